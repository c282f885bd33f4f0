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


def test_contrast_keeps_black_white_and_order(window):
    window = window.copy()
    window[0, :2, 0] = 0, 1
    order = np.argsort(window, axis=None)
    for contrast in (-0.8, 0.0, 0.8):
        given = np.asarray(appearance.with_contrast(window, jnp.float32(contrast)))
        np.testing.assert_allclose(given, window + contrast * window * (1 - window), atol=1e-6)
        assert np.diff(given.ravel()[order]).min() > -1e-6
        np.testing.assert_allclose(given[0, :2, 0], [0, 1])
        assert np.sign(given.mean() - window.mean()) == np.sign(contrast)


def test_softening_mixes_in_the_blurred_copy(window):
    soft = np.asarray(appearance.blurred(window))
    np.testing.assert_array_equal(appearance.softened(window, jnp.float32(0)), window)
    np.testing.assert_allclose(appearance.softened(window, jnp.float32(0.25)), 0.75 * window + 0.25 * soft, atol=1e-6)
    np.testing.assert_allclose(appearance.softened(window, jnp.float32(1)), soft, atol=1e-6)


def test_draws_fill_their_ranges():
    drawn = jax.vmap(functools.partial(appearance.sample, contrast=0.4, blur=0.5))(jax.random.split(KEY, 500))
    assert -0.4 <= drawn.contrast.min() < -0.38
    assert 0.38 < drawn.contrast.max() <= 0.4
    assert 0 <= drawn.blur.min() < 0.02
    assert 0.48 < drawn.blur.max() <= 0.5
    assert abs(np.corrcoef(drawn.contrast, drawn.blur)[0, 1]) < 0.15
    none = appearance.sample(KEY, contrast=0, blur=0)
    assert none == (0, 0)


def test_jit_and_vmap_agree(window):
    def look(window, contrast, share):
        return appearance.softened(appearance.with_contrast(window, contrast), share)

    windows, contrasts, shares = np.stack([window, 1 - window]), jnp.array([0.3, -0.3]), jnp.array([0.2, 0.7])
    alone = np.stack([look(*each) for each in zip(windows, contrasts, shares, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(look))(jnp.asarray(windows), contrasts, shares), alone, atol=1e-6)
