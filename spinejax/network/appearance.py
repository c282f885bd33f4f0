"""Random changes of how a scan looks, for training: its contrast and its sharpness, which differ between scanners.

Views (`views.py`) change where a window is taken. What is here changes its values alone, so nothing has to be put back.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # binomial: a Gaussian of standard deviation 1 px
_TIMES = 2  # twice that blurs by √2 px


def vary(
    key: PRNGKeyArray, window: Float[Array | np.ndarray, "112 224 9"], *, gamma: float, blur: float
) -> Float[Array, "112 224 9"]:
    """One window with a random gamma and a random blur.

    Args:
        key: decides both.
        window: intensities in about [0, 1]; what is below 0 becomes 0.
        gamma: the exponent is drawn from exp(-gamma) to exp(gamma), uniformly in its logarithm. 0 and 1 stay unchanged.
        blur: the weight of a blurred copy (Gaussian, √2 px in plane) is drawn uniformly from 0 to this; the window
            itself has the rest.
    """
    gamma_key, blur_key = jax.random.split(key)
    window = jnp.asarray(window)
    if gamma:
        exponent = jnp.exp(jax.random.uniform(gamma_key, minval=-gamma, maxval=gamma))
        window = jnp.maximum(window, 0) ** exponent
    if blur:
        window = window + jax.random.uniform(blur_key, maxval=blur) * (blurred(window) - window)
    return window


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
