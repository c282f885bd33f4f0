"""Training truth: slices of scans with masks, and where in each slice the bodies' corners and centres are."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_prep.anatomy.vertebrae import (
    CANAL,
    DISC_BELOW,
    LAST_VERTEBRA,
    VertebralBody,
    bodies_from_spider_mask,
    body_labels,
)
from data_prep.detector.grid import normalise, resample
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

NUM_DEVELOPMENT = 6

SOURCE_MM = 1.0
"""Pixel of stored slices: finer than the network's, so that augmentation may enlarge them."""

NOTHING, BODY, SACRUM, DOUBTFUL = range(4)
"""Kinds of keypoint. A doubtful one is neither right nor wrong: the loss leaves its surroundings out."""

MAX_POINTS = 16

_INTO_SACRUM_MM = 10.0  # from the middle of its upper plate to what stands for S1's centre
_HALF_HEIGHT = 0.38  # of an endplate's length: the half height of a body of which only the lower plate is in view
_SUBSTANTIAL = 0.7


def development_patients(patients: Iterable[str]) -> list[str]:
    """The six patients that never train: those whose ids have the smallest SHA-256."""
    return sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).hexdigest())[:NUM_DEVELOPMENT]


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice with its truth.

    Args:
        image: float32[h, w], normalised, `SOURCE_MM` a pixel.
        tissue: uint8[h, w]. 0 other, 1 vertebra, 2 disc, 3 canal: what random contrasts go by.
        kinds: int[K]. Of each keypoint.
        centres: float32[K, 2]. (row, column) in pixels.
        corners: float32[K, 4, 2]. As `VertebralBody.corners`; NaN where not known.
    """

    image: np.ndarray
    tissue: np.ndarray
    kinds: np.ndarray
    centres: np.ndarray
    corners: np.ndarray


def slices_with_truth(scan: Scan, mask: Scan, indices: Iterable[int] | None = None) -> list[Slice]:
    """The slices of a scan in which bodies can be told from its mask.

    Args:
        scan: the voxels.
        mask: on the same grid, by SPIDER's labels.
        indices: which slices; all if not given. A slice whose mask shows fewer than two bodies is left out.
    """
    labels = body_labels(mask)
    areas = {label: (labels == label).sum((0, 1)) for label in range(1, LAST_VERTEBRA + 1) if (labels == label).any()}
    made = []
    for index in range(mask.voxels.shape[2]) if indices is None else indices:
        plane = _with_canal(labels, mask.voxels == CANAL, index)
        whole = {label for label, area in areas.items() if area[index] >= _SUBSTANTIAL * area.max()}
        one = Scan(plane[:, :, None], mask.affine, mask.name)
        try:
            bodies, _ = bodies_from_spider_mask(one)
        except SpinejaxError:
            continue
        made.append(_slice(scan, mask, plane, bodies, whole, index))
    return made


def _with_canal(labels: np.ndarray, canal: np.ndarray, index: int) -> np.ndarray:
    """A slice's labels, with the nearest slice's canal where it shows none: bodies were told from arches before."""
    plane = labels[:, :, index].copy()
    slices = np.flatnonzero(canal.any((0, 1)))
    nearest = canal[:, :, slices[np.argmin(abs(slices - index))]]
    plane[nearest & (plane == 0)] = CANAL
    return plane


def _slice(
    scan: Scan, mask: Scan, plane: np.ndarray, bodies: list[VertebralBody], whole: set[int], index: int
) -> Slice:
    from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE

    spacing = scan.spacing_mm[:2]
    points = []
    told = set()
    for body in bodies:
        corners = body.corners * spacing
        centre = centre_of(corners)
        label = SPIDER_VERTEBRAE.get(body.name, 0)
        told.add(label)
        kind = SACRUM if body.name == "S1" else BODY if label in whole else DOUBTFUL
        points.append((kind, centre, corners))
    for label in np.unique(plane):
        if 0 < label <= LAST_VERTEBRA and label not in told:
            points.append((DOUBTFUL, np.argwhere(plane == label).mean(0) * spacing, np.full((4, 2), np.nan)))
    points += _above(points)
    kinds = np.zeros(MAX_POINTS, np.int32)
    centres, corners = np.full((MAX_POINTS, 2), -1e3, np.float32), np.full((MAX_POINTS, 4, 2), np.nan, np.float32)
    for place, (kind, centre, four) in enumerate(points[:MAX_POINTS]):
        kinds[place], centres[place], corners[place] = kind, centre / SOURCE_MM, four / SOURCE_MM
    labelled = mask.voxels[:, :, index]
    groups = ((labelled > 0) & (labelled <= LAST_VERTEBRA), labelled > DISC_BELOW, labelled == CANAL)
    tissue = sum(number * group.astype(np.uint8) for number, group in enumerate(groups, start=1))
    step = SOURCE_MM / spacing
    image = normalise(resample(scan.voxels[:, :, index], spacing, SOURCE_MM))
    tissue = ndimage.affine_transform(tissue, step, output_shape=image.shape, order=0, mode="nearest")
    return Slice(image, tissue, kinds, centres, corners)


def centre_of(corners: np.ndarray) -> np.ndarray:
    """What stands for the centre of a body: the mean of its corners in mm, or of where they would be.

    Of a body with upper corners only (the sacrum), a place below their middle; with lower ones only, one above.
    """
    if np.isfinite(corners).all():
        return corners.mean(0)
    upper = np.isfinite(corners[:2]).all()
    front, back = corners[:2] if upper else corners[[3, 2]]
    along = back - front
    down = np.array([along[1], -along[0]])
    if upper:
        return (front + back) / 2 + _INTO_SACRUM_MM * down / np.linalg.norm(down)
    return (front + back) / 2 - _HALF_HEIGHT * down


def _above(points: list) -> list:
    """Doubtful places where two more bodies may be in view, unlabelled, above the topmost that is."""
    column = sorted((tuple(centre) for kind, centre, _ in points if kind != SACRUM), key=lambda centre: centre[0])
    if len(column) < 2:
        return []
    top, next_one = np.array(column[0]), np.array(column[1])
    nowhere = np.full((4, 2), np.nan)
    return [(DOUBTFUL, top + step * (top - next_one), nowhere) for step in (0.9, 1.8)]
