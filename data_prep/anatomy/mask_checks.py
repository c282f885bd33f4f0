"""Faults of a mask that its labels do not show: islands far from the spine, and voxels flipped against the scan."""

from collections.abc import Mapping, Set

import numpy as np
from jaxtyping import Shaped, UInt8
from scipy import ndimage

from data_prep.anatomy.vertebrae import CANAL, DISC_BELOW, LAST_VERTEBRA, SACRUM, boxes_of
from data_prep.read.scan import Scan

_FAR_MM = 36.0  # in the plane, between the boxes of two pieces; a spinous process is up to 20 mm behind its body
_ISLAND = 0.2  # a far piece below this part of the largest's size is an island
_BETTER = 1.25  # factor by which a flipped mask has to explain the image better; 29 SPIDER stacks, flipped, have 0.97
_BEHIND = 0.52  # where a vertebra's centre is from front to back; 0.43 at most, as a median, in 29 SPIDER stacks
_FLIPS = {"upside down": 0, "back to front": 1, "from right to left": 2}


def without_islands(mask: Scan, *, whole: Set[int] = frozenset(), names: Mapping[int, str]) -> tuple[Scan, list[str]]:
    """A mask without what is far from the spine, and notes on it.

    A small piece far from the rest of its label is removed. Where a label has two large ones, either could be meant: it
    is removed from the mask, unless it is one of `whole`. `names` are for the notes.
    """
    voxels, notes = mask.voxels, []
    for label, box in boxes_of(mask.voxels):
        part = voxels[box] == label
        counts = part.sum(2)  # distances are in the plane, and pieces, too
        pieces, number = ndimage.label(counts, np.ones((3, 3)))
        if number < 2:
            continue
        sizes = np.bincount(pieces.ravel(), counts.ravel()).astype(int)[1:]
        places = ndimage.find_objects(pieces)
        far = [
            piece
            for piece, place in enumerate(places)
            if _apart_mm(place, places[int(np.argmax(sizes))], mask.spacing_mm) > _FAR_MM
        ]
        if not far:
            continue
        what = f"label {label}" + (f" ({names[label]})" if label in names else "")
        if voxels is mask.voxels:
            voxels = mask.voxels.copy()
        large = [piece for piece in far if sizes[piece] >= _ISLAND * sizes.max()]
        if not large:
            voxels[box][np.isin(pieces, [piece + 1 for piece in far])] = 0
            notes.append(f"{sizes[far].sum()} voxels of {what} far from its others were left out.")
        elif label in whole:
            notes.append(f"{what} is doubtful: it is in two places, more than {_FAR_MM:.0f} mm apart.")
        else:
            voxels[box][part] = 0
            notes.append(f"{what} was left out: it is in two places, more than {_FAR_MM:.0f} mm apart.")
    return Scan(voxels, mask.affine, mask.name), [f"{mask.name}: {note}" for note in notes]


def _apart_mm(one: tuple[slice, ...], other: tuple[slice, ...], spacing_mm: np.ndarray) -> float:
    """The distance between two boxes in the plane of the slices; 0 if they overlap there."""
    gaps = [max(a.start - b.stop, b.start - a.stop, 0) for a, b in zip(one[:2], other[:2], strict=True)]
    return float(np.hypot(*(gaps * spacing_mm[:2])))


def flipped(scan: Scan, mask: Scan) -> str:
    """How a mask, in SPIDER's labels, has to be flipped to fit its scan, in words; "" if it fits as it is.

    A mask fits if its structures explain the differences of intensity: by the share of the variance that is between
    them, around the spine. Vertebrae alone do not: "" for a mask without a canal.
    """
    if not (mask.voxels == CANAL).any():
        return ""
    table = np.zeros(256, np.uint8)
    table[1:CANAL], table[CANAL + 1 : SACRUM + 1], table[CANAL], table[DISC_BELOW + 1 :] = 1, 1, 2, 3
    kinds, image = table[mask.voxels[::3, ::3]], scan.voxels[::3, ::3]  # a ninth of the pixels is enough
    as_it_is = _explained(image, kinds)
    better = {name: _explained(image, np.flip(kinds, axis)) for name, axis in _FLIPS.items()}
    name = max(better, key=lambda name: better[name])
    return name if better[name] > max(_BETTER * as_it_is, 1e-3) else ""


def _explained(image: Shaped[np.ndarray, "H W S"], kinds: UInt8[np.ndarray, "H W S"]) -> float:
    """The part of the variance that is between structures, in the box that holds all of them."""
    rows, columns = np.flatnonzero(kinds.any((1, 2))), np.flatnonzero(kinds.any((0, 2)))
    if not len(rows):
        return 0.0
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    values = image[box].astype(float).ravel()
    values -= values.mean()
    counts = np.bincount(kinds[box].ravel())
    sums = np.bincount(kinds[box].ravel(), values)
    return float((sums**2 / np.maximum(counts, 1)).sum() / max((values**2).sum(), 1e-30))


def is_back_to_front(mask: Scan) -> bool:
    """Whether vertebrae, labelled with their arches, have most of their volume behind: in SPIDER's labels."""
    centres = []
    for label, box in boxes_of(mask.voxels):
        if label <= LAST_VERTEBRA:
            columns = (mask.voxels[box] == label).sum((0, 2))
            centres.append(np.average(np.arange(len(columns)) + 0.5, weights=columns) / len(columns))
    return bool(centres) and float(np.median(centres)) > _BEHIND
