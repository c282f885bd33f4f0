"""Masks of several segmentation tools, converted to one convention: SPIDER's, with one more label for the sacrum.

If a tool has no label for the spinal canal, posterior elements are separated from bodies by the shape of each vertebra
(`posterior_wall.py`).
"""

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from data_prep.anatomy.mask_checks import is_back_to_front, without_islands
from data_prep.anatomy.posterior_wall import posterior_elements
from data_prep.anatomy.segment_names import segments_by_name
from data_prep.anatomy.vertebrae import CANAL, DISC_BELOW, LAST_VERTEBRA, POSTERIOR, SACRUM, SPIDER_VERTEBRAE, boxes_of
from data_prep.read.csv_tables import some
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS

_NAMES = tuple(SPIDER_VERTEBRAE)  # L5 first
_MAX_PIECES = 4  # of two vertebrae in one slice: their bodies and spinous processes
# A sacrum is larger than L5 in its middle slice; without S2, it still has no spinous process as far behind as L5's.
_SACRUM_AREA, _SACRUM_DEPTH = 1.2, 0.7
_SURPLUS = ("T13", "L6")  # vertebrae that some people have; no level is named after them


@dataclass(frozen=True)
class Convention:
    """One tool's labels."""

    vertebrae: Mapping[str, int]  # name → label, which posterior elements may share
    others: Set[int]  # not used, but may be present
    needed: Set[int]  # a mask of this tool has at least one of them, and other tools do not use them
    discs: Mapping[str, int] = field(default_factory=dict)  # name of the vertebra above → label
    canal: Sequence[int] = ()  # and its contents
    sacrum: int | None = None

    @property
    def labels(self) -> set[int]:
        """All labels that a mask of this tool may have; 0 is background."""
        return {*self.vertebrae.values(), *self.discs.values(), *self.canal, self.sacrum or 0, *self.others}


def _upwards(lowest: int) -> dict[str, int]:
    return {name: lowest + place for place, name in enumerate(_NAMES)}


_TOTALSPINESEG = dict(zip(_NAMES, (45, 44, 43, 42, 41, 32, 31, 30, 29), strict=True)) | {"L6": 46}
_SPINEPS = dict(zip(_NAMES, (24, 23, 22, 21, 20, 19, 18, 17, 16), strict=True)) | {"L6": 25, "T13": 28}

CONVENTIONS = {
    # van der Graaf et al. 2024: counted from the bottom, whatever the lowest vertebra is.
    "spider": Convention(
        vertebrae=_upwards(1),
        discs=_upwards(201),
        canal=(CANAL,),
        others={*range(10, 26), *range(101, 126), *range(210, 226)},
        needed={CANAL},
    ),
    # github.com/neuropoly/totalspineseg, list of classes.
    "totalspineseg": Convention(
        vertebrae=_TOTALSPINESEG,
        discs=dict(zip(_NAMES, (100, 95, 94, 93, 92, 91, 82, 81, 80), strict=True)),
        canal=(1, 2),
        sacrum=50,
        others={*range(11, 18), *range(21, 29), *range(60, 80), 96},
        needed={*range(41, 47)},
    ),
    # github.com/Hendrik-code/spineps, vertebra masks (seg-vert): discs are 100, endplates 200 above their vertebra.
    # Without its labelling model, SPINEPS numbers vertebrae from the top: see `_disorder`.
    "spineps": Convention(
        vertebrae=_SPINEPS,
        discs={name: 100 + label for name, label in _SPINEPS.items()},
        sacrum=26,
        others={*range(1, 16), 27, *range(101, 116), *range(126, 128), *range(201, 229)},
        needed={*range(20, 25), *range(116, 126)},  # without discs, these are VerSe's labels, too
    ),
    # github.com/wasserth/TotalSegmentator, task vertebrae_mr, saved with --ml.
    "totalsegmentator": Convention(vertebrae=_upwards(2), sacrum=1, others={*range(11, 26)}, needed={1, 2}),
}

# Masks that name no vertebrae, or name them otherwise: their labels, and what to give instead.
_NOT_READ = {
    "a binary mask": ({1}, "a mask with a label for each vertebra"),
    "classes of structures, as of nnU-Net": ({1, 2, 3}, "a mask with a label for each vertebra"),
    "TotalSpineSeg's step 1": ({*range(1, 10)}, "its step2_output"),
    "TotalSpineSeg's step2_raw": ({*range(1, 15)}, "its step2_output"),
    "TotalSpineSeg's of 2024": ({*range(18, 42), 92, *range(200, 225)}, "the output of a newer version"),
    "SPINEPS's seg-spine": ({26, *range(41, 51), *range(60, 63), 100}, "its seg-vert"),
    "SPINEPS's seg-vert without its labelling model": (
        {*range(1, 30), *range(101, 130), *range(201, 230)},
        "a mask made with that model, or --lowest-level to count the vertebrae",
    ),
    "TotalSegmentator's for CT": ({*range(25, 51)}, "a mask of its task vertebrae_mr, saved with --ml"),
}


def _convention_of(names: Mapping[int, str], present: Set[int], where: str) -> Convention | None:
    """The labels of one file by the names of its segments; None if they name no two vertebrae."""
    found = segments_by_name({label: name for label, name in names.items() if label in present})
    for (kind, name), labels in found.items():
        if len(labels) > 1 and kind != "canal":
            raise SpinejaxError(
                f"{where}: its segments {' and '.join(repr(names[label]) for label in labels)} are both taken for the "
                f"{kind} {name}. Rename or remove one."
            )
    of_kind = {kind: {name: labels[0] for (own, name), labels in found.items() if own == kind} for kind, _ in found}
    vertebrae, sacrum = of_kind.get("vertebra", {}), of_kind.get("sacrum", {})
    if len(vertebrae) + len(sacrum) < 2:
        return None
    canal = found.get(("canal", ""), [])
    return Convention(vertebrae, set(), set(), of_kind.get("disc", {}), canal, sacrum.get("S1"))


def to_spider(
    mask: Scan, convention: str | None, lowest_level: str | None, names: Mapping[int, str] | None = None
) -> tuple[Scan, list[str]]:
    """A tool's mask in SPIDER's convention, and notes on what is doubtful.

    Args:
        mask: of uint8.
        convention: one of `CONVENTIONS`; None to recognise it by its labels.
        lowest_level: the name of the mask's lowest disc, one of `LEVELS`, if the levels are to be counted from it; None
            for the mask's own names. SPIDER's masks have none and are counted from L5-S1.
        names: label → name of the segment, if the file has names. Those that name vertebrae are used without a
            `convention`, and a segment with any other name is not used.

    Raises:
        SpinejaxError: the mask fits no convention, or several; it has fewer than two vertebrae; levels cannot be
            counted from `lowest_level`.
    """
    present = set(np.flatnonzero(np.bincount(mask.voxels.ravel())).tolist()) - {0}
    shown = some([str(label) for label in sorted(present)], 12) or "none at all"
    tool = _convention_of(names, present, mask.name) if names and convention is None else None
    if tool is None and convention is not None:
        tool = CONVENTIONS[convention]
    if tool is None:
        fitting = {
            name: _disorder(mask, tool, present) or _no_sacrum(mask, name, present)
            for name, tool in CONVENTIONS.items()
            if present <= tool.labels and present & tool.needed
        }
        if names and [*fitting] == ["totalsegmentator"]:  # by small numbers alone, which segments have anyway
            named = some([names[label] for label in sorted(names)])
            raise SpinejaxError(
                f"{mask.name}: its segments are named {named}, which tells no vertebrae. Name them L5, L4, … and "
                "sacrum, or name the tool of its labels with --convention."
            )
        possible = [name for name, wrong in fitting.items() if not wrong]
        if len(possible) == 1:
            (convention,) = possible
            tool = CONVENTIONS[convention]
        elif possible or lowest_level is None or (tool := _counted(mask, present)) is None:
            raise SpinejaxError(f"{mask.name}: with its labels {shown} it {_unknown(present, fitting)}")
    elif wrong := _disorder(mask, tool, present):
        whose = f"{convention}'s" if convention else "what its segments are named"
        raise SpinejaxError(f"{mask.name}: with its labels {shown} it is not {whose}: {wrong}.")
    names_of = {label: f"the disc below {name}" for name, label in tool.discs.items()}
    names_of |= {label: name for name, label in tool.vertebrae.items()}
    mask, islands = without_islands(mask, whole=frozenset({*tool.canal, tool.sacrum or 0}), names=names_of)
    present = set(np.unique(mask.voxels).tolist()) - {0}
    known = {name: label for name, label in tool.vertebrae.items() if label in present}
    if len(known) + (tool.sacrum in present) < 2:
        raise SpinejaxError(
            f"{mask.name}: {len(known)} vertebrae from T9 down by {convention}'s labels, expected two or more; its "
            f"labels are {shown}. Is it a mask of {convention}? Choose with --convention."
        )
    labels, notes = (mask.voxels, []) if convention == "spider" else _relabel(mask, tool, known)
    notes += islands + _gaps(mask.name, known)
    if lowest_level is not None:
        labels = _count_from(labels, lowest_level, mask.name)
    if not (labels == CANAL).any():
        if is_back_to_front(Scan(labels, mask.affine, mask.name)):
            raise SpinejaxError(f"{mask.name}: its vertebrae have their arches in front: it is flipped back to front.")
        labels = np.where(posterior_elements(labels, mask.spacing_mm), np.uint8(POSTERIOR), labels)
    return Scan(labels, mask.affine, mask.name), notes


def _unknown(present: set[int], fitting: Mapping[str, str]) -> str:
    """What is said of a mask that is not of exactly one tool; `fitting` has tools and why it is not theirs, if so."""
    possible = [name for name, wrong in fitting.items() if not wrong]
    if possible:
        return f"could be of {' or '.join(possible)}. Name its tool with --convention, or give --corners."
    hints = [f"It is not {name}'s: {wrong}." for name, wrong in fitting.items()]
    fewest = sorted(_NOT_READ.items(), key=lambda item: len(item[1][0]))
    hints += [f"Is it {what}? Give {wanted}." for what, (labels, wanted) in fewest if present <= labels][:1]
    none = f"fits none of {', '.join(CONVENTIONS)}. Name its tool with --convention, or give --corners."
    return " ".join([none, *hints] if present else [none])


def _rows_and_pieces(mask: Scan, labels: Sequence[int]) -> tuple[list[float], list[int]]:
    """The middle row of each label, and its number of pieces in the slice that shows most of it.

    Pieces of less than half the size of the largest do not count.
    """
    boxes = dict(boxes_of(mask.voxels))
    rows, pieces = [], []
    for label in labels:
        part = mask.voxels[boxes[label]] == label
        counts = part.sum(1)
        rows.append(boxes[label][0].start + float(np.average(np.arange(len(counts)), weights=counts.sum(1))))
        sizes = _piece_sizes(part[:, :, np.argmax(counts.sum(0))])
        pieces.append(int(np.sum(sizes >= sizes.max() / 2)))
    return rows, pieces


def _piece_sizes(plane: np.ndarray) -> np.ndarray:
    return np.bincount(ndimage.label(plane)[0].ravel(), minlength=2)[1:]


def _disorder(mask: Scan, tool: Convention, present: set[int]) -> str:
    """Why the labels cannot be this tool's by where they are; "" if they can: its vertebrae have to go down."""
    downwards = [(name, tool.vertebrae[name]) for name in reversed(_NAMES) if tool.vertebrae.get(name) in present]
    if tool.sacrum in present:
        downwards.append(("the sacrum", tool.sacrum or 0))
    rows, pieces = _rows_and_pieces(mask, [label for _, label in downwards])
    below = [
        f"{upper} ({label}) would be below {lower} ({other})"
        for ((upper, label), row), ((lower, other), next_row) in itertools.pairwise(zip(downwards, rows, strict=True))
        if row >= next_row
    ]
    if len(below) == len(downwards) - 1 and below:
        return (
            f"{below[-1]}: it is upside down, or numbered from the other end, as by SPINEPS without its labelling model"
        )
    if below:
        return below[0]
    if tool is CONVENTIONS["spineps"] and 1 in present and not present & {23, 24, 25}:
        return (
            "it begins with 1, C1, and has neither L4 nor L5: SPINEPS without its labelling model counts from the top"
        )
    crowd = [f"label {label} is in {n}" for (_, label), n in zip(downwards, pieces, strict=True) if n > _MAX_PIECES]
    return f"{crowd[0]} pieces, a class and no vertebra" if crowd else ""


def _no_sacrum(mask: Scan, convention: str, present: set[int]) -> str:
    """Why the lowest label cannot be a sacrum by its size; "" if it can.

    TotalSegmentator's labels are those of masks that only count from the bottom: 1, 2, 3, … In both 1 is the lowest.
    """
    if convention != "totalsegmentator" or not {1, 2} <= present:
        return ""
    boxes = dict(boxes_of(mask.voxels))
    (_, columns, slices), (_, columns_above, slices_above) = boxes[1], boxes[2]
    sacrum, above = (
        _piece_sizes(mask.voxels[:, :, (where.start + where.stop) // 2] == label).max()
        for label, where in ((1, slices), (2, slices_above))
    )
    as_deep = columns.stop - columns.start >= _SACRUM_DEPTH * (columns_above.stop - columns_above.start)
    if sacrum >= _SACRUM_AREA * above or not as_deep or (mask.voxels[-1] == 1).any():
        return ""
    return (
        "label 1 is as large as 2 and is a vertebra, so its numbers only count (--lowest-level names the lowest disc)"
    )


def _counted(mask: Scan, present: set[int]) -> Convention | None:
    """The convention of a mask whose vertebrae are only numbered, from either end, with SPINEPS's discs or without.

    None if its labels, or their order, are others.
    """
    vertebrae = sorted(label for label in present if label < 30 and label != 26)
    if not present <= {*vertebrae, 26, *(100 + label for label in range(30)), *(200 + label for label in range(30))}:
        return None
    steps = np.sign(np.diff(_rows_and_pieces(mask, vertebrae)[0]))
    if len(vertebrae) < 2 or abs(steps.sum()) < len(steps):
        return None
    # Labels above 200 are SPINEPS's endplates only where its discs are. SPIDER has its discs there.
    num_discs = sum(100 + label in present for label in vertebrae)
    if max(present) > 200 and num_discs < len(vertebrae) - 2:
        return None
    upwards = vertebrae if steps[0] < 0 else vertebrae[::-1]
    named = dict(zip(_NAMES, upwards, strict=False))
    discs = {name: 100 + label for name, label in named.items()}
    return Convention(vertebrae=named, discs=discs, sacrum=26, others=present, needed=set())


def _relabel(mask: Scan, tool: Convention, known: Mapping[str, int]) -> tuple[np.ndarray, list[str]]:
    """The mask's voxels with SPIDER's labels. Levels next to a surplus vertebra have no name and are left out."""
    table = np.zeros(256, np.uint8)
    table[list(tool.canal)] = CANAL
    surplus = [name for name in _SURPLUS if name in known]
    for name in _NAMES:
        if name in tool.vertebrae:
            table[tool.vertebrae[name]] = SPIDER_VERTEBRAE[name]
        if name in tool.discs:
            table[tool.discs[name]] = DISC_BELOW + SPIDER_VERTEBRAE[name]
    if tool.sacrum is not None:
        table[tool.sacrum] = SACRUM
    if "L6" in surplus:  # the disc below L5 is not L5-S1
        table[[tool.sacrum or 0, tool.discs.get("L5", 0)]] = 0
    if "T13" in surplus:  # the disc below T12 is not T12-L1
        table[[tool.vertebrae[name] for name in _NAMES if name[0] == "T" and name in tool.vertebrae]] = 0
        table[[tool.discs[name] for name in _NAMES if name[0] == "T" and name in tool.discs]] = 0
    notes = [
        f"{mask.name}: has {name}, so the numbering is doubtful; the levels beside it have no name and are left out."
        for name in surplus
    ]
    return table[mask.voxels], notes


def _gaps(name: str, known: Mapping[str, int]) -> list[str]:
    """A note if a vertebra is missing between others."""
    numbers = sorted(SPIDER_VERTEBRAE[vertebra] for vertebra in known if vertebra in SPIDER_VERTEBRAE)
    if not numbers or numbers == list(range(numbers[0], numbers[-1] + 1)):
        return []
    return [f"{name}: a vertebra is missing between {', '.join(known)}: the numbering is doubtful."]


def _count_from(labels: np.ndarray, lowest_level: str, name: str) -> np.ndarray:
    """The mask renumbered so that its lowest disc is `lowest_level`."""
    present = np.unique(labels).tolist()
    discs = [label - DISC_BELOW for label in present if label > DISC_BELOW]
    vertebrae = [label for label in present if 0 < label <= LAST_VERTEBRA]
    lowest = min(discs) if discs else 1 if SACRUM in present else min(vertebrae) + 1
    shift = len(LEVELS) - LEVELS.index(lowest_level) - lowest
    table, numbers = np.arange(256), np.arange(1, LAST_VERTEBRA + 1)
    for first in (0, 100, DISC_BELOW):
        shifted = numbers + shift
        table[first + numbers] = np.where((shifted >= 1) & (shifted <= LAST_VERTEBRA), first + shifted, 0)
    if shift and SACRUM in present:
        raise SpinejaxError(
            f"{name}: labels a sacrum, so its lowest disc is L5-S1, not --lowest-level {lowest_level}. Leave the "
            "option out, or remove the sacrum from the mask."
        )
    return table.astype(np.uint8)[labels]
