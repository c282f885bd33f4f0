"""A checkpoint comes back to the bit, loads anywhere, and is refused if one byte of it changed."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

import spinejax
from spinejax import checkpoint, devices, training
from spinejax.config import Config
from spinejax.errors import SpinejaxError
from spinejax.tasks import Task
from tests.conftest import TASKS

CONFIG = Config(width=0.02)


@functools.cache
def fresh(tasks, config):
    model = training.make_model(config, tasks)
    state = training.init(jax.random.key(0), model, config, np.linspace(0.1, 0.9, 9, dtype=np.float32))
    return model, devices.to_host(state)


def state_on_eight_devices(seed, tasks=TASKS, config=CONFIG):
    model, state = fresh(tasks, config)
    state = state.replace(
        step=np.int32(10 * seed), params=jax.tree.map(lambda leaf: leaf * np.float32(seed), state.params)
    )
    return model, devices.put_replicated(state, devices.make_mesh())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three saves; the second has the least error. And the states that were saved."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = checkpoint.open_checkpoints(folder)
    states = {}
    for seed, error in ((1, 0.4), (2, 0.3), (3, 0.35)):
        model, states[10 * seed] = state_on_eight_devices(seed)
        checkpoint.save(checkpoints, states[10 * seed], model, data_digest="abc", error=error)
    checkpoints.close()
    checkpoint.export(folder)
    return folder, model, states


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, devices.to_host(one), devices.to_host(other))


def restored(checkpoints, step, tasks=TASKS, config=CONFIG, data_digest="abc"):
    model, template = state_on_eight_devices(0, tasks, config)
    return checkpoint.restore(checkpoints, template, step, model=model, data_digest=data_digest)


def damage(folder):
    """Flip one bit of the largest file below a folder: of the arrays' data."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_latest_and_the_best_are_kept_and_come_back_to_the_bit(run):
    folder, _, states = run
    checkpoints = checkpoint.open_checkpoints(folder, read_only=True)
    assert sorted(checkpoints.all_steps()) == [20, 30]
    assert checkpoints.latest_step() == 30
    assert checkpoint.best_step(folder) == 20
    for step in (20, 30):
        same(restored(checkpoints, step), states[step])


def test_load_gives_the_best_steps_network(run):
    folder, model, states = run
    for path in (folder, folder / "export", folder / "checkpoints" / "20"):
        loaded, variables = spinejax.load(path)
        assert loaded == model
        same(variables, {"params": states[20].params, "constants": states[20].constants})
    windows = jax.random.uniform(jax.random.key(0), (2, 112, 224, 9))
    assert loaded.apply(variables, windows)["brightness"].shape == (2, 3)


@pytest.mark.parametrize("item", ["variables", "optimiser"])
def test_one_flipped_bit_is_found_and_the_way_back_is_named(run, tmp_path, item):
    copy = shutil.copytree(run[0], tmp_path / "run")
    damage(copy / "checkpoints" / "30" / item)
    checkpoints = checkpoint.open_checkpoints(copy, read_only=True)
    with pytest.raises(SpinejaxError, match=r"30.*go back to the other saved step"):
        restored(checkpoints, 30)


def test_a_missing_file_is_found(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "20" / "variables" / "d", ignore_errors=True)
    for path in (copy / "checkpoints" / "20" / "variables").rglob("manifest*"):
        path.unlink()
    with pytest.raises(SpinejaxError, match="damaged or incomplete"):
        spinejax.load(copy)


@pytest.mark.parametrize("text", ["", "{", '{"version": 99}', "[]", None])
def test_a_damaged_record_is_refused(run, tmp_path, text):
    copy = shutil.copytree(run[0] / "export", tmp_path / "export")
    path = copy / "record" / "metadata"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(SpinejaxError, match="record"):
        spinejax.load(copy)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model": None}, "model"),
        ({"model": {"width": 0.05}}, "another network or task table: params/head_brightness/fc6/bias"),
        ({"model": {"dtype": "evil"}}, "model.dtype"),
        ({"model": {"width": 1e9}}, "model.width"),
        ({"tasks": [{"name": "brightness"}]}, "Task table"),
        ({"sha256": 3}, "sha256"),
        ({"error": "low"}, "error"),
    ],
)
def test_an_edited_record_is_refused(run, tmp_path, changes, fault):
    copy = shutil.copytree(run[0] / "export", tmp_path / "export")
    path = copy / "record" / "metadata"
    record = json.loads(path.read_text())
    for name, change in changes.items():
        record[name] = record[name] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(record))
    with pytest.raises(SpinejaxError, match=fault):
        spinejax.load(copy)


def test_a_run_goes_on_with_its_own_data_and_tasks_only(run):
    checkpoints = checkpoint.open_checkpoints(run[0], read_only=True)
    with pytest.raises(SpinejaxError, match="another data set"):
        restored(checkpoints, 30, data_digest="abd")
    swapped = (TASKS[0], Task("side", ("back", "front")))
    with pytest.raises(SpinejaxError, match="another task table"):
        restored(checkpoints, 30, tasks=swapped)


def test_a_run_goes_on_with_its_own_options_only(tmp_path):
    checkpoint.settle(Config(), tmp_path)
    checkpoint.settle(Config(epochs=2000, workers=3), tmp_path)  # neither changes what a step computes
    with pytest.raises(SpinejaxError, match=r"width was 1.0, now 0.5"):
        checkpoint.settle(Config(width=0.5), tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "7" / "record").mkdir(parents=True)
    with pytest.raises(SpinejaxError, match=r"config\.json is missing"):
        checkpoint.settle(Config(), tmp_path)


def test_a_record_that_lacks_an_array_is_refused(run, tmp_path):
    copy = shutil.copytree(run[0] / "export", tmp_path / "export")
    path = copy / "record" / "metadata"
    record = json.loads(path.read_text())
    del record["sha256"]["variables/params/trunk/conv1/kernel"]
    path.write_text(json.dumps(record))
    with pytest.raises(SpinejaxError, match="conv1/kernel is not what was saved"):
        spinejax.load(copy)


@pytest.mark.parametrize(
    ("tasks", "config", "difference"),
    [
        (TASKS, Config(width=0.03), r"another network or task table: .*head_brightness/fc6/bias is float32"),
        ((*TASKS, Task("more", ("no", "yes"))), CONFIG, r"head_more/fc6/bias is absent"),
        (TASKS, Config(width=0.02, branch_point="fc7"), r"another network"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(run, tasks, config, difference):
    checkpoints = checkpoint.open_checkpoints(run[0], read_only=True)
    with pytest.raises(SpinejaxError, match=difference):
        restored(checkpoints, 30, tasks, config)


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(SpinejaxError, match="no checkpoint there"):
        spinejax.load(tmp_path)


def test_a_second_trainer_is_refused(tmp_path):
    with (
        checkpoint.locked(tmp_path / "run"),
        pytest.raises(SpinejaxError, match="another trainer"),
        checkpoint.locked(tmp_path / "run"),
    ):
        pass
    with checkpoint.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_half_written_save_is_not_seen(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "run")
    (copy / "checkpoints" / "40.orbax-checkpoint-tmp-123").mkdir()
    assert checkpoint.best_step(copy) == 20
    checkpoints = checkpoint.open_checkpoints(copy)
    assert checkpoints.latest_step() == 30
    checkpoints.close()
