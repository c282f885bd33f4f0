"""From a scan to its named vertebral bodies, each with a confidence, and notes on what is doubtful."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.anatomy.body_size import USUAL_DEPTH_MM
from data_prep.anatomy.vertebrae import NAMES, VertebralBody
from data_prep.detector.candidates import BODY, SACRUM, Candidate, Group, group, see, see_images, slices_to_see
from data_prep.detector.chain import SAME_PLACE_MM, Column, best_column, columns, margin
from data_prep.detector.doubt import MAX_DOUBT, MAX_MARGIN, Calibration, Evidence
from data_prep.detector.endplates import second_look
from data_prep.detector.grid import alone, normalise, resample
from data_prep.detector.weights import BODIES, ENDPLATES, SHIPPED, load, provenance
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

_ENDPLATE_MM = (23.0, 55.0)  # median over a scan; cervical ones have 14 to 20
_LEAST_ENDPLATE_MM = 20.0  # above a sure sacrum, where no cervical spine is: a child's, or pixels larger than stated
_MIN_BODIES = 2
_FEW_BODIES = 4
_SURE = 0.5
_DISC_SHARE = 0.22  # height of a disc, as a fraction of the distance between a missing body's neighbours
_TURNED_SACRUM = 0.55  # least score of a sacrum that is seen in a turned image
_TURNED_MARGIN = 0.15  # by which it must exceed the score of the sacrum in the image itself
_TURNED_COLUMN = 8.0  # by which the column there may be worse
_CENTRAL = 7  # slices that all networks look at


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in a scan."""

    bodies: list[VertebralBody]  # from the top down
    confidence: Mapping[str, float]  # name → confidence in that body's position and name, in [0, 1]
    notes: list[str]  # what is doubtful, one sentence each
    doubt: float = 0.0  # the probability that the levels are wrong
    doubtful_levels: bool = False  # that probability is above the greatest allowed
    # Of bodies that were seen, by name: 90 % of corners are right within twice this, because their estimates differ so.
    corner_mm: Mapping[str, float] = field(default_factory=dict)
    spread_mm: Mapping[str, float] = field(default_factory=dict)
    evidence: Evidence | None = None  # what the levels were decided by; None if they are given, or no sacrum was seen


def detect(
    scan: Scan,
    *,
    lowest_level: str | None = None,
    max_doubt: float = MAX_DOUBT,
    weights: Path = SHIPPED,
    member: int | None = None,
) -> Detection:
    """Find the vertebral bodies of a sagittal lumbar scan and name them from the sacrum up.

    Args:
        scan: of one slice or more.
        lowest_level: the name of the lowest disc, one of `LEVELS`, if the others are to be counted from it.
        max_doubt: the probability of wrong levels above which they count as doubtful.
        weights: of the networks.
        member: the only one of them to use, for a patient whom the others have learned from.

    Raises:
        SpinejaxError: no column of bodies is found, they are not of a lumbar spine's size, or the image is turned.
    """
    members = load(weights) if member is None else [load(weights)[member]]
    bodies_nets, endplate_nets = ([one[of] for one in members] for of in (BODIES, ENDPLATES))
    calibration = Calibration.of(provenance(weights), member)
    groups = _groups(bodies_nets, scan)
    alternatives = columns(groups)
    column = max(alternatives, key=lambda one: one.score, default=None)
    _refuse_turned(bodies_nets[:1], scan)
    num_sure = 0 if column is None else sum(one is not None and one.score >= _SURE for one in column.groups)
    if column is None or num_sure < _MIN_BODIES or column.score < 0:
        raise SpinejaxError(
            f"{scan.name}: no column of vertebral bodies was found. Is it a sagittal lumbar scan? If so, mark its "
            "bodies in a corner file (--corners)."
        )
    small = _refuse_other_sizes(scan, column)
    names, evidence, notes = _name(column, groups, alternatives, lowest_level)
    notes += small
    column = second_look(endplate_nets, scan, column)
    doubt = calibration.level_doubt(evidence) if lowest_level is None else 0.0
    if evidence is not None and doubt > max_doubt:
        notes.append(
            f"its levels may be off by one, with a probability of {doubt:.0%}: the sacrum's score is "
            f"{evidence.sacrum:.2f}, another count is {evidence.margin:.1f} behind (a transitional vertebra?); look at "
            "the scan and give --lowest-level"
        )
    bodies, confidence, spread_mm = [], {}, {}
    for place, (name, one) in enumerate(zip(names, column.groups, strict=False)):
        confidence[name] = 0.0 if one is None else round(one.score * (1 - doubt), 3)
        if one is None:
            one = _between(column, place)
            notes.append(f"{name} was not seen: it was placed between its neighbours")
        else:
            spread_mm[name] = round(one.spread_mm, 2)
            if one.score < _SURE:
                notes.append(f"{name} was barely seen (score {one.score:.2f})")
        bodies.append(_body(scan, name, one))
    if len(column.groups) > len(names):
        notes.append(f"{len(column.groups) - len(names)} bodies above {names[-1]} were left out")
    notes = [f"{scan.name}: {note}." for note in notes]
    corner_mm = {name: round(calibration.corner_mm(spread), 2) for name, spread in spread_mm.items()}
    return Detection(bodies[::-1], confidence, notes, doubt, doubt > max_doubt, corner_mm, spread_mm, evidence)


def _groups(members: Sequence[dict[str, Any]], scan: Scan) -> list[Group]:
    """The bodies in a scan: the first network looks at all slices, the others at those in the middle of the column.

    Corners are taken from these, and five networks on every slice would take five times as long.
    """
    indices = slices_to_see(scan)
    found = dict(zip(indices, see(members[:1], scan, indices), strict=True))
    column = best_column(group(list(found.values()), indices))
    if len(members) > 1 and column is not None:
        central = _central_slices(column, indices)
        found |= dict(zip(central, see(members, scan, central), strict=True))
    return group(list(found.values()), indices)


def _central_slices(column: Column, indices: Sequence[int]) -> list[int]:
    """The slices nearest to the middles of a column's bodies, at most `_CENTRAL` of them."""
    middles = [np.mean(one.run()) for one in column.groups if one is not None]
    by_distance = sorted(indices, key=lambda index: (np.median(np.abs(np.subtract(middles, index))), index))
    return sorted(by_distance[:_CENTRAL])


def _name(
    column: Column, groups: Sequence[Group], alternatives: Sequence[Column], lowest_level: str | None
) -> tuple[tuple[str, ...], Evidence | None, list[str]]:
    """Names of a column's bodies from the bottom up, what their count was decided by, and notes."""
    num_bodies = sum(one is not None and one.kind == BODY for one in column.groups)
    notes = []
    if num_bodies < _FEW_BODIES:
        notes.append(f"short field of view: {num_bodies} vertebral bodies above the sacrum")
    if lowest_level is not None:
        first = NAMES.index(lowest_level.split("-")[1])
        return NAMES[first : first + len(column.groups)], None, notes
    sacrum = column.sacrum
    if sacrum is None:
        notes.append(
            "no sacrum was seen: the lowest body is named L5, which may be wrong; --lowest-level gives the name of the "
            "lowest disc"
        )
        return NAMES[1 : 1 + len(column.groups)], None, notes
    rival = max((_rivalry(one, column, sacrum) for one in groups), default=0.0)
    evidence = Evidence(min(margin(column, alternatives), MAX_MARGIN), sacrum.score, rival)
    return NAMES[: len(column.groups)], evidence, notes


def _rivalry(one: Group, column: Column, sacrum: Group) -> float:
    """How strongly a group outside of the column suggests that the count begins elsewhere, in [0, 1]."""
    lowest = next((other for other in column.groups[1:] if other is not None), sacrum)
    other = lowest if one.kind == SACRUM else sacrum  # L5 may look like a sacrum, and S1 like a lumbar vertebra
    near = np.linalg.norm(one.centre - other.centre) < SAME_PLACE_MM
    return one.score if near and one not in column.groups else 0.0


def _body(scan: Scan, name: str, one: Group) -> VertebralBody:
    """A group as a body in the scan's voxels. An endplate with a corner outside the image is unknown."""
    corners = one.corners / scan.spacing_mm[:2]
    outside = ((corners < -0.5) | (corners > np.array(scan.voxels.shape[:2]) - 0.5)).any(1)
    for pair in (slice(0, 2), slice(2, 4)):
        if outside[pair].any():
            corners[pair] = np.nan
    if one.kind == SACRUM:
        corners[2:] = np.nan
    run, used = one.run(), slices_to_see(scan)
    step = used[1] - used[0] if len(used) > 1 else 1
    first, stop = max(0, run[0] - step // 2), min(scan.voxels.shape[2], run[-1] + (step + 1) // 2)
    return VertebralBody(name, corners, (first, max(stop, first + 1)))


def _between(column: Column, place: int) -> Group:
    """A skipped body, halfway between its neighbours."""
    below, above = column.groups[place - 1], column.groups[place + 1]
    assert below is not None and above is not None  # noqa: PT018, S101
    lower = below.corners[[0, 1]]
    way = above.corners[[3, 2]] - lower
    corners = np.concatenate([lower + (1 - _DISC_SHARE) * way, (lower + _DISC_SHARE * way)[::-1]])
    made = Candidate(BODY, 0.0, corners.mean(0), corners)
    return Group(BODY, above.support, dict.fromkeys(above.members, made))


def _refuse_other_sizes(scan: Scan, column: Column) -> list[str]:
    """Refuse bodies that are not of a lumbar spine's size. Small ones above a sure sacrum are only noted."""
    bodies = [one.corners for one in column.groups if one is not None and one.kind == BODY]
    length_mm = np.median([np.linalg.norm(corners[1] - corners[0]) for corners in bodies])
    least, most = _ENDPLATE_MM
    if least <= length_mm <= most:
        return []
    if _LEAST_ENDPLATE_MM <= length_mm < least and _sacrum_score(column) >= _SURE:
        return [f"endplates of {length_mm:.1f} mm are small: a child's, or the pixel spacing is wrong"]
    raise SpinejaxError(
        f"{scan.name}: endplates of {length_mm:.1f} mm were found, expected {least:.0f} to {most:.0f}: not a lumbar "
        f"spine, or a wrong pixel spacing. With spacings × {USUAL_DEPTH_MM / length_mm:.2g} they would be "
        f"{USUAL_DEPTH_MM:.0f} mm."
    )


def _refuse_turned(members: Sequence[dict[str, Any]], scan: Scan) -> None:
    """Search the middle slice upside down, back to front and both: a more certain sacrum there means a wrong header.

    The column alone says little: bodies and sacral segments look like bodies upside down, too.
    """
    middle = scan.voxels.shape[2] // 2
    image = normalise(resample(scan.voxels[:, :, middle], scan.spacing_mm[:2]))
    turns = {"upside down": image[::-1], "back to front": image[:, ::-1], "turned by 180°": image[::-1, ::-1]}
    upright, *turned = (
        best_column(group([found], [middle]))
        for found in see_images(members, [alone(each) for each in (image, *turns.values())])
    )
    least_sacrum = max(_sacrum_score(upright) + _TURNED_MARGIN, _TURNED_SACRUM)
    least_column = (0.0 if upright is None else max(upright.score, 0.0)) - _TURNED_COLUMN
    for name, other in zip(turns, turned, strict=True):
        if other is not None and _sacrum_score(other) > least_sacrum and other.score > least_column:
            raise SpinejaxError(
                f"{scan.name}: it looks {name}: a spine with its sacrum is seen only when the image is turned. Correct "
                "its orientation."
            )


def _sacrum_score(column: Column | None) -> float:
    return 0.0 if column is None or column.sacrum is None else column.sacrum.score
