"""Random training crops: geometry, contrast and artefacts of a slice, with its keypoints. A pure function of a key.

The ranges are wide on purpose (domain randomisation): a real scan should look like one more draw. Intensities are in
[0, 1.25] before and after.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from data_prep.detector.grid import BRIGHTEST, PERCENTILES, PIXEL_MM
from data_prep.detector.training.truth import BODY, NOTHING, SACRUM, SOURCE_MM, Slice

CROP_SHAPE = (160, 128)  # in network pixels: 240 × 192 mm
ONE = 200  # the stored intensity, uint8, that stands for 1
_ALONE = 0.5  # of the crops are shown without neighbours, as in a scan of one slice
_SAMPLED = 4  # percentiles are those of every fourth row and column, to save the sorting of all


class Crops(NamedTuple):
    """Slices or crops with their truth, as arrays: the fields of `truth.Slice` with a batch axis."""

    image: Any
    tissue: Any
    size: Any  # the rows and columns of a padded image that are image
    kinds: Any
    centres: Any
    corners: Any


def stack(slices: Sequence[Slice]) -> Crops:
    """Slices as one set of arrays, zero-padded to the largest; images as uint8 (`ONE`)."""
    shape = np.max([one.image.shape[:2] for one in slices], axis=0)

    def padded(image):
        missing = [(0, size - n) for size, n in zip(shape, image.shape, strict=False)]
        return np.pad(image, missing + [(0, 0)] * (image.ndim - 2))

    return Crops(
        image=np.stack([padded(np.rint(one.image * ONE).astype(np.uint8)) for one in slices]),
        tissue=np.stack([padded(one.tissue) for one in slices]),
        size=np.array([one.image.shape[:2] for one in slices], np.float32),
        kinds=np.stack([one.kinds for one in slices]),
        centres=np.stack([one.centres for one in slices]),
        corners=np.stack([one.corners for one in slices]),
    )


def random_crop(key: jax.Array, slices: Crops, shape: tuple[int, int] = CROP_SHAPE) -> Crops:
    """One random crop of one slice, given without the batch axis.

    Returns:
        The crop: an image in network pixels, and its keypoints. Those outside become `NOTHING`.
    """
    keys = jax.random.split(key, 5)
    matrix, bend, centre = _geometry(keys[0], slices)
    middle = (jnp.array(shape, jnp.float32) - 1) / 2
    rows, columns = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in shape), indexing="ij")
    at = jnp.stack([rows - middle[0], columns - middle[1]], axis=-1)
    at = at.at[..., 1].add(bend * at[..., 0] ** 2)
    source = at @ matrix.T + centre.reshape(1, 1, 2)
    inside = ((source >= 0) & (source <= slices.size.reshape(1, 1, 2) - 1)).all(-1)
    y, x = rows / shape[0], columns / shape[1]
    frame = jax.random.uniform(keys[3], (5,), maxval=0.2)  # a smaller field of view, empty beyond it
    frame = jnp.where(frame[4] < 0.06, frame, jnp.zeros(5))
    inside &= (y >= frame[0]) & (y <= 1 - frame[1]) & (x >= frame[2]) & (x <= 1 - frame[3])
    contrast = tissue_gains(keys[1])[slices.tissue]
    image = slices.image.astype(jnp.float32) / ONE * contrast[..., None]
    places = [source[..., 0], source[..., 1]]
    image = jnp.stack([map_coordinates(image[..., c], places, order=1, mode="nearest") for c in range(3)], axis=-1)
    image = appearance(keys[2], image, inside[..., None], y[..., None], x[..., None])
    image = _with_some_neighbours(keys[4], image, (slices.image > 0).any((0, 1)))

    back = jnp.linalg.inv(matrix)

    def to_crop(points):
        y, x = jnp.moveaxis(points, -1, 0)
        y, x = y - centre[0], x - centre[1]
        y, x = back[0, 0] * y + back[0, 1] * x, back[1, 0] * y + back[1, 1] * x
        return jnp.stack([y + middle[0], x - bend * y**2 + middle[1]], axis=-1)

    centres = to_crop(slices.centres)
    y, x = (jnp.clip(jnp.rint(centres[:, axis]).astype(jnp.int32), 0, shape[axis] - 1) for axis in (0, 1))
    shown = (jnp.abs(centres - jnp.stack([y, x], axis=-1).astype(jnp.float32)) <= 0.5).all(-1) & inside[y, x]
    # A doubtful point just outside stays, because the loss must ignore its surroundings.
    kinds = jnp.where(shown | (slices.kinds > SACRUM), slices.kinds, NOTHING)
    return Crops(image, slices.tissue, slices.size, kinds, centres, to_crop(slices.corners))


def _geometry(key: jax.Array, slices: Crops) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The crop's pixels → the slice's: a matrix, the bend of a column by the square of the row, and the middle."""
    keys = jax.random.split(key, 7)
    angle = jnp.deg2rad(jax.random.truncated_normal(keys[0], -2.5, 2.5) * 9)
    scale = PIXEL_MM / SOURCE_MM * jnp.exp(jax.random.uniform(keys[1], minval=-0.28, maxval=0.25))
    stretch = jnp.exp(jax.random.normal(keys[2], (2,)) * 0.06)
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    bend = jax.random.normal(keys[3]) * 0.0012
    weights = ((slices.kinds == BODY) | (slices.kinds == SACRUM)).astype(jnp.float32)
    chosen = jax.random.categorical(keys[4], jnp.log(weights + 1e-6))
    jitter = jax.random.uniform(keys[5], (2,), minval=-1.0, maxval=1.0) * jnp.array([80.0, 40.0])
    return turn * (scale * stretch).reshape(1, 2), bend, slices.centres[chosen] + jitter


def _with_some_neighbours(key: jax.Array, image: jax.Array, present: jax.Array) -> jax.Array:
    """Hide the neighbours of half of the crops, and swap those of half: which is left and which right is no evidence.

    `present` says which of the three slices the scan has; the others stay zero.
    """
    alone, swapped = jax.random.bernoulli(key, jnp.array([_ALONE, 0.5]))
    shown = present & (jnp.array([False, True, False]) | ~alone)
    image = jnp.where(shown[None, None], image, 0.0)
    return jnp.where(swapped, image[..., ::-1], image)


def tissue_gains(key: jax.Array) -> jax.Array:
    """Factors of other tissue, vertebrae, discs and canal; all are one in a third of the crops."""
    keys = jax.random.split(key, 2)
    gains = jnp.exp(jax.random.normal(keys[0], (4,)) * jnp.array([0.0, 0.25, 0.45, 0.6]))
    return jnp.where(jax.random.bernoulli(keys[1], 1 / 3), jnp.ones(4), gains)


def appearance(key: jax.Array, image: jax.Array, inside: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """The effects of sequence, coil and artefacts on a crop; in the end it is normalised as `grid.normalise` does.

    `y`, `x` in [0, 1) are the pixels' places. The slices in the last axis share all but the noise.
    """
    keys = iter(jax.random.split(key, 40))

    def uniform(low, high, shape=()):
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    def chance(probability):
        return jax.random.bernoulli(next(keys), probability)

    # Contrast: a gamma, or a curve through random knots that need not rise; sometimes the negative.
    image = jnp.clip(image, 0, 1.25) / 1.25
    curve = jnp.clip(jnp.linspace(0, 1, 6) + uniform(-0.25, 0.25, (6,)), 0, 1)
    bent = sum(curve[k] * jnp.maximum(0, 1 - jnp.abs(5 * image - k)) for k in range(6))  # linear between the knots
    image = jnp.where(chance(0.4), bent, image ** jnp.exp(uniform(-0.7, 0.7)))
    image = jnp.where(chance(0.08), 1 - image, image)
    # A coil's shading, and the saturation band that is often placed over the belly.
    waves = sum(
        amplitude * jnp.sin(jnp.pi * (a * y + b * x + phase))
        for amplitude, a, b, phase in zip(
            uniform(-0.4, 0.4, (3,)), uniform(-2, 2, (3,)), uniform(-2, 2, (3,)), uniform(0, 2, (3,)), strict=True
        )
    )
    image = image * jnp.exp(waves)
    edge, slope = uniform(0.0, 0.45), uniform(-0.2, 0.2)
    band = jax.nn.sigmoid((x - edge - slope * (y - 0.5)) / 0.02)
    image = image * jnp.where(chance(0.25), 0.1 + 0.9 * band, jnp.ones_like(band))
    # A motion ghost along the rows or columns.
    ghost = jnp.where(chance(0.5), jnp.roll(image, 23, 0), jnp.roll(image, 19, 1))
    image = image + jnp.where(chance(0.15), uniform(0.0, 0.25), 0.0) * ghost
    # A metal void with a bright rim.
    from_void = jnp.hypot((y - uniform(0, 1)) * image.shape[0], (x - uniform(0, 1)) * image.shape[1]) * PIXEL_MM
    radius = jnp.where(chance(0.1), uniform(5, 18), -50.0)
    rim = jnp.exp(-(((from_void - radius - 2) / 2) ** 2))
    image = image * jax.nn.sigmoid((from_void - radius) / 1.0) + 0.8 * rim
    # Resolution, different along rows and columns; noise.
    for axis in (0, 1):
        image = _blur(image, jnp.where(chance(0.6), uniform(0.0, 1.1), 0.0), axis)
    noise = jax.random.normal(next(keys), image.shape) * jnp.where(chance(0.8), uniform(0.0, 0.07), 0.0)
    image = jnp.abs(image + noise)
    data = jnp.where(inside, image, jnp.nan)[::_SAMPLED, ::_SAMPLED]
    low, high = jnp.nan_to_num(jnp.nanpercentile(data, jnp.array(PERCENTILES), axis=(0, 1)))
    image = (image - low[None, None]) / jnp.maximum(high - low, 0.05)[None, None] * uniform(0.9, 1.2)
    return jnp.where(inside, jnp.clip(image, 0, BRIGHTEST), 0.0)


def _blur(image: jax.Array, sigma: jax.Array, axis: int) -> jax.Array:
    """Gaussian blur of a few pixels along an axis, as a product with a banded matrix: quicker than shifted sums."""
    places = jnp.arange(image.shape[axis], dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((places[:, None] - places[None]) / jnp.maximum(sigma, 0.2)) ** 2)
    return jnp.moveaxis(jnp.tensordot(weights / weights.sum(1, keepdims=True), image, (1, axis)), 0, axis)
