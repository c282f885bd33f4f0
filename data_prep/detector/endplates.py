"""A second, closer look at the endplates of a column: where exactly each one ends.

The first network sees 1.5 mm a pixel and all of a slice. The second sees one endplate at a time, in a patch that is
turned along it and scaled by its length, with the vertebra always on the same side. So it is the same task for every
endplate, upper and lower, S1's too, and for any size of spine. Levels do not depend on it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32
from scipy import ndimage

from data_prep.detector.candidates import SACRUM, Candidate, Group
from data_prep.detector.chain import Column
from data_prep.detector.grid import with_neighbours
from data_prep.detector.network import PATCH_SHAPE, EndplateNet
from data_prep.read.scan import Scan

ENDPLATE_PX = 40.0  # length of an endplate, as it was first placed, in its patch
PIXEL_MM = 1.0  # of the slices that patches are taken from, as in training
_LOOKS = 2  # the second is at the ends that the first has found
_AT_ONCE = 32
UPPER, LOWER = (0, 1), (3, 2)  # a body's corners at the front and at the back of each endplate
_AnyArray = np.ndarray | jax.Array
# What one unit of rows, and of columns, along an endplate adds to the matrix of its patch.
_TURNS = np.array([[[0, 1], [-1, 0]], [[1, 0], [0, 1]]], np.float32)
_ROWS = np.array([[1, 0]], np.float32)


def frame(
    ends: Float[_AnyArray, "*N 2 2"], side: Float[_AnyArray, "*N"]
) -> tuple[Float[_AnyArray, "*N 2"], Float[_AnyArray, "*N 2 2"]]:
    """Where an endplate's patch is in its image. For arrays of NumPy and of JAX.

    Args:
        ends: the endplate's front and back, (row, column).
        side: 1 for a body's upper endplate, -1 for its lower one.

    Returns:
        The middle of the patch; and a matrix, from (row, column) in the patch's pixels to those of the image. Rows go
        into the body: down from an upper endplate, up from a lower one. Columns go from front to back.
    """
    along = (ends[..., 1, :] - ends[..., 0, :]) / ENDPLATE_PX
    matrix = (along[..., None, None] * _TURNS).sum(-3)
    return ends.mean(-2), matrix * (side[..., None, None] * _ROWS + (1 - _ROWS))


def patch_grid() -> Float32[np.ndarray, "H W 2"]:
    """(row, column) of each of a patch's pixels, from its middle."""
    rows, columns = (np.arange(size, dtype=np.float32) - (size - 1) / 2 for size in PATCH_SHAPE)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def second_look(members: Sequence[dict[str, Any]], scan: Scan, column: Column) -> Column:
    """The column with the corners of its bodies where the endplates end, in the slices around each body's middle.

    An endplate that is partly outside of the image stays where it was placed: its end cannot be seen.

    Args:
        members: the variables of one `EndplateNet` or more; their answers are averaged.
        scan: the scan.
        column: found in it.
    """
    groups = [one for one in column.groups if one is not None]
    indices = sorted({index for one in groups for index in one.central()})
    planes = with_neighbours(scan, indices, PIXEL_MM)
    images = {index: plane[..., 1] for index, plane in zip(indices, planes, strict=True)}
    limits_mm = (np.array(scan.voxels.shape[:2]) - 1) * scan.spacing_mm[:2]
    looks = [
        (one, index, corners)
        for one in groups
        for index in one.central()
        for corners in ((UPPER,) if one.kind == SACRUM else (UPPER, LOWER))
        if _within(one.members[index].corners[list(corners)], limits_mm)
    ]
    if not looks:
        return column
    ends = np.array([one.members[index].corners[list(corners)] for one, index, corners in looks]) / PIXEL_MM
    side = np.array([1.0 if corners == UPPER else -1.0 for _, _, corners in looks])
    for _ in range(_LOOKS):
        ends = _looked_at(members, [images[index] for _, index, _ in looks], ends, side)
    moved: dict[tuple[int, int], dict[tuple[int, int], np.ndarray]] = {}
    for (one, index, corners), two in zip(looks, ends * PIXEL_MM, strict=True):
        moved.setdefault((id(one), index), {})[corners] = two

    def with_moved(one: Group) -> Group:
        members = {
            index: _moved(candidate, moved.get((id(one), index), {})) for index, candidate in one.members.items()
        }
        return Group(one.kind, one.support, members)

    return replace(column, groups=tuple(None if one is None else with_moved(one) for one in column.groups))


def _within(ends: Float[np.ndarray, "2 2"], limits_mm: Float[np.ndarray, "2"]) -> bool:
    return bool((ends >= 0).all() and (ends <= limits_mm).all())


def _moved(one: Candidate, endplates: dict[tuple[int, int], Float[np.ndarray, "2 2"]]) -> Candidate:
    """A candidate with some endplates elsewhere. Its spread is how far these were moved."""
    if not endplates:
        return one
    corners, by_mm = one.corners.copy(), []
    for which, ends in endplates.items():
        by_mm.append(np.linalg.norm(ends - corners[list(which)], axis=1).mean())
        corners[list(which)] = ends
    return replace(one, corners=corners, spread_mm=float(np.mean(by_mm)))


def _looked_at(
    members: Sequence[dict[str, Any]],
    images: Sequence[Float32[np.ndarray, "..."]],
    ends: Float[np.ndarray, "N 2 2"],
    side: Float[np.ndarray, "N"],
) -> Float[np.ndarray, "N 2 2"]:
    """One look at each endplate, in its image: where its ends are, on average over the networks."""
    middle, matrix = frame(ends, side)
    source = np.einsum("nij,hwj->nihw", matrix, patch_grid()) + middle[..., None, None]
    patches = np.zeros((-(-len(ends) // _AT_ONCE) * _AT_ONCE, *PATCH_SHAPE), np.float32)
    for place, image in enumerate(images):
        ndimage.map_coordinates(image, source[place], order=1, output=patches[place])
    answers = [
        np.concatenate([_ends(each, patches[start : start + _AT_ONCE]) for start in range(0, len(patches), _AT_ONCE)])
        for each in members
    ]
    return np.einsum("nij,nej->nei", matrix, np.mean(answers, axis=0)[: len(ends)]) + middle[:, None]


@jax.jit
def _ends(variables: dict[str, Any], patches: Array) -> Array:
    return EndplateNet().apply(variables, patches, train=False)  # type: ignore[return-value]
