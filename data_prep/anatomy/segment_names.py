"""What the segments of a segmentation are, by their names, as people and tools give them in 3D Slicer.

Their numbers say nothing: Slicer counts segments from 1 in the order in which they were made.
"""

import re
from collections.abc import Mapping
from typing import Literal

Kind = Literal["vertebra", "disc", "sacrum", "canal"]

_LEVEL = re.compile(r"(?<![A-Z])(?:([TL])H?0?(\d{1,2})|(S)0?1)(?!\d)")
_SECOND = re.compile(r"(?<![A-Z])[TL]H?0?\d{1,2}[\s_/-]+(?:\d{1,2}|S(?:0?1)?)(?!\d)")  # L4/5, L5-S
_DISC = re.compile(r"DIS[CK]|\bIVD|INTERVERTEBRAL")
_CANAL = re.compile(r"CANAL|CORD|THECAL|DURAL")
_OTHER = re.compile(r"POSTERIOR|ARCH|PROCESS|PEDICLE|LAMINA|NERVE|ROOT|RIB|ENDPLATE|MUSCLE|LIGAMENT|FACET")


def segments_by_name(names: Mapping[int, str]) -> dict[tuple[Kind, str], list[int]]:
    """Kind of structure and name of the vertebra, or of the one above the disc → the labels of its segments.

    Args:
        names: label → the segment's name, such as "L4", "vertebrae_L4", "L4-L5", "disc L4/5", "Sacrum", "spinal canal".

    Returns:
        What is recognised; segments with other names, and posterior elements, are not.
    """
    found: dict[tuple[Kind, str], list[int]] = {}
    for label, name in names.items():
        text = name.upper().replace("_", " ")
        levels = [f"{match[1] or match[3]}{match[2] or 1}" for match in _LEVEL.finditer(text)]
        if _OTHER.search(text):
            continue
        structure: tuple[Kind, str] | None = None
        if levels and levels[0][0] != "S" and (len(levels) == 2 or _SECOND.search(text) or _DISC.search(text)):
            structure = "disc", levels[0]
        elif len(levels) == 1 and levels[0][0] != "S":
            structure = "vertebra", levels[0]
        elif levels == ["S1"] or "SACRUM" in text:
            structure = "sacrum", "S1"
        elif _CANAL.search(text):
            structure = "canal", ""
        if structure:
            found.setdefault(structure, []).append(label)
    return found
