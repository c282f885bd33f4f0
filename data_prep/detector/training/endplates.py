"""What the second network learns from: random patches of endplates, placed as roughly as the first network does.

A pure function of a key, as `augment` is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from data_prep.detector.endplates import LOWER, UPPER, frame, patch_grid
from data_prep.detector.network import PATCH_SHAPE, EndplateNet
from data_prep.detector.training.augment import ONE, Crops, appearance, tissue_gains
from data_prep.detector.training.truth import BODY, SACRUM, SOURCE_MM

_BOX = 128  # side of the part of a slice that a patch is taken from, in pixels of `SOURCE_MM`
_MIN_MM = 15.0  # shorter endplates are those of oblique sections
_HUBER_MM = 1.0


class Endplates(NamedTuple):
    """Slices, and endplates in them: arrays."""

    images: Any  # uint8 [S, H, W], as `Crops.image` without neighbours
    tissues: Any
    sizes: Any
    rows: Any  # [E], the slice of each endplate
    ends: Any  # [E, 2, 2], its front and back, (row, column) in pixels
    sides: Any  # [E], 1 for upper and -1 for lower ones


def endplates_of(slices: Crops) -> Endplates:
    """The known endplates in slices."""
    rows, ends, sides = [], [], []
    for row, place in np.argwhere((slices.kinds == BODY) | (slices.kinds == SACRUM)):
        for corners, side in ((UPPER, 1.0), (LOWER, -1.0)):
            two = slices.corners[row, place][list(corners)]
            if np.isfinite(two).all() and np.linalg.norm(two[1] - two[0]) * SOURCE_MM > _MIN_MM:
                rows.append(row)
                ends.append(two)
                sides.append(side)
    return Endplates(
        *(slices.image[..., 1], slices.tissue, slices.size),
        *(np.array(rows, np.int32), np.array(ends, np.float32).reshape(-1, 2, 2), np.array(sides, np.float32)),
    )


def random_patch(key: jax.Array, data: Endplates, number: jax.Array) -> tuple[Array, Array, Array]:
    """A random patch of one endplate: off its place, in another contrast, with artefacts.

    Args:
        key: of the draw.
        data: the slices and their endplates.
        number: which of the endplates.

    Returns:
        float[*PATCH_SHAPE], in [0, 1.25]. The true ends, in pixels from its middle. The size of such a pixel in mm.
    """
    keys = jax.random.split(key, 4)
    row, ends, side = data.rows[number], data.ends[number], data.sides[number]
    middle, matrix = frame(_misplaced(keys[0], ends), side)
    unit_mm = jnp.linalg.norm(matrix[:, 1]) * SOURCE_MM
    stretch = jnp.exp(jax.random.normal(keys[1], (2,)) * 0.05)
    shear = jax.random.normal(jax.random.fold_in(keys[1], 1)) * 0.05
    matrix = matrix @ jnp.array([[stretch[0], shear], [0.0, stretch[1]]])

    # Only the surroundings: to change the contrast of the whole slice takes longer than all the rest.
    corner = jnp.rint(middle - _BOX / 2).astype(jnp.int32)
    corner = jnp.clip(corner, 0, jnp.maximum(jnp.array(data.images.shape[1:]) - _BOX, 0))
    box = tuple(min(_BOX, size) for size in data.images.shape[1:])
    image, tissue = (jax.lax.dynamic_slice(of[row], corner, box) for of in (data.images, data.tissues))
    image = image.astype(jnp.float32) / ONE * tissue_gains(keys[2])[tissue]
    grid = jnp.asarray(patch_grid())
    source = grid @ matrix.T + middle[None, None]
    inside = ((source >= 0) & (source <= data.sizes[row][None, None] - 1)).all(-1)
    at = source - corner.astype(jnp.float32)[None, None]
    patch = map_coordinates(image, [at[..., 0], at[..., 1]], order=1, mode="nearest")
    y, x = (grid[..., axis, None] / size + 0.5 for axis, size in enumerate(PATCH_SHAPE))
    patch = appearance(keys[3], patch[..., None], inside[..., None], y, x)[..., 0]
    return patch, (ends - middle[None]) @ jnp.linalg.inv(matrix).T, unit_mm


def _misplaced(key: jax.Array, ends: Array) -> Array:
    """Ends as the first network might place them: usually a millimetre or two off, now and then many."""
    keys = jax.random.split(key, 4)
    length = jnp.linalg.norm(ends[1] - ends[0])
    how_far = 0.06 * jnp.exp(jax.random.uniform(keys[0], minval=-1.5, maxval=0.5))
    apart = jax.random.normal(keys[1], (2, 2)) * how_far
    together = jax.random.normal(keys[2], (1, 2)) * 0.03
    scale = jnp.exp(jax.random.normal(keys[3]) * 0.06)
    middle = ends.mean(0, keepdims=True)
    return middle + (ends - middle) * scale + (apart + together) * length


def endplate_loss(
    found: Float[Array, "N 2 2"], true: Float[Array, "N 2 2"], unit_mm: Float[Array, "N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean Huber loss of the ends, quadratic below 1 mm, and their mean distance in mm.

    Args:
        found, true: in the patches' pixels.
        unit_mm: the size of these.
    """
    distance_mm = jnp.sqrt(((found - true) ** 2).sum(-1) + 1e-6) * unit_mm[:, None]
    return optax.huber_loss(distance_mm, delta=_HUBER_MM).mean(), distance_mm.mean()


def loss_of_patches(
    key: jax.Array, variables: dict[str, Any], data: Endplates, numbers: jax.Array
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The loss of random patches of some endplates, for `step.train_step`."""
    patches, true, unit_mm = jax.vmap(random_patch, (0, None, 0))(jax.random.split(key, len(numbers)), data, numbers)
    found, new = EndplateNet().apply(variables, patches, train=True, mutable=["batch_stats"])
    loss, end_mm = endplate_loss(found, true, unit_mm)
    return loss, (dict(new), {"end_mm": end_mm})
