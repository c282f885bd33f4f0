"""Masks of several segmentation tools, converted to one convention: SPIDER's, with one more label for the sacrum.

If a tool has no label for the spinal canal, posterior elements are separated from bodies by the shape of each vertebra
(`posterior_wall.py`).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from data_prep.anatomy.posterior_wall import posterior_elements
from data_prep.anatomy.segment_names import segments_by_name
from data_prep.anatomy.vertebrae import CANAL, DISC_BELOW, LAST_VERTEBRA, POSTERIOR, SACRUM, SPIDER_VERTEBRAE
from data_prep.read.csv_tables import some
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS

_NAMES = tuple(SPIDER_VERTEBRAE)  # L5 first
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
    "spineps": Convention(
        vertebrae=_SPINEPS,
        discs={name: 100 + label for name, label in _SPINEPS.items()},
        sacrum=26,
        others={*range(1, 16), 27, *range(101, 116), *range(126, 128), *range(201, 229)},
        needed={*range(116, 126)},
    ),
    # github.com/wasserth/TotalSegmentator, task vertebrae_mr, saved with --ml.
    "totalsegmentator": Convention(vertebrae=_upwards(2), sacrum=1, others={*range(11, 26)}, needed={1, 2}),
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
    own = _convention_of(names, present, mask.name) if names and convention is None else None
    if convention is None and own is None:
        fitting = [name for name, tool in CONVENTIONS.items() if present <= tool.labels and present & tool.needed]
        if names and fitting == ["totalsegmentator"]:  # by small numbers alone, which segments have anyway
            named = some([names[label] for label in sorted(names)])
            raise SpinejaxError(
                f"{mask.name}: its segments are named {named}, which tells no vertebrae. Name them L5, L4, … and "
                "sacrum, or name the tool of its labels with --convention."
            )
        if len(fitting) != 1:
            found = f"could be of {' or '.join(fitting)}" if fitting else f"fits none of {', '.join(CONVENTIONS)}"
            raise SpinejaxError(
                f"{mask.name}: with its labels {shown} it {found}. Name its tool with --convention, or give --corners."
            )
        (convention,) = fitting
    tool = own or CONVENTIONS[convention or ""]
    known = {name: label for name, label in tool.vertebrae.items() if label in present}
    if len(known) + (tool.sacrum in present) < 2:
        raise SpinejaxError(
            f"{mask.name}: {len(known)} vertebrae from T9 down by {convention}'s labels, expected two or more; its "
            f"labels are {shown}. Is it a mask of {convention}? Choose with --convention."
        )
    labels, notes = (mask.voxels, []) if convention == "spider" else _relabel(mask, tool, known)
    if lowest_level is not None:
        labels = _count_from(labels, lowest_level, mask.name)
    if not (labels == CANAL).any():
        labels = np.where(posterior_elements(labels, mask.spacing_mm), np.uint8(POSTERIOR), labels)
    return Scan(labels, mask.affine, mask.name), notes


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
    numbers = sorted(SPIDER_VERTEBRAE[name] for name in known if name in SPIDER_VERTEBRAE)
    if numbers and numbers != list(range(numbers[0], numbers[-1] + 1)):
        notes.append(f"{mask.name}: a vertebra is missing between {', '.join(known)}: the numbering is doubtful.")
    return table[mask.voxels], notes


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
