"""A pair of neighbouring vertebral bodies → one disc volume (paper, Sect. 4, "Disc volume extraction").

The four corners that face each other across a disc define it: the mean direction of their endplates becomes horizontal,
their mean the centre, and the endplates' mean length half of the paper's 224 columns. Slices are not resampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Float, Shaped, UInt8, UInt16
from scipy import ndimage

from data_prep.anatomy.vertebrae import SACRUM, SPIDER_VERTEBRAE, VertebralBody
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.tasks import LEVELS

BODY_INTENSITY = 0.5  # the median over a disc's two vertebral bodies is mapped to this, in every slice
PREPROCESSING = {"interpolation": "linear", "width_px": WINDOW_SHAPE[1] // 2, "median_of_bodies": BODY_INTENSITY}

_MIN_MEDIAN = 1e-3  # minimum median, as a fraction of the disc's brightest pixel
_WIDTH_MM = (15, 70)
_HEIGHT_MM = (-3, 35)  # an edge fitted to a collapsed disc may cross its neighbour a little


@dataclass(frozen=True, eq=False)
class DiscVolume:
    """One disc, cut out of a scan; `spinejax.data.shards` gives the fields' meaning and units."""

    level: str
    volume: UInt16[np.ndarray, "192 320 15"]
    affine: Float[np.ndarray, "4 4"]
    slices: tuple[int, int]
    region: UInt8[np.ndarray, "192 320 15"] | None = None
    lesion: UInt16[np.ndarray, "192 320 15"] | None = None


def extract_discs(
    scan: Scan,
    bodies: Sequence[VertebralBody],
    *,
    regions: Scan | None = None,
    lesions: Scan | None = None,
    per_disc: bool = False,
    notes: list[str] | None = None,
) -> list[DiscVolume]:
    """Cut out the disc between every two neighbouring bodies.

    Args:
        scan, bodies: in any units, and in any order.
        regions: SPIDER's labels on the scan's grid, without posterior elements (`body_labels`).
        lesions: on the scan's grid. Bit t is set where the evidence for task t is.
        per_disc: scale a disc by one median over all of its slices. By default each slice has its own, as in the
            paper, which evens out the fall of a surface coil's gain from slice to slice.
        notes: a level that cannot be cut out is noted here, so the scan's other discs are not lost. Without it, or if
            no level can be cut out, the first fault is raised.

    Returns:
        One disc volume for each level, from the top down. Voxels outside the scan are zero.

    Raises:
        SpinejaxError: two bodies share a name; corners that cannot be a disc's; two bodies without a common slice; a
            slice with black vertebral bodies, so that its intensities have no scale.
    """
    by_name = {body.name: body for body in bodies}
    if len(by_name) != len(bodies):
        raise SpinejaxError(
            f"{scan.name}: two vertebral bodies have the same name among {[body.name for body in bodies]}."
        )
    discs, faults = [], []
    for upper, lower in (level.split("-") for level in LEVELS):
        if upper in by_name and lower in by_name:
            try:
                discs.append(_extract(scan, by_name[upper], by_name[lower], regions, lesions, per_disc))
            except SpinejaxError as error:
                faults.append(error)
    if faults and (notes is None or not discs):
        raise faults[0]
    if notes is not None:
        notes += [f"left out: {fault}" for fault in faults]
    return discs


def _extract(
    scan: Scan, upper: VertebralBody, lower: VertebralBody, regions: Scan | None, lesions: Scan | None, per_disc: bool
) -> DiscVolume:
    level = f"{upper.name}-{lower.name}"
    where = f"{scan.name}, {level}"
    to_scan = _disc_to_scan(scan, upper, lower, where)
    start = round(to_scan[2, 3])  # the slice that slot 0 shows; negative where the scan begins later
    first, stop = max(0, -start), min(VOLUME_SHAPE[2], scan.voxels.shape[2] - start)

    medians = _body_medians(scan, upper, lower, np.arange(start + first, start + stop), where)
    if per_disc:
        medians = np.full_like(medians, np.median(medians))
    volume = np.zeros(VOLUME_SHAPE, np.uint16)
    for slot, median in zip(range(first, stop), medians, strict=True):
        values = _linear(scan.voxels[:, :, start + slot], to_scan)
        # A scale derived from a few grey levels would amplify noise to tissue.
        if not median > _MIN_MEDIAN * values.max():
            raise SpinejaxError(
                f"{where}: in slice {start + slot} the median of the vertebral bodies is {median:.3g}, too dark to "
                "normalise to. Correct the corners or leave the slice out."
            )
        volume[:, :, slot] = np.rint((values * (BODY_INTENSITY * INTENSITY_ONE / median)).clip(0, INTENSITY_ONE))

    # All slices share one affine, so indexing is five times as fast as scipy's affine_transform of order 0.
    row, column = np.rint(np.tensordot(to_scan[:2, :2], np.indices(VOLUME_SHAPE[:2]), 1) + to_scan[:2, 3, None, None])
    inside = (row >= 0) & (row < scan.voxels.shape[0]) & (column >= 0) & (column < scan.voxels.shape[1])

    def nearest(voxels: np.ndarray) -> np.ndarray:
        found = np.zeros(VOLUME_SHAPE, voxels.dtype)
        slices = slice(start + first, start + stop)
        found[inside, first:stop] = voxels[row[inside].astype(int), column[inside].astype(int), slices]
        return found

    region = None if regions is None else _parts(nearest(regions.voxels), upper.name)
    lesion = None if lesions is None else nearest(lesions.voxels)
    return DiscVolume(level, volume, scan.affine @ to_scan, (first, stop), region, lesion)


def _disc_to_scan(scan: Scan, upper: VertebralBody, lower: VertebralBody, where: str) -> Float[np.ndarray, "4 4"]:
    """(row, column, slice, 1) of the disc volume → (row, column, slice, 1) of the scan.

    Angles and lengths are in mm, because the spacings of a scan's rows and columns may differ.
    """
    spacing = scan.spacing_mm[:2]
    upper_posterior, upper_anterior = upper.corners[2:] * spacing
    lower_anterior, lower_posterior = lower.corners[:2] * spacing
    corners = np.stack([upper_anterior, upper_posterior, lower_anterior, lower_posterior])
    if not np.isfinite(corners).all():
        raise SpinejaxError(f"{where}: a corner beside the disc is not known. Give all four, or leave the level out.")
    endplates = np.stack([upper_posterior - upper_anterior, lower_posterior - lower_anterior])
    lengths_mm = np.linalg.norm(endplates, axis=1)
    width_mm = lengths_mm.mean()
    back = (endplates / np.maximum(lengths_mm, 1e-9)[:, None]).sum(0)
    back /= max(np.linalg.norm(back), 1e-9)
    down = np.array([back[1], -back[0]])
    height_mm = (corners[2:].mean(0) - corners[:2].mean(0)) @ down
    if not (_WIDTH_MM[0] <= width_mm <= _WIDTH_MM[1] and _HEIGHT_MM[0] <= height_mm <= _HEIGHT_MM[1]):
        raise SpinejaxError(
            f"{where}: its corners span {width_mm:.1f} mm front to back and {height_mm:.1f} mm top to bottom; expected "
            f"{_WIDTH_MM[0]} to {_WIDTH_MM[1]} and {_HEIGHT_MM[0]} to {_HEIGHT_MM[1]}. Correct the mask or the corners."
        )

    pixel_mm = 2 * width_mm / WINDOW_SHAPE[1]
    in_plane = np.stack([down, back], axis=1) * pixel_mm / spacing[:, None]
    centre = (np.array(VOLUME_SHAPE[:2]) - 1) / 2
    to_scan = np.eye(4)
    to_scan[:2, :2] = in_plane
    to_scan[:2, 3] = corners.mean(0) / spacing - in_plane @ centre
    middle = int(np.floor((upper.mid_slice + lower.mid_slice) / 2 + 0.5))
    if not 0 <= middle < scan.voxels.shape[2]:
        raise SpinejaxError(f"{where}: its middle slice is {middle}, the scan has {scan.voxels.shape[2]} slices.")
    to_scan[2, 3] = middle - VOLUME_SHAPE[2] // 2
    return to_scan


def _linear(plane: np.ndarray, to_scan: np.ndarray) -> Shaped[np.ndarray, "192 320"]:
    """One slice of a scan at the disc's pixels, interpolated; zero outside.

    Only the part of the slice that the disc covers is read. If the disc's pixels are further apart than the scan's, the
    scan is smoothed first, or fine structures would alias.
    """
    matrix, offset = to_scan[:2, :2], to_scan[:2, 3]
    outline = offset + np.array([*np.ndindex(2, 2)]) * (np.array(VOLUME_SHAPE[:2]) - 1) @ matrix.T
    low = np.clip(np.floor(outline.min(0)).astype(int) - 4, 0, plane.shape)
    high = np.clip(np.ceil(outline.max(0)).astype(int) + 5, 0, plane.shape)
    if (high <= low).any():
        return np.zeros(VOLUME_SHAPE[:2], plane.dtype)
    crop = np.ascontiguousarray(plane[low[0] : high[0], low[1] : high[1]])
    coarseness = np.linalg.norm(matrix, axis=1)  # scan pixels per disc pixel, along the scan's rows and columns
    if coarseness.max() > 1:
        crop = ndimage.gaussian_filter(crop, 0.5 * np.sqrt(np.maximum(coarseness**2 - 1, 0)), mode="nearest")
    return ndimage.affine_transform(crop, matrix, offset - low, VOLUME_SHAPE[:2], order=1, mode="constant")


def _body_medians(
    scan: Scan, upper: VertebralBody, lower: VertebralBody, indices: np.ndarray, where: str
) -> Shaped[np.ndarray, "n"]:
    """The median over the two bodies in each of these slices.

    A slice without both bodies takes the median of the nearest that has both. A body with unknown corners (the sacrum,
    a body at the edge of the image) is not used.
    """
    bodies = [body for body in (upper, lower) if np.isfinite(body.corners).all()]
    if not bodies:
        raise SpinejaxError(f"{where}: neither vertebral body has all four corners, so intensities have no scale.")
    first = max(upper.slices[0], lower.slices[0], 0)
    stop = min(upper.slices[1], lower.slices[1], scan.voxels.shape[2])
    if first >= stop:
        raise SpinejaxError(f"{where}: the two vertebral bodies have no slice of the scan in common.")
    rows, columns = np.indices(scan.voxels.shape[:2])
    inside = np.any([shapely.intersects_xy(shapely.Polygon(body.corners), rows, columns) for body in bodies], axis=0)
    if not inside.any():
        raise SpinejaxError(f"{where}: its vertebral bodies are outside the scan. Correct the corners.")
    nearest = indices.clip(first, stop - 1)
    return np.median(scan.voxels[inside][:, nearest], axis=0)


def _parts(labels: np.ndarray, upper: str) -> np.ndarray:
    """SPIDER's labels → 1 upper vertebral body, 2 disc, 3 lower vertebral body, 0 everything else."""
    vertebra = SPIDER_VERTEBRAE[upper]
    part = np.zeros(256, np.uint8)
    part[[vertebra, 100 + vertebra]] = 1
    part[200 + vertebra] = 2
    part[[vertebra - 1, 99 + vertebra] if vertebra > 1 else SACRUM] = 3
    return part[labels]


def window_in_scan(scan: Scan, affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 2"]:
    """The corners of the network's window of a disc, (row, column) of the scan; `affine` is that of the disc volume."""
    low = (np.array(VOLUME_SHAPE[:2]) - WINDOW_SHAPE[:2]) / 2 - 0.5
    corners = low + np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) * WINDOW_SHAPE[:2]
    points = np.c_[corners, np.full(4, VOLUME_SHAPE[2] // 2), np.ones(4)]
    return (points @ (np.linalg.inv(scan.affine) @ affine).T)[:, :2]
