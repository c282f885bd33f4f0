"""From a scan to its named vertebral bodies, with a confidence each and notes on what is doubtful."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE, VertebralBody
from data_prep.detector.candidates import BODY, SACRUM, Group, group, see, see_images, slices_to_see
from data_prep.detector.chain import SAME_PLACE_MM, Column, best_column
from data_prep.detector.grid import normalise, resample
from data_prep.detector.weights import SHIPPED, load
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS

NAMES = ("S1", *SPIDER_VERTEBRAE)
"""From the sacrum up."""

_ENDPLATE_MM = (23.0, 55.0)  # median over a scan; cervical ones have 14 to 20
_LEAST_BODIES = 2
_FEW_BODIES = 4
_SURE = 0.5
_AMBIGUOUS = 0.25
_TURNED_SACRUM = 0.55  # score of a sacrum in a turned image, to be believed
_TURNED_MARGIN = 0.15  # by which it must be surer than the sacrum in the image itself
_TURNED_COLUMN = 8.0  # by which the column there may be worse
_NO_SACRUM_CONFIDENCE = 0.3


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in a scan.

    Args:
        bodies: from the top down.
        confidence: of each body's place and name, in [0, 1], by name.
        notes: what is doubtful, one sentence each, to be shown to whoever uses the levels.
        doubtful_levels: one of the notes is that all names may be off by one: no sacrum was seen, or a doubtful one.
    """

    bodies: list[VertebralBody]
    confidence: Mapping[str, float]
    notes: list[str]
    doubtful_levels: bool = False


def detect(scan: Scan, *, lowest_level: str | None = None, weights: Path = SHIPPED) -> Detection:
    """Find the vertebral bodies of a sagittal lumbar scan and name them from the sacrum up.

    Args:
        scan: float32[H, W, S], one slice or more.
        lowest_level: the name of the lowest disc that is found, one of `LEVELS`, to count the others from it.
        weights: of the network.

    Raises:
        SpinejaxError: no column of bodies is found, they are not of a lumbar spine's size, or the image is turned.
    """
    variables = load(weights)
    indices = slices_to_see(scan)
    groups = group(see(variables, scan, indices), indices)
    column = best_column(groups)
    _refuse_turned(variables, scan)
    num_sure = 0 if column is None else sum(one is not None and one.score >= _SURE for one in column.groups)
    if column is None or num_sure < _LEAST_BODIES or column.score < 0:
        raise SpinejaxError(
            f"{scan.name}: no column of vertebral bodies was found. Is it a sagittal lumbar scan? If so, mark its "
            "bodies in a corner file (--corners)."
        )
    _refuse_other_sizes(scan, column)
    names, sure, notes, doubtful = _name(scan, column, groups, lowest_level)
    bodies, confidence = [], {}
    for place, (name, one) in enumerate(zip(names, column.groups, strict=False)):
        if one is None:
            one = _between(column, place)
            notes.append(f"{name} was not seen: it was placed between its neighbours")
            confidence[name] = 0.0
        else:
            confidence[name] = round(one.score * sure, 3)
            if one.score < _SURE:
                notes.append(f"{name} was barely seen (score {one.score:.2f})")
        bodies.append(_body(scan, name, one))
    if len(column.groups) > len(names):
        notes.append(f"{len(column.groups) - len(names)} bodies above {names[-1]} were left out")
    prefix = f"{scan.name}: "
    return Detection(bodies[::-1], confidence, [f"{prefix}{note}." for note in notes], doubtful)


# Names ---------------------------------------------------------------------------------------------------------------


def _name(
    scan: Scan, column: Column, groups: Sequence[Group], lowest_level: str | None
) -> tuple[tuple[str, ...], float, list[str], bool]:
    """Names of a column's bodies from the bottom up, how sure their count is, notes, and if all may be off by one."""
    num_bodies = sum(one is not None and one.kind == BODY for one in column.groups)
    notes = []
    if num_bodies < _FEW_BODIES:
        notes.append(f"short field of view: {num_bodies} vertebral bodies above the sacrum")
    if lowest_level is not None:
        first = NAMES.index(lowest_level.split("-")[1])
        return NAMES[first : first + len(column.groups)], 1.0, notes, False
    if not column.has_sacrum:
        notes.append(
            "no sacrum was seen: the lowest body is taken for L5, which may be wrong; --lowest-level gives the name of "
            "the lowest disc"
        )
        return NAMES[1 : 1 + len(column.groups)], _NO_SACRUM_CONFIDENCE, notes, True
    sacrum = column.groups[0]
    assert sacrum is not None  # noqa: S101
    rival = max((_rivalry(one, column, sacrum) for one in groups), default=0.0)
    doubtful = sacrum.score < _SURE or rival > _AMBIGUOUS
    if doubtful:
        notes.append(
            f"the sacrum is doubtful (score {sacrum.score:.2f}, rival {rival:.2f}): a transitional vertebra, or levels "
            "off by one; look, and give --lowest-level"
        )
    return NAMES[: len(column.groups)], float(np.clip(sacrum.score * (1 - rival), 0, 1)), notes, doubtful


def _rivalry(one: Group, column: Column, sacrum: Group) -> float:
    """How strongly a group outside of the column says that the count begins elsewhere, in [0, 1]."""
    lowest = next((other for other in column.groups[1:] if other is not None), sacrum)
    if one.kind == BODY and one not in column.groups and _apart(one, sacrum) < SAME_PLACE_MM:
        return one.score  # S1 looks like a lumbar vertebra
    if one.kind == SACRUM and one is not sacrum and _apart(one, lowest) < SAME_PLACE_MM:
        return one.score  # L5 looks like a sacrum
    return 0.0


def _apart(one: Group, other: Group) -> float:
    return float(np.linalg.norm(one.centre - other.centre))


# Bodies --------------------------------------------------------------------------------------------------------------


def _body(scan: Scan, name: str, one: Group) -> VertebralBody:
    """A group as a body in the scan's voxels. Corners beyond the image are not known."""
    corners = one.corners / scan.spacing_mm[:2]
    outside = ((corners < -0.5) | (corners > np.array(scan.voxels.shape[:2]) - 0.5)).any(1)
    for pair in (slice(0, 2), slice(2, 4)):
        if outside[pair].any():
            corners[pair] = np.nan
    if one.kind == SACRUM:
        corners[2:] = np.nan
    run = one.run()
    looked_at = slices_to_see(scan)
    step = looked_at[1] - looked_at[0] if len(looked_at) > 1 else 1
    first, stop = max(0, run[0] - step // 2), min(scan.voxels.shape[2], run[-1] + (step + 1) // 2)
    return VertebralBody(name, corners, (first, max(stop, first + 1)))


def _between(column: Column, place: int) -> Group:
    """A body that was stepped over, halfway between its neighbours."""
    below, above = column.groups[place - 1], column.groups[place + 1]
    assert below is not None  # noqa: S101
    assert above is not None  # noqa: S101
    lower = below.corners[[0, 1]]
    share = 0.22  # of the way from endplate to endplate that a disc takes
    way = above.corners[[3, 2]] - lower
    corners = np.concatenate([lower + (1 - share) * way, (lower + share * way)[::-1]])
    made = Group(BODY, above.support)
    for index, seen in above.members.items():
        made.members[index] = type(seen)(BODY, 0.0, corners.mean(0), corners)
    return made


# Refusals ------------------------------------------------------------------------------------------------------------


def _refuse_other_sizes(scan: Scan, column: Column) -> None:
    lengths = [
        np.linalg.norm(one.corners[1] - one.corners[0]) for one in column.groups if one is not None and one.kind == BODY
    ]
    if lengths and not _ENDPLATE_MM[0] <= np.median(lengths) <= _ENDPLATE_MM[1]:
        raise SpinejaxError(
            f"{scan.name}: endplates of {np.median(lengths):.0f} mm were found, expected {_ENDPLATE_MM[0]:.0f} to "
            f"{_ENDPLATE_MM[1]:.0f}: not a lumbar spine, or a wrong pixel spacing."
        )


def _refuse_turned(variables: dict[str, Any], scan: Scan) -> None:
    """Look at the middle slice upside down, back to front and both: a surer sacrum there means a wrong header.

    The column tells little: bodies pass for bodies upside down, too, and so do sacral segments.
    """
    middle = scan.voxels.shape[2] // 2
    image = normalise(resample(scan.voxels[:, :, middle], scan.spacing_mm[:2]))
    turns = {"upside down": image[::-1], "back to front": image[:, ::-1], "turned by 180°": image[::-1, ::-1]}
    here, *turned = (best_column(group([found], [middle])) for found in see_images(variables, [image, *turns.values()]))
    own = 0.0 if here is None else max(here.score, 0.0)
    least_sacrum = max(_sacrum_score(here) + _TURNED_MARGIN, _TURNED_SACRUM)
    least_column = own - _TURNED_COLUMN
    for name, other in zip(turns, turned, strict=True):
        if other is not None and _sacrum_score(other) > least_sacrum and other.score > least_column:
            raise SpinejaxError(
                f"{scan.name}: it looks {name}: a spine with its sacrum is seen only when the image is turned. Correct "
                "its orientation."
            )


def _sacrum_score(column: Column | None) -> float:
    """The score of a column's sacrum, 0 if it has none."""
    lowest = column.groups[0] if column is not None else None
    return float(lowest.score) if lowest is not None and lowest.kind == SACRUM else 0.0


def check_level(lowest_level: str | None) -> None:
    """Raises SpinejaxError if `--lowest-level` is not a disc's name."""
    if lowest_level not in (None, *LEVELS):
        raise SpinejaxError(f"--lowest-level {lowest_level}: expected one of {', '.join(LEVELS)}.")
