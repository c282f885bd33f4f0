"""A pair of neighbouring vertebral bodies → one disc volume (paper, Sect. 4, "Disc volume extraction").

The four corners that face each other across a disc define it: their endplates' mean direction becomes horizontal, their
mean the centre, and the endplates' mean length half of the paper's 224 columns. Slices stay the scan's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_prep.anatomy.vertebrae import SACRUM, SPIDER_VERTEBRAE, VertebralBody
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.tasks import LEVELS

BODY_INTENSITY = 0.5
"""What the median over a disc's two vertebral bodies becomes, in every slice."""

PREPROCESSING = {"interpolation": "linear", "width_px": WINDOW_SHAPE[1] // 2, "median_of_bodies": BODY_INTENSITY}

_LEAST_MEDIAN = 1e-3  # of the brightest pixel around
_WIDTH_MM = (15, 70)
_HEIGHT_MM = (-3, 35)  # an edge fitted to a collapsed disc may cross its neighbour by a little


@dataclass(frozen=True, eq=False)
class DiscVolume:
    """One disc, cut out of a scan; `spinejax.shards` gives the fields' shapes and units."""

    level: str
    volume: np.ndarray
    affine: np.ndarray
    slices: tuple[int, int]
    region: np.ndarray | None = None
    lesion: np.ndarray | None = None


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
        scan: float32[H, W, S], arbitrary units.
        bodies: in any order, each name at most once.
        regions: integer[H, W, S] on the scan's grid, SPIDER's labels, without posterior elements (`body_labels`).
        lesions: uint16[H, W, S] on the scan's grid. Bit t is set where the evidence for task t lies.
        per_disc: scale a disc by one median over all of its slices. By default each slice has its own, as in the
            paper, which evens out the fall of a surface coil's gain from slice to slice.
        notes: where it is noted that a level cannot be cut out, so that the scan's other discs are not lost with it.
            Without it, and if no level can, the first fault is raised.

    Returns:
        A disc volume a level, from the top down. Voxels outside the scan are zero.

    Raises:
        SpinejaxError: two bodies of one name; corners that cannot be a disc's; two bodies without a common slice; a
            slice whose vertebral bodies are black, so that its intensities have no scale.
    """
    by_name = {body.name: body for body in bodies}
    if len(by_name) != len(bodies):
        raise SpinejaxError(f"{scan.name}: two vertebral bodies have one name among {[body.name for body in bodies]}.")
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
        # A scale that rests on a few grey levels would blow noise up to tissue.
        if not median > _LEAST_MEDIAN * values.max():
            raise SpinejaxError(
                f"{where}: in slice {start + slot} the median of the vertebral bodies is {median:.3g}, too dark to "
                "normalise to. Correct the corners or leave the slice out."
            )
        volume[:, :, slot] = np.rint((values * (BODY_INTENSITY * INTENSITY_ONE / median)).clip(0, INTENSITY_ONE))

    def mask(labels: Scan, dtype) -> np.ndarray:
        resampled = np.zeros(VOLUME_SHAPE, dtype)
        resampled[:, :, first:stop] = _nearest(labels.voxels[:, :, start + first : start + stop], to_scan)
        return resampled

    region = None if regions is None else _parts(mask(regions, np.uint8), upper.name)
    lesion = None if lesions is None else mask(lesions, np.uint16)
    return DiscVolume(level, volume, scan.affine @ to_scan, (first, stop), region, lesion)


def _disc_to_scan(scan: Scan, upper: VertebralBody, lower: VertebralBody, where: str) -> np.ndarray:
    """float64[4, 4]. (row, column, slice, 1) of the disc volume → (row, column, slice, 1) of the scan.

    Angles and lengths are taken in mm, because a scan's rows and columns may be spaced unequally.
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
    to_scan[2, 3] = _mid_sagittal(scan, upper, lower, where) - VOLUME_SHAPE[2] // 2
    return to_scan


def _mid_sagittal(scan: Scan, upper: VertebralBody, lower: VertebralBody, where: str) -> int:
    middle = int(np.floor((upper.mid_slice + lower.mid_slice) / 2 + 0.5))
    if not 0 <= middle < scan.voxels.shape[2]:
        raise SpinejaxError(f"{where}: its middle slice is {middle}, the scan has {scan.voxels.shape[2]} slices.")
    return middle


def _linear(plane: np.ndarray, to_scan: np.ndarray) -> np.ndarray:
    """[192, 320]. One slice of a scan at the disc's pixels, interpolated; zero outside.

    Only the part of the slice that the disc reaches is touched. Where the disc's pixels lie further apart than the
    scan's, the scan is smoothed first, or fine structures would alias.
    """
    matrix, offset = to_scan[:2, :2], to_scan[:2, 3]
    rows, columns = VOLUME_SHAPE[:2]
    outline = offset + np.array([[0, 0], [0, columns - 1], [rows - 1, 0], [rows - 1, columns - 1]]) @ matrix.T
    low = np.clip(np.floor(outline.min(0)).astype(int) - 4, 0, plane.shape)
    high = np.clip(np.ceil(outline.max(0)).astype(int) + 5, 0, plane.shape)
    if (high <= low).any():
        return np.zeros(VOLUME_SHAPE[:2], plane.dtype)
    crop = np.ascontiguousarray(plane[low[0] : high[0], low[1] : high[1]])
    coarseness = np.linalg.norm(matrix, axis=1)  # scan pixels a disc pixel, along the scan's rows and columns
    if coarseness.max() > 1:
        crop = ndimage.gaussian_filter(crop, 0.5 * np.sqrt(np.maximum(coarseness**2 - 1, 0)), mode="nearest")
    return ndimage.affine_transform(crop, matrix, offset - low, VOLUME_SHAPE[:2], order=1, mode="constant")


def _nearest(labels: np.ndarray, to_scan: np.ndarray) -> np.ndarray:
    """[192, 320, S]. The labels of the scan pixels nearest to the disc's, in every slice; zero outside."""
    pixels = np.indices(VOLUME_SHAPE[:2])
    place = np.tensordot(to_scan[:2, :2], pixels, 1) + to_scan[:2, 3, None, None]
    row, column = np.rint(place).astype(int)
    inside = (row >= 0) & (row < labels.shape[0]) & (column >= 0) & (column < labels.shape[1])
    found = np.zeros((*VOLUME_SHAPE[:2], labels.shape[2]), labels.dtype)
    found[inside] = labels[row[inside], column[inside]]
    return found


def _body_medians(
    scan: Scan, upper: VertebralBody, lower: VertebralBody, indices: np.ndarray, where: str
) -> np.ndarray:
    """float64[len(indices)]. The median over the two bodies in each of these slices.

    A slice that misses a body takes the median of the nearest that has both. A body of which only the corners beside
    the disc are known (the sacrum, a body at the edge of the image) is left to the other one.
    """
    bodies = [body for body in (upper, lower) if np.isfinite(body.corners).all()]
    if not bodies:
        raise SpinejaxError(f"{where}: neither vertebral body has all four corners, so intensities have no scale.")
    first = max(upper.slices[0], lower.slices[0], 0)
    stop = min(upper.slices[1], lower.slices[1], scan.voxels.shape[2])
    if first >= stop:
        raise SpinejaxError(f"{where}: the two vertebral bodies have no slice of the scan in common.")
    rows, columns = np.concatenate([_inside(body.corners, scan.voxels.shape[:2]) for body in bodies], axis=1)
    if not len(rows):
        raise SpinejaxError(f"{where}: its vertebral bodies lie outside the scan. Correct the corners.")
    nearest = indices.clip(first, stop - 1)
    return np.median(scan.voxels[rows[:, None], columns[:, None], nearest], axis=0)


def _inside(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """int[2, N]. Pixels inside a convex polygon whose corners run clockwise on the screen."""
    low = np.clip(np.floor(corners.min(0)).astype(int), 0, shape)
    high = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, shape)
    pixels = np.mgrid[low[0] : high[0], low[1] : high[1]].reshape(2, -1)
    inside = np.ones(pixels.shape[1], bool)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, to_pixel = end - start, pixels - start[:, None]
        inside &= edge[1] * to_pixel[0] - edge[0] * to_pixel[1] >= 0
    return pixels[:, inside]


def _parts(labels: np.ndarray, upper: str) -> np.ndarray:
    """uint8. SPIDER's labels → 1 upper vertebral body, 2 disc, 3 lower vertebral body, 0 all else."""
    vertebra = SPIDER_VERTEBRAE[upper]
    part = np.zeros(256, np.uint8)
    part[[vertebra, 100 + vertebra]] = 1
    part[200 + vertebra] = 2
    part[[vertebra - 1, 99 + vertebra] if vertebra > 1 else SACRUM] = 3
    return part[labels]
