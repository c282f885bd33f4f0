"""Vertebral bodies: four corners and a slice range of each vertebra's body in a scan."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage

from data_prep.anatomy.corners import DoubtfulError, across_mm, fit_corners_mm
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError


@dataclass(frozen=True, eq=False)
class VertebralBody:
    """One vertebra's body in a scan's voxel coordinates (pixel centres at integers).

    Args:
        name: "T12", "L1", … "L5", "S1".
        corners: (row, column) in its mid slice: upper anterior, upper posterior, lower posterior, lower anterior. NaN
            where a corner is not known: the sacrum's lower ones, the upper ones of a body cut by the field of view.
        slices: first and one past the last slice that shows most of the body's largest area.
    """

    name: str
    corners: Float[np.ndarray, "4 2"]
    slices: tuple[int, int]

    @property
    def mid_slice(self) -> float:
        """The middle of the body's slices: on a slice, or halfway between two."""
        return (self.slices[0] + self.slices[1] - 1) / 2


NAMES = ("S1", "L5", "L4", "L3", "L2", "L1", "T12", "T11", "T10", "T9")
"""From the sacrum up."""

# SPIDER's labels: vertebrae from the bottom, the disc below vertebra v is 200 + v, a vertebra cut by the field of view
# is 100 + v. The sacrum has none.
SPIDER_VERTEBRAE = {name: label for label, name in enumerate(NAMES) if label}
LAST_VERTEBRA = 25
CANAL = 100
DISC_BELOW = 200
SACRUM = 150  # our own label: SPIDER has none for the sacrum, other tools do
POSTERIOR = 151  # our own, for posterior elements in a mask without a canal
_PARTIAL = range(101, 126)

# Of a structure's largest area in a slice; its sides, and the remainder of a pedicle, have less. With a lower threshold
# the flank of a body that leaves the stack of slices, in scoliosis, would be treated as its middle.
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
        that is doubtful because the stack of slices ends beside its middle.

    Raises:
        SpinejaxError: the mask has no spinal canal, or fewer than two bodies are found.
    """
    voxels = body_labels(mask)
    spacing = mask.spacing_mm[:2]
    middles = _middles(voxels, spacing)
    lowest_disc = min((label for label in middles if label > DISC_BELOW), default=None)
    bodies, reasons = [], _bodiless(mask.voxels, middles)
    for label in sorted(middles):
        try:
            if label == SACRUM:
                if DISC_BELOW + 1 not in middles:
                    bodies.append(_sacrum_by_itself(voxels, middles, spacing))
            elif label == lowest_disc and label - DISC_BELOW - 1 not in middles:
                bodies.append(_below_lowest_disc(voxels, label, middles, spacing))
            elif label < DISC_BELOW and _name(label) in SPIDER_VERTEBRAE:
                bodies.append(_body(voxels, label, middles, spacing))
            elif label < DISC_BELOW:
                raise DoubtfulError("it is above T9 and not graded")
        except DoubtfulError as doubt:
            reasons[_name(label)] = str(doubt)
    short = _short(bodies, spacing)
    bodies = [body for body in bodies if body.name not in short]
    notes = [f"{mask.name}: {name} was left out: {reason}." for name, reason in (reasons | short).items()]
    notes += [f"{mask.name}: {doubt}" for doubt in _cut_sideways(bodies, voxels.shape[2], float(mask.spacing_mm[2]))]
    if len(bodies) < 2:
        raise SpinejaxError(
            f"{mask.name}: {len(bodies)} usable vertebral bodies, expected two or more. {' '.join(notes)} "
            "Is it a SPIDER mask (vertebrae 1 to 25 from the bottom, canal 100, discs from 201)?"
        )
    return sorted(bodies, key=lambda body: NAMES.index(body.name), reverse=True), notes


# Bodies without their posterior elements -----------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Middle:
    """The slices that show a good part of a structure, and its largest piece in the middle one.

    `corner` is the scan's pixel at the piece's pixel (0, 0), `box` the structure's rows and columns in the scan.
    """

    box: tuple[slice, slice]
    piece: np.ndarray
    corner: np.ndarray
    centre_mm: np.ndarray
    slices: tuple[int, int]


def _middles(voxels: np.ndarray, spacing: np.ndarray) -> dict[int, _Middle]:
    return {label: _middle(voxels[box] == label, box, spacing) for label, box in boxes_of(voxels) if label != CANAL}


def _middle(part: np.ndarray, box: tuple[slice, ...], spacing: np.ndarray) -> _Middle:
    areas = part.sum((0, 1))
    runs, _ = ndimage.label(areas >= _SUBSTANTIAL * areas.max())
    inside = np.flatnonzero(runs == runs[np.argmax(areas)])
    first, stop = int(inside[0]), int(inside[-1]) + 1
    pieces, _ = ndimage.label(part[:, :, (first + stop - 1) // 2])
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    piece = pieces == np.argmax(sizes)
    corner = np.array([box[0].start, box[1].start])
    centre = (corner + np.argwhere(piece).mean(0)) * spacing
    return _Middle((box[0], box[1]), piece, corner, centre, (box[2].start + first, box[2].start + stop))


# Corners -------------------------------------------------------------------------------------------------------------

_LENGTH_MM = (15.0, 70.0)  # from the front to the back of an endplate
_HEIGHT_MM = (1.5, 60.0)  # the front wall of a crushed body can nearly vanish; the tallest lumbar body has 40
_LEAST_OF_TYPICAL = 0.6  # of the median endplate length in the scan; T9's are about 0.75
_FLANK_MM = 12.0  # nearly half the width of a small body, 27 mm
_SACRUM_DEPTHS_MM = (25.0, 18.0, 14.0, 12.0)  # thinner as the upper edge's direction becomes known
_AREA_RATIO = (0.75, 1.3)  # the four corners' area against the mask's


def _body(voxels: np.ndarray, label: int, middles: dict[int, _Middle], spacing: np.ndarray) -> VertebralBody:
    """A vertebra's body; only the lower corners of one that the upper edge of the image cuts."""
    if _cut_at_top(middles[label], voxels.shape) or label in _PARTIAL:
        return _fit_body(label, middles, spacing, cut=True)
    try:
        return _fit_body(label, middles, spacing, cut=False)
    except DoubtfulError:
        if any(label < other <= LAST_VERTEBRA for other in middles):
            raise
        return _fit_body(label, middles, spacing, cut=True)  # masks of cut bodies may end short of the image


def _fit_body(label: int, middles: dict[int, _Middle], spacing: np.ndarray, *, cut: bool) -> VertebralBody:
    middle, number = middles[label], label % 100
    above = _first_of(middles, (DISC_BELOW + number + 1, number + 1), middle)
    below = _first_of(middles, (DISC_BELOW + number, number - 1), middle)
    kind = "cut body" if cut else "body"
    corners = fit_corners_mm(middle.piece, below.centre_mm - above.centre_mm, spacing, kind)
    lengths = np.linalg.norm(np.diff(corners, axis=0, append=corners[:1]), axis=1)
    _require(_LENGTH_MM, lengths[[0, 2]], "endplates", "mm long")
    _require(_HEIGHT_MM, lengths[[1, 3]], "walls", "mm high")
    _require(_AREA_RATIO, [_area(corners) / (middle.piece.sum() * spacing.prod())], "area", "times its mask's")
    if cut:
        corners[:2] = np.nan
    return VertebralBody(_name(label), middle.corner + corners / spacing, middle.slices)


def _below_lowest_disc(
    voxels: np.ndarray, label: int, middles: dict[int, _Middle], spacing: np.ndarray
) -> VertebralBody:
    """The upper corners of the vertebra below the lowest disc, from the disc's lower edge."""
    disc, number = middles[label], label - DISC_BELOW
    if _cut_at_top(disc, voxels.shape):
        raise DoubtfulError("the disc above it is cut by the upper edge of the image")
    above = _first_of(middles, (number, label + 1), disc)
    # If L5 has slipped forward, the line to it does not show the disc's direction; the disc's own length does.
    down = across_mm(disc.piece, spacing)
    down = down if down @ (disc.centre_mm - above.centre_mm) >= 0 else -down
    corners = fit_corners_mm(disc.piece, down, spacing, "disc")
    _require(_LENGTH_MM, [np.linalg.norm(corners[2] - corners[3])], "endplate", "mm long")
    return _upper_edge_only(_name(label), disc, corners[[3, 2]], spacing)


def _sacrum_by_itself(voxels: np.ndarray, middles: dict[int, _Middle], spacing: np.ndarray) -> VertebralBody:
    """S1's upper corners from the part of the sacrum's mask just below its upper edge."""
    sacrum = middles[SACRUM]
    if _cut_at_top(sacrum, (voxels.shape[0] + 1, *voxels.shape[1:])):  # an image may end within the sacrum
        raise DoubtfulError("it is cut by the upper edge of the image")
    lowest = _first_of(middles, (1, 2), sacrum)
    down_mm = sacrum.centre_mm - lowest.centre_mm
    pixels = np.argwhere(sacrum.piece)
    for depth_mm in _SACRUM_DEPTHS_MM:
        along = pixels @ (spacing * down_mm / np.linalg.norm(down_mm))
        slab = np.zeros_like(sacrum.piece)
        slab[tuple(pixels[along <= np.percentile(along, 1) + depth_mm].T)] = True
        corners = fit_corners_mm(slab, down_mm, spacing, "disc")
        back = corners[1] - corners[0]
        down_mm = np.array([back[1], -back[0]])
    _require(_LENGTH_MM, [np.linalg.norm(back)], "endplate", "mm long")
    return _upper_edge_only("S1", sacrum, corners[[0, 1]], spacing)


def _upper_edge_only(name: str, middle: _Middle, ends_mm: np.ndarray, spacing: np.ndarray) -> VertebralBody:
    upper = middle.corner + ends_mm / spacing
    return VertebralBody(name, np.concatenate([upper, np.full((2, 2), np.nan)]), middle.slices)


def _short(bodies: list[VertebralBody], spacing: np.ndarray) -> dict[str, str]:
    """Name → reason, for bodies with an endplate far shorter than is typical of the scan."""
    sides = np.array([body.corners[[1, 2]] - body.corners[[0, 3]] for body in bodies]).reshape(-1, 2, 2) * spacing
    lengths_mm = np.linalg.norm(sides, axis=2)
    typical_mm = np.nanmedian(lengths_mm) if bodies else 0.0
    return {
        body.name: f"its endplate is {np.nanmin(pair_mm):.0f} mm long, {typical_mm:.0f} mm is typical of this scan: "
        "its middle may be beside the slices"
        for body, pair_mm in zip(bodies, lengths_mm, strict=True)
        if np.nanmin(pair_mm) < _LEAST_OF_TYPICAL * typical_mm
    }


def _cut_sideways(bodies: list[VertebralBody], num_slices: int, slice_mm: float) -> list[str]:
    """Notes on bodies of which the stack shows one flank only, as in scoliosis: those are not the middle's corners."""
    doubts = []
    for body in bodies:
        first, stop = body.slices
        seen_mm = (stop - first) * slice_mm
        if (first == 0) != (stop == num_slices) and seen_mm < _FLANK_MM:
            side = "first" if first == 0 else "last"
            doubts.append(
                f"{body.name} is doubtful: only {seen_mm:.0f} mm of its width are seen, in the {side} slices, "
                "so that its middle may be beside them."
            )
    return doubts


def _bodiless(voxels: np.ndarray, middles: dict[int, _Middle]) -> dict[str, str]:
    """Name → reason, for vertebrae of which the mask has posterior elements only."""
    known = {*middles, CANAL, POSTERIOR}
    lost = [label for label, _ in boxes_of(voxels) if label < DISC_BELOW and label not in known]
    return {_name(label): "no part of it is in front of the canal" for label in lost}


def _name(label: int) -> str:
    names = {label: name for name, label in SPIDER_VERTEBRAE.items()}
    if label == SACRUM or label > DISC_BELOW:  # a disc stands for the vertebra below it
        return "S1" if label in (SACRUM, DISC_BELOW + 1) else names.get(label - DISC_BELOW - 1, "a vertebra above T9")
    return names.get(label % 100, f"vertebra {label % 100} from the bottom")


def _first_of(middles: dict[int, _Middle], labels: tuple[int, ...], otherwise: _Middle) -> _Middle:
    return next((middles[label] for label in labels if label in middles), otherwise)


def _cut_at_top(middle: _Middle, shape: tuple[int, ...]) -> bool:
    """Whether the upper edge of the image cuts a piece. Raises DoubtfulError if another edge does."""
    rows, columns = middle.box
    if rows.stop == shape[0] or columns.start == 0 or columns.stop == shape[1]:
        raise DoubtfulError("it is cut by the edge of the image")
    return rows.start == 0


def _require(bounds: tuple[float, float], values, what: str, unit: str) -> None:
    wrong = [value for value in values if not bounds[0] <= value <= bounds[1]]
    if wrong:
        raise DoubtfulError(f"its {what} would be {wrong[0]:.1f} {unit}, expected {bounds[0]:g} to {bounds[1]:g}")


def _area(corners: np.ndarray) -> float:
    """A polygon's area (shoelace formula), negative if front and back, or top and bottom, are swapped."""
    rows, cols = corners.T
    return 0.5 * float(np.sum(cols * np.roll(rows, -1) - np.roll(cols, -1) * rows))
