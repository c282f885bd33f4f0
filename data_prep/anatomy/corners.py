"""The four corners of a roughly four-sided piece of a mask.

Straight lines are fitted to the piece's two endplates and two walls, in mm; the corners are where they cross. The lines
are repeated medians (Siegel), which are right while fewer than half of an edge's points are off: Schmorl nodes,
osteophytes and ragged masks move them little. In a wedge fracture the lines are simply not parallel.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.stats import siegelslopes

_ENDPLATE_PART = 0.75  # part of the width that is used: osteophytes grow on the rims
_WALL_PART = 0.7  # part of the height that is used


class DoubtfulError(Exception):
    """A structure whose corners would be nonsense, and why. `bodies_from_spider_mask` catches it."""


def fit_corners_mm(
    piece: Bool[np.ndarray, "h w"], down_mm: Float[np.ndarray, "2"], spacing: Float[np.ndarray, "2"], kind: str
) -> Float[np.ndarray, "4 2"]:
    """Fit the corners of a piece.

    Args:
        piece, spacing: its pixels, and the spacing of rows and columns in mm.
        down_mm: a first guess of its downward direction (row, column), corrected by the endplates that are found.
        kind: "body"; "cut body", whose upper edge is the image's and has no meaning; or "disc". The walls of the last
            two are too low for lines, and are assumed to be at right angles to the endplates.

    Returns:
        (row, column) in mm from the centre of the piece's pixel (0, 0): upper anterior, upper posterior, lower
        posterior, lower anterior.

    Raises:
        DoubtfulError: the piece is too small or too irregular for lines.
    """
    centre_mm = np.argwhere(piece).mean(0) * spacing
    if not down_mm.any():  # a piece without neighbours
        down_mm = np.array([1.0, 0.0])
    for _ in range(2):
        down = _unit(down_mm)
        back = np.array([-down[1], down[0]])
        corners = _quadrilateral(*_straightened(piece, centre_mm, down, back, spacing), kind=kind)
        corners = centre_mm + corners @ np.stack([down, back])
        along = _unit(corners[2] - corners[3])
        if kind != "cut body":
            along += _unit(corners[1] - corners[0])
        down_mm = np.array([along[1], -along[0]])
    return corners


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


def _quadrilateral(fullness: np.ndarray, axis: np.ndarray, *, kind: str) -> np.ndarray:
    """The corners, (down, back) in mm: intersections of lines fitted to the four edges."""
    front, rear = _edges(fullness.T, axis)
    top, bottom = _edges(fullness, axis)
    thickness = bottom - top
    # A column counts if it is at least half as high as is typical, so spurs in front and behind do not.
    counted = np.nan_to_num(thickness) > np.nanmedian(thickness) / 2
    columns = _central(counted, _ENDPLATE_PART)
    endplates = [_line(axis[columns], edge[columns]) for edge in (top, bottom)]
    breadth = rear - front
    rows = _central(np.nan_to_num(breadth) > np.nanmedian(breadth) / 2, _WALL_PART)
    if kind == "body":
        walls = [_line(axis[rows], edge[rows]) for edge in (front, rear)]
    elif kind == "cut body":  # if the cut is oblique, only the lower half is whole
        walls = [(0.0, np.median(edge[(rows.start + rows.stop) // 2 : rows.stop])) for edge in (front, rear)]
    else:
        walls = [(0.0, axis[counted][end]) for end in (0, -1)]
    upper, lower, anterior, posterior = *endplates, *walls
    pairs = ((upper, anterior), (upper, posterior), (lower, posterior), (lower, anterior))
    return np.array([_intersection(endplate, wall) for endplate, wall in pairs])


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
