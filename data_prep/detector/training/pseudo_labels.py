"""Corners for slices in which only the discs are marked: a detector's own, where they agree with the marks.

A detector that was trained on masks and phantoms finds bodies in these slices, but may be wrong about the sacrum and so
about every level. The marks say which candidate is which body. What they contradict is not taught, and what they expect
but the detector did not see is left open (`DOUBTFUL`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from data_prep.detector.candidates import BODY as FOUND_BODY
from data_prep.detector.candidates import SACRUM as FOUND_SACRUM
from data_prep.detector.candidates import Candidate, see
from data_prep.detector.training.marked import SHIFTS_MM, MarkedSlice, middle_mm
from data_prep.detector.training.truth import (
    BODY,
    DOUBTFUL,
    MAX_POINTS,
    SACRUM,
    UNKNOWN,
    Point,
    Slice,
    centre_of,
    perhaps_above,
    slice_with,
)
from spinejax.tasks import LEVELS

_NEAR_MM = 12.0  # from a disc's mark to the edges of the bodies next to it; the discs are about 35 mm apart
_MIN_SCORE = 0.3
_MIN_SCORE_ABOVE = 0.6  # of bodies above the topmost mark
_DISC_MM = (1.0, 18.0)  # between two of these
_MIN_BODIES = 3
_BELOW_MARK_MM = 15.0  # from the mark of L5-S1 to the point that serves as S1's centre


def pseudo_labelled(variables: dict[str, Any], slices: Iterable[MarkedSlice]) -> list[Slice]:
    """The slices in which three bodies or more were found where the marks expect them.

    Args:
        variables: of `BodyNet`. A detector that is to be measured on a patient must not have learned from labels that
            another one made which has seen him; so each fold's detector makes its own.
        slices: of the patients that it may learn from.
    """
    made = []
    for marked in slices:
        scan, index = marked.read()
        (candidates,) = see([variables], scan, [index])
        points = keypoints(marked, middle_mm(scan), candidates)
        if sum(kind == BODY for kind, _, _ in points) >= _MIN_BODIES:
            made.append(slice_with(scan, index, points))
    return made


def keypoints(marked: MarkedSlice, middle: Float[np.ndarray, "2"], candidates: Sequence[Candidate]) -> list[Point]:
    """The keypoints of a marked slice: those of the candidates that its marks confirm, and doubtful ones.

    Args:
        marked: the slice.
        middle: of its image, in mm from the centre of the first pixel (`marked.middle_mm`).
        candidates: what a detector found in it.
    """
    levels = [level for level in (*reversed(LEVELS),) if level in marked.points]
    marks = np.array([marked.points[level] for level in levels]) + middle
    if not marked.exact:
        fits = [sum(one.score for one in _confirmed(marks + by, marked, candidates) if one) for by in SHIFTS_MM]
        best = np.array(fits) >= max(fits) - 1e-6
        marks = marks + SHIFTS_MM[best].mean(0)  # the middle of all that fit best
    sacrum, *bodies = _confirmed(marks, marked, candidates)
    points: list[Point] = [_point(SACRUM, sacrum) if sacrum else (DOUBTFUL, marks[0] + (_BELOW_MARK_MM, 0.0), UNKNOWN)]
    for number, one in enumerate(bodies):
        between = marks[number : number + 2].mean(0) if number + 1 < len(marks) else 1.5 * marks[-1] - 0.5 * marks[-2]
        points.append(_point(BODY, one) if one else (DOUBTFUL, between, UNKNOWN))
    top = bodies[-1]
    while top is not None and (top := _next_above(top, candidates)) is not None:
        points.append(_point(BODY, top))
    return (points + perhaps_above(points))[:MAX_POINTS]


def _confirmed(marks: np.ndarray, marked: MarkedSlice, candidates: Sequence[Candidate]) -> list[Candidate | None]:
    """S1 and the bodies above each mark, from the bottom up; None for one that was not found.

    The edge of a body next to a disc must be near to the disc's mark: the posterior corner, or the endplate's middle.
    """
    upper, lower = ([1], [2]) if marked.posterior else ([0, 1], [2, 3])

    def best(kind: int, below: np.ndarray | None, above: np.ndarray | None) -> Candidate | None:
        ends = [(lower, below), (upper, above)]
        fitting = [
            one
            for one in candidates
            if one.kind == kind
            and one.score >= _MIN_SCORE
            and all(mark is None or np.linalg.norm(one.corners[end].mean(0) - mark) < _NEAR_MM for end, mark in ends)
        ]
        return max(fitting, key=lambda one: one.score, default=None)

    # S1 that looks like a vertebra is S1 all the same: that is what the marks teach.
    s1 = best(FOUND_SACRUM, None, marks[0]) or best(FOUND_BODY, None, marks[0])
    above = [*marks[1:], None]
    return [s1, *(best(FOUND_BODY, below, mark) for below, mark in zip(marks, above, strict=True))]


def _next_above(body: Candidate, candidates: Sequence[Candidate]) -> Candidate | None:
    """The body above the topmost one that the marks confirm, if it is a sure one."""
    edge = body.corners[[0, 1]].mean(0)
    steps = [(edge - one.corners[[2, 3]].mean(0), one) for one in candidates]
    fitting = [
        one
        for step, one in steps
        if one.kind == FOUND_BODY
        and one.score >= _MIN_SCORE_ABOVE
        and _DISC_MM[0] < step[0] < _DISC_MM[1]
        and abs(step[1]) < _NEAR_MM
    ]
    return max(fitting, key=lambda one: one.score, default=None)


def _point(kind: int, one: Candidate) -> Point:
    corners = np.concatenate([one.corners[:2], UNKNOWN[2:]]) if kind == SACRUM else one.corners
    return kind, centre_of(corners), corners
