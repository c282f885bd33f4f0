"""DICOM frames as a volume: of one size and orientation, evenly spaced along a straight line.

Instance numbers and file names are ignored: only positions count.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from data_prep.read.dicom_headers import Frame
from data_prep.read.scan import MAX_VOXELS
from spinejax.errors import SpinejaxError

SAME_MM = 0.01  # positions closer than this are the same
_TURNED = 5e-3  # tolerance of directions, which may be rounded to two digits
_UNEVEN = 0.03  # tolerance, as a fraction of the spacing
_ROUNDED_MM = 0.1  # a position rounded to 0.1 mm may lie this far off its line, as all three coordinates are rounded


def in_order(frames: Sequence[Frame], name: str) -> tuple[list[Frame], Float[np.ndarray, "4 4"]]:
    """Frames in order of position, and the affine (row, column, slice, 1) → patient, LPS, mm.

    A straight line is fitted through all positions, so that their rounding does not matter.

    Raises:
        SpinejaxError: frames differ in size, spacing or orientation, share a position, leave a gap, are unevenly
            spaced, or are shifted against one another in their plane.
    """
    first = frames[0]
    if any(frame.shape != first.shape or abs(frame.axes - first.axes).max() > _TURNED for frame in frames):
        raise SpinejaxError(f"{name}: its images differ in size or orientation. Split the series.")
    if len(frames) * first.shape[0] * first.shape[1] > MAX_VOXELS:
        raise SpinejaxError(f"{name}: {len(frames)} images of {first.shape} pixels; expected at most {MAX_VOXELS}.")
    frames = sorted(frames, key=lambda frame: float(frame.position_mm @ first.normal))
    positions = np.stack([frame.position_mm for frame in frames])
    start, between = positions[0], first.normal * (first.thickness_mm or 1.0)
    if len(frames) > 1:
        _refuse_repeats(frames, np.diff(positions @ first.normal), name)
        places = np.arange(len(frames)) - (len(frames) - 1) / 2
        between = places @ positions / (places @ places)
        off_mm = positions - positions.mean(0) - places[:, None] * between
        _refuse_uneven(frames, np.diff(positions @ first.normal), abs(off_mm @ first.normal).max(), name)
        if np.abs(off_mm).max() > 0.5 * first.spacing_mm.min():
            raise SpinejaxError(f"{name}: its slices are shifted against one another in their plane. Export it again.")
        across_mm = (between - first.normal * (between @ first.normal)) * (len(frames) - 1)
        if np.abs(across_mm).max() <= 2 * _ROUNDED_MM:  # rounding alone: slices are stacked along their normal
            between = first.normal * (between @ first.normal)
        start = positions.mean(0) + places[0] * between
    affine = np.eye(4)
    affine[:3, 0] = first.axes[1] * first.spacing_mm[0]
    affine[:3, 1] = first.axes[0] * first.spacing_mm[1]
    affine[:3, 2] = between
    affine[:3, 3] = start
    return frames, affine


def _refuse_repeats(frames: Sequence[Frame], steps_mm: np.ndarray, name: str) -> None:
    positions = 1 + int(np.sum(steps_mm > SAME_MM))
    if len(frames) > positions:
        first = int(np.argmax(steps_mm <= SAME_MM))
        count = len(frames) // positions
        if len(frames) % positions == 0 and (positions > 1 or len(frames) > 2):
            kind = f"{count} images at each of its {positions} positions: the series is 4-D"
        else:
            kind = f"a slice occurs twice ({frames[first].path} and {frames[first + 1].path})"
        raise SpinejaxError(f"{name}: {kind}. Expected one image per position. Remove the other set.")


def _refuse_uneven(frames: Sequence[Frame], steps_mm: np.ndarray, off_mm: float, name: str) -> None:
    """`off_mm` is how far the positions are from the line through them, across the slices.

    A gap of one slice pulls a position off the line by a third of the spacing or more.
    """
    typical = float(np.median(steps_mm))
    if off_mm <= min(max(_UNEVEN * typical, _ROUNDED_MM), 0.25 * typical):
        return
    odd = int(np.argmax(abs(steps_mm - typical)))
    gap = float(steps_mm[odd])
    between = f"between {frames[odd].path.name} and {frames[odd + 1].path.name}"
    missing = round(gap / typical) - 1
    if missing >= 1 and abs(gap - (missing + 1) * typical) < 0.1 * typical + 2 * _ROUNDED_MM:
        kind = f"{missing} slices are missing {between} ({gap:.2f} mm apart, the others {typical:.2f} mm)"
    else:
        kind = f"its slices are unevenly spaced ({gap:.2f} mm {between}, mostly {typical:.2f} mm)"
    raise SpinejaxError(f"{name}: {kind}. Export the whole series again.")
