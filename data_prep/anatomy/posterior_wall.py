"""Posterior elements separated from vertebral bodies in a mask without a spinal canal.

A body is a block of even height. Behind its posterior wall the height falls: to nothing if the slice passes through the
canal or a foramen, to that of a pedicle beside them. So the wall is found in the profile of each vertebra's height from
front to back, slice by slice, along the vertebra's own direction. If a slice shows a gap, the wall is the body's own
edge. If a pedicle bridges it, the wall is taken from the nearest slice with a gap, or if there is none, from where
the profile falls.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from scipy.stats import siegelslopes

from data_prep.anatomy.vertebrae import LAST_VERTEBRA, SACRUM, boxes_of

_STEP_MM = 1.0
_DEPTH_MM = (16.0, 48.0)  # range of a body's depth, front to back
_FRONT_MM = 26.0  # behind the first voxel: surely body, enough for a first centre
_BODY = 0.7  # a slice shows the body if its height is at least this fraction of the tallest slice's
_DROP = 0.3  # behind its wall, a body loses at least this fraction of its height
_REACH = round(6.0 / _STEP_MM)  # within this many steps
_EMPTY = 0.12  # below this fraction of the body's height, the profile has a gap
_STRAY_MM = 12.0  # from slice to slice of one body


def posterior_elements(
    labels: UInt8[np.ndarray, "H W S"], spacing_mm: Float[np.ndarray, "3"]
) -> Bool[np.ndarray, "H W S"]:
    """The part of each vertebra behind its body's posterior wall. `labels` are SPIDER's; the canal is not needed."""
    behind = np.zeros(labels.shape, bool)
    boxes = {label: box for label, box in boxes_of(labels) if label <= LAST_VERTEBRA or label == SACRUM}
    centres = {label: _first_centre_mm(labels[box] == label, box, spacing_mm) for label, box in boxes.items()}
    for label, box in boxes.items():
        if label != SACRUM:  # only its upper edge is used
            behind[box] |= _behind(labels[box] == label, _down(label, centres), spacing_mm)
    return behind


def _first_centre_mm(part: np.ndarray, box: tuple[slice, ...], spacing_mm: np.ndarray) -> np.ndarray:
    """(row, column), mm: the middle of the front part, in the slices that show most of the vertebra."""
    areas = part.sum((0, 1))
    most = part[:, :, areas >= 0.5 * areas.max()]
    reach = round(_FRONT_MM / spacing_mm[1])
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
    """The pixels of a vertebra behind its wall, in each slice."""
    rows, columns = np.indices(part.shape[:2])
    along = rows * spacing_mm[0] * down[0] + columns * spacing_mm[1] * down[1]
    back = -rows * spacing_mm[0] * down[1] + columns * spacing_mm[1] * down[0]
    origin = back.min()
    bins = ((back - origin) / _STEP_MM).astype(int)
    profiles = np.stack([np.bincount(bins[plane], minlength=bins.max() + 1) for plane in np.moveaxis(part, 2, 0)])
    profiles = ndimage.uniform_filter1d(profiles * spacing_mm[:2].prod() / _STEP_MM, 3, axis=1, mode="constant")
    found = [_gap_and_fall(profile) for profile in profiles]
    tallest = max(height for height, _, _ in found)
    # A slice with a lower profile misses the body, and shows only a pedicle or a process.
    bodies = {index: places for index, (height, *places) in enumerate(found) if height >= _BODY * tallest}
    gaps = {index: origin + gap * _STEP_MM for index, (gap, _) in bodies.items() if gap is not None}
    falls = {index: origin + fall * _STEP_MM for index, (_, fall) in bodies.items() if fall is not None}
    # A facet seen alone can look like a body: its gap is not where the others' are.
    usual = np.median(list(gaps.values()) or [0.0])
    gaps = {index: gap for index, gap in gaps.items() if abs(gap - usual) <= _STRAY_MM}
    behind = np.zeros_like(part)
    for index in range(part.shape[2]):
        if index in gaps:
            wall = gaps[index]
        elif gaps:
            nearest = min(gaps, key=lambda other: abs(other - index))
            slope, place = _wall_line(part[:, :, nearest], along, back, gaps[nearest])
            wall = place + slope * along
        elif index in falls:
            wall = np.median(list(falls.values()))
        else:
            continue
        behind[:, :, index] = part[:, :, index] & (back > wall)
    return behind


def _gap_and_fall(profile: np.ndarray) -> tuple[float, float | None, float | None]:
    """A body's height in mm, and in steps the middle of the first gap behind it and the place where its height falls.

    Without a gap, or a fall, they are None.
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
    """(slope, place) of the posterior edge, back = place + slope · along, of the part in front of a gap."""
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
