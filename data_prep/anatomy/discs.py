"""A pair of neighbouring vertebral bodies → one disc volume (paper, Sect. 4, "Disc volume extraction").

The four corners that face each other across a disc define it: the mean direction of their endplates becomes horizontal,
their mean the centre, and the endplates' mean length half of the paper's 224 columns. Slices are not resampled, but
thin ones are averaged into slabs. That is done here, disc by disc, so that each disc's middle slab is centred on that
disc's own middle, and so that bodies are located in the scan as it is.
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

# The paper's scans have slices of 2.6 to 6.0 mm, so its nine span 23 to 54 mm. Nine of 0.9 mm would span 8 mm.
SLAB_MM, THIN_MM = 4.0, 2.5
SLICES = {"slabs": f"averaged to about {SLAB_MM:g} mm where less than {THIN_MM:g} mm apart", "native": "native"}
"""What a manifest says of the slices, by the option that was given."""

_MIN_MEDIAN = 1e-3  # minimum median, as a fraction of the disc's brightest pixel
WIDTH_MM = (15, 70)
HEIGHT_MM = (-3, 35)  # an edge fitted to a collapsed disc may cross its neighbour a little
_TO_WIDTH = 0.75  # height, and slip, up to 0.51 and 0.3 in SPIDER; where a vertebra or a part of it is missing about 1


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
    native_slices: bool = False,
    notes: list[str] | None = None,
) -> list[DiscVolume]:
    """Cut out the disc between every two neighbouring bodies.

    Args:
        scan, bodies: in any units, and in any order.
        regions: SPIDER's labels on the scan's grid, without posterior elements (`body_labels`).
        lesions: on the scan's grid. Bit t is set where the evidence for task t is. Of a slab, regions and lesions are
            those of its middle slice.
        per_disc: scale a disc by one median over all of its slices. By default each slice has its own, as in the
            paper, which evens out the fall of a surface coil's gain from slice to slice.
        native_slices: keep thin slices as they are, instead of averaging them (`slices_per_slab`).
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
    per_slab = 1 if native_slices else slices_per_slab(scan)
    discs, faults = [], []
    for upper, lower in (level.split("-") for level in LEVELS):
        if upper in by_name and lower in by_name:
            try:
                discs.append(_extract(scan, by_name[upper], by_name[lower], regions, lesions, per_disc, per_slab))
            except SpinejaxError as error:
                faults.append(error)
    if faults and (notes is None or not discs):
        raise faults[0]
    if notes is not None:
        notes += [f"left out: {fault}" for fault in faults]
    return discs


def slices_per_slab(scan: Scan) -> int:
    """The number of neighbouring slices that are averaged into one slice of a disc volume.

    It is 1 from 2.5 mm on. Thinner slices are averaged to what comes closest to 4 mm, 3.2 mm or more, so that the
    network's nine span at least 28 mm.
    """
    slice_mm = float(scan.spacing_mm[2])
    if slice_mm > THIN_MM - 0.005:  # spacings are rounded in files
        return 1
    return min(round(SLAB_MM / slice_mm), scan.voxels.shape[2])


def _extract(
    scan: Scan,
    upper: VertebralBody,
    lower: VertebralBody,
    regions: Scan | None,
    lesions: Scan | None,
    per_disc: bool,
    per_slab: int,
) -> DiscVolume:
    level = f"{upper.name}-{lower.name}"
    where = f"{scan.name}, {level}"
    to_scan = _disc_to_scan(scan, upper, lower, per_slab, where)
    num_slices = scan.voxels.shape[2]
    # The first slice of each slot's slab; outside the scan it is negative or too high.
    starts = np.rint(to_scan[2, 3] - (per_slab - 1) / 2).astype(int) + per_slab * np.arange(VOLUME_SHAPE[2])
    seen = (starts + per_slab).clip(0, num_slices) - starts.clip(0, num_slices)
    slots = np.flatnonzero(2 * seen >= per_slab)  # the scan has at least half of their slices
    first, stop = int(slots[0]), int(slots[-1]) + 1

    medians = _body_medians(scan, upper, lower, starts[slots], per_slab, where)
    if per_disc:
        medians = np.full_like(medians, np.median(medians))
    volume = np.zeros(VOLUME_SHAPE, np.uint16)
    for slot, median in zip(slots, medians, strict=True):
        values = _linear(scan.voxels[:, :, max(starts[slot], 0) : starts[slot] + per_slab], to_scan)
        # A scale derived from a few grey levels would amplify noise to tissue.
        if not median > _MIN_MEDIAN * values.max():
            raise SpinejaxError(
                f"{where}: in slice {starts[slot] + per_slab // 2} the median of the vertebral bodies is {median:.3g}, "
                "too dark to normalise to. Correct the corners or leave the slice out."
            )
        volume[:, :, slot] = np.rint((values * (BODY_INTENSITY * INTENSITY_ONE / median)).clip(0, INTENSITY_ONE))

    # All slices share one affine, so indexing is five times as fast as scipy's affine_transform of order 0.
    row, column = np.rint(np.tensordot(to_scan[:2, :2], np.indices(VOLUME_SHAPE[:2]), 1) + to_scan[:2, 3, None, None])
    inside = (row >= 0) & (row < scan.voxels.shape[0]) & (column >= 0) & (column < scan.voxels.shape[1])

    def nearest(voxels: np.ndarray) -> np.ndarray:
        found = np.zeros(VOLUME_SHAPE, voxels.dtype)
        middles = (starts[slots] + per_slab // 2).clip(0, num_slices - 1)
        pixels = voxels[row[inside].astype(int), column[inside].astype(int)]
        found[inside, first:stop] = pixels[:, middles]
        return found

    region = None if regions is None else _parts(nearest(regions.voxels), upper.name)
    lesion = None if lesions is None else nearest(lesions.voxels)
    return DiscVolume(level, volume, scan.affine @ to_scan, (first, stop), region, lesion)


def _disc_to_scan(
    scan: Scan, upper: VertebralBody, lower: VertebralBody, per_slab: int, where: str
) -> Float[np.ndarray, "4 4"]:
    """(row, column, slice, 1) of the disc volume → (row, column, slice, 1) of the scan.

    Angles and lengths are in mm, because the spacings of a scan's rows and columns may differ. A slab lies where the
    middle of its slices is, which is halfway between two if their number is even.
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
    highest_mm = min(HEIGHT_MM[1], _TO_WIDTH * width_mm)
    if not (WIDTH_MM[0] <= width_mm <= WIDTH_MM[1] and HEIGHT_MM[0] <= height_mm <= highest_mm):
        raise SpinejaxError(
            f"{where}: its corners span {width_mm:.1f} mm front to back and {height_mm:.1f} mm top to bottom; expected "
            f"{WIDTH_MM[0]} to {WIDTH_MM[1]} and {HEIGHT_MM[0]} to {highest_mm:.0f}. Correct the mask or the corners."
        )
    slip_mm = abs((corners[2:].mean(0) - corners[:2].mean(0)) @ back)
    if slip_mm > _TO_WIDTH * width_mm:
        raise SpinejaxError(f"{where}: one body is {slip_mm:.0f} mm behind the other. Correct the mask or the corners.")

    pixel_mm = 2 * width_mm / WINDOW_SHAPE[1]
    in_plane = np.stack([down, back], axis=1) * pixel_mm / spacing[:, None]
    centre = (np.array(VOLUME_SHAPE[:2]) - 1) / 2
    to_scan = np.eye(4)
    to_scan[:2, :2] = in_plane
    to_scan[:2, 3] = corners.mean(0) / spacing - in_plane @ centre
    middle = (upper.mid_slice + lower.mid_slice) / 2
    if not 0 <= (nearest := int(np.floor(middle + 0.5))) < scan.voxels.shape[2]:
        raise SpinejaxError(f"{where}: its middle slice is {nearest}, the scan has {scan.voxels.shape[2]} slices.")
    reach = (per_slab - 1) / 2  # from a slab's first slice to its middle
    to_scan[2, 2] = per_slab
    to_scan[2, 3] = np.floor(middle - reach + 0.5) + reach - per_slab * (VOLUME_SHAPE[2] // 2)
    return to_scan


def _linear(planes: np.ndarray, to_scan: np.ndarray) -> Shaped[np.ndarray, "192 320"]:
    """The mean of some slices of a scan at the disc's pixels, interpolated; zero outside.

    Only the part of the slices that the disc covers is read. If the disc's pixels are further apart than the scan's,
    the scan is smoothed first, or fine structures would alias.
    """
    matrix, offset = to_scan[:2, :2], to_scan[:2, 3]
    outline = offset + np.array([*np.ndindex(2, 2)]) * (np.array(VOLUME_SHAPE[:2]) - 1) @ matrix.T
    low = np.clip(np.floor(outline.min(0)).astype(int) - 4, 0, planes.shape[:2])
    high = np.clip(np.ceil(outline.max(0)).astype(int) + 5, 0, planes.shape[:2])
    if (high <= low).any():
        return np.zeros(VOLUME_SHAPE[:2], planes.dtype)
    crop = planes[low[0] : high[0], low[1] : high[1]].mean(2)
    coarseness = np.linalg.norm(matrix, axis=1)  # scan pixels per disc pixel, along the scan's rows and columns
    if coarseness.max() > 1:
        crop = ndimage.gaussian_filter(crop, 0.5 * np.sqrt(np.maximum(coarseness**2 - 1, 0)), mode="nearest")
    return ndimage.affine_transform(crop, matrix, offset - low, VOLUME_SHAPE[:2], order=1, mode="constant")


def _body_medians(
    scan: Scan, upper: VertebralBody, lower: VertebralBody, starts: np.ndarray, per_slab: int, where: str
) -> Shaped[np.ndarray, "n"]:
    """The median over the two bodies in each of these slabs, given by their first slices.

    A slab of which a slice lacks a body takes the median of the nearest slices that have both. A body with unknown
    corners (the sacrum, a body at the edge of the image) is not used.
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
    voxels = scan.voxels[inside]
    nearest = starts.clip(first, max(first, stop - per_slab))
    slabs = np.stack([voxels[:, start : min(start + per_slab, stop)].mean(1) for start in nearest], axis=1)
    return np.median(slabs, axis=0)


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
