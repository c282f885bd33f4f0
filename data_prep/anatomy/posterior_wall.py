"""Posterior elements told from vertebral bodies in a mask that has no spinal canal.

A body is a block of even height. Behind its posterior wall that height falls: to nothing where the slice passes through
the canal or a foramen, to that of a pedicle beside them. So the wall is looked for in the profile of each vertebra's
height from front to back, slice by slice, in the vertebra's own direction. Where a slice shows a gap, the wall is the
body's own edge; where a pedicle bridges it, the wall is that of the nearest slices with a gap, and only if there is
none the place where the profile falls.
"""

import numpy as np
from scipy import ndimage
from scipy.stats import siegelslopes

from data_prep.anatomy.vertebrae import LAST_VERTEBRA, SACRUM

_STEP_MM = 1.0
_DEPTH_MM = (16.0, 48.0)  # of a body, front to back
_FIRST_LOOK_MM = 26.0  # behind a row's first voxel: surely body, enough for a first centre
_BODY = 0.7  # of the greatest height in any slice: less is no body
_DROP = 0.3  # of its height is what a body loses behind its wall, at once: within
_REACH = round(6.0 / _STEP_MM)  # steps
_EMPTY = 0.12  # of its height, and less, is a gap
_STRAY_MM = 12.0  # from slice to slice of one body


def posterior_elements(house: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """bool[H, W, S]. What of each vertebra lies behind its body's posterior wall.

    Args:
        house: uint8[H, W, S]. By SPIDER's labels, of which the canal is not needed.
        spacing_mm: float64[3].
    """
    behind = np.zeros(house.shape, bool)
    boxes = {label: box for label, box in enumerate(ndimage.find_objects(house), start=1) if box is not None}
    boxes = {label: box for label, box in boxes.items() if label <= LAST_VERTEBRA or label == SACRUM}
    centres = {label: _first_centre_mm(house[box] == label, box, spacing_mm) for label, box in boxes.items()}
    for label, box in boxes.items():
        if label != SACRUM:  # its upper edge is all that is used of it
            down = _down(label, centres)
            behind[box] |= _behind(house[box] == label, down, spacing_mm)
    return behind


def _first_centre_mm(part: np.ndarray, box: tuple[slice, ...], spacing_mm: np.ndarray) -> np.ndarray:
    """(row, column), mm. The middle of what lies at the front, in the slices that show most of the vertebra."""
    areas = part.sum((0, 1))
    most = part[:, :, areas >= 0.5 * areas.max()]
    reach = round(_FIRST_LOOK_MM / spacing_mm[1])
    front = np.flatnonzero(most.any((0, 2)))[0]
    rows, columns, _ = np.nonzero(most[:, front : front + reach])
    corner = np.array([box[0].start, box[1].start + front])
    return (corner + np.array([rows.mean(), columns.mean()])) * spacing_mm[:2]


def _down(label: int, centres: dict[int, np.ndarray]) -> np.ndarray:
    """The unit vector (row, column), in mm, from the vertebra above to the one below."""
    order = sorted(centres, key=lambda other: centres[other][0])
    place = order.index(label)
    above, below = order[max(place - 1, 0)], order[min(place + 1, len(order) - 1)]
    way = centres[below] - centres[above]
    length = np.linalg.norm(way)
    return way / length if length > 0 else np.array([1.0, 0.0])


def _behind(part: np.ndarray, down: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """bool, as `part`. What lies behind the wall, in each slice."""
    rows, columns = np.indices(part.shape[:2])
    along = rows * spacing_mm[0] * down[0] + columns * spacing_mm[1] * down[1]
    back = -rows * spacing_mm[0] * down[1] + columns * spacing_mm[1] * down[0]
    origin = back.min()
    bins = ((back - origin) / _STEP_MM).astype(int)
    profiles = np.stack([np.bincount(bins[plane], minlength=bins.max() + 1) for plane in np.moveaxis(part, 2, 0)])
    profiles = ndimage.uniform_filter1d(profiles * spacing_mm[:2].prod() / _STEP_MM, 3, axis=1, mode="constant")
    lines, falls = {}, {}
    looks = [_gap_and_fall(profile) for profile in profiles]
    tallest = max(height for height, _, _ in looks)
    for index, (height, gap, fall) in enumerate(looks):
        if height < _BODY * tallest:
            continue  # a slice beside the body, with a pedicle or a process alone
        if gap is not None:
            lines[index] = (
                _wall_line(part[:, :, index], along, back, origin + gap * _STEP_MM),
                origin + gap * _STEP_MM,
            )
        if fall is not None:
            falls[index] = origin + fall * _STEP_MM
    # A facet seen alone can look like a body: its wall is not where the others' are.
    usual = np.median([place for _, place in lines.values()] or [0.0])
    lines = {index: line for index, line in lines.items() if abs(line[1] - usual) <= _STRAY_MM}
    behind = np.zeros_like(part)
    for index in range(part.shape[2]):
        if index in lines:  # the body is what lies in front of the gap
            wall = np.full_like(back, lines[index][1])
        elif lines:
            (slope, place), _ = lines[min(lines, key=lambda other: abs(other - index))]
            wall = place + slope * along
        elif index in falls:
            wall = np.full_like(back, np.median(list(falls.values())))
        else:
            continue
        behind[:, :, index] = part[:, :, index] & (back > wall)
    return behind


def _gap_and_fall(profile: np.ndarray) -> tuple[float, float | None, float | None]:
    """A body's height, in mm, and where, in steps, the first gap behind it has its middle and where its height falls.

    None where there is no gap, or no fall.
    """
    if profile.max() <= 0:
        return 0.0, None, None
    front = int(np.argmax(profile >= 0.3 * profile.max()))
    least, most = (round(depth / _STEP_MM) for depth in _DEPTH_MM)
    height = np.median(profile[front + 3 : front + least])
    drop = profile - np.append(profile[_REACH:], np.zeros(_REACH))
    steep = np.flatnonzero(drop[front + least - _REACH : front + most] >= _DROP * height)
    if height <= 0 or not len(steep):
        return float(height), None, None
    first = front + least - _REACH + steep[0]
    fall = first + int(np.argmax(drop[first : first + _REACH])) + _REACH / 2
    behind = profile[int(fall) : int(fall) + 2 * _REACH] < _EMPTY * height
    if not behind.any():
        return float(height), None, fall  # a pedicle follows
    start = int(fall) + int(np.argmax(behind))
    width = int(np.argmax(np.append(profile[start:] >= _EMPTY * height, True)))
    return float(height), start + min(width, _REACH) / 2, fall


def _wall_line(plane: np.ndarray, along: np.ndarray, back: np.ndarray, gap: float) -> tuple[float, float]:
    """(slope, place) of the posterior edge, back = place + slope · along, of what lies in front of a gap."""
    body = plane & (back < gap)
    rows = np.round(along[body] / _STEP_MM).astype(int)
    first = rows.min()
    edge = np.full(rows.max() - first + 1, -np.inf)
    np.maximum.at(edge, rows - first, back[body])
    heights = (np.arange(len(edge)) + first) * _STEP_MM
    trim = round(0.15 * len(edge))
    known = np.isfinite(edge)
    known[:trim] = known[len(edge) - trim :] = False
    if known.sum() < 4:
        return 0.0, float(gap)
    slope, place = siegelslopes(edge[known], heights[known])
    return float(slope), float(place)
