"""A checkpoint comes back to the bit, loads anywhere, and is refused if one byte of it changed."""

import dataclasses
import errno
import fcntl
import functools
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import spinejax
from spinejax.config import Config
from spinejax.errors import SpinejaxError
from spinejax.files import checksums, lock
from spinejax.parallel import devices
from spinejax.tasks import Task
from spinejax.training import checkpoint, train_step
from tests.conftest import TASKS

CONFIG = Config(width=0.02)


@functools.cache
def fresh(tasks, config):
    model = train_step.make_model(config, tasks)
    state = train_step.init(jax.random.key(0), model, config, np.linspace(0.1, 0.9, 9, dtype=np.float32))
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
    checkpoints = checkpoint.Checkpoints(folder)
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


def test_the_latest_two_and_the_best_are_kept_and_come_back_to_the_bit(run):
    folder, _, states = run
    checkpoints = checkpoint.Checkpoints(folder, read_only=True)
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


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, remove, empty])
def test_damage_to_any_file_is_one_line_that_names_the_step_to_go_back_to(run, tmp_path, damage):
    """Every file there is: arrays, Orbax's and OCDBT's own, the record, the list of sums."""
    original = run[0] / "checkpoints" / "30"
    names = files_of(original)
    assert {"SHA256SUMS", "record/metadata", "variables/manifest.ocdbt", "optimiser/_METADATA"} <= set(map(str, names))
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    checkpoints = checkpoint.Checkpoints(copy, read_only=True)
    for name in names:
        path = copy / "checkpoints" / "30" / name
        if not path.stat().st_size and damage is not remove:
            continue
        before = path.read_bytes()
        damage(path)
        reads = [lambda: restored(checkpoints, 30), lambda: spinejax.load(copy / "checkpoints" / "30")]
        for read in reads if name.parts[0] in ("variables", "record") else reads[:1]:
            with pytest.raises(SpinejaxError, match=r"go back to step 20\.") as caught:
                read()
            assert "30" in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(before)
    restored(checkpoints, 30)


def test_every_single_bit_of_the_list_of_sums_counts(run, tmp_path):
    folder = shutil.copytree(run[0] / "export", tmp_path / "export")
    path = folder / "SHA256SUMS"
    before = path.read_bytes()
    for place in range(0, len(before), 7):
        path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        assert checksums.fault_of(folder)
    for stop in range(0, len(before), 50):
        path.write_bytes(before[:stop])
        assert checksums.fault_of(folder)
    path.write_bytes(before)
    assert checksums.fault_of(folder) is None
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False).returncode == 0


def test_the_way_back_is_a_step_that_is_whole(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "run")
    for step in ("20", "30"):
        flip_a_byte(copy / "checkpoints" / step / "variables" / "manifest.ocdbt")
    with pytest.raises(SpinejaxError, match="No other saved step is whole"):
        restored(checkpoint.Checkpoints(copy, read_only=True), 30)


def test_a_full_disk_is_noticed_before_a_save_and_says_how_much_is_needed(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    model, state = state_on_eight_devices(1)
    checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.4)
    checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    model, state = state_on_eight_devices(2)
    with pytest.raises(SpinejaxError, match=r"too full.* needs \d+ MB, and 1 MB are free. Step 10 is kept"):
        checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.4)
    checkpoints.close()
    assert checkpoints.all_steps() == [10]


@pytest.mark.parametrize("call", range(1, 12))
def test_a_disk_that_fills_up_during_a_save_keeps_the_last_good_step(run, tmp_path, monkeypatch, call):
    """The error comes at one flush after the other: no half-written folder remains, and it is one line."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    model, state = run[1], run[2][20]
    checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.4)
    checkpoints.wait()
    flush, calls = checksums.flush, iter(range(1, 1000))

    def full(path):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    monkeypatch.setattr(checksums, "flush", full)
    checkpoint.save(checkpoints, run[2][30], model, data_digest="abc", error=0.3)
    with pytest.raises(SpinejaxError, match=r"step 30 could not be saved: .*No space left.*Step 20 is kept"):
        checkpoints.close()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["20"]
    same(restored(checkpoint.Checkpoints(tmp_path), 20), run[2][20])


def test_a_step_saved_on_sigterm_is_the_best_only_if_there_is_no_other(run, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    model, states = run[1], run[2]
    checkpoint.save(checkpoints, states[10], model, data_digest="abc", error=None, unlogged=[{"loss": 1 / 3}])
    checkpoints.wait()
    assert checkpoint.best_step(tmp_path) == 10
    _, unlogged, _ = checkpoint.resume(checkpoints, states[10], model=model, data_digest="abc")
    assert unlogged == [{"loss": 1 / 3}]
    checkpoint.save(checkpoints, states[20], model, data_digest="abc", error=0.9)
    checkpoint.save(checkpoints, states[30], model, data_digest="abc", error=None)
    checkpoints.close()
    assert checkpoint.best_step(tmp_path) == 20


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
        ({"model": {"width": 0.05}}, "not of this network and task table: params/head_brightness/fc6/bias"),
        ({"model": {"dtype": "evil"}}, "model.dtype"),
        ({"model": {"width": 1e9}}, "model.width"),
        ({"tasks": [{"name": "brightness"}]}, "Task table"),
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
    checksums.seal(copy)  # by somebody who knows how
    with pytest.raises(SpinejaxError, match=fault):
        spinejax.load(copy)


def test_a_run_goes_on_with_its_own_data_and_tasks_only(run):
    checkpoints = checkpoint.Checkpoints(run[0], read_only=True)
    with pytest.raises(SpinejaxError, match="another data set"):
        restored(checkpoints, 30, data_digest="abd")
    swapped = (TASKS[0], Task("side", ("back", "front")))
    with pytest.raises(SpinejaxError, match="its task table is not"):
        restored(checkpoints, 30, tasks=swapped)


def test_only_what_a_save_left_is_removed(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "copy")
    shutil.copytree(copy / "checkpoints" / "30", copy / "checkpoints" / "30-good")
    (copy / "checkpoints" / "40.tmp").mkdir()
    checkpoint.Checkpoints(copy).close()
    assert (copy / "checkpoints" / "30-good" / "SHA256SUMS").is_file()
    assert not (copy / "checkpoints" / "40.tmp").exists()


def test_a_run_goes_on_with_its_own_options_only(tmp_path):
    checkpoint.check_options(Config(init_from=Path("mistyped")), tmp_path)
    checkpoint.check_options(Config(), tmp_path)  # nothing was saved that would go on
    (tmp_path / "checkpoints" / "7" / "record").mkdir(parents=True)
    checkpoint.check_options(Config(epochs=2000, workers=3), tmp_path)  # neither changes what a step computes
    with pytest.raises(SpinejaxError, match=r"width was 1.0, now 0.5"):
        checkpoint.check_options(Config(width=0.5), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SpinejaxError, match=r"config\.json is missing"):
        checkpoint.check_options(Config(), tmp_path)


def test_load_verifies_and_reads_no_optimiser(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run[0], tmp_path / "run")
    step = copy / "checkpoints" / "20"
    for name in files_of(step / "optimiser"):
        flip_a_byte(step / "optimiser" / name) if (step / "optimiser" / name).stat().st_size else None
    hashed, sha256_of = [], checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    _, variables = spinejax.load(step)
    same(variables["params"], run[2][20].params)
    assert hashed
    assert {path.relative_to(step).parts[0] for path in hashed} == {"record", "variables"}
    assert len(set(hashed)) == len(hashed)
    checkpoint.export(copy)
    with pytest.raises(SpinejaxError, match=r"optimiser/.* is not what was saved.*go back to step 30"):
        restored(checkpoint.Checkpoints(copy, read_only=True), 20)


def test_export_sums_each_file_once_and_a_damaged_step_leaves_the_export_before(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run[0], tmp_path / "run")
    before = {name: (copy / "export" / name).read_bytes() for name in files_of(copy / "export")}
    summed, sha256_of = [], checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: summed.append(path) or sha256_of(path))
    checkpoint.export(copy)
    assert len(summed) == len(set(summed)) == sum(len(name.parts) > 1 for name in before)
    assert {name: (copy / "export" / name).read_bytes() for name in files_of(copy / "export")} == before

    step = copy / "checkpoints" / "20"
    name = next(name for name in files_of(step / "variables") if (step / "variables" / name).stat().st_size)
    flip_a_byte(step / "variables" / name)
    with pytest.raises(SpinejaxError, match=f"checkpoints/20: variables/{name} is not what was saved"):
        checkpoint.export(copy)
    assert {name: (copy / "export" / name).read_bytes() for name in files_of(copy / "export")} == before
    assert {path.name for path in copy.iterdir() if path.name.startswith("export")} == {"export"}


def test_records_of_the_version_before_are_read_and_of_the_first_refused(run, tmp_path):
    copy = shutil.copytree(run[0] / "export", tmp_path / "export")
    path = copy / "record" / "metadata"
    record = json.loads(path.read_text())
    del record["validation_split"]
    for version in (2, 1):
        path.write_text(json.dumps(record | {"version": version, "sha256": {"variables/params/x": "0" * 64}}))
        checksums.seal(copy)
        if version == 2:
            same(spinejax.load(copy)[1]["params"], run[2][20].params)
    with pytest.raises(SpinejaxError, match="of a different version: version: Input should be 2 or 3"):
        spinejax.load(copy)


@pytest.mark.parametrize(
    ("tasks", "config", "difference"),
    [
        (TASKS, Config(width=0.03), r"not of this network and task table: .*head_brightness/fc6/bias is float32"),
        ((*TASKS, Task("more", ("no", "yes"))), CONFIG, r"head_more/fc6/bias is absent"),
        (TASKS, Config(width=0.02, branch_point="fc7"), r"not of this network"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(run, tasks, config, difference):
    checkpoints = checkpoint.Checkpoints(run[0], read_only=True)
    with pytest.raises(SpinejaxError, match=difference):
        restored(checkpoints, 30, tasks, config)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(SpinejaxError, match="not a checkpoint"):
        spinejax.load(tmp_path)


def test_a_second_trainer_is_refused_by_a_message_that_names_the_first(tmp_path):
    with (
        lock.locked(tmp_path / "run", "advice"),
        pytest.raises(SpinejaxError, match=rf"another process \(host .*, process {os.getpid()}\) is writing .*advice"),
        lock.locked(tmp_path / "run", "advice"),
    ):
        pass
    with lock.locked(tmp_path / "run", "advice"):
        assert (tmp_path / "run").is_dir()


def test_where_locks_do_not_hold_the_trainer_that_lost_the_folder_stops_before_it_saves(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    model, state = state_on_eight_devices(1)
    with lock.locked(tmp_path, "advice"):
        checkpoints = checkpoint.Checkpoints(tmp_path)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(socket, "gethostname", lambda: "other-host")
            held_elsewhere = lock.locked(tmp_path, "advice")
            held_elsewhere.__enter__()
        with pytest.raises(SpinejaxError, match=r"another process \(host other-host, process \d+\) has taken"):
            checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.4)
        checkpoints.close()
    assert checkpoints.all_steps() == []


def test_a_half_written_save_is_not_seen(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "run")
    half = shutil.copytree(copy / "checkpoints" / "30", copy / "checkpoints" / "40.tmp")
    assert checkpoint.best_step(copy) == 20
    assert checkpoint.Checkpoints(copy, read_only=True).latest_step() == 30
    assert half.is_dir()
    assert checkpoint.Checkpoints(copy).latest_step() == 30
    assert not half.exists()


def test_with_an_average_the_network_is_the_average_and_a_resumed_run_has_both(tmp_path):
    config = dataclasses.replace(CONFIG, average_weights=0.9)
    model, state = state_on_eight_devices(2, config=config)
    state = state.replace(average=jax.tree.map(lambda leaf: leaf + 1, state.params))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.1)
    checkpoints.close()
    same(restored(checkpoints, 20, config=config), state)
    same(spinejax.load(tmp_path)[1]["params"], state.average)
