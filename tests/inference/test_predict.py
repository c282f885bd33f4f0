"""Averaging over views, against the views taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinejax.config import Config
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.inference import predict
from spinejax.network import views
from spinejax.parallel import devices
from spinejax.training import train_step
from tests.conftest import TASKS


@pytest.fixture(scope="module")
def network(tiny):
    config = Config(width=0.02)
    model = train_step.make_model(config, TASKS)
    state = train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32))
    return model, {"params": state.params, "constants": state.constants}, DataSet(tiny)


@pytest.mark.parametrize("average_logits", [False, True])
def test_tta_is_the_mean_over_the_papers_54_views(network, average_logits):
    model, variables, data = network
    volumes = jnp.asarray(data.volumes(data.rows("test")[:2]))
    got, spread = predict.predict_step(variables, volumes, views.grid(), model=model, average_logits=average_logits)
    windows = jax.vmap(jax.vmap(views.take, (None, 0)), (0, None))(volumes, views.grid())
    logits = jax.vmap(lambda each: model.apply(variables, each))(windows)
    for name, scores in logits.items():
        assert scores.shape[:2] == (2, 54)
        expected = jax.nn.softmax(scores.mean(1)) if average_logits else jax.nn.softmax(scores).mean(1)
        np.testing.assert_allclose(got[name], expected, atol=1e-5)
        np.testing.assert_allclose(got[name].sum(1), 1, atol=1e-5)
        deviations = np.std(jax.nn.softmax(scores), axis=1)[np.arange(2), expected.argmax(1)]
        np.testing.assert_allclose(spread[name], deviations, atol=1e-5)
        assert (deviations > 0).all()


def test_one_view_is_the_plain_network(network):
    model, variables, data = network
    volumes = data.volumes(data.rows("test")[:3])
    got, spread = predict.predict_step(variables, volumes, predict.view_set(tta=False), model=model)
    windows = jax.vmap(lambda volume: views.take(volume, views.identity()))(volumes)
    expected = jax.tree.map(jax.nn.softmax, model.apply(variables, windows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert not any(np.any(each) for each in spread.values())


def test_every_disc_is_graded_once_and_in_order_for_any_batch_size(network):
    model, variables, data = network
    rows = data.rows("train")[:11]
    mesh = devices.make_mesh()
    found = {}
    for batch_size in (8, 16):
        batches = eval_batches(data, rows, [], batch_size=batch_size)
        parts = list(predict.predict(model, variables, batches, mesh))
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), rows)
        found[batch_size] = np.concatenate([part[1]["side"] for part in parts])
    assert found[8].shape == (11, 2)
    np.testing.assert_allclose(found[8], found[16], atol=1e-6)


def test_the_next_batch_is_dispatched_before_the_last_ones_grades_are_fetched(network, monkeypatch):
    model, variables, data = network
    batches = eval_batches(data, data.rows("train")[:17], [], batch_size=8)
    done, step, fetch = [], predict.predict_step, predict.to_host
    monkeypatch.setattr(predict, "predict_step", lambda *args, **named: (done.append("step"), step(*args, **named))[1])
    monkeypatch.setattr(predict, "to_host", lambda tree: (done.append("fetch"), fetch(tree))[1])
    rows = [rows for rows, *_ in predict.predict(model, variables, batches, devices.make_mesh())]
    assert done == ["step", "step", "fetch", "step", "fetch", "fetch"]
    np.testing.assert_array_equal(np.concatenate(rows), data.rows("train")[:17])


def test_a_network_is_copied_where_it_fits_and_else_split_to_the_same_grades(network, monkeypatch):
    model, variables, data = network
    model = model.clone(width=0.03125)  # 128 features of fc6 divide by eight devices
    variables = model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
    mesh, size = devices.make_mesh(), sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    found = []
    for free, split in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr(predict, "free_bytes", lambda mesh, free=free: free)
        layout = predict.grading_layout(mesh, variables)
        assert layout.split is split
        kernel = layout.put(variables)["params"]["head_side"]["fc6"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // (8 if split else 1)
        batches = eval_batches(data, data.rows("test"), [], batch_size=8)
        found.append(next(iter(predict.predict(model, variables, batches, mesh)))[1])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *found)


def test_the_nine_in_plane_views_share_conv1_to_the_same_scores(network):
    model, variables, data = network
    variables = variables | {
        "constants": {"slice_mean": jnp.linspace(0.1, 0.5, 9)}
    }  # so that an unnoticed flip would show
    volumes = jnp.asarray(data.volumes(np.arange(2)))
    plain, shared = (
        predict.predict_step(variables, volumes, views.grid(), model=model, grid=grid) for grid in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shared, plain)


def test_the_grid_is_not_checked_inside_jit_where_it_has_no_values(network):
    model, variables, _ = network
    step = jax.jit(predict.predict_step, static_argnames=("model", "grid"))
    volumes = jax.ShapeDtypeStruct((1, *VOLUME_SHAPE), np.uint16)
    probabilities, _ = jax.eval_shape(
        lambda variables, volumes: step(variables, volumes, views.grid(), model=model, grid=True), variables, volumes
    )
    assert {name: each.shape for name, each in probabilities.items()} == {
        task.name: (1, task.num_grades) for task in model.tasks
    }


def test_a_place_gives_the_scores_of_its_own_window(network):
    model, variables, _ = network
    around = jax.random.uniform(jax.random.key(1), (2, 144, 256, 9))
    places = ((0, 0), (16, 4), (32, 32))
    together = model.apply(variables, around, places=places)["side"].reshape(2, len(places), 2)
    for number, (row, column) in enumerate(places):
        alone = model.apply(variables, around[:, row : row + 112, column : column + 224])["side"]
        np.testing.assert_allclose(together[:, number], alone, atol=1e-6)
    with pytest.raises(SpinejaxError, match="multiples of 4 px"):
        model.apply(variables, around, places=((0, 2), (4, 4)))
