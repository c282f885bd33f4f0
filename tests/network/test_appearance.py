import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from spinejax.network import appearance

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def window():
    return np.random.default_rng(0).random((112, 224, 9)).astype(np.float32)


def test_blur_is_scipys_with_binomial_taps(window):
    expected = window
    for axis in (0, 1, 0, 1):
        expected = scipy.ndimage.correlate1d(expected, np.array([1, 4, 6, 4, 1]) / 16, axis=axis, mode="nearest")
    np.testing.assert_allclose(appearance.blurred(window), expected, atol=1e-6)


def test_without_ranges_nothing_changes(window):
    np.testing.assert_array_equal(appearance.vary(KEY, window, gamma=0, blur=0), window)


def test_gamma_keeps_black_white_and_order(window):
    window = window.copy()
    window[0, :3, 0] = 0, 1, -0.1
    drawn = [np.asarray(appearance.vary(key, window, gamma=0.4, blur=0)) for key in jax.random.split(KEY, 50)]
    exponents = [float(np.log(each[5, 5, 5]) / np.log(window[5, 5, 5])) for each in drawn]
    assert np.exp(-0.4) <= min(exponents) < 0.8
    assert 1.2 < max(exponents) <= np.exp(0.4)
    for each, exponent in zip(drawn, exponents, strict=True):
        np.testing.assert_allclose(each[1:], window[1:] ** exponent, rtol=1e-3)
        np.testing.assert_array_equal(each[0, :3, 0], [0, 1, 0])


def test_blur_lies_between_the_window_and_its_blurred_copy(window):
    soft = np.asarray(appearance.blurred(window))
    for key in jax.random.split(KEY, 5):
        given = np.asarray(appearance.vary(key, window, gamma=0, blur=0.5))
        share = (given - window)[np.abs(soft - window) > 0.1] / (soft - window)[np.abs(soft - window) > 0.1]
        np.testing.assert_allclose(share, share[0], atol=1e-3)
        assert 0 <= share[0] <= 0.5


def test_jit_and_vmap_agree(window):
    vary = functools.partial(appearance.vary, gamma=0.3, blur=0.5)
    keys = jax.random.split(KEY, 2)
    alone = np.stack([vary(key, window) for key in keys])
    np.testing.assert_allclose(jax.jit(jax.vmap(vary, in_axes=(0, None)))(keys, jnp.asarray(window)), alone, atol=1e-5)
