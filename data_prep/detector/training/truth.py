"""Training truth: slices of scans with masks, and the corners and centres of the bodies in each."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Integer, UInt8
from scipy import ndimage

from data_prep.anatomy.vertebrae import (
    CANAL,
    DISC_BELOW,
    LAST_VERTEBRA,
    SPIDER_VERTEBRAE,
    VertebralBody,
    bodies_from_spider_mask,
    body_labels,
)
from data_prep.detector.grid import with_neighbours
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

MAX_POINTS = 16
SOURCE_MM = 1.0  # pixel of stored slices: finer than the network's, so that augmentation may enlarge them
NOTHING, BODY, SACRUM, DOUBTFUL = range(4)  # kinds of keypoint; the loss ignores the surroundings of a doubtful one

_INTO_SACRUM_MM = 10.0  # from the middle of its upper endplate to the point that serves as S1's centre
_HALF_HEIGHT = 0.38  # half a body's height per endplate length, used if only its lower endplate is in view
_SUBSTANTIAL = 0.7
UNKNOWN = np.full((4, 2), np.nan)

Point = tuple[int, Float[np.ndarray, "2"], Float[np.ndarray, "4 2"]]  # a keypoint's kind, centre and corners, in mm


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice, `SOURCE_MM` a pixel, with its keypoints."""

    image: Float32[np.ndarray, "h w 3"]  # normalised, between its neighbours, as `grid.with_neighbours` gives it
    tissue: UInt8[np.ndarray, "h w"]  # 0 other, 1 vertebra, 2 disc, 3 canal: random contrasts depend on it
    kinds: Int32[np.ndarray, "K"]
    centres: Float32[np.ndarray, "K 2"]  # (row, column) in pixels
    corners: Float32[np.ndarray, "K 4 2"]  # as `VertebralBody.corners`; NaN where not known


def slices_with_truth(scan: Scan, mask: Scan, indices: Iterable[int] | None = None) -> list[Slice]:
    """The slices, all or those given, in which a SPIDER mask on the scan's grid shows two bodies or more."""
    labels = body_labels(mask)
    areas = {label: (labels == label).sum((0, 1)) for label in range(1, LAST_VERTEBRA + 1) if (labels == label).any()}
    made = []
    for index in range(mask.voxels.shape[2]) if indices is None else indices:
        plane = _with_canal(labels, mask.voxels == CANAL, index)
        whole = {label for label, area in areas.items() if area[index] >= _SUBSTANTIAL * area.max()}
        try:
            bodies, _ = bodies_from_spider_mask(Scan(plane[:, :, None], mask.affine, mask.name))
        except SpinejaxError:
            continue
        points = _keypoints(plane, bodies, whole, scan.spacing_mm[:2])
        made.append(slice_with(scan, index, points, mask.voxels[:, :, index]))
    return made


def _with_canal(labels: np.ndarray, canal: Bool[np.ndarray, "H W S"], index: int) -> np.ndarray:
    """A slice's labels, with the nearest slice's canal if it has none: posterior elements are removed already."""
    plane = labels[:, :, index].copy()
    slices = np.flatnonzero(canal.any((0, 1)))
    nearest = canal[:, :, slices[np.argmin(abs(slices - index))]]
    plane[nearest & (plane == 0)] = CANAL
    return plane


def _keypoints(plane: np.ndarray, bodies: list[VertebralBody], whole: set[int], spacing: np.ndarray) -> list[Point]:
    """Kind, centre and corners, in mm, of each vertebra in a slice. `whole` are the labels shown in full."""
    points = []
    labels = [SPIDER_VERTEBRAE.get(body.name, 0) for body in bodies]
    for body, label in zip(bodies, labels, strict=True):
        kind = SACRUM if body.name == "S1" else BODY if label in whole else DOUBTFUL
        points.append((kind, centre_of(body.corners * spacing), body.corners * spacing))
    for label in np.unique(plane):
        if 0 < label <= LAST_VERTEBRA and label not in labels:
            points.append((DOUBTFUL, np.argwhere(plane == label).mean(0) * spacing, UNKNOWN))
    return (points + perhaps_above(points))[:MAX_POINTS]


def perhaps_above(points: list[Point]) -> list[Point]:
    """Doubtful points for two more bodies that may be in view, unlabelled, above the topmost."""
    column = sorted((centre for kind, centre, _ in points if kind != SACRUM), key=lambda centre: centre[0])
    if len(column) < 2:
        return []
    return [(DOUBTFUL, column[0] + step * (column[0] - column[1]), UNKNOWN) for step in (0.9, 1.8)]


def slice_with(scan: Scan, index: int, points: list[Point], labels: Integer[np.ndarray, "H W"] | None = None) -> Slice:
    """A slice of a scan with its keypoints, and its tissues where a SPIDER mask's `labels` tell them."""
    kinds = np.zeros(MAX_POINTS, np.int32)
    centres, corners = np.full((MAX_POINTS, 2), -1e3, np.float32), np.full((MAX_POINTS, 4, 2), np.nan, np.float32)
    for place, (kind, centre, four) in enumerate(points):
        kinds[place], centres[place], corners[place] = kind, centre / SOURCE_MM, four / SOURCE_MM
    (image,) = with_neighbours(scan, [index], SOURCE_MM)
    tissue = np.zeros(image.shape[:2], np.uint8)
    if labels is not None:
        kinds_of_tissue = [labels == 0, labels <= LAST_VERTEBRA, labels == CANAL, labels > DISC_BELOW]
        step = SOURCE_MM / scan.spacing_mm[:2]
        ndimage.affine_transform(
            np.select(kinds_of_tissue, [0, 1, 3, 2], 0).astype(np.uint8), step, output=tissue, order=0, mode="nearest"
        )
    return Slice(image, tissue, kinds, centres, corners)


def centre_of(corners: Float[np.ndarray, "4 2"]) -> Float[np.ndarray, "2"]:
    """The point that serves as the centre of a body: the mean of its corners in mm, or an estimate of it.

    With upper corners only (the sacrum), it is a point below their middle; with lower ones only, one above.
    """
    if np.isfinite(corners).all():
        return corners.mean(0)
    upper = np.isfinite(corners[:2]).all()
    front, back = corners[:2] if upper else corners[[3, 2]]
    down = np.array([back[1] - front[1], front[0] - back[0]])
    shift = _INTO_SACRUM_MM * down / np.linalg.norm(down) if upper else -_HALF_HEIGHT * down
    return (front + back) / 2 + shift
