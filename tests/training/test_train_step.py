"""One step against the paper's rules in plain numpy, against PyTorch, and on one and eight devices."""

import dataclasses
import functools
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinejax.config import Config
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.network import losses, views
from spinejax.network.views import ViewRanges
from spinejax.parallel import devices
from spinejax.tasks import UNLABELLED, Task
from spinejax.training import train_step
from tests.conftest import TASKS

CONFIG = Config(width=0.02, batch_size=8, learning_rate=0.02, plateau_patience=3)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def batch(tiny):
    data = DataSet(tiny)
    chosen = data.rows("train")[:8]
    return {
        "volume": jnp.asarray(data.volumes(chosen)),
        "labels": jnp.asarray(data.labels[chosen], jnp.int32),
        "row": jnp.asarray(chosen, jnp.int32),
        "valid": jnp.ones(8, bool),
    }


@pytest.fixture(scope="module")
def weights(tiny):
    return losses.class_weights(DataSet(tiny).labels, TASKS)


@functools.cache
def initial(config):
    model = train_step.make_model(config, TASKS)
    return model, devices.to_host(train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32)))


def fresh(config=CONFIG):
    """A model and a state of one's own: a step takes its state's memory over."""
    model, state = initial(config)
    return model, jax.device_put(state)


def stepped(state, model, batch, weights, config=CONFIG, steps=1):
    for _ in range(steps):
        state, figures = train_step.train_step(KEY, state, batch, weights, model=model, config=config)
    return state, figures


def test_weights_of_another_network_are_taken_over_where_they_fit():
    """A task of the same name and grades, the trunk, and nothing else; the data set's mean stays."""
    _, state = fresh()
    other = train_step.make_model(CONFIG, [TASKS[1], Task("brightness", ("dark", "bright"))])
    before = jax.tree.map(np.array, state)
    theirs = train_step.init(jax.random.key(1), other, CONFIG, np.zeros(9, np.float32)).params
    state, taken = train_step.initialise_from(state, theirs)
    assert {"trunk/conv1", "trunk/conv5", "head_side/fc6", "head_side/fc8", "head_brightness/fc7"} <= set(taken)
    assert "head_brightness/fc8" not in taken
    jax.tree.map(np.testing.assert_array_equal, state.params["trunk"], theirs["trunk"])
    jax.tree.map(np.testing.assert_array_equal, state.params["head_side"], theirs["head_side"])
    fc8 = [params["head_brightness"]["fc8"] for params in (state.params, before.params)]
    jax.tree.map(np.testing.assert_array_equal, *fc8)
    np.testing.assert_array_equal(state.constants["slice_mean"], before.constants["slice_mean"])
    jax.tree.map(np.testing.assert_array_equal, state.momentum, before.momentum)


def test_a_network_of_another_width_has_no_weight_to_start_with():
    _, state = fresh()
    wide = dataclasses.replace(CONFIG, width=0.05)
    with pytest.raises(SpinejaxError, match="--init-from: none of that run's weights"):
        train_step.initialise_from(state, initial(wide)[1].params)  # though the last layers' biases would fit


def test_frozen_layers_keep_their_weights_and_the_others_learn_as_before(batch, weights):
    model, state = fresh()
    before = flax.traverse_util.flatten_dict(devices.to_host(state.params), sep="/")
    config = dataclasses.replace(CONFIG, freeze=("trunk", "head_side/fc8"), init_from=Path("run"))
    free, _ = stepped(state, model, batch, weights)
    frozen, metrics = stepped(fresh()[1], model, batch, weights, config)
    free, frozen = (flax.traverse_util.flatten_dict(each.params, sep="/") for each in (free, frozen))
    squares = 0.0
    for name, leaf in before.items():
        if name.startswith(("trunk/", "head_side/fc8/")):  # kernels too, in spite of the weight decay
            np.testing.assert_array_equal(frozen[name], leaf)
        else:
            np.testing.assert_allclose(frozen[name], free[name], rtol=1e-5, atol=1e-7)
            decay = CONFIG.weight_decay * leaf * name.endswith("kernel")
            squares += np.square((leaf - frozen[name]) / CONFIG.learning_rate - decay).sum()
    assert metrics["gradient_norm"] == pytest.approx(np.sqrt(squares), rel=1e-3)  # of what learns, alone


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("trunk/conv",), r"--freeze trunk/conv: no such layer\. The network has .*trunk/conv1"),
        (
            ("trunk", "head_brightness", "head_side"),
            "--freeze trunk .* head_side: no layer is left to learn",
        ),
    ],
)
def test_layers_to_freeze_are_the_networks_and_not_all(names, fault):
    config = dataclasses.replace(CONFIG, freeze=names, init_from=Path("run"))
    with pytest.raises(SpinejaxError, match=fault):
        train_step.init(KEY, train_step.make_model(config, TASKS), config, np.zeros(9, np.float32))


def test_a_step_is_the_papers_rule_written_out(batch, weights):
    """v ← µv - (g + λw), w ← w + ηv, decay on weights only; two steps, so that the momentum counts."""
    model, state = fresh()
    params, velocity = state.params, jax.tree.map(jnp.zeros_like, state.params)
    for step in range(2):
        view_key, dropout_key = jax.random.split(jax.random.fold_in(KEY, step))
        windows = jnp.stack(
            [
                views.take(volume, views.sample(jax.random.fold_in(view_key, place), CONFIG.views))
                for place, volume in enumerate(batch["volume"])
            ]
        )

        def loss(params):
            variables = {"params": params, "constants": {"slice_mean": jnp.full(9, 0.3)}}
            logits = model.apply(variables, windows, train=True, rngs={"dropout": dropout_key})  # noqa: B023
            return sum(
                losses.task_loss(logits[task.name], batch["labels"][:, column], weights[task.name])
                for column, task in enumerate(TASKS)
            )

        gradients = jax.grad(loss)(params)
        decayed = jax.tree.map(lambda g, w: g + 5e-4 * w if w.ndim > 1 else g, gradients, params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v - g, velocity, decayed)
        params = jax.tree.map(lambda w, v: w + 0.02 * v, params, velocity)
    got, _ = stepped(state, model, batch, weights, steps=2)
    assert got.step == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), got.params, params)


def test_windows_drawn_in_groups_are_those_drawn_together(batch, monkeypatch):
    chosen = jax.vmap(views.sample)(jax.random.split(KEY, 8))
    take = functools.partial(train_step._take_each, batch["volume"], chosen, dtype=jnp.float32)
    together = take()
    monkeypatch.setattr(train_step, "DISCS_AT_ONCE", 3)
    np.testing.assert_allclose(take(), together, atol=1e-6)


def test_contrast_and_blur_differ_from_disc_to_disc(batch):
    same = jnp.broadcast_to(batch["volume"][:1], batch["volume"].shape)
    plain = train_step.draw_windows(KEY, jnp.int32(0), same, ranges=CONFIG.views)
    look = functools.partial(train_step.change_looks, KEY, jnp.int32(0), plain)
    varied = look(contrast=0.5, blur=0)
    inside = (plain > 0.05) & (plain < 0.95)
    change = (varied - plain) / (plain * (1 - plain))
    of_disc = [float(jnp.median(change[disc][inside[disc]])) for disc in range(8)]
    for disc in range(8):
        np.testing.assert_allclose(change[disc][inside[disc]], of_disc[disc], atol=1e-3)
    assert max(map(abs, of_disc)) <= 0.5
    assert len({round(each, 3) for each in of_disc}) == 8
    assert not jnp.allclose(look(contrast=0, blur=1.0), plain, atol=1e-3)


def test_eight_devices_agree_with_one(batch, weights):
    model, state = fresh()
    one, figures_of_one = stepped(state, model, batch, weights, steps=3)
    mesh = devices.make_mesh()
    assert mesh.size == 8
    _, state = fresh()
    state = devices.put_replicated(state, mesh)
    spread = devices.put_batch(jax.tree.map(np.asarray, batch), mesh)
    eight, figures_of_eight = stepped(state, model, spread, devices.put_replicated(weights, mesh), steps=3)
    assert eight.params["trunk"]["conv1"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(figures_of_eight["loss"], figures_of_one["loss"], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), eight.params, one.params)


def test_the_same_seed_gives_the_same_bits_and_another_key_does_not(batch, weights):
    results = []
    for key in (KEY, KEY, jax.random.key(8)):
        model, state = fresh()
        state, _ = train_step.train_step(key, state, batch, weights, model=model, config=CONFIG)
        results.append(np.asarray(state.params["trunk"]["conv1"]["kernel"]))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_training_learns_what_can_be_learned(batch, weights):
    config = Config(
        width=0.05, dropout=0.0, initialiser="he", learning_rate=0.002, views=ViewRanges(5, 4, 4, 1, 0.05, 0.02)
    )
    model, state = fresh(config)
    _, before = stepped(state, model, batch, weights, config)
    _, state = fresh(config)
    state, after = stepped(state, model, batch, weights, config, steps=120)
    assert after["loss"] < 0.3 * before["loss"]
    variables = {"params": state.params, "constants": state.constants}
    counts = train_step.eval_step(variables, batch, model=model)
    assert np.trace(counts["brightness"]) >= 7


def test_a_step_compiles_once(batch, weights):
    config = Config(width=0.02, batch_size=8, learning_rate=0.0123)
    model, state = fresh(config)
    programs = (train_step.draw_windows, train_step.update)
    before = [program._cache_size() for program in programs]
    stepped(state, model, batch, weights, config, steps=3)
    after = [program._cache_size() for program in programs]
    assert after[1] == before[1] + 1
    assert after[0] <= before[0] + 1


def test_a_step_copies_neither_weights_nor_momentum(batch, weights):
    model, state = fresh()
    windows = jnp.zeros((8, 112, 224, 9))
    args = (KEY, state, windows, batch["labels"], weights)
    program = train_step.update.lower(*args, model=model, config=CONFIG).compile().as_text()
    rows, columns = state.params["head_side"]["fc6"]["kernel"].shape
    assert not re.findall(rf"= f32\[{rows},{columns}\]\S* copy\(", program)


def test_a_step_moves_nothing_between_host_and_device(batch, weights):
    model, state = fresh()
    weights = jax.device_put(weights)
    state, _ = stepped(state, model, batch, weights)
    with jax.transfer_guard("disallow"):
        stepped(state, model, batch, weights)


def test_counts_leave_out_padding_and_missing_labels(batch):
    model, state = fresh()
    variables = {"params": state.params, "constants": state.constants}
    labels = batch["labels"].at[0, 0].set(UNLABELLED)
    partly = batch | {"labels": labels, "valid": batch["valid"].at[5:].set(False)}
    counts = train_step.eval_step(variables, partly, model=model)
    assert counts["brightness"].sum() == 4
    assert counts["side"].sum() == np.sum(np.asarray(labels[:5, 1]) != UNLABELLED)
    windows = jnp.stack([views.take(volume, views.identity()) for volume in batch["volume"]])
    predicted = model.apply(variables, windows)["brightness"].argmax(1)
    expected = np.zeros((3, 3), int)
    for place in range(1, 5):
        expected[labels[place, 0], predicted[place]] += 1
    np.testing.assert_array_equal(counts["brightness"], expected)


def test_the_learning_rate_falls_after_patience_evaluations_without_a_lower_error():
    _, state = fresh()
    scales = []
    for error in (0.5, 0.4, 0.41, 0.42, 0.43, 0.39, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4):
        state = train_step.evaluated(state, error, CONFIG)
        scales.append(float(state.plateau.scale))
    np.testing.assert_allclose(scales, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001], rtol=1e-5)
    assert train_step.is_over(state, CONFIG)


def test_the_learning_rate_falls_when_pytorchs_does():
    torch = pytest.importorskip("torch")
    parameter = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    # PyTorch waits for one evaluation more than its patience.
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=CONFIG.plateau_patience - 1, eps=0)
    _, state = fresh()
    for error in np.random.default_rng(0).uniform(0.2, 0.6, 60):
        state = train_step.evaluated(state, float(error), CONFIG)
        theirs.step(float(error))
        np.testing.assert_allclose(state.plateau.scale, optimiser.param_groups[0]["lr"], rtol=1e-4)


def test_a_lower_scale_makes_smaller_steps(batch, weights):
    model, state = fresh()
    kernel = np.asarray(state.params["trunk"]["conv1"]["kernel"])
    moved = []
    for scale in (1.0, 0.1):
        _, state = fresh()
        state = state.replace(plateau=state.plateau._replace(scale=jnp.float32(scale)))
        state, _ = stepped(state, model, batch, weights)
        moved.append(np.asarray(state.params["trunk"]["conv1"]["kernel"]) - kernel)
    np.testing.assert_allclose(moved[1], 0.1 * moved[0], atol=1e-7)


def test_training_ends_at_the_plateau_after_the_last_decay():
    config = Config(num_decays=0, plateau_patience=1)
    _, state = fresh()
    state = train_step.evaluated(state, 0.5, config)
    assert not train_step.is_over(state, config)
    assert train_step.is_over(train_step.evaluated(state, 0.5, config), config)


@pytest.mark.parametrize("poison", ["loss", "one gradient"])
def test_a_step_with_a_nan_changes_nothing_but_the_counts(batch, weights, poison):
    """And the step after it is the one that would have come had there been no gradient: same weights, same momentum."""
    model, state = fresh()
    state, _ = stepped(state, model, batch, weights)
    before = devices.to_host(state)
    poisoned = weights
    if poison == "loss":
        poisoned = weights | {"side": weights["side"] * np.float32("nan")}
    else:  # log(1 + exp(x)) is finite far out, but a scale that overflows the gradient alone is not
        poisoned = weights | {"side": weights["side"] * np.float32(1e38)}
    for count in (1, 2):
        state, figures = stepped(state, model, batch, poisoned)
        assert figures["skipped"] == count
        assert state.step == 1 + count
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.momentum, before.momentum)
    state, figures = stepped(state, model, batch, weights)
    assert figures["skipped"] == 0
    assert state.skipped == 0
    assert not np.array_equal(state.params["trunk"]["conv1"]["kernel"], before.params["trunk"]["conv1"]["kernel"])


def test_weight_decay_leaves_biases_alone():
    _, state = fresh()
    ones = jax.tree.map(jnp.ones_like, state.params)
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    optimiser = train_step.make_optimiser(CONFIG)
    velocity, _ = optimiser.update(nothing, optimiser.init(ones), ones)
    for layer in velocity["trunk"].values():
        np.testing.assert_array_equal(layer["bias"], 0)
        np.testing.assert_allclose(layer["kernel"], 5e-4, rtol=1e-6)


def test_the_average_of_the_weights_is_what_is_evaluated(batch, weights):
    """kept = min(memory, (step + 1) / (step + 10)), written out over three steps."""
    config = dataclasses.replace(CONFIG, average_weights=0.15)
    model, state = fresh(config)
    expected = jax.tree.map(np.array, state.params)
    for step in range(3):
        state, _ = stepped(state, model, batch, weights, config)
        kept = min(0.15, (step + 1) / (step + 10))
        expected = jax.tree.map(lambda old, new: kept * old + (1 - kept) * np.asarray(new), expected, state.params)  # noqa: B023
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), state.variables["params"], expected)
    plain, _ = stepped(fresh()[1], model, batch, weights, steps=3)
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)  # the average changes no step
    assert plain.average == {}
    assert plain.variables["params"] is plain.params


def test_a_skipped_step_leaves_the_average_alone(batch, weights):
    config = dataclasses.replace(CONFIG, average_weights=0.9)
    model, state = fresh(config)
    state, _ = stepped(state, model, batch, weights, config)
    before = jax.tree.map(np.array, state.average)
    poisoned = {name: each * np.nan for name, each in weights.items()}
    state, _ = stepped(state, model, batch, poisoned, config)
    assert state.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.average, before)
