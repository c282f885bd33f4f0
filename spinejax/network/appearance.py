"""Random changes of how a scan looks, for training: its contrast and its sharpness, which differ between scanners.

Views (`views.py`) change where a window is taken. What is here changes its values alone, so nothing has to be put back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # binomial: a Gaussian of standard deviation 1 px
_TIMES = 2  # twice that blurs by √2 px


class Appearance(NamedTuple):
    """A change of a window's values. Fields are scalars, or share leading axes for `vmap`.

    Args:
        contrast: c, between -1 and 1, for `with_contrast`.
        blur: the share of the blurred copy in [0, 1], for `softened`.
    """

    contrast: jax.Array
    blur: jax.Array


def sample(key: PRNGKeyArray, *, contrast: float, blur: float) -> Appearance:
    """A random change, uniform from -`contrast` to `contrast`, and from 0 to `blur`."""
    contrast_key, blur_key = jax.random.split(key)
    return Appearance(
        jax.random.uniform(contrast_key, minval=-contrast, maxval=contrast), jax.random.uniform(blur_key, maxval=blur)
    )


def with_contrast(window: Float[Array | np.ndarray, "H W S"], contrast: jax.Array) -> Float[Array, "H W S"]:
    """An intensity x becomes x + c x (1 - x).

    Black and white stay, and the order of intensities; greys get brighter or darker, as by a gamma, which takes longer.
    """
    window = jnp.asarray(window)
    return window + contrast * window * (1 - window)


def softened(window: Float[Array | np.ndarray, "H W S"], share: jax.Array) -> Float[Array, "H W S"]:
    """The window, mixed with its blurred copy (Gaussian, √2 px in plane)."""
    window = jnp.asarray(window)
    return window + share * (blurred(window) - window)


def blurred(window: Float[Array | np.ndarray, "H W S"]) -> Float[Array, "H W S"]:
    """The window blurred in plane; beyond its edge the outermost pixel goes on."""
    window = jnp.asarray(window)
    reach = len(_TAPS) // 2
    for axis in (0, 1) * _TIMES:
        size = window.shape[axis]
        wide = jnp.pad(window, [(reach, reach) if each == axis else (0, 0) for each in range(3)], mode="edge")
        parts = (jax.lax.slice_in_dim(wide, place, place + size, axis=axis) for place in range(len(_TAPS)))
        window = sum((tap * part for tap, part in zip(_TAPS, parts, strict=True)), start=jnp.zeros_like(window))
    return window
