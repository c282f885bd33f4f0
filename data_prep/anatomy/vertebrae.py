"""Vertebral bodies: four corners and a slice range of each vertebra's body in a scan."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage
from scipy.spatial import ConvexHull

from data_prep.anatomy.corners import DoubtfulError, across_mm, fit_corners_mm
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError


@dataclass(frozen=True, eq=False)
class VertebralBody:
    """One vertebra's body in a scan's voxel coordinates (pixel centres at integers).

    The corners are (row, column) in its mid slice: upper anterior, upper posterior, lower posterior, lower anterior.
    Unknown ones are NaN: the sacrum's lower ones, the upper ones of a body cut by the field of view.
    """

    name: str
    corners: Float[np.ndarray, "4 2"]
    slices: tuple[int, int]  # first and one past the last that shows most of the body's largest area

    @property
    def mid_slice(self) -> float:
        """The middle of the body's slices: on a slice, or halfway between two."""
        return (self.slices[0] + self.slices[1] - 1) / 2


NAMES = ("S1", "L5", "L4", "L3", "L2", "L1", "T12", "T11", "T10", "T9")  # from the sacrum up

# SPIDER's labels: vertebrae from the bottom, the disc below vertebra v is 200 + v, a vertebra cut by the field of view
# is 100 + v. The sacrum has none.
SPIDER_VERTEBRAE = {name: label for label, name in enumerate(NAMES) if label}
LAST_VERTEBRA = 25
CANAL = 100
DISC_BELOW = 200
SACRUM = 150  # our own label: SPIDER has none for the sacrum, other tools do
POSTERIOR = 151  # our own, for posterior elements in a mask without a canal
_PARTIAL = range(101, 126)

# Only slices that show this fraction of a structure's largest area count: its flanks, and remains of a pedicle, show
# less. With a lower threshold the flank of a body that leaves the stack of slices, in scoliosis, would be treated as
# its middle.
_SUBSTANTIAL = 0.7


def bodies_from_spider_mask(mask: Scan) -> tuple[list[VertebralBody], list[str]]:
    """Find the vertebral bodies of a mask in SPIDER's convention.

    SPIDER does not label the sacrum: S1's upper corners are the ends of the lower edge of disc 201, its lower corners
    are NaN. The same holds for any unlabelled vertebra below the lowest disc. If there is no such disc but a sacrum
    (`SACRUM`), its own upper edge is used.

    Args:
        mask: of integers. Each vertebra's label includes its posterior elements.

    Returns:
        The bodies from the top down, and a note on every vertebra of the mask that was left out, with the reason, or
        that is doubtful because its middle may be outside the stack of slices.

    Raises:
        SpinejaxError: the mask has no spinal canal, or fewer than two bodies are found.
    """
    voxels, spacing = body_labels(mask), mask.spacing_mm[:2]
    seen = {label: _structure(voxels, label, box, spacing) for label, box in boxes_of(voxels) if label != CANAL}
    lowest_disc = min((label for label in seen if label > DISC_BELOW), default=None)
    lost = [
        label for label, _ in boxes_of(mask.voxels) if label < DISC_BELOW and label not in (*seen, CANAL, POSTERIOR)
    ]
    bodies, sunk_mm = [], dict[str, np.ndarray]()
    reasons = {_name(label): "no part of it is in front of the canal" for label in lost}
    for label in sorted(seen):
        try:
            if label == SACRUM:
                if DISC_BELOW + 1 not in seen:
                    bodies.append(_sacrum_by_itself(seen))
            elif label == lowest_disc and label - DISC_BELOW - 1 not in seen:
                bodies.append(_below_lowest_disc(label, seen))
            elif label < DISC_BELOW and _name(label) in SPIDER_VERTEBRAE:
                bodies.append(_body(label, seen, sunk_mm))
            elif label < DISC_BELOW:
                raise DoubtfulError("it is above T9 and not graded")
        except DoubtfulError as doubt:
            reasons[_name(label)] = str(doubt)
    short = _short(bodies, spacing)
    bodies = [body for body in bodies if body.name not in short]
    notes = [f"{mask.name}: {name} was left out: {reason}." for name, reason in (reasons | short).items()]
    doubts = _cut_sideways(bodies, voxels.shape[2], float(mask.spacing_mm[2])) + _sunken(sunk_mm)
    doubts += _without_top(bodies, seen)
    notes += [f"{mask.name}: {doubt}" for doubt in doubts]
    if len(bodies) < 2:
        raise SpinejaxError(
            f"{mask.name}: {len(bodies)} usable vertebral bodies, expected two or more. {' '.join(notes)} "
            "Is it a SPIDER mask (vertebrae 1 to 25 from the bottom, canal 100, discs from 201)?"
        )
    return sorted(bodies, key=lambda body: NAMES.index(body.name), reverse=True), notes


# Structures ----------------------------------------------------------------------------------------------------------


def body_labels(mask: Scan) -> Integer[np.ndarray, "H W S"]:
    """The mask's voxels with the posterior elements of every vertebra set to zero; canal and discs are kept.

    Posterior elements have their own label (`POSTERIOR`), or a vertebra's body is the part in front of the canal. If a
    slice shows no canal at some height (beside the midline the pedicles close it off), the nearest slice's is used; if
    no slice does, the nearest heights'.

    Raises:
        SpinejaxError: the mask has no canal.
    """
    voxels = mask.voxels.copy()
    if (posterior := voxels == POSTERIOR).any():
        voxels[posterior] = 0
        return voxels
    front = _canal_front(mask)
    columns = np.arange(voxels.shape[1])
    for label, box in boxes_of(voxels):
        if label <= LAST_VERTEBRA or label in _PARTIAL or label == SACRUM:
            part = voxels[box]
            behind = columns[None, box[1], None] >= front[box[0], None, box[2]]
            part[(part == label) & behind] = 0
    return voxels


def _canal_front(mask: Scan) -> Float[np.ndarray, "H S"]:
    """The column where the canal begins at each row of each slice, inferred where it is not seen."""
    canal = mask.voxels == CANAL
    seen = canal.any(1)
    rows = np.flatnonzero(seen.any(1))
    if not len(rows):
        raise SpinejaxError(f"{mask.name}: no spinal canal (label {CANAL}), which separates bodies from arches.")
    front = np.argmax(canal, axis=1).astype(float)
    slices = np.arange(front.shape[1])
    for row in rows:
        here = np.flatnonzero(seen[row])
        nearest = here[np.argmin(abs(slices[:, None] - here), axis=1)]
        front[row] = front[row, nearest]
    every_row = np.arange(len(front))
    return np.stack([np.interp(every_row, rows, column) for column in front[rows].T], axis=1)


def boxes_of(voxels: Integer[np.ndarray, "H W S"]) -> list[tuple[int, tuple[slice, ...]]]:
    """Each label of a mask with the box that contains it."""
    return [(label, box) for label, box in enumerate(ndimage.find_objects(voxels), start=1) if box is not None]


@dataclass(frozen=True, eq=False)
class _Structure:
    """The largest piece of a structure in the middle of the slices that show a good part of it."""

    piece: np.ndarray
    corner: np.ndarray  # the scan's pixel at the piece's pixel (0, 0)
    spacing: np.ndarray
    slices: tuple[int, int]
    cut_by: set[str]  # the edges of the image that it touches

    @property
    def centre_mm(self) -> np.ndarray:
        return (self.corner + np.argwhere(self.piece).mean(0)) * self.spacing

    @property
    def top_mm(self) -> float:
        """Distance of its highest pixel from the image's upper edge."""
        return float((self.corner[0] + np.argwhere(self.piece)[0, 0]) * self.spacing[0])

    def is_cut_at_top(self) -> bool:
        """Whether the upper edge of the image cuts it. Raises DoubtfulError if another edge does."""
        if self.cut_by - {"top"}:
            raise DoubtfulError("it is cut by the edge of the image")
        return "top" in self.cut_by

    def body(self, label: int, corners_mm: np.ndarray) -> VertebralBody:
        """The body with these corners, of which the lower two may be missing."""
        corners = np.concatenate([corners_mm, np.full((4 - len(corners_mm), 2), np.nan)])
        return VertebralBody(_name(label), self.corner + corners / self.spacing, self.slices)


def _structure(voxels: np.ndarray, label: int, box: tuple[slice, ...], spacing: np.ndarray) -> _Structure:
    part = voxels[box] == label
    areas = part.sum((0, 1))
    runs, _ = ndimage.label(areas >= _SUBSTANTIAL * areas.max())
    inside = np.flatnonzero(runs == runs[np.argmax(areas)])
    first, stop = int(inside[0]), int(inside[-1]) + 1
    pieces, _ = ndimage.label(part[:, :, (first + stop - 1) // 2])
    largest = 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    rows, columns, slices = box
    edges = {"top": rows.start == 0, "side": columns.start == 0 or columns.stop == voxels.shape[1]}
    # An image may end within the sacrum.
    edges["bottom"] = rows.stop == voxels.shape[0] and label != SACRUM
    return _Structure(
        piece=pieces == largest,
        corner=np.array([rows.start, columns.start]),
        spacing=spacing,
        slices=(slices.start + first, slices.start + stop),
        cut_by={edge for edge, touches in edges.items() if touches},
    )


# Corners -------------------------------------------------------------------------------------------------------------

_LENGTH_MM = (15.0, 70.0)  # from the front to the back of an endplate
_HEIGHT_MM = (1.5, 60.0)  # the front wall of a crushed body can nearly vanish; the tallest lumbar body has 40
_MIN_LENGTH_RATIO = 0.6  # to the scan's median endplate length; T9's are about 0.75
_FLANK_MM = 12.0  # nearly half the width of a small body, 27 mm
_SACRUM_DEPTHS_MM = (25.0, 18.0, 14.0, 12.0)  # thinner as the upper edge's direction becomes known
_NEAR_TOP_MM, _LOW = 5.0, 0.3  # a body so near to the image's upper edge, and so low for its length, is cut by it
_DENT_MM = 2.6  # a dent so much deeper than the scan's others moves the endplate's line at its rims by 2 mm or more
_DEEP_MM = 2.3  # an endplate so much deeper below its rims than the scan's others is fractured or has osteophytes
_AREA_RATIO = (0.75, 1.3)  # the four corners' area against the mask's


def _body(label: int, seen: dict[int, _Structure], sunk_mm: dict[str, np.ndarray]) -> VertebralBody:
    """A vertebra's body; only the lower corners of one that the upper edge of the image cuts."""
    if seen[label].is_cut_at_top() or label in _PARTIAL:
        return _fit_body(label, seen, "cut body", sunk_mm)
    if any(label < other <= LAST_VERTEBRA for other in seen):
        return _fit_body(label, seen, "body", sunk_mm)
    try:  # masks of cut bodies may end short of the image
        body = _fit_body(label, seen, "body", sunk_mm)
    except DoubtfulError:
        return _fit_body(label, seen, "cut body", sunk_mm)
    corners_mm = body.corners * seen[label].spacing
    length_mm, height_mm = np.linalg.norm(corners_mm[[1, 3]] - corners_mm[0], axis=1)
    if corners_mm[:2, 0].min() < _NEAR_TOP_MM and height_mm < _LOW * length_mm:
        return _fit_body(label, seen, "cut body", sunk_mm)
    return body


def _fit_body(label: int, seen: dict[int, _Structure], kind: str, sunk_mm: dict[str, np.ndarray]) -> VertebralBody:
    body, number = seen[label], label % 100
    above = _first_of(seen, (DISC_BELOW + number + 1, number + 1, label))
    below = _first_of(seen, (DISC_BELOW + number, number - 1, label))
    corners, depths_mm = fit_corners_mm(body.piece, below.centre_mm - above.centre_mm, body.spacing, kind)
    lengths = np.linalg.norm(np.diff(corners, axis=0, append=corners[:1]), axis=1)
    _require(_LENGTH_MM, lengths[[0, 2]], "endplates", "mm long")
    _require(
        _HEIGHT_MM,
        lengths[[1, 3]],
        "walls",
        "mm high",
        "two vertebrae under one label, and names above it wrong by one",
    )
    area, mask_area = _area(corners), body.piece.sum() * body.spacing.prod()
    if depths_mm.any():  # the corners' rims enclose more than the mask
        mask_area = np.clip(area, mask_area, ConvexHull(np.argwhere(body.piece) * body.spacing).volume)
    _require(_AREA_RATIO, [area / mask_area], "area", "times its mask's")
    if kind == "cut body":
        corners[:2] = np.nan
    sunk_mm[_name(label)] = depths_mm
    return body.body(label, corners)


def _below_lowest_disc(label: int, seen: dict[int, _Structure]) -> VertebralBody:
    """The upper corners of the vertebra below the lowest disc, from the disc's lower edge."""
    disc = seen[label]
    if disc.is_cut_at_top():
        raise DoubtfulError("the disc above it is cut by the upper edge of the image")
    above = _first_of(seen, (label - DISC_BELOW, label + 1, label))
    # If L5 has slipped forward, the line to it does not show the disc's direction; the disc's own length does.
    down = across_mm(disc.piece, disc.spacing)
    down = down if down @ (disc.centre_mm - above.centre_mm) >= 0 else -down
    ends = fit_corners_mm(disc.piece, down, disc.spacing, "disc")[0][[3, 2]]
    _require(_LENGTH_MM, [np.linalg.norm(ends[1] - ends[0])], "endplate", "mm long")
    return disc.body(label, ends)


def _sacrum_by_itself(seen: dict[int, _Structure]) -> VertebralBody:
    """S1's upper corners from the part of the sacrum's mask just below its upper edge."""
    sacrum = seen[SACRUM]
    if sacrum.is_cut_at_top():
        raise DoubtfulError("it is cut by the upper edge of the image")
    down_mm = sacrum.centre_mm - _first_of(seen, (1, 2, SACRUM)).centre_mm
    pixels = np.argwhere(sacrum.piece)
    for depth_mm in _SACRUM_DEPTHS_MM:
        along = pixels @ (sacrum.spacing * down_mm / np.linalg.norm(down_mm))
        slab = np.zeros_like(sacrum.piece)
        slab[tuple(pixels[along <= np.percentile(along, 1) + depth_mm].T)] = True
        corners, _ = fit_corners_mm(slab, down_mm, sacrum.spacing, "disc")
        back = corners[1] - corners[0]
        down_mm = np.array([back[1], -back[0]])
    _require(_LENGTH_MM, [np.linalg.norm(back)], "endplate", "mm long")
    return sacrum.body(SACRUM, corners[:2])


def _short(bodies: list[VertebralBody], spacing: np.ndarray) -> dict[str, str]:
    """Name → reason, for bodies with an endplate far shorter than is typical of the scan."""
    sides = np.array([body.corners[[1, 2]] - body.corners[[0, 3]] for body in bodies]).reshape(-1, 2, 2) * spacing
    lengths_mm = np.linalg.norm(sides, axis=2)
    typical_mm = np.nanmedian(lengths_mm) if bodies else 0.0
    return {
        body.name: f"its endplate is {np.nanmin(pair_mm):.0f} mm long, {typical_mm:.0f} mm is typical of this scan: "
        "its middle may be outside the slices"
        for body, pair_mm in zip(bodies, lengths_mm, strict=True)
        if np.nanmin(pair_mm) < _MIN_LENGTH_RATIO * typical_mm
    }


def _cut_sideways(bodies: list[VertebralBody], num_slices: int, slice_mm: float) -> list[str]:
    """Notes on bodies of which the stack shows one flank only, as in scoliosis: those are not the middle's corners."""
    flanks = [(body, (body.slices[1] - body.slices[0]) * slice_mm) for body in bodies]
    return [
        f"{body.name} is doubtful: only {seen_mm:.0f} mm of its width are seen, in the "
        f"{'first' if body.slices[0] == 0 else 'last'} slices, so its middle may be outside them."
        for body, seen_mm in flanks
        if (body.slices[0] == 0) != (body.slices[1] == num_slices) and seen_mm < _FLANK_MM
    ]


def _without_top(bodies: list[VertebralBody], seen: dict[int, _Structure]) -> list[str]:
    """Notes on bodies that were fitted as if the image's upper edge cut them, although it is not near."""
    structures = {_name(label): one for label, one in seen.items() if label < DISC_BELOW and label != SACRUM}
    tops_mm = {
        body.name: one.top_mm
        for body in bodies
        if np.isnan(body.corners[:2]).all() and (one := structures.get(body.name))
    }
    return [
        f"{name} is doubtful: only its lower edge is known, and the image goes on for {top_mm:.0f} mm above it: a "
        "fracture, or its mask is not whole."
        for name, top_mm in tops_mm.items()
        if top_mm > _NEAR_TOP_MM
    ]


def _sunken(sunk_mm: dict[str, np.ndarray]) -> list[str]:
    """Notes on endplates that are further below their rims than is typical of the scan: the middle, or some part."""
    if not sunk_mm:
        return []
    typical_mm = np.median([*sunk_mm.values()], axis=(0, 2))
    notes = []
    for name, depths_mm in sunk_mm.items():
        for which, depth in zip(("upper", "lower"), depths_mm.T, strict=True):
            middle, part = depth - typical_mm >= (_DEEP_MM, _DENT_MM)
            if middle or part:
                notes.append(
                    f"{name} is doubtful: {'the middle' if middle else 'a part'} of its {which} endplate is "
                    f"{depth[0 if middle else 1]:.0f} mm below its rims, {typical_mm[0 if middle else 1]:.0f} mm is "
                    "typical of this scan: a fracture, a Schmorl's node, or osteophytes."
                )
    return notes


def _name(label: int) -> str:
    """A vertebra's name; a disc stands for the vertebra below it."""
    number = 0 if label == SACRUM else label - DISC_BELOW - 1 if label > DISC_BELOW else label % 100
    return NAMES[number] if number < len(NAMES) else f"vertebra {number} from the bottom"


def _first_of(seen: dict[int, _Structure], labels: tuple[int, ...]) -> _Structure:
    return next(seen[label] for label in labels if label in seen)


def _require(bounds: tuple[float, float], values, what: str, unit: str, too_much: str = "") -> None:
    wrong = [value for value in values if not bounds[0] <= value <= bounds[1]]
    if wrong:
        why = f": {too_much}" if too_much and wrong[0] > bounds[1] else ""
        raise DoubtfulError(f"its {what} would be {wrong[0]:.1f} {unit}, expected {bounds[0]:g} to {bounds[1]:g}{why}")


def _area(corners: np.ndarray) -> float:
    """A polygon's area (shoelace formula), negative if front and back, or top and bottom, are swapped."""
    rows, cols = corners.T
    return 0.5 * float(np.sum(cols * np.roll(rows, -1) - np.roll(cols, -1) * rows))
