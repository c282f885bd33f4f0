"""The four corners of a roughly four-sided piece of a mask.

Straight lines are fitted to the piece's two endplates and two walls, in mm; the corners are where they cross. The lines
are repeated medians (Siegel), which are right while fewer than half of an edge's points are off: Schmorl nodes,
osteophytes and ragged masks move them little. Fractures need more. In a wedge the lines are not parallel, and a low
wall is fitted between its own ends only. An endplate that is sunk in its middle has its rims' line: that line touches
the edge in front of its middle and behind.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.stats import siegelslopes

_ENDPLATE_PART = 0.75  # part of the width that is used: osteophytes grow on the rims
_WALL_PART = 0.7  # part of the height that is used

# Rims that stand out from a flat endplate are osteophytes. A sunken endplate is bent: its middle spreads about its
# median line, from the 10th to the 90th percentile, by this part of its depth below the line of its rims.
_BENT = 0.36
_MIN_SPAN = 0.5  # part of the width between two rims
# A bent endplate is fractured, and its corners are its rims', if its median depth is above the first, or that of both
# endplates of the body above the second. The 29 SPIDER stacks of docs/data.md have up to 3.8 mm, and 2.6 in both.
_SUNK_MM = 3.9
_BOTH_SUNK_MM = 2.75
_SHARED_ROWS = 0.5  # a wall that has less than this part of the usual rows is low: the median of those misleads


class DoubtfulError(Exception):
    """A structure whose corners would be nonsense, and why. `bodies_from_spider_mask` catches it."""


def fit_corners_mm(
    piece: Bool[np.ndarray, "h w"], down_mm: Float[np.ndarray, "2"], spacing: Float[np.ndarray, "2"], kind: str
) -> tuple[Float[np.ndarray, "4 2"], Float[np.ndarray, "2 2"]]:
    """Fit the corners of a piece.

    Args:
        piece, spacing: its pixels, and the spacing of rows and columns in mm.
        down_mm: a first guess of its downward direction (row, column), corrected by the endplates that are found.
        kind: "body"; "cut body", whose upper edge is the image's and has no meaning; or "disc". The walls of the last
            two are too low for lines, and are assumed to be at right angles to the endplates.

    Returns:
        (row, column) in mm from the centre of the piece's pixel (0, 0): upper anterior, upper posterior, lower
        posterior, lower anterior; and by how many mm the middles of the upper and the lower endplate are below their
        rims, and their deepest parts.

    Raises:
        DoubtfulError: the piece is too small or too irregular for lines.
    """
    centre_mm = np.argwhere(piece).mean(0) * spacing
    if not down_mm.any():  # a piece without neighbours
        down_mm = np.array([1.0, 0.0])
    for last in (False, True):
        down = _unit(down_mm)
        back = np.array([-down[1], down[0]])
        corners, sunk_mm = _quadrilateral(*_straightened(piece, centre_mm, down, back, spacing), kind=kind, rims=last)
        corners = centre_mm + corners @ np.stack([down, back])
        along = _unit(corners[2] - corners[3])
        if kind != "cut body":
            along += _unit(corners[1] - corners[0])
        down_mm = np.array([along[1], -along[0]])
    return corners, sunk_mm


def across_mm(piece: Bool[np.ndarray, "h w"], spacing: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    """The direction (row, column), in mm, across a long piece: the axis along which it spreads least."""
    return np.linalg.eigh(np.cov((np.argwhere(piece) * spacing).T))[1][:, 0]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _straightened(
    piece: np.ndarray, centre_mm: np.ndarray, down: np.ndarray, back: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The piece on a fine grid along its own directions: how full each point is, in [0, 1], and the grid's mm."""
    step, reach = spacing.min() / 1.5, 0.6 * np.hypot(*(piece.shape * spacing))
    axis = np.arange(-reach, reach, step)
    matrix = np.stack([down, back], axis=1) * step / spacing[:, None]
    offset = centre_mm / spacing - matrix @ np.full(2, reach / step)
    fullness = ndimage.affine_transform(
        piece.astype(np.float32), matrix, offset, (len(axis), len(axis)), order=1, mode="grid-constant"
    )
    return fullness, axis


def _quadrilateral(fullness: np.ndarray, axis: np.ndarray, *, kind: str, rims: bool) -> tuple[np.ndarray, np.ndarray]:
    """The corners, (down, back) in mm: intersections of lines fitted to the four edges; and how far endplates sank."""
    front, rear = _edges(fullness.T, axis)
    top, bottom = _edges(fullness, axis)
    thickness = bottom - top
    # A column counts if it is at least half as high as is typical, so spurs in front and behind do not.
    counted = np.nan_to_num(thickness) > np.nanmedian(thickness) / 2
    columns = _central(counted, _ENDPLATE_PART)
    endplates = [_line(axis[columns], edge[columns]) for edge in (top, bottom)]
    sunk_mm = np.zeros((2, 2))
    if kind == "body" and rims:
        filled = fullness.sum(0)  # without the space between two spurs
        at_rims = counted & (filled > np.median(filled[counted]) / 2)
        endplates, sunk_mm = _at_rims(endplates, axis, (top, bottom), at_rims)
    breadth = rear - front
    rows = _central(np.nan_to_num(breadth) > np.nanmedian(breadth) / 2, _WALL_PART)
    if kind == "body":
        ends = np.nanpercentile(front[rows], 5), np.nanpercentile(rear[rows], 95)
        walls = [_wall(axis, edge, end, rows, endplates) for edge, end in zip((front, rear), ends, strict=True)]
    elif kind == "cut body":  # if the cut is oblique, only the lower half is whole
        walls = [(0.0, np.median(edge[(rows.start + rows.stop) // 2 : rows.stop])) for edge in (front, rear)]
    else:
        walls = [(0.0, axis[counted][end]) for end in (0, -1)]
    upper, lower, anterior, posterior = *endplates, *walls
    pairs = ((upper, anterior), (upper, posterior), (lower, posterior), (lower, anterior))
    return np.array([_intersection(endplate, wall) for endplate, wall in pairs]), sunk_mm


def _at_rims(
    lines: list[tuple[float, float]], axis: np.ndarray, edges: tuple, counted: np.ndarray
) -> tuple[list[tuple[float, float]], np.ndarray]:
    """The endplates' lines, those of sunken ones replaced by their rims' lines; and how deep each is, in mm."""
    rims, depth_mm, deepest_mm, bent = list(lines), np.zeros(2), np.zeros(2), np.zeros(2, bool)
    columns = _central(counted, _ENDPLATE_PART)
    for place, (edge, outward, (slope, level)) in enumerate(zip(edges, (-1, 1), lines, strict=True)):
        known = counted & np.isfinite(edge)
        if (rim := _rims_line(axis[known], edge[known], outward)) is not None:
            x, y = axis[columns], edge[columns]
            rims[place], depth_mm[place] = rim, np.nanmedian(outward * (rim[0] * x + rim[1] - y))
            deepest_mm[place] = np.nanpercentile(outward * (rim[0] * x + rim[1] - y), 95)
            bent[place] = np.diff(np.nanpercentile(y - slope * x - level, [10, 90]))[0] >= _BENT * depth_mm[place]
    both = (bent & (depth_mm >= _BOTH_SUNK_MM)).all()
    sunk = bent & ((depth_mm >= _SUNK_MM) | both)
    return [rim if is_sunk else line for line, rim, is_sunk in zip(lines, rims, sunk, strict=True)], np.stack(
        [depth_mm, deepest_mm]
    )


def _rims_line(x: np.ndarray, y: np.ndarray, outward: int) -> tuple[float, float] | None:
    """(slope, intercept) of the line that touches an edge from outside on both sides of its middle; None if it bulges.

    Of all lines through a point on either side, it passes the middle furthest outward.
    """
    middle = (x[0] + x[-1]) / 2
    before, behind = np.flatnonzero(x < middle), np.flatnonzero(x > middle)
    slopes = (y[behind] - y[before, None]) / (x[behind] - x[before, None])
    heights = outward * (y[before, None] + slopes * (middle - x[before, None]))
    first, last = np.unravel_index(np.argmax(heights), heights.shape)
    start, end = before[first], behind[last]
    if x[end] - x[start] < _MIN_SPAN * (x[-1] - x[0]):
        return None
    slope = float(slopes[first, last])
    return slope, float(y[start] - slope * x[start])


def _wall(
    axis: np.ndarray, edge: np.ndarray, end: float, rows: slice, endplates: list[tuple[float, float]]
) -> tuple[float, float]:
    """The line of a wall; of a low one, as in a wedge, from the rows between the endplates there."""
    upper, lower = (slope * end + level for slope, level in endplates)
    own = (axis > upper) & (axis < lower)
    if own[rows].mean() < _SHARED_ROWS:
        if np.sum(own) * _WALL_PART < 6:
            return 0.0, float(end)
        rows = _central(own, _WALL_PART)
    return _line(axis[rows], edge[rows])


def _edges(fullness: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where fullness crosses one half first and last in each column, in mm; NaN in empty columns."""
    step = axis[1] - axis[0]

    def first_crossing(values):
        index = np.argmax(values >= 0.5, axis=0)
        here = np.take_along_axis(values, index[None], 0)[0]
        before = np.take_along_axis(values, np.maximum(index - 1, 0)[None], 0)[0]
        found = (here >= 0.5) & (index > 0)
        fraction = np.divide(here - 0.5, here - before, out=np.zeros_like(here), where=found)
        return np.where(found, (index - fraction) * step, np.nan)

    return axis[0] + first_crossing(fullness), axis[-1] - first_crossing(fullness[::-1])


def _central(inside: np.ndarray, part: float) -> slice:
    """The middle `part` of the range that a mask spans."""
    where = np.flatnonzero(inside)
    if len(where) < 4:
        raise DoubtfulError("a mask of a few pixels, too small for corners")
    trim = (where[-1] + 1 - where[0]) * (1 - part) / 2
    return slice(round(where[0] + trim), round(where[-1] + 1 - trim))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the repeated-median line through the points that are known."""
    known = np.isfinite(y)
    if known.sum() < 4:
        raise DoubtfulError("an edge of a few pixels, too short for a line")
    slope, intercept = siegelslopes(y[known], x[known])
    return float(slope), float(intercept)


def _intersection(endplate: tuple[float, float], wall: tuple[float, float]) -> tuple[float, float]:
    """(down, back) where `down = m·back + b` (an endplate) meets `back = m·down + b` (a wall); a line is (m, b)."""
    crossing = 1 - endplate[0] * wall[0]
    if abs(crossing) < 0.1:
        raise DoubtfulError("an endplate and a wall that are nearly parallel")
    back = (wall[0] * endplate[1] + wall[1]) / crossing
    return endplate[0] * back + endplate[1], back
