"""What the network finds in a scan: candidates in each slice, grouped over the slices into bodies."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy import ndimage

from data_prep.detector.grid import CELL_MM, CELL_PX, OFFSET_MM, with_neighbours
from data_prep.detector.network import BodyNet
from data_prep.read.scan import Scan

BODY, SACRUM = 0, 1  # the order of the heat maps

SLICES_AT_ONCE = 4
# Heights and widths are padded to the smallest that fits both, so that nearly every scan (up to 384 mm) runs the same
# compiled program. Whatever exceeds the last, 960 mm, is cut off.
BUCKETS_PX = (256, 384, 640)

MIN_SCORE = 0.08
_SLICE_STEP_MM = 2.5  # of thinner slices, only every second or third is used
_VOTING_CELLS = 2
_HALF_CELL = (CELL_PX - 1) / 2 / CELL_PX  # from the centre of a cell's first pixel to the centre of the cell
_SAME_BODY_MM = 10.0
_SUPPORT = 3


@dataclass(frozen=True, eq=False)
class Candidate:
    """A body, or the sacrum, in one slice. Places are (row, column) in mm from the centre of its first pixel."""

    kind: int  # `BODY` or `SACRUM`
    score: float  # in (0, 1)
    centre: Float[np.ndarray, "2"]
    corners: Float[np.ndarray, "4 2"]  # as `VertebralBody.corners`; the sacrum's lower two have no meaning
    spread_mm: float = 0.0  # between the two estimates of its corners, on average


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
    def centre(self) -> Float[np.ndarray, "2"]:
        """In mm."""
        return np.median([one.centre for one in self._central()], axis=0)

    @property
    def corners(self) -> Float[np.ndarray, "4 2"]:
        """In mm: the median over the central slices, so that an error in one slice does not count."""
        return np.median([one.corners for one in self._central()], axis=0)

    @property
    def spread_mm(self) -> float:
        """How much the estimates of its corners differ: within a slice, and between the central slices."""
        central = self._central()
        between = np.std([one.corners for one in central], axis=0)
        return float(np.mean([one.spread_mm for one in central]) + np.linalg.norm(between, axis=-1).mean())

    def run(self) -> list[int]:
        """The slices around the best one in which the score does not fall below half of the best."""
        order = sorted(self.members)
        scores = np.array([self.members[index].score for index in order])
        runs, _ = ndimage.label(scores >= 0.5 * scores.max())
        return [index for index, label in zip(order, runs, strict=True) if label == runs[np.argmax(scores)]]

    def central(self) -> list[int]:
        """The middle third of its run, or more: the slices that its place and its corners are taken from."""
        run = self.run()
        third = len(run) // 3
        return run[third : len(run) - third]

    def _central(self) -> list[Candidate]:
        return [self.members[index] for index in self.central()]


def see(members: Sequence[dict[str, Any]], scan: Scan, indices: Sequence[int]) -> list[list[Candidate]]:
    """The candidates in each of some slices of a scan. `members` are the variables of one `BodyNet` or more."""
    return see_images(members, with_neighbours(scan, indices))


def see_images(
    members: Sequence[dict[str, Any]], images: Sequence[Float[np.ndarray, "H W 3"]]
) -> list[list[Candidate]]:
    """The candidates in each of some images of one size, as `grid.with_neighbours` gives them."""
    shape = np.array(images[0].shape[:2])
    side = next((bucket for bucket in BUCKETS_PX if bucket >= shape.max()), BUCKETS_PX[-1])
    shape = np.minimum(shape, side)
    padded = np.zeros((-(-len(images) // SLICES_AT_ONCE) * SLICES_AT_ONCE, side, side, 3), np.float32)
    for place, image in enumerate(images):
        padded[place, : shape[0], : shape[1]] = image[:side, :side]
    found = []
    for start in range(0, len(padded), SLICES_AT_ONCE):
        seen = [jax.device_get(_apply(each, padded[start : start + SLICES_AT_ONCE])) for each in members]
        maps = [np.mean(of_members, axis=0) for of_members in zip(*seen, strict=True)]
        found += [_peaks(heat, far, near, shape) for heat, far, near in zip(*maps, strict=True)]
    return found[: len(images)]


@jax.jit
def _apply(variables: dict[str, Any], images: Array) -> tuple[Array, Array, Array]:
    heat, far, near = BodyNet().apply(variables, images, train=False)  # type: ignore[misc]
    return jax.nn.sigmoid(heat), far, near


def _peaks(heat: np.ndarray, far: np.ndarray, near: np.ndarray, shape: np.ndarray) -> list[Candidate]:
    """Local maxima of the heat maps, each with its corners.

    A first estimate of the corners is the mean of what the cells around the peak predict, weighted by their heat.
    """
    rows, columns = -(-shape // CELL_PX)
    heat, far, near = heat[:rows, :columns], far[:rows, :columns], near[:rows, :columns]
    cells_mm = (np.moveaxis(np.mgrid[:rows, :columns], 0, -1) + _HALF_CELL) * CELL_MM
    near_mm = cells_mm[:, :, None] + OFFSET_MM * near
    found = []
    for kind in (BODY, SACRUM):
        warm = heat[..., kind]
        peaks = np.argwhere((warm == ndimage.maximum_filter(warm, 5, mode="constant")) & (warm > MIN_SCORE))
        for row, column in peaks:
            box = tuple(slice(max(0, at - _VOTING_CELLS), at + _VOTING_CELLS + 1) for at in (row, column))
            weights = warm[box] / warm[box].sum()
            centre = np.tensordot(weights, cells_mm[box], 2)
            votes = cells_mm[box][:, :, None] + OFFSET_MM * far[box]
            first = np.tensordot(weights, votes, 2)
            corners = _refined(first, near_mm)
            spread_mm = 2 * float(np.linalg.norm(corners - first, axis=1).mean())
            found.append(Candidate(kind, float(warm[row, column]), centre, corners, spread_mm))
    return found


def _refined(corners: np.ndarray, near_mm: np.ndarray) -> np.ndarray:
    """Corners in mm, each moved halfway to what the four cells around it predict.

    The errors of the two estimates differ, so their mean is better than either. Corners outside of the cells stay.
    """
    refined = corners.astype(float)
    for kind, place in enumerate(corners / CELL_MM - _HALF_CELL):
        near = [
            ndimage.map_coordinates(near_mm[:, :, kind, axis], place[:, None], order=1, cval=np.nan)[0]
            for axis in (0, 1)
        ]
        if np.isfinite(near).all():
            refined[kind] = (corners[kind] + near) / 2
    return refined


def slices_to_see(scan: Scan) -> list[int]:
    """Which slices are used: all, or every n-th of a stack of thin ones."""
    step = max(1, round(_SLICE_STEP_MM / scan.spacing_mm[2]))
    count = scan.voxels.shape[2]
    return list(range((count - 1) % step // 2, count, step))


def group(candidates: Sequence[Sequence[Candidate]], indices: Sequence[int]) -> list[Group]:
    """Candidates of all slices → bodies. Starting with the best, each joins the nearest body of its kind."""
    support = min(_SUPPORT, len(indices))
    groups: list[Group] = []
    every = [(one, index) for index, here in zip(indices, candidates, strict=True) for one in here]
    for one, index in sorted(every, key=lambda pair: -pair[0].score):
        distances = [_distance(other, one, index) for other in groups]
        if min(distances, default=np.inf) > _SAME_BODY_MM:
            groups.append(Group(one.kind, support, {index: one}))
        else:
            groups[np.argmin(distances)].members.setdefault(index, one)
    return groups


def _distance(group: Group, one: Candidate, index: int) -> float:
    """Between a candidate in a slice and a group's member in the nearest slice, in mm."""
    nearest = group.members[min(group.members, key=lambda member: abs(member - index))]
    return float(np.linalg.norm(nearest.centre - one.centre)) if group.kind == one.kind else np.inf
