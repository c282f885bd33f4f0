"""The network holds what the paper says: layers, shapes, parameter counts, and how branches share."""

import functools
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE
from spinejax.network.spinenet import BRANCH_POINTS, LAYERS, Dense, Dropout, SpineNet, Stack, filled
from spinejax.tasks import PAPER_TASKS, Task

WINDOW = jnp.zeros((1, 112, 224, 9))


def abstract(model, windows=WINDOW):
    return jax.eval_shape(model.init, jax.random.key(0), windows)


@pytest.fixture(scope="module")
def small():
    model = SpineNet(PAPER_TASKS, width=0.03)
    variables = jax.jit(model.init)(jax.random.key(0), WINDOW)
    windows = jax.random.uniform(jax.random.key(1), (3, 112, 224, 9))
    return model, variables, windows


@pytest.mark.parametrize(
    ("branch_point", "millions"),
    [(None, 291.0), ("conv3", 281.9), ("conv4", 270.1), ("conv5", 258.3), ("fc6", 69.5), ("fc7", 48.5)],
)
def test_parameter_counts_at_full_width(branch_point, millions):
    params = abstract(SpineNet(PAPER_TASKS, branch_point))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 1) == millions


def test_every_intermediate_shape():
    model = SpineNet(PAPER_TASKS)

    def outputs(variables, windows):
        return model.apply(variables, windows, capture_intermediates=True)[1]["intermediates"]

    found = jax.eval_shape(outputs, abstract(model), WINDOW)
    shapes = {
        name: leaf[0].shape[1:]
        for name, leaf in flax.traverse_util.flatten_dict(found, sep="/").items()
        if name.startswith(("trunk", "head_pfirrmann"))
    }
    assert shapes["trunk/conv1/__call__"] == (53, 109, 96)
    assert shapes["trunk/conv2/__call__"] == (12, 26, 256)
    for name in ("conv3", "conv4", "conv5"):
        assert shapes[f"trunk/{name}/__call__"] == (6, 13, 512)
    assert shapes["trunk/__call__"] == (3, 6, 512)
    assert shapes["head_pfirrmann/fc6/__call__"] == (4096,)
    assert shapes["head_pfirrmann/fc7/__call__"] == (1024,)
    assert shapes["head_pfirrmann/fc8/__call__"] == (5,)
    params = flax.traverse_util.flatten_dict(abstract(model)["params"], sep="/")
    assert params["trunk/conv1/kernel"].shape == (7, 7, 9, 96)
    assert params["trunk/conv2/kernel"].shape == (5, 5, 96, 256)
    assert params["head_narrowing/fc6/kernel"].shape == (9216, 4096)


@pytest.mark.parametrize("branch_point", BRANCH_POINTS)
def test_layers_up_to_the_branch_point_are_shared_and_the_rest_is_per_task(branch_point):
    params = abstract(SpineNet(PAPER_TASKS, branch_point, width=0.03))["params"]
    names = [layer.name for layer in LAYERS]
    num_shared = names.index(branch_point) + 1 if branch_point else 0
    assert list(params.get("trunk", {})) == names[:num_shared]
    for task in PAPER_TASKS:
        assert list(params[f"head_{task.name}"]) == [*names[num_shared:], "fc8"]


def test_logits_are_by_task_name_for_any_task_table():
    tasks = (Task("modic", ("0", "1", "2", "3")), Task("trunk", ("no", "yes")))
    model = SpineNet(tasks, "fc7", width=0.02, num_slices=5)
    windows = jnp.zeros((2, 112, 224, 5))
    logits = model.apply(model.init(jax.random.key(0), windows), windows)
    assert {name: scores.shape for name, scores in logits.items()} == {"modic": (2, 4), "trunk": (2, 2)}


def test_slice_mean_is_subtracted_and_is_a_constant(small):
    model, variables, windows = small
    np.testing.assert_array_equal(variables["constants"]["slice_mean"], np.zeros(9))
    mean = jnp.linspace(0.1, 0.9, 9)
    shifted = {"params": variables["params"], "constants": {"slice_mean": mean}}
    expected = model.apply(variables, windows)
    got = model.apply(shifted, windows + mean[None, None, None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_forward_pass_equals_torch(small):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, variables, windows = small
    params = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), variables["params"])
    x = torch.tensor(np.asarray(windows)).permute(0, 3, 1, 2)
    for layer in LAYERS[:5]:
        weights = params["trunk"][layer.name]
        kernel = weights["kernel"].permute(3, 2, 0, 1)
        x = functional.relu(functional.conv2d(x, kernel, weights["bias"], layer.stride, layer.padding))
        x = functional.max_pool2d(x, 2) if layer.pool else x
    x = x.permute(0, 2, 3, 1).flatten(1)
    for name, logits in model.apply(variables, windows).items():
        y = x
        for layer in ("fc6", "fc7", "fc8"):
            weights = params[f"head_{name}"][layer]
            y = y @ weights["kernel"] + weights["bias"]
            y = y if layer == "fc8" else functional.relu(y)
        np.testing.assert_allclose(logits, y.numpy(), atol=1e-5)


def test_the_relu_of_a_pool_is_the_pool_of_relus_with_its_gradient(small):
    """Bit for bit, equal pixels in one pool included; only pooled pixels go through it."""
    model, variables, windows = small
    windows = jnp.round(2 * windows) / 2  # many windows of conv1 are alike
    after = model.clone(kernels=model.kernels._replace(pool_first=False))

    def total(windows, model):
        return sum(scores.sum() for scores in model.apply(variables, windows).values())

    for function in (total, jax.grad(total)):
        first, second = (jax.jit(functools.partial(function, model=each))(windows) for each in (model, after))
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-9)
    programs = [str(jax.make_jaxpr(functools.partial(total, model=each))(windows)) for each in (model, after)]
    assert [bool(re.search(r":f32\[3,53,109,3\] = max ", program)) for program in programs] == [False, True]


def test_dropout_only_in_training_and_decided_by_the_key(small):
    model, variables, windows = small

    def run(key, train=True):
        return model.apply(variables, windows, train=train, rngs={"dropout": jax.random.key(key)})["pfirrmann"]

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    np.testing.assert_array_equal(run(0, train=False), run(1, train=False))


def test_dropout_is_flaxs_and_a_part_of_a_batch_has_its_rows():
    x, rngs = jax.random.normal(jax.random.key(1), (6, 8)), {"dropout": jax.random.key(2)}
    whole = Dropout(0.25).apply({}, x, rngs=rngs)
    np.testing.assert_array_equal(whole, nn.Dropout(0.25, deterministic=False).apply({}, x, rngs=rngs))
    rows = jnp.array([4, 1])
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x[rows], part_of=(6, rows), rngs=rngs), whole[rows])


def test_dropout_keeps_the_expected_activation():
    """Inverted dropout: a linear layer after it has, averaged over many masks, its value without dropout."""
    stack = Stack([Dense("fc7", 64)], width=1.0, dropout=0.5, dtype=jnp.float32, initialiser="glorot", num_outputs=2)
    x = jax.random.uniform(jax.random.key(1), (1, 32))
    params = stack.init(jax.random.key(0), x, train=False)

    def fc8(key):
        return stack.apply(params, x, train=True, rngs={"dropout": key})[0]

    draws = jax.vmap(fc8)(jax.random.split(jax.random.key(2), 4000))
    standard_error = draws.std(0) / np.sqrt(4000)
    assert (standard_error > 0).all()
    assert (np.abs(draws.mean(0) - stack.apply(params, x, train=False)[0]) < 4 * standard_error).all()


def test_jit_vmap_and_bfloat16_agree_with_plain_calls(small):
    model, variables, windows = small
    expected = model.apply(variables, windows)
    jitted = jax.jit(model.apply)(variables, windows)
    one_by_one = jax.vmap(lambda window: model.apply(variables, window[None]))(windows)
    bfloat16 = SpineNet(PAPER_TASKS, width=0.03, dtype=jnp.bfloat16).apply(variables, windows)
    for name, scores in expected.items():
        np.testing.assert_allclose(jitted[name], scores, atol=1e-5)
        np.testing.assert_allclose(one_by_one[name][:, 0], scores, atol=1e-5)
        assert bfloat16[name].dtype == jnp.float32
        np.testing.assert_allclose(bfloat16[name], scores, atol=0.05)


def test_forward_mode_gradients_agree_with_reverse_mode(small):
    model, variables, windows = small
    along = jax.random.normal(jax.random.key(2), windows.shape)

    @jax.jit
    def score(windows):
        return sum(jnp.sin(scores).sum() for scores in model.apply(variables, windows).values())

    expected = (jax.grad(score)(windows) * along).sum()
    for got in (jax.jvp(score, (windows,), (along,))[1], jax.linearize(score, windows)[1](along)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"fill_slices": True}, {"branch_point": None}])
def test_it_exports_with_any_number_of_windows_for_every_platform(options):
    model = SpineNet(PAPER_TASKS[:2], width=0.02, **options)
    (num,) = jax.export.symbolic_shape("N")
    windows = jax.ShapeDtypeStruct((num, *WINDOW_SHAPE), jnp.float32)
    exported = jax.export.export(jax.jit(model.apply), platforms=("cpu", "cuda", "tpu"))(abstract(model), windows)
    assert {str(scores.shape[0]) for scores in exported.out_avals} == {"N"}


def test_scores_are_float32_in_a_bfloat16_network_too(small):
    model, variables, windows = small
    for scores in model.clone(dtype=jnp.bfloat16).apply(variables, windows).values():
        assert not np.array_equal(scores, scores.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(("branch_point", "shape"), [("conv3", (6, 13, 15)), ("conv5", (3, 6, 15)), ("fc7", (31,))])
def test_features_are_what_the_branches_see(branch_point, shape):
    model = SpineNet(PAPER_TASKS[:1], branch_point, width=0.03)
    variables = jax.jit(model.init)(jax.random.key(0), WINDOW)
    windows = jax.random.uniform(jax.random.key(1), (2, *WINDOW_SHAPE))
    _, seen = model.apply(variables, windows, capture_intermediates=True)
    features = model.apply(variables, windows, features=True)
    assert features.shape == (2, *shape)
    np.testing.assert_array_equal(features, seen["intermediates"]["trunk"]["__call__"][0])


def test_a_network_without_a_trunk_has_no_features():
    model = SpineNet(PAPER_TASKS, None, width=0.02)
    with pytest.raises(SpinejaxError, match="no shared layers"):
        jax.eval_shape(lambda variables: model.apply(variables, WINDOW, features=True), abstract(model))


def test_glorot_initialisation_has_glorots_variance():
    params = jax.jit(SpineNet(PAPER_TASKS, width=0.25).init)(jax.random.key(0), WINDOW)["params"]
    kernel = params["trunk"]["conv3"]["kernel"]
    fan_in, fan_out = 9 * kernel.shape[2], 9 * kernel.shape[3]
    assert np.var(kernel) == pytest.approx(2 / (fan_in + fan_out), rel=0.03)
    assert np.abs(kernel).max() <= np.sqrt(6 / (fan_in + fan_out)) * 1.0001
    assert not params["trunk"]["conv3"]["bias"].any()


@pytest.mark.parametrize(
    ("model", "windows", "fault"),
    [
        (SpineNet(PAPER_TASKS, "conv6"), WINDOW, "branch_point 'conv6'"),
        (SpineNet(PAPER_TASKS), jnp.zeros((1, 112, 224, 8)), "expected .N, height, width, 9."),
    ],
)
def test_bad_arguments_are_named(model, windows, fault):
    with pytest.raises(SpinejaxError, match=fault):
        abstract(model, windows)


# Slices outside the scan ---------------------------------------------------------------------------------------------


def window(*slices):
    """float32[1, 112, 224, 9] with noise in some slices; the others have one value, as random views make them."""
    noise = np.random.default_rng(0).random((1, *WINDOW_SHAPE), np.float32)
    return np.where(np.isin(np.arange(9), slices), noise, np.float32(0.07))


def test_slices_outside_the_scan_become_the_nearest_inside():
    found = np.asarray(filled(jnp.asarray(window(2, 3, 7))))
    for slot, nearest in enumerate([2, 2, 2, 3, 3, 3, 7, 7, 7]):  # 5 is midway: the first of the two
        np.testing.assert_array_equal(found[..., slot], window(2, 3, 7)[..., nearest])


def test_full_and_empty_windows_are_unchanged():
    both = np.concatenate([window(*range(9)), window()])
    np.testing.assert_array_equal(filled(jnp.asarray(both)), both)


def test_a_network_that_fills_sees_one_slice_as_a_stack_of_it():
    plain = SpineNet(tasks=PAPER_TASKS[:1], width=0.02)
    variables = plain.init(jax.random.key(0), jnp.zeros((1, *WINDOW_SHAPE)))
    variables = {**variables, "constants": {"slice_mean": jnp.linspace(0.1, 0.5, 9)}}
    stack = np.repeat(window(4)[..., 4:5], 9, axis=-1)
    scores = plain.clone(fill_slices=True).apply(variables, window(4))["pfirrmann"]
    np.testing.assert_allclose(scores, plain.apply(variables, stack)["pfirrmann"], rtol=1e-5, atol=1e-6)
    assert np.abs(scores - plain.apply(variables, window(4))["pfirrmann"]).max() > 1e-3
