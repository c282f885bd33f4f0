"""Convolutions and pools against XLA's, and their gradients, for every parity of size, kernel and padding."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from spinejax.network.cpu_kernels import (
    CPU,
    FEW_FEATURES,
    MANY_FEATURES,
    input_gradient,
    max_pool,
    winograd,
    with_cpu_kernels,
)
from spinejax.network.spinenet import XLA, SpineNet
from spinejax.tasks import PAPER_TASKS

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": lax.Precision.HIGHEST}


def sample(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def outcomes(convolve, x, kernel, stride, padding):
    """A convolution and its gradients, given some gradient of the output."""
    pads = [(padding, padding)] * 2
    output, backward = jax.vjp(lambda x, kernel: convolve(x, kernel, (stride, stride), pads, **LAYOUT), x, kernel)
    return output, *backward(sample(output.shape, 2))


def assert_same_as_xlas(x, kernel, stride, padding):
    expected = outcomes(lax.conv_general_dilated, x, kernel, stride, padding)
    got = jax.jit(outcomes, static_argnums=(0, 3, 4))(CPU.convolve, x, kernel, stride, padding)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-6 * np.abs(other).max())


@pytest.mark.parametrize(("stride", "size", "padding"), list(itertools.product((2, 3), ((12, 15), (11, 14)), (0, 1))))
def test_strided_convolutions_and_their_gradients_equal_xlas(stride, size, padding):
    """With few and many features; some sizes have pixels at the border on which no output depends."""
    for kernel_size, num_features in itertools.product((3, 5), (4, FEW_FEATURES + 1)):
        x, kernel = sample((2, *size, 3), 0), sample((kernel_size, kernel_size, 3, num_features), 1)
        assert_same_as_xlas(x, kernel, stride, padding)


def test_with_many_channels_the_gradient_is_xlas_bit_for_bit():
    x, kernel = sample((2, 8, 9, 40), 0), sample((3, 3, 40, 4), 1)

    def gradient(convolve):
        return jax.grad(lambda x: jnp.sin(convolve(x, kernel, (2, 2), [(1, 1)] * 2, **LAYOUT)).sum())(x)

    np.testing.assert_array_equal(gradient(CPU.convolve), gradient(lax.conv_general_dilated))


@pytest.mark.parametrize(("num", "size"), list(itertools.product((4, 16), ((6, 13), (5, 4), (1, 2)))))
def test_winograd_and_its_gradients_equal_xlas(num, size):
    """With 16 discs the kernel's gradient uses Winograd too; odd sizes end within a tile."""
    x, kernel = sample((num, *size, 5), 0), sample((3, 3, 5, MANY_FEATURES), 1)
    winograds, xlas = (outcomes(convolve, x, kernel, 1, 1)[0] for convolve in (CPU.convolve, lax.conv_general_dilated))
    assert not np.array_equal(winograds, xlas)
    assert_same_as_xlas(x, kernel, 1, 1)


def test_winograd_of_an_exact_example():
    """Sums over neighbours: every intermediate number is a multiple of a quarter, so the result is exact."""
    x = jnp.arange(4 * 3 * 3.0).reshape(4, 3, 3, 1)
    sums = winograd(x, jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
    np.testing.assert_array_equal(sums, [[8, 15, 12], [21, 36, 27], [20, 33, 24]])


def test_winograd_under_vmap_equals_one_by_one():
    batches, kernel = sample((3, 4, 6, 5, 2), 0), sample((3, 3, 2, 3), 1)
    each = jnp.stack([winograd(x, kernel) for x in batches])
    np.testing.assert_allclose(jax.vmap(winograd, (0, None))(batches, kernel), each, atol=1e-5)


@pytest.mark.parametrize(
    ("num", "features", "dtype"),
    [(3, MANY_FEATURES, jnp.float32), (16, MANY_FEATURES - 1, jnp.float32), (16, MANY_FEATURES, jnp.bfloat16)],
)
def test_few_discs_few_features_and_bfloat16_use_xlas(num, features, dtype):
    x, kernel = sample((num, 6, 5, 2), 0).astype(dtype), sample((3, 3, 2, features), 1).astype(dtype)
    args = (x, kernel, (1, 1), [(1, 1)] * 2)
    np.testing.assert_array_equal(CPU.convolve(*args, **LAYOUT), lax.conv_general_dilated(*args, **LAYOUT))


@pytest.mark.parametrize(("backend", "kernels"), [("cpu", CPU), ("gpu", XLA), ("tpu", XLA)])
def test_they_are_chosen_where_the_computation_runs_on_cpus(monkeypatch, backend, kernels):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert SpineNet(PAPER_TASKS).kernels == XLA
    assert with_cpu_kernels(SpineNet(PAPER_TASKS)).kernels == kernels


def test_a_network_scores_and_learns_the_same_with_either_kernels():
    model = SpineNet(PAPER_TASKS[:1], width=0.25)  # the least whose 3×3 convolutions have enough features
    windows = jax.random.uniform(jax.random.key(1), (4, 112, 224, 9))
    variables = jax.jit(model.init)(jax.random.key(0), windows[:1])

    @functools.partial(jax.jit, static_argnums=0)
    def outcome(model):
        def total(params):
            scores = model.apply({**variables, "params": params}, windows)["pfirrmann"]
            return jnp.sin(scores).sum(), scores

        return jax.grad(total, has_aux=True)(variables["params"])

    for one, other in zip(*(jax.tree.leaves(outcome(each)) for each in (model, model.clone(kernels=CPU))), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(one).max())


def test_the_input_gradient_under_vmap_equals_one_by_one():
    gradients, kernel = sample((5, 1, 4, 6, 4), 0), sample((5, 5, 3, 4), 1)

    def one(gradient):
        return input_gradient(gradient, kernel, (1, 11, 13, 3), 2, [(0, 0), (1, 1)])

    together = jax.vmap(one)(gradients)
    np.testing.assert_allclose(together, jnp.stack([one(gradient) for gradient in gradients]), atol=1e-5)


def test_other_convolutions_are_xlas():
    x, kernel = sample((1, 8, 9, 2), 0), sample((3, 3, 1, 4), 1)
    grouped = {**LAYOUT, "feature_group_count": 2}
    got = CPU.convolve(x, kernel, (2, 2), [(1, 1)] * 2, **grouped)
    np.testing.assert_array_equal(got, lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1)] * 2, **grouped))


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_pooling_and_its_gradient_equal_flaxs(size):
    x = jnp.round(sample((2, *size, 3), 0))  # some pixels are equal: the gradient goes to the first

    def theirs(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    np.testing.assert_array_equal(max_pool(x), theirs(x))

    def gradient(pool):
        return jax.grad(lambda x: jnp.sin(pool(x)).sum())(x)

    np.testing.assert_allclose(gradient(max_pool), gradient(theirs), rtol=1e-6)


@pytest.mark.parametrize("place", range(4))
def test_pooling_hides_no_nan(place):
    assert np.isnan(max_pool(jnp.zeros(4).at[place].set(jnp.nan).reshape(1, 2, 2, 1))).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_and_both_gradients_equal_xlas_at_either_stride(stride):
    x, kernel = sample((3, 9, 12, 2), 0), sample((3, 3, 2, 4), 1)
    window = ((stride, stride), [(1, 1)] * 2)
    expected = lax.conv_general_dilated(x, kernel, *window, **LAYOUT)
    one_by_one = jax.vmap(lambda one: CPU.convolve(one[None], kernel, *window, **LAYOUT)[0])(x)
    np.testing.assert_allclose(one_by_one, expected, atol=1e-5)
    cotangent = sample(expected.shape, 2)
    for convolve in (lax.conv_general_dilated, CPU.convolve):
        out, backwards = jax.vjp(lambda x, k, convolve=convolve: convolve(x, k, *window, **LAYOUT), x, kernel)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        gradients = backwards(cotangent)
        if convolve is lax.conv_general_dilated:
            reference = gradients
    for one, other in zip(gradients, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
