"""What the network sees in a scan: candidates in each slice, grouped over the slices into bodies."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from scipy import ndimage

from data_prep.detector.grid import CELL_MM, CELL_PX, OFFSET_MM, normalise, resample
from data_prep.detector.network import BodyNet
from data_prep.read.scan import Scan

BODY, SACRUM = 0, 1  # the heat-maps' order

SLICES_AT_ONCE = 4
BUCKETS_PX = (256, 384, 640)
"""Heights and widths are padded to the smallest of these that fits both, so that nearly every scan (up to 384 mm) runs
the same compiled program. What is beyond the last, 960 mm, is cut off."""

LEAST_SCORE = 0.08
_SLICE_STEP_MM = 2.5  # of a stack with thinner slices, every second or third is looked at
_VOTING_CELLS = 2
_HALF_CELL = (CELL_PX - 1) / 2 / CELL_PX  # from the centre of a cell's first pixel to the cell's
_SAME_BODY_MM = 10.0
_CENTRAL_MM = 5.0
_SUPPORT = 3


@dataclass(frozen=True, eq=False)
class Candidate:
    """A body, or the sacrum, in one slice.

    Args:
        kind: `BODY` or `SACRUM`.
        score: in (0, 1).
        centre: float64[2]. (row, column) in mm from the centre of the slice's first pixel.
        corners: float64[4, 2]. Likewise, in the order of `VertebralBody.corners`; the sacrum's lower two mean nothing.
    """

    kind: int
    score: float
    centre: np.ndarray
    corners: np.ndarray


@dataclass(eq=False)
class Group:
    """One body over the slices: slice → candidate. `support` is the number of slices that could have shown it."""

    kind: int
    support: int
    members: dict[int, Candidate] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean of its best slices, where a slice without it counts as zero."""
        best = sorted((one.score for one in self.members.values()), reverse=True)[: self.support]
        return float(sum(best) / self.support)

    @property
    def centre(self) -> np.ndarray:
        return np.median([one.centre for one in self._central()], axis=0)

    @property
    def corners(self) -> np.ndarray:
        """float64[4, 2], mm: the median over the central slices, so that one slice's slip does not count."""
        return np.median([one.corners for one in self._central()], axis=0)

    def run(self) -> list[int]:
        """The slices around the best one in which the score does not fall below half of the best."""
        order = sorted(self.members)
        scores = np.array([self.members[index].score for index in order])
        good = scores >= 0.5 * scores.max()
        runs, _ = ndimage.label(good)
        return [index for index, label in zip(order, runs, strict=True) if label == runs[np.argmax(scores)]]

    def _central(self) -> list[Candidate]:
        run = self.run()
        third = len(run) // 3
        return [self.members[index] for index in run[third : len(run) - third]]


def see(variables: dict[str, Any], scan: Scan, indices: Sequence[int]) -> list[list[Candidate]]:
    """The candidates in some slices of a scan.

    Args:
        variables: of `BodyNet`.
        scan: float32[H, W, S].
        indices: the slices.

    Returns:
        A list a slice.
    """
    spacing = scan.spacing_mm[:2]
    images = [normalise(resample(scan.voxels[:, :, index], spacing)) for index in indices]
    return see_images(variables, images)


def see_images(variables: dict[str, Any], images: Sequence[np.ndarray]) -> list[list[Candidate]]:
    """The candidates in images of one size, normalised, at `PIXEL_MM`."""
    longest = max(images[0].shape)
    side = next((bucket for bucket in BUCKETS_PX if bucket >= longest), BUCKETS_PX[-1])
    shape = np.minimum(images[0].shape, side)
    padded = np.zeros((-(-len(images) // SLICES_AT_ONCE) * SLICES_AT_ONCE, side, side), np.float32)
    for place, image in enumerate(images):
        padded[place, : shape[0], : shape[1]] = image[:side, :side]
    found = []
    for start in range(0, len(padded), SLICES_AT_ONCE):
        told = jax.device_get(_apply(variables, padded[start : start + SLICES_AT_ONCE]))
        found += [_peaks(heat, far, near, shape) for heat, far, near in zip(*told, strict=True)]
    return found[: len(images)]


@partial(jax.jit)
def _apply(variables: dict[str, Any], images: jax.Array) -> tuple[Any, Any, Any]:
    heat, far, near = cast(tuple, BodyNet().apply(variables, images, train=False))
    return jax.nn.sigmoid(heat), far, near


def _peaks(heat: np.ndarray, far: np.ndarray, near: np.ndarray, shape: np.ndarray) -> list[Candidate]:
    """Local maxima of the heat-maps, each with its corners.

    These are halfway between where the cells around the peak say, by their heat, and where the cells around there say.
    """
    rows, columns = -(-shape // CELL_PX)
    heat, far, near = heat[:rows, :columns], far[:rows, :columns], near[:rows, :columns]
    cells_mm = (np.moveaxis(np.mgrid[:rows, :columns], 0, -1) + _HALF_CELL) * CELL_MM
    again_mm = cells_mm[:, :, None] + OFFSET_MM * near
    found = []
    for kind in (BODY, SACRUM):
        warm = heat[..., kind]
        peaks = np.argwhere((warm == ndimage.maximum_filter(warm, 5, mode="constant")) & (warm > LEAST_SCORE))
        for row, column in peaks:
            box = tuple(slice(max(0, at - _VOTING_CELLS), at + _VOTING_CELLS + 1) for at in (row, column))
            weights = warm[box] / warm[box].sum()
            centre = np.tensordot(weights, cells_mm[box], 2)
            votes = cells_mm[box][:, :, None] + OFFSET_MM * far[box]
            corners = _looked_at_again(np.tensordot(weights, votes, 2), again_mm)
            found.append(Candidate(kind, float(warm[row, column]), centre, corners))
    return found


def _looked_at_again(corners: np.ndarray, again_mm: np.ndarray) -> np.ndarray:
    """Corners, float64[4, 2] in mm, moved halfway to where the four cells around each say.

    The two looks err unlike: their mean is nearer than either. Corners outside of the cells stay as they are.
    """
    seen = corners.astype(float)
    for kind, place in enumerate(corners / CELL_MM - _HALF_CELL):
        row, column = np.floor(place).astype(int)
        if 0 <= row < again_mm.shape[0] - 1 and 0 <= column < again_mm.shape[1] - 1:
            down, right = place - (row, column)
            weights = np.outer((1 - down, down), (1 - right, right))
            again = np.tensordot(weights, again_mm[row : row + 2, column : column + 2, kind], 2)
            seen[kind] = (corners[kind] + again) / 2
    return seen


def slices_to_see(scan: Scan) -> list[int]:
    """Which slices are looked at: all, or every n-th of a stack of thin ones."""
    step = max(1, round(_SLICE_STEP_MM / scan.spacing_mm[2]))
    count = scan.voxels.shape[2]
    return list(range((count - 1) % step // 2, count, step))


def group(candidates: Sequence[Sequence[Candidate]], indices: Sequence[int]) -> list[Group]:
    """Candidates of all slices → bodies. The best come first, and take from each slice the nearest of their kind."""
    support = min(_SUPPORT, len(indices))
    groups: list[Group] = []
    every = [(one, index) for index, here in zip(indices, candidates, strict=True) for one in here]
    for one, index in sorted(every, key=lambda pair: -pair[0].score):
        near = [
            (np.linalg.norm(_nearest_in_slices(group, index).centre - one.centre), number)
            for number, group in enumerate(groups)
            if group.kind == one.kind
        ]
        distance, number = min(near, default=(np.inf, -1))
        if distance > _SAME_BODY_MM:
            groups.append(Group(one.kind, support, {index: one}))
        elif index not in groups[number].members:
            groups[number].members[index] = one
    return groups


def _nearest_in_slices(group: Group, index: int) -> Candidate:
    return group.members[min(group.members, key=lambda member: abs(member - index))]
