"""One consistent column out of many candidates, by dynamic programming from the sacrum up (paper, refs. 5 and 7).

Every two neighbours pay for an unlikely disc between them: its height, the bend of the column there, and the unlike
lengths of their endplates. A body that no candidate stands for is stepped over, at a price.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.detector.candidates import SACRUM, Group

# Means and standard deviations. Endplates' lengths are of neighbours, as a logarithm of their ratio.
_GAP_MM = (8.0, 5.0)
_BEND_DEG = 14.0
_LUMBOSACRAL_BEND_DEG = 22.0
_SIZE_RATIO = 0.13
_SACRAL_SIZE_RATIO = 0.25
_MISSING_COST = 5.0
_MOST_COST = 14.0  # of a link; beyond it, two bodies are no neighbours
_GAIN = 3.0  # added to a body's log-odds: a candidate is worth taking from a score of 0.05
SAME_PLACE_MM = 14.0
"""Between the centres of a body and a sacrum that are one thing."""

_LEAST_BODY_MM = (8.0, 5.0)  # length and height


@dataclass(frozen=True, eq=False)
class Column:
    """The bodies of a chain from the bottom up; None stands for one that was stepped over. `score` is the chain's."""

    groups: tuple[Group | None, ...]
    score: float

    @property
    def has_sacrum(self) -> bool:
        """Whether it begins with S1."""
        first = self.groups[0]
        return first is not None and first.kind == SACRUM


@dataclass(frozen=True, eq=False)
class _Shape:
    """A group's geometry, mm: the middles of its endplates, their mean length, and the direction up."""

    upper: np.ndarray
    lower: np.ndarray
    length: float
    height: float
    up: np.ndarray
    lower_up: np.ndarray
    is_sacrum: bool


def _shape(group: Group) -> _Shape:
    corners = group.corners
    upper, lower = corners[:2].mean(0), corners[2:].mean(0)
    upper_along, lower_along = corners[1] - corners[0], corners[2] - corners[3]
    up = _unit(np.array([-upper_along[1], upper_along[0]]))
    if group.kind == SACRUM:
        return _Shape(upper, upper, float(np.linalg.norm(upper_along)), 0.0, up, up, True)
    length = (np.linalg.norm(upper_along) + np.linalg.norm(lower_along)) / 2
    lower_up = _unit(np.array([-lower_along[1], lower_along[0]]))
    return _Shape(upper, lower, float(length), float(np.linalg.norm(upper - lower)), up, lower_up, False)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def link_cost(below: _Shape, above: _Shape, *, missing: bool) -> float:
    """What it costs that two bodies are neighbours, or have one `missing` between them."""
    step = above.lower - below.upper
    length = (below.length + above.length) / 2
    gap = float(step @ _unit(below.up + above.lower_up))
    if missing:  # a body as high as the one above, and a disc
        gap -= above.height + _GAP_MM[0]
    bend_deg = np.degrees(np.arccos(np.clip(below.up @ above.lower_up, -1, 1)))
    across = step - gap * _unit(below.up + above.lower_up) if not missing else np.zeros(2)
    sacral = below.is_sacrum
    cost = 0.5 * ((gap - _GAP_MM[0]) / _GAP_MM[1] / (1.5 if missing else 1.0)) ** 2
    cost += 0.5 * (bend_deg / (_LUMBOSACRAL_BEND_DEG if sacral else _BEND_DEG) / (1.5 if missing else 1.0)) ** 2
    cost += 0.5 * (np.log(below.length / above.length) / (_SACRAL_SIZE_RATIO if sacral else _SIZE_RATIO)) ** 2
    cost += 0.5 * (np.linalg.norm(across) / (0.25 * length)) ** 2
    return float(cost) + (_MISSING_COST if missing else 0.0)


def best_column(groups: Sequence[Group]) -> Column | None:
    """The chain whose candidates' log-odds, less the costs of its links, sum to most; None if no body is possible.

    Who takes for a vertebra what may be the sacrum pays for that. Not the other way about: S1 often looks like one.

    Args:
        groups: bodies and sacra, in any order.
    """
    shapes = {id(group): _shape(group) for group in groups}
    usable = [group for group in groups if _possible(shapes[id(group)])]
    usable.sort(key=lambda group: (group.kind != SACRUM, -group.centre[0]))  # from the sacrum up
    best: list[tuple[float, tuple[Group | None, ...]]] = []
    for index, group in enumerate(usable):
        gain = _gain(group)
        if group.kind != SACRUM:
            gain -= max((_gain(sacrum) for sacrum in usable if _is_same_thing(sacrum, group)), default=0.0)
        options: list[tuple[float, tuple[Group | None, ...]]] = [(gain, (group,))]
        if group.kind != SACRUM:
            for score, chain in best[:index]:
                below = chain[-1]
                if below is None or below.centre[0] <= group.centre[0]:
                    continue
                for missing in (False, True):
                    cost = link_cost(shapes[id(below)], shapes[id(group)], missing=missing)
                    if cost < _MOST_COST:
                        options.append((score + gain - cost, (*chain, *([None] if missing else []), group)))
        best.append(max(options, key=lambda option: option[0]))
    if not best:
        return None
    score, chain = max(best, key=lambda option: option[0])
    return Column(chain, score)


def _possible(shape: _Shape) -> bool:
    return shape.length > _LEAST_BODY_MM[0] and (shape.is_sacrum or shape.height > _LEAST_BODY_MM[1])


def _is_same_thing(sacrum: Group, body: Group) -> bool:
    return sacrum.kind == SACRUM and float(np.linalg.norm(sacrum.centre - body.centre)) < SAME_PLACE_MM


def _gain(group: Group) -> float:
    score = np.clip(group.score, 0.01, 0.99)
    return float(np.log(score / (1 - score))) + _GAIN
