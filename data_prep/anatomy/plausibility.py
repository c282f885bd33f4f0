"""Is a scan's column of vertebral bodies that of a spine? Bodies, and spaces between them, are compared with others.

A mask that lacks a part of a vertebra, or all of it, or that has two under one label, gives corners that look right one
by one. Their distances do not. With these limits no disc of the 29 SPIDER stacks of docs/data.md and of 30 phantoms is
noted, and only bodies that are crushed are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_prep.anatomy.vertebrae import DISC_BELOW, NAMES, SPIDER_VERTEBRAE, VertebralBody
from data_prep.read.scan import Scan

_MAX_HEIGHT_TO_WIDTH = 0.55  # of the space between two bodies; up to 0.51 in the stacks
_MAX_EXCESS_MM = 6.0  # over the highest of the other spaces; up to 5.0
_MIN_OTHERS = 2
_MAX_SLIP_TO_WIDTH = 0.5  # from front to back, grade III of a slip; up to 0.3 in the stacks
_MAX_OFF_MM = 3.0  # from the middle between two bodies to that of their disc's mask, along the spine; up to 2.2
_BODY_HEIGHTS = (0.6, 1.6)  # to the median of the scan's other bodies
_FRONT_TO_REAR = (0.6, 1.75)  # of a body's walls; L5 is a wedge by nature


@dataclass(frozen=True)
class _Space:
    """The space between two neighbouring bodies, in mm of the plane."""

    height_mm: float
    width_mm: float
    slip_mm: float  # of the lower body, backward
    middle_mm: Float[np.ndarray, "2"]
    down: Float[np.ndarray, "2"]


def doubts_of(
    bodies: Sequence[VertebralBody], spacing_mm: Float[np.ndarray, "3"], regions: Scan | None = None
) -> list[str]:
    """A sentence on each disc or body whose height or place is not plausible beside its neighbours.

    Args:
        bodies: in any order.
        spacing_mm: of the scan's rows, columns and slices.
        regions: SPIDER's labels on the scan's grid, if there is a mask. A disc that it labels has to be in the middle
            between its bodies.
    """
    in_order = sorted(bodies, key=lambda body: NAMES.index(body.name), reverse=True)
    walls_mm = {body.name: _walls_mm(body, spacing_mm) for body in in_order if np.isfinite(body.corners).all()}
    heights_mm = {name: float(walls.mean()) for name, walls in walls_mm.items()}
    spaces = {
        (upper, lower): space
        for upper, lower in itertools.pairwise(in_order)
        if NAMES.index(upper.name) == NAMES.index(lower.name) + 1
        and (space := _space(upper, lower, spacing_mm)) is not None
    }
    doubts = []
    body_mm = float(np.median([*heights_mm.values()] or [np.inf]))
    for pair, space in spaces.items():
        others_mm = [other.height_mm for key, other in spaces.items() if key is not pair]
        beside = _beside_its_mask(*pair, space, spacing_mm, regions) if regions else []
        high = _high(*pair, space, others_mm, body_mm)
        doubts += high if space.height_mm > body_mm else beside or high
        if abs(space.slip_mm) > _MAX_SLIP_TO_WIDTH * space.width_mm:
            upper, lower = (body.name for body in pair)
            where = "behind" if space.slip_mm > 0 else "in front of"
            doubts.append(f"{upper}-{lower} is doubtful: {lower} is {abs(space.slip_mm):.0f} mm {where} {upper}.")
    for name, (front_mm, rear_mm) in walls_mm.items():
        others_mm = [height for key, height in heights_mm.items() if key != name]
        height_mm = heights_mm[name]
        typical_mm = float(np.median(others_mm)) if len(others_mm) >= _MIN_OTHERS else height_mm
        if not _BODY_HEIGHTS[0] * typical_mm <= height_mm <= _BODY_HEIGHTS[1] * typical_mm:
            low = height_mm < typical_mm
            what = "a fracture, or a part of it is missing" if low else "two vertebrae under one name"
            doubts.append(
                f"{name} is doubtful: it is {height_mm:.0f} mm high, {typical_mm:.0f} mm is typical of this scan: "
                f"{what}."
            )
        elif name != "L5" and not _FRONT_TO_REAR[0] * rear_mm <= front_mm <= _FRONT_TO_REAR[1] * rear_mm:
            doubts.append(
                f"{name} is doubtful: it is {front_mm:.0f} mm high in front and {rear_mm:.0f} mm behind: a fracture, "
                "or a part of it is missing."
            )
    return doubts


def _walls_mm(body: VertebralBody, spacing_mm: np.ndarray) -> np.ndarray:
    """The heights of a body's front and rear walls."""
    return np.linalg.norm((body.corners[[3, 2]] - body.corners[:2]) * spacing_mm[:2], axis=1)


def _space(upper: VertebralBody, lower: VertebralBody, spacing_mm: np.ndarray) -> _Space | None:
    """The space between two bodies; None if a corner beside it is not known."""
    above, below = upper.corners[[3, 2]] * spacing_mm[:2], lower.corners[:2] * spacing_mm[:2]
    endplates = np.stack([above[1] - above[0], below[1] - below[0]])
    lengths = np.linalg.norm(endplates, axis=1)
    if not np.isfinite(lengths).all() or lengths.min() == 0:
        return None
    back = (endplates / lengths[:, None]).sum(0)
    back /= max(np.linalg.norm(back), 1e-9)
    down = np.array([back[1], -back[0]])
    way = below.mean(0) - above.mean(0)
    return _Space(
        float(way @ down), float(lengths.mean()), float(way @ back), (above.mean(0) + below.mean(0)) / 2, down
    )


def _high(
    upper: VertebralBody, lower: VertebralBody, space: _Space, others_mm: list[float], body_mm: float
) -> list[str]:
    """A doubt if a space is too high for its width, or for its neighbours."""
    excess = space.height_mm - max(others_mm) if len(others_mm) >= _MIN_OTHERS else 0.0
    if space.height_mm <= _MAX_HEIGHT_TO_WIDTH * space.width_mm and excess <= _MAX_EXCESS_MM:
        return []
    if lower.name == "S1":
        why = "the upper part of S1, or the lower part of L5, may be missing"
    elif space.height_mm > body_mm:
        why = "a vertebra may be missing between them, and all names above be wrong by one"
    else:
        why = f"the lower part of {upper.name}, or the upper part of {lower.name}, may be missing"
    usual = f", the others are up to {max(others_mm):.0f} mm" if others_mm else ""
    apart = f"{upper.name} and {lower.name} are {space.height_mm:.0f} mm apart{usual}"
    return [f"{upper.name}-{lower.name} is doubtful: {apart}: {why}."]


def _beside_its_mask(
    upper: VertebralBody, lower: VertebralBody, space: _Space, spacing_mm: np.ndarray, regions: Scan
) -> list[str]:
    """A doubt if the disc's own mask is not in the middle between its bodies."""
    middle = int((upper.mid_slice + lower.mid_slice) / 2 + 0.5)
    pixels = np.argwhere(regions.voxels[:, :, middle] == DISC_BELOW + SPIDER_VERTEBRAE[upper.name])
    if not len(pixels):
        return []
    off_mm = float((pixels.mean(0) * spacing_mm[:2] - space.middle_mm) @ space.down)
    if abs(off_mm) <= _MAX_OFF_MM:
        return []
    where, lacks, sunk = "below", f"upper part of {lower.name}", f"{upper.name}'s lower"
    if off_mm > 0:
        where, lacks, sunk = "above", f"lower part of {upper.name}", f"{lower.name}'s upper"
    return [
        f"{upper.name}-{lower.name} is doubtful: the middle between its bodies is {abs(off_mm):.0f} mm {where} that of "
        f"its disc's mask: the mask may lack the {lacks}, or {sunk} endplate is sunk."
    ]
