"""One consistent column out of many candidates, by dynamic programming from the sacrum up (paper, refs. 5 and 7).

Every two neighbours have a cost: for an unlikely disc height, an unlikely bend, and unequal endplate lengths. A body
without a candidate may be skipped, at a cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.detector.candidates import SACRUM, Group

# Means and standard deviations. The size ratio is the logarithm of the ratio of neighbours' endplate lengths.
_GAP_MM = (8.0, 5.0)
_BEND_DEG = 14.0
_LUMBOSACRAL_BEND_DEG = 22.0
_SIZE_RATIO = 0.13
_SACRAL_SIZE_RATIO = 0.25
_MISSING_COST = 5.0
_MAX_COST = 14.0  # above this cost, two bodies are not neighbours
_GAIN = 3.0  # added to a body's log-odds: a candidate is worth taking from a score of 0.05
SAME_PLACE_MM = 14.0  # a body and a sacrum whose centres are nearer than this are the same structure
_MIN_BODY_MM = (8.0, 5.0)  # length and height


@dataclass(frozen=True, eq=False)
class Column:
    """The bodies of a chain from the bottom up; None stands for a skipped one. `score` is the chain's."""

    groups: tuple[Group | None, ...]
    score: float

    @property
    def sacrum(self) -> Group | None:
        """S1, if the column begins with it."""
        first = self.groups[0]
        return first if first is not None and first.kind == SACRUM else None


@dataclass(frozen=True, eq=False)
class _Shape:
    """A group's geometry in mm: middle and upward direction of each endplate, their mean length, and their distance."""

    upper: np.ndarray
    lower: np.ndarray
    up: np.ndarray
    lower_up: np.ndarray
    length: float
    height: float
    is_sacrum: bool


def _shape(group: Group) -> _Shape:
    corners, is_sacrum = group.corners, group.kind == SACRUM
    plates = [corners[[0, 1]], corners[[0, 1] if is_sacrum else [3, 2]]]
    upper, lower = (plate.mean(0) for plate in plates)
    along = [plate[1] - plate[0] for plate in plates]
    up, lower_up = (_unit(np.array([-way[1], way[0]])) for way in along)
    length = float(np.mean([np.linalg.norm(way) for way in along]))
    return _Shape(upper, lower, up, lower_up, length, float(np.linalg.norm(upper - lower)), is_sacrum)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def _link_cost(below: _Shape, above: _Shape, *, missing: bool) -> float:
    """The cost of two bodies as neighbours, or with one `missing` between them."""
    step = above.lower - below.upper
    up = _unit(below.up + above.lower_up)
    gap = float(step @ up)
    across = np.zeros(2) if missing else step - gap * up
    if missing:  # a body as high as the one above, and a disc
        gap -= above.height + _GAP_MM[0]
    spread = 1.5 if missing else 1.0
    bend_deg = np.degrees(np.arccos(np.clip(below.up @ above.lower_up, -1, 1)))
    usual_bend_deg = _LUMBOSACRAL_BEND_DEG if below.is_sacrum else _BEND_DEG
    usual_ratio = _SACRAL_SIZE_RATIO if below.is_sacrum else _SIZE_RATIO
    deviations = (
        (gap - _GAP_MM[0]) / (_GAP_MM[1] * spread),
        bend_deg / (usual_bend_deg * spread),
        np.log(below.length / above.length) / usual_ratio,
        np.linalg.norm(across) / (0.25 * (below.length + above.length) / 2),
    )
    return 0.5 * float(sum(value**2 for value in deviations)) + (_MISSING_COST if missing else 0.0)


def best_column(groups: Sequence[Group]) -> Column | None:
    """The chain with the greatest sum of its candidates' log-odds minus the costs of its links; None without a body.

    A body placed on a likely sacrum is penalised; the reverse is not, because S1 often looks like a vertebra.
    """
    return max(columns(groups), key=lambda column: column.score, default=None)


def margin(column: Column, others: Sequence[Column]) -> float:
    """How much better a column is than the best of those that count one of its bodies as another vertebra."""
    numbers = _numbers(column)
    rivals = [other.score for other in others if any(numbers.get(g, at) != at for g, at in _numbers(other).items())]
    return column.score - max(rivals, default=-np.inf)


def _numbers(column: Column) -> dict[Group, int]:
    """Each body of a column → its number from the sacrum up, by which it is named."""
    first = 0 if column.sacrum is not None else 1
    return {group: number for number, group in enumerate(column.groups, first) if group is not None}


def columns(groups: Sequence[Group]) -> list[Column]:
    """For each group at which the count could begin, the best column from it up."""
    shapes = {group: _shape(group) for group in groups}
    centres = {group: group.centre for group in groups if _possible(shapes[group])}
    usable = sorted(centres, key=lambda group: (group.kind != SACRUM, -centres[group][0]))  # from the sacrum up
    sacra = [group for group in usable if group.kind == SACRUM]
    gains = {group: _gain(group) for group in usable}
    for group in usable[len(sacra) :]:
        on_it = (gains[one] for one in sacra if np.linalg.norm(centres[one] - centres[group]) < SAME_PLACE_MM)
        gains[group] -= max(on_it, default=0.0)
    links = {
        (below, above, missing): cost
        for below in usable
        for above in usable
        if above.kind != SACRUM and centres[below][0] > centres[above][0]
        for missing in (False, True)
        if (cost := _link_cost(shapes[below], shapes[above], missing=missing)) < _MAX_COST
    }
    return [_best_from(start, usable, gains, links) for start in usable]


def _best_from(
    start: Group,
    usable: Sequence[Group],
    gains: Mapping[Group, float],
    links: Mapping[tuple[Group, Group, bool], float],
) -> Column:
    best: list[tuple[float, tuple[Group | None, ...]]] = []
    for group in usable:
        gain = gains[group]
        options: list[tuple[float, tuple[Group | None, ...]]] = [(gain, (group,))] if group is start else []
        for score, chain in best if group.kind != SACRUM else ():
            below = chain[-1]
            assert below is not None  # noqa: S101
            for missing in (False, True):
                if (cost := links.get((below, group, missing))) is not None:
                    options.append((score + gain - cost, (*chain, *([None] if missing else []), group)))
        if options:
            best.append(max(options, key=lambda option: option[0]))
    score, chain = max(best, key=lambda option: option[0])
    return Column(chain, score)


def _possible(shape: _Shape) -> bool:
    return shape.length > _MIN_BODY_MM[0] and (shape.is_sacrum or shape.height > _MIN_BODY_MM[1])


def _gain(group: Group) -> float:
    score = np.clip(group.score, 0.01, 0.99)
    return float(np.log(score / (1 - score))) + _GAIN
