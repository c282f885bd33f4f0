"""Which of the discs that a detector found lie at a slice's marks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_prep.anatomy.vertebrae import NAMES, VertebralBody
from data_prep.detector.training.marked import SHIFTS_MM, MarkedSlice, middle_mm
from data_prep.read.scan import Scan
from spinejax.tasks import LEVELS

_NEAR_MM = 12.0  # from a point at a disc's posterior margin to the detected disc's; discs are about 35 mm apart


@dataclass(frozen=True, eq=False)
class Disc:
    """The space between two detected bodies that follow each other."""

    above: VertebralBody
    below: VertebralBody
    place_mm: Float[np.ndarray, "2"]  # of its posterior margin, or of its middle; from the middle of the image

    @property
    def level(self) -> str:
        """The level that the detector gives it."""
        return f"{self.above.name}-{self.below.name}"


@dataclass(frozen=True, eq=False)
class DiscsAtMarks:
    """What a detector found at the marks of a slice."""

    discs: dict[str, Disc]  # level of a mark → the disc there; without the marks at which there is none
    distances_mm: dict[str, float]  # likewise, from the mark, or from the middle of its box
    shift_mm: tuple[float, float]  # by which marks of another image were moved, (row, column)

    @property
    def levels_right(self) -> bool:
        """Whether there are discs, and all have the names of their marks."""
        return bool(self.discs) and all(level == disc.level for level, disc in self.discs.items())


def marked_levels(marked: MarkedSlice) -> list[str]:
    """The levels of the marks, from the top down. Those that no detector can name are left out."""
    return [level for level in LEVELS if level in marked.points]


def discs_at_marks(marked: MarkedSlice, scan: Scan, bodies: Sequence[VertebralBody]) -> DiscsAtMarks:
    """Match marks with the discs between a detection's bodies.

    A disc is at a mark if the middle of the two posterior corners that face it is near the point, or the middle of all
    four is in the box. Points that were set in another image of the patient are shifted first, to fit best.
    """
    levels, discs = marked_levels(marked), _discs(scan, bodies, posterior=marked.posterior)
    shifts = np.zeros((1, 2)) if marked.exact else SHIFTS_MM
    tried = [_matches(marked, levels, discs, shift) for shift in shifts]
    best = max(range(len(shifts)), key=lambda place: (len(tried[place]), -sum(tried[place].values()), -place))
    row, column = shifts[best].tolist()
    return DiscsAtMarks(
        {levels[mark]: discs[disc] for mark, disc in tried[best]},
        {levels[mark]: distance_mm for (mark, _), distance_mm in tried[best].items()},
        (row, column),
    )


def _discs(scan: Scan, bodies: Sequence[VertebralBody], *, posterior: bool) -> list[Disc]:
    """The discs with known facing corners, from the top down."""
    lower, upper = ([2], [1]) if posterior else ([2, 3], [0, 1])
    discs = []
    for above, below in itertools.pairwise(bodies):
        facing = np.concatenate([above.corners[lower], below.corners[upper]])
        if NAMES.index(above.name) == NAMES.index(below.name) + 1 and np.isfinite(facing).all():
            discs.append(Disc(above, below, place_mm(scan, facing)))
    return discs


def place_mm(scan: Scan, corners: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "2"]:
    """The middle of the known corners, in mm from the middle of the image."""
    return np.nanmean(corners, axis=0) * scan.spacing_mm[:2] - middle_mm(scan)


def _matches(
    marked: MarkedSlice, levels: Sequence[str], discs: Sequence[Disc], shift_mm: Float[np.ndarray, "2"]
) -> dict[tuple[int, int], float]:
    """Pairs of a mark and a disc, by their places in `levels` and `discs`, that are each other's nearest → mm apart."""
    distances_mm = np.full((len(levels), len(discs)), np.inf)
    for mark, level in enumerate(levels):
        point = marked.points[level] + shift_mm
        for number, disc in enumerate(discs):
            distance_mm = float(np.linalg.norm(disc.place_mm - point))
            box = marked.boxes.get(level)
            near = distance_mm < _NEAR_MM if box is None else _inside(disc.place_mm, box)
            distances_mm[mark, number] = distance_mm if near else np.inf
    pairs = itertools.product(range(len(levels)), range(len(discs)))
    return {
        (mark, disc): float(distances_mm[mark, disc])
        for mark, disc in pairs
        if np.isfinite(distances_mm[mark, disc])
        and distances_mm[mark].argmin() == disc
        and distances_mm[:, disc].argmin() == mark
    }


def _inside(place_mm: Float[np.ndarray, "2"], box_mm: Float[np.ndarray, "2 2"]) -> bool:
    return bool(((place_mm >= box_mm[0]) & (place_mm <= box_mm[1])).all())
