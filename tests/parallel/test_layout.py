"""Parameters split over devices: who keeps what, and the same numbers as when everybody keeps everything."""

import contextlib
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from spinejax.config import Config
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.inference import predict
from spinejax.network import losses, views
from spinejax.network.spinenet import BRANCH_POINTS, SpineNet
from spinejax.network.views import ViewRanges
from spinejax.parallel import devices
from spinejax.parallel import layout as layouts
from spinejax.tasks import PAPER_TASKS, UNLABELLED
from spinejax.training import checkpoint, train_step
from tests.conftest import TASKS

# fc6 has 64 features, which 8 devices share; dropout is on.
CONFIG = Config(width=1 / 64, batch_size=8, learning_rate=0.02, initialiser="he")
KEY = jax.random.key(3)


def mesh_of(num_devices):
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",), axis_types=(AxisType.Auto,))


@functools.cache
def shapes_of(branch_point, width=1.0):
    model = SpineNet(tasks=PAPER_TASKS, branch_point=branch_point, width=width)
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, 112, 224, 9)))["params"]


def specs(layout, tree):
    leaves = jax.tree.leaves_with_path(layout.shardings(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec for path, sharding in leaves}


@pytest.mark.parametrize("branch_point", BRANCH_POINTS)
def test_the_table_holds_at_every_branch_point(branch_point):
    params = shapes_of(branch_point)
    found = specs(layouts.make("split", mesh_of(8), params, batch_size=256), params)
    assert len(found) == len(jax.tree.leaves(params))
    for path, spec in found.items():
        _, layer, kind = path.split("/")
        expected = {
            ("fc6", "kernel"): PartitionSpec(None, "data"),
            ("fc6", "bias"): PartitionSpec("data"),
            ("fc7", "kernel"): PartitionSpec("data", None),
            ("conv2", "kernel"): PartitionSpec(None, None, None, "data"),
            ("conv3", "kernel"): PartitionSpec(None, None, "data", None),
            ("conv4", "kernel"): PartitionSpec(None, None, "data", None),
            ("conv5", "kernel"): PartitionSpec(None, None, "data", None),
        }.get((layer, kind), PartitionSpec())
        assert spec == expected, path
    assert sum(spec != PartitionSpec() for spec in found.values()) >= 7


def test_what_the_optimiser_keeps_is_divided_like_its_parameter():
    model = train_step.make_model(CONFIG, TASKS)
    state = jax.eval_shape(lambda key: train_step.init(key, model, CONFIG, np.zeros(9, np.float32)), KEY)
    found = specs(layouts.make("split", mesh_of(8), state.params, batch_size=8), state)
    momentum = {path: spec for path, spec in found.items() if path.startswith("momentum")}
    assert momentum
    for path, spec in momentum.items():
        (param,) = [p for p in found if p.startswith("params/") and path.endswith(p.removeprefix("params/"))]
        assert spec == found[param]
    assert {spec for path, spec in found.items() if path.startswith(("plateau", "step", "constants"))} == {
        PartitionSpec()
    }


def test_what_does_not_divide_is_replicated_and_said():
    params = shapes_of("conv5", 0.02)  # fc6 has 82 features
    layout = layouts.make("split", mesh_of(8), params, batch_size=8)
    assert not {path for path, spec in specs(layout, params).items() if "fc" in path and spec != PartitionSpec()}
    (note,) = layout.notes()
    assert "fc6, fc7, conv2, conv[3-5]: a dimension does not divide by the 8 devices" in note
    assert "--width" in note
    (note,) = layouts.make("split", mesh_of(2), params, batch_size=8).notes()
    assert "fc" not in note
    assert not layouts.make("split", mesh_of(8), shapes_of("conv5", 0.125), batch_size=8).notes()


def test_auto_takes_the_layout_of_which_less_travels():
    params = shapes_of("conv5")
    assert layouts.make("auto", mesh_of(8), params, batch_size=256).split
    assert not layouts.make("auto", mesh_of(1), params, batch_size=256).split
    # So many discs that their features outweigh the gradients.
    assert not layouts.make("auto", mesh_of(8), params, batch_size=2**15).split
    assert not layouts.make("data", mesh_of(8), params, batch_size=256).split
    shapes = {layouts._name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    assert layouts.num_moved(layouts.Layout(mesh_of(8)), shapes, 256) == 2 * sum(
        x.size for x in jax.tree.leaves(params)
    )


@pytest.fixture(scope="module")
def batch(tiny):
    data = DataSet(tiny)
    rows = data.rows("train")[:8]
    volumes = data.volumes(rows)
    windows = np.asarray(jax.vmap(lambda volume: views.crop(volume, views.identity()))(volumes))
    return {"volume": volumes, "window": windows, "labels": data.labels[rows].astype(np.int32)}


@pytest.fixture(scope="module")
def weights(tiny):
    return losses.class_weights(DataSet(tiny).labels, TASKS)


@functools.cache
def initial(config):
    model = train_step.make_model(config, TASKS)
    return devices.to_host(train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32)))


def trained(choice, num_devices, batch, weights, steps=3, **changes):
    """State and figures after some steps, as numpy."""
    config = dataclasses.replace(CONFIG, **changes)
    model = train_step.make_model(config, TASKS)
    state, mesh = initial(config), mesh_of(num_devices)
    layout = layouts.make(choice, mesh, state.params, batch_size=8)
    state, model = layout.put(state), layout.on(model)
    on_devices, weights = devices.put_batch(batch, mesh), devices.put_replicated(weights, mesh)
    for _ in range(steps):
        state, figures = train_step.train_step(
            KEY, state, on_devices, weights, model=model, config=config, layout=layout
        )
    return layout, state, figures


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_split_equals_data_parallel_dropout_included(batch, weights, num_devices):
    _, one, figures_of_one = trained("data", 1, batch, weights)
    _, split, figures = trained("split", num_devices, batch, weights)
    assert figures["skipped"] == 0
    np.testing.assert_allclose(figures["loss"], figures_of_one["loss"], rtol=1e-5)
    # Weights are about 0.1 in size and have moved by 1e-3 to 1e-2; sums in another order differ in the last digits.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), devices.to_host(split), devices.to_host(one))


@pytest.mark.parametrize(("choice", "num_devices", "num_parts"), [("data", 1, 4), ("data", 4, 2), ("split", 2, 4)])
def test_microbatches_make_the_steps_of_whole_batches(batch, weights, choice, num_devices, num_parts):
    """Dropout included, and missing labels, of which the parts have different numbers."""
    labels = batch["labels"].copy()
    labels[[0, 1, 5], 1] = UNLABELLED
    batch = batch | {"labels": labels}
    _, one, figures_of_one = trained("data", 1, batch, weights)
    _, parts, figures = trained(choice, num_devices, batch, weights, microbatches=num_parts)
    for name in ("loss", "loss/brightness", "loss/side"):
        np.testing.assert_allclose(figures[name], figures_of_one[name], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), devices.to_host(parts), devices.to_host(one))


@pytest.mark.parametrize(("choice", "num_devices", "num_parts"), [("data", 4, 2), ("split", 2, 1)])
def test_each_sources_class_weights_go_with_its_discs(batch, weights, choice, num_devices, num_parts):
    """Of two sources the second's discs count three times: as if its labels had been given class weights like that."""
    batch = batch | {"source": np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)}
    of_each = {name: np.stack([each, 3 * each]) for name, each in weights.items()}
    _, one, figures_of_one = trained("data", 1, batch, of_each)
    _, parts, figures = trained(choice, num_devices, batch, of_each, microbatches=num_parts)
    np.testing.assert_allclose(figures["loss"], figures_of_one["loss"], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), devices.to_host(parts), devices.to_host(one))

    first = {"source": np.zeros(8, np.int32)}
    _, _, like_all = trained("data", 1, batch | first, of_each, steps=1)
    _, _, expected = trained("data", 1, batch, weights, steps=1)
    assert like_all["loss"] == expected["loss"]
    second = {"source": np.ones(8, np.int32)}
    _, _, thrice = trained("data", 1, batch | second, of_each, steps=1)
    np.testing.assert_allclose(thrice["loss"], 3 * expected["loss"], rtol=1e-6)


def test_microbatches_take_less_memory(batch, weights):
    """Of the windows that a step gets, one part at a time goes through the network."""
    model = train_step.make_model(CONFIG, TASKS)
    state, labels = jax.eval_shape(lambda: initial(CONFIG)), jax.ShapeDtypeStruct((64, 2), np.int32)
    args = (KEY, state, jax.ShapeDtypeStruct((64, 112, 224, 9), np.float32), labels, weights)

    def temporary_bytes(num_parts):
        config = dataclasses.replace(CONFIG, microbatches=num_parts)
        program = train_step.update.lower(*args, model=model, config=config).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.6 * temporary_bytes(1)


def test_a_new_states_parts_are_made_on_the_devices_that_keep_them():
    model = train_step.make_model(CONFIG, TASKS)
    fresh = functools.partial(train_step.init, jax.random.key(0), model, CONFIG, np.full(9, 0.3, np.float32))
    layout = layouts.make("split", mesh_of(8), jax.eval_shape(fresh).params, batch_size=8)
    state = layout.create(fresh)
    kernel = state.params["head_side"]["fc6"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(kernel.shape[0], kernel.shape[1] // 8)}
    jax.tree.map(np.testing.assert_array_equal, devices.to_host(state), initial(CONFIG))


def test_gathered_along_rows_and_columns_as_in_one_ring(batch, weights):
    """As more than `ONE_RING` devices do it; here rows of two and columns of four."""
    config = Config(**{**CONFIG.__dict__, "dropout": 0.0})
    model, init = train_step.make_model(config, TASKS), initial(CONFIG)
    one_ring = layouts.make("split", mesh_of(8), init.params, batch_size=8)
    assert one_ring.row == 1
    assert [layouts._row(size) for size in (2, 16, 24, 13, 256)] == [1, 4, 4, 1, 16]
    states = []
    for layout in (one_ring, dataclasses.replace(one_ring, row=2)):
        arguments = devices.put_batch(batch, layout.mesh), devices.put_replicated(weights, layout.mesh)
        options = {"model": layout.on(model), "config": config, "layout": layout}
        states.append(devices.to_host(train_step.train_step(KEY, layout.put(init), *arguments, **options)[0]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *states)


def test_features_gradients_are_scattered_not_summed_whole(batch, weights):
    """Each device needs those of its own discs; an all-reduce would give all of them to every device."""
    model = train_step.make_model(CONFIG, TASKS)
    layout = layouts.make("split", mesh_of(8), initial(CONFIG).params, batch_size=64)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: initial(CONFIG)),
        layout.shardings(initial(CONFIG)),
    )
    windows, labels = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=devices.by_disc(layout.mesh))
        for shape, dtype in (((64, 112, 224, 9), np.float32), ((64, 2), np.int32))
    )
    options = {"model": layout.on(model), "config": CONFIG, "layout": layout}
    program = train_step.update.lower(KEY, state, windows, labels, weights, **options).compile().as_text()

    def sizes(kind):
        results = re.findall(rf" = (.*?) {kind}(?:-start)?\(", program)
        return [
            np.prod([*map(int, shape.split(","))]) for each in results for shape in re.findall(r"\[([\d,]+)]", each)
        ]

    num_features = 3 * 6 * 8
    assert max(sizes("all-reduce")) < 64 * num_features
    assert 64 // 8 * num_features in sizes("reduce-scatter")


def of_two_slices():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("slice", "data"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("choice", ["data", "split"])
def test_two_slices_make_the_steps_of_one_device(batch, weights, choice, monkeypatch):
    _, one, figures_of_one = trained("data", 1, batch, weights)
    monkeypatch.setattr("tests.parallel.test_layout.mesh_of", lambda _: of_two_slices())
    layout, state, figures = trained(choice, 8, batch, weights)
    assert layout.split == (choice == "split")
    np.testing.assert_allclose(figures["loss"], figures_of_one["loss"], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), devices.to_host(state), devices.to_host(one))
    kernel = state.params["head_side"]["fc6"]["kernel"]  # each slice has all of it
    parts = 4 if layout.split else 1
    assert {shard.data.shape[1] for shard in kernel.addressable_shards} == {kernel.shape[1] // parts}


def test_between_slices_goes_a_devices_share_of_the_gradients(batch, weights):
    """What is summed over both slices was summed within each before, and is no larger than what a device keeps."""
    model, init = train_step.make_model(CONFIG, TASKS), initial(CONFIG)
    layout = layouts.make("split", of_two_slices(), init.params, batch_size=8)
    on_devices, on_all = devices.put_batch(batch, layout.mesh), devices.put_replicated(weights, layout.mesh)
    arguments = KEY, layout.put(init), on_devices["window"], on_devices["labels"], on_all
    options = {"model": layout.on(model), "config": CONFIG, "layout": layout}
    program = train_step.update.lower(*arguments, **options).compile().as_text()
    within = re.findall(r" = f32\[([\d,]+)\]\S* reduce-scatter\(.*replica_groups={{0,1,2,3},{4,5,6,7}}", program)
    summed = " ".join(re.findall(r" = (.*?) all-reduce(?:-start)?\(", program))
    # conv5's kernel is divided by its 8 input channels, fc6's by its columns.
    assert "3,3,2,8" in within
    assert "f32[3,3,2,8]" in summed
    assert "f32[144,16]" in summed
    assert "f32[3,3,8,8]" not in summed
    assert "f32[144,64]" not in summed


def a_chip(number, process, slice_index):
    """What a mesh asks of a TPU's chip."""
    chip = mock.NonCallableMock(spec=jax.Device, id=number, process_index=process, slice_index=slice_index)
    chip.configure_mock(platform="tpu", device_kind="TPU v5 lite", coords=(0, 0, 0), core_on_chip=0)
    return chip


def test_slices_are_an_axis_and_processes_stay_in_order():
    chips = [a_chip(place, place // 4, place // 8) for place in range(16)]
    mesh = devices.make_mesh(chips)
    assert mesh.axis_names == ("slice", "data")
    assert mesh.devices.tolist() == [chips[:8], chips[8:]]
    assert devices.by_disc(mesh).spec == PartitionSpec(("slice", "data"))
    assert devices.make_mesh(chips[:8]).axis_names == ("data",)
    with pytest.raises(SpinejaxError, match="2 slices are not equal in size"):
        devices.make_mesh(chips[:12])


@pytest.mark.parametrize(
    ("platform", "num_processes", "expected"), [("cpu", 2, True), ("cpu", 1, False), ("tpu", 2, False)]
)
def test_discs_are_not_sent_between_cpus_of_several_processes(platform, num_processes, expected):
    chips = [a_chip(place, place % num_processes, 0) for place in range(4)]
    for chip in chips:
        chip.configure_mock(platform=platform)
    assert devices.joined_by_network(devices.make_mesh(chips)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("branch_point", ["none", "conv4", "fc6", "fc7"])
def test_split_equals_data_parallel_at_other_branch_points(batch, weights, branch_point):
    (_, one, _), (_, split, _) = (
        trained(choice, 8, batch, weights, branch_point=branch_point, steps=2) for choice in ("data", "split")
    )
    kept = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding.spec, split.params))
    assert PartitionSpec(None, "data") in kept
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), devices.to_host(split), devices.to_host(one))


def test_a_device_holds_its_share_and_keeps_it(batch, weights):
    layout, state, _ = trained("split", 8, batch, weights, steps=1)
    for tree in (state.params, state.momentum[1].trace):
        kernel = tree["head_side"]["fc6"]["kernel"]
        assert kernel.shape[1] == 64
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(kernel.shape[0], 8)}
        assert {s.data.shape for s in tree["head_side"]["fc7"]["kernel"].addressable_shards} == {(8, 16)}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(layout.shardings(state)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_checkpoint_of_one_layout_goes_on_in_another(batch, weights, tmp_path):
    _, state, _ = trained("split", 8, batch, weights, steps=2)
    model = train_step.make_model(CONFIG, TASKS)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoint.save(checkpoints, state, model, data_digest="d", error=0.5)
        checkpoints.wait()
        found = checkpoint.restore(checkpoints, initial(CONFIG), 2, model=model, data_digest="d")
    jax.tree.map(np.testing.assert_array_equal, devices.to_host(state), found)
    for choice, num_devices in (("split", 8), ("data", 1)):
        layout = layouts.make(choice, mesh_of(num_devices), found.params, batch_size=8)
        put = layout.put(found)
        assert jax.tree.map(lambda leaf: leaf.sharding, put) == layout.shardings(found)
        jax.tree.map(np.testing.assert_array_equal, devices.to_host(put), found)


def test_grades_do_not_depend_on_the_layout(batch):
    model = train_step.make_model(CONFIG, TASKS)
    variables = devices.to_host(model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9))))
    grades = []
    for choice, num_devices in (("data", 1), ("split", 8)):
        mesh = mesh_of(num_devices)
        layout = layouts.make(choice, mesh, variables["params"], batch_size=8)
        volumes = devices.put_batch({"volume": batch["volume"]}, mesh)["volume"]
        one_view = devices.put_replicated(predict.view_set(tta=False), mesh)
        grades.append(predict.predict_step(layout.put(variables), volumes, one_view, model=layout.on(model)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *map(devices.to_host, grades))


def test_one_program_computes_what_two_do(batch, weights):
    """Accelerators run views and update as one program, `whole_step`."""
    config = Config(**{**CONFIG.__dict__, "views": ViewRanges()})
    model = train_step.make_model(config, TASKS)
    init = initial(config)
    batch = {"volume": batch["volume"], "labels": batch["labels"]}
    states = [
        step(KEY, jax.device_put(init), batch, weights, model=model, config=config)[0]
        for step in (train_step.train_step, train_step.whole_step)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *map(devices.to_host, states))


def test_bfloat16_computes_and_float32_remembers(batch, weights):
    """Parameters, momentum, loss and logits stay float32; the loss is the float32 one to bfloat16's three digits."""
    figures, states = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = Config(**{**CONFIG.__dict__, "dtype": dtype, "dropout": 0.0})
        model = train_step.make_model(config, TASKS)
        state = jax.device_put(initial(CONFIG))
        variables = {"params": state.params, "constants": state.constants}
        logits = jax.eval_shape(model.apply, variables, jnp.zeros((1, 112, 224, 9)))
        assert {leaf.dtype for leaf in jax.tree.leaves(logits)} == {jnp.dtype("float32")}
        states[dtype], figures[dtype] = train_step.update(
            KEY, state, batch["window"], batch["labels"], weights, model=model, config=config
        )
    kept = jax.tree.leaves((states["bfloat16"].params, states["bfloat16"].momentum, figures["bfloat16"]))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    np.testing.assert_allclose(figures["bfloat16"]["loss"], figures["float32"]["loss"], rtol=0.02)
