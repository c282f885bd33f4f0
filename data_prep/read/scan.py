"""A scan: one sagittal MR series in memory, its voxels in one orientation, with their place in the patient."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from spinejax.errors import SpinejaxError


class NotSagittalError(SpinejaxError):
    """A series of another plane: it is left out of a run, which is not a fault."""


@dataclass(frozen=True, eq=False)
class Scan:
    """One sagittal series in the standard orientation.

    Rows run superior→inferior, columns anterior→posterior, slices from the patient's right to the left.
    """

    voxels: Shaped[np.ndarray, "H W S"]  # float32, or integers for a mask
    affine: Float[np.ndarray, "4 4"]  # (row, column, slice, 1) → patient space, LPS, in mm
    name: str  # for messages

    @property
    def spacing_mm(self) -> Float[np.ndarray, "3"]:
        """Distance between neighbouring rows, columns and slices."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


# Orientation ---------------------------------------------------------------------------------------------------------

# Directions of rows, columns and slices in LPS: x grows to the patient's left, y to the back, z to the head.
_AXES = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
MAX_OFF_SAGITTAL_DEG = 40
_MAX_ANISOTROPY = 1.5


def reorient(voxels: Shaped[np.ndarray, "A B C"], affine: Float[np.ndarray, "4 4"], name: str) -> Scan:
    """Bring a series to the standard orientation by permuting and flipping axes; no voxel is resampled.

    The affine maps (a, b, c, 1) to patient space, LPS, mm.

    Raises:
        SpinejaxError: the axes are not at right angles; NotSagittalError: the series is of another plane.
    """
    affine, order, flipped = _standard(voxels.shape, affine, name)
    voxels = voxels.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
    return Scan(np.ascontiguousarray(voxels), affine, name)


def refuse_non_sagittal(shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"], name: str) -> None:
    """Raises what `reorient` would for a series of this shape and affine, before its voxels are read."""
    _standard(shape, affine, name)


def _standard(shape: tuple[int, ...], affine: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, ...], list[bool]]:
    """The affine in the standard orientation, the order of the axes there, and which of them are flipped."""
    if not np.isfinite(affine).all() or (spacing := np.linalg.norm(affine[:3, :3], axis=0)).min() <= 0:
        raise SpinejaxError(f"{name}: its geometry is not finite or has a zero spacing. Export the series again.")
    directions = affine[:3, :3] / spacing
    if not np.allclose(directions.T @ directions, np.eye(3), atol=1e-2):
        raise SpinejaxError(f"{name}: its axes are not at right angles. Resample it to an orthogonal grid.")

    closeness = _AXES @ directions
    order = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(closeness[range(3), axes])))
    flipped = [bool(closeness[place, axis] < 0) for place, axis in enumerate(order)]
    turn = np.eye(4)[:, [*order, 3]]
    for place, axis in enumerate(order):
        if flipped[place]:
            turn[axis, place] = -1
            turn[axis, 3] = shape[axis] - 1

    affine, spacing = affine @ turn, spacing[list(order)]
    angle_deg = math.degrees(math.acos(min(affine[0, 2] / spacing[2], 1)))
    if angle_deg > MAX_OFF_SAGITTAL_DEG:
        raise NotSagittalError(
            f"{name}: its slices stand {angle_deg:.0f}° off the sagittal plane. Give a sagittal series."
        )
    # In an axial or coronal series the thick slices are stacked along our rows or columns.
    if spacing[:2].max() > _MAX_ANISOTROPY * spacing[2]:
        plane = ("an axial", "a coronal")[int(np.argmax(spacing[:2]))]
        millimetres = " × ".join(f"{value:.2f}" for value in spacing)
        raise NotSagittalError(
            f"{name}: spacing {millimetres} mm (superior–inferior × anterior–posterior × left–right) is that of "
            f"{plane} series. Give a sagittal series."
        )
    return affine, order, flipped


def require_same_grid(scan: Scan, other: Scan) -> None:
    """Raises SpinejaxError if two scans differ in size, or in the position of any voxel by more than half a spacing."""
    if scan.voxels.shape != other.voxels.shape:
        raise SpinejaxError(
            f"{other.name}: {list(other.voxels.shape)} voxels, but {scan.name} has {list(scan.voxels.shape)}. "
            "A mask must have its scan's own grid."
        )
    corners = [(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in scan.voxels.shape))]
    apart_mm = np.abs((scan.affine - other.affine) @ np.transpose(corners)).max()
    if apart_mm > 0.5 * scan.spacing_mm.min():
        raise SpinejaxError(
            f"{other.name}: up to {apart_mm:.1f} mm away from {scan.name} in patient space. "
            "A mask must have its scan's own grid."
        )


# Voxels --------------------------------------------------------------------------------------------------------------

_ROUNDING = 0.01  # a label of 1 can be read as 0.999, from a file with a scale
MAX_VOXELS = 1 << 27  # of one scan; a sagittal lumbar series has up to 640 × 640 × 200


def as_dtype(voxels: Shaped[np.ndarray, "*shape"], dtype, name) -> Shaped[np.ndarray, "*shape"]:
    """A copy of the voxels as `dtype`, without any change of value but rounding.

    An image may have NaN voxels, as resampling leaves where nothing is known: `read.plausible` judges them.

    Raises:
        SpinejaxError: a voxel is infinite; for an integer `dtype`, a value is NaN, does not fit, or is not whole,
            within what the scale of a file rounds.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # reported below, as infinite
            converted = voxels.astype(dtype)
        if infinite := int(np.isinf(converted).sum()):
            raise SpinejaxError(f"{name}: {infinite} voxels are infinite. Export it again.")
        return converted
    whole = np.rint(voxels) if voxels.dtype.kind == "f" else voxels
    bounds = np.iinfo(dtype)
    with np.errstate(invalid="ignore"):  # of infinite values
        fits = np.abs(voxels - whole).max() <= _ROUNDING and bounds.min <= whole.min() and whole.max() <= bounds.max
    if not fits:
        raise SpinejaxError(f"{name}: a mask's labels must be whole numbers that fit {dtype}; found others.")
    return whole.astype(dtype)
