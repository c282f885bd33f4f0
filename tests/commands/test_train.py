"""The command as its users run it: it learns, and it says what is wrong."""

import dataclasses
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from spinejax import config
from spinejax.commands import evaluate, train
from spinejax.config import Config
from spinejax.data.batches import refuse_unlabelled
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.network import losses
from spinejax.network.views import ViewRanges
from spinejax.parallel import runtime
from spinejax.training import checkpoint, epoch, train_step
from spinejax.training.log import read_log
from tests.conftest import write_tiny
from tests.running import ROOT, digests, environment, train_command

OPTIONS = Config(
    width=0.02, batch_size=8, epochs=2, learning_rate=0.01, initialiser="he", views=ViewRanges(5, 4, 4, 1, 0.05, 0.05)
)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    # Within one process the cache of compiled programs would warn that it was set up too late.
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)


def run_train(launcher, data, run, *options):
    return launcher.run(train_command(data, run, "--epochs", 5, *options))


@pytest.fixture(scope="module")
def uninterrupted(tiny, launcher, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    result = run_train(launcher, tiny, run)
    assert result.status == 0, result.stderr
    return run, result


def test_a_run_leaves_what_the_design_promises(uninterrupted):
    run, result = uninterrupted
    assert {"config.json", "checkpoints", "log.jsonl", "curves.png", "export"} <= {p.name for p in run.iterdir()}
    log = read_log(run / "log.jsonl")
    assert [(entry["epoch"], entry["step"]) for entry in log] == [(n, 3 * n) for n in range(1, 6)]
    assert {"loss", "loss/side", "validation_error", "learning_rate", "discs_per_second"} <= set(log[0])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "is finished: step 15" in result.stdout
    assert "validation error" in result.stdout


def test_each_step_has_a_line_and_the_last_of_an_epoch_its_speed(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16))
    for entry, start in zip(read_log(uninterrupted[0] / "log.jsonl"), range(0, 15, 3), strict=True):
        of_epoch = lines[start : start + 3]
        np.testing.assert_allclose(entry["loss"], np.mean([line["loss"] for line in of_epoch]))
        assert ["discs_per_second" in line for line in of_epoch] == [False, False, True]
        assert of_epoch[-1]["peak_memory_mb"] > 10


def test_a_saved_runs_options_start_another(uninterrupted, tmp_path):
    path, options = uninterrupted[0] / "config.json", tmp_path / "options.json"
    parse = """
import sys
from spinejax import config
from spinejax.commands import evaluate, train
arguments = train.parsed(sys.argv[1:])
config.save(arguments.options, arguments.workdir)
print(arguments.data)
"""
    words = ["--data", "discs", "--workdir", options, "--epochs", "7"]
    child = [sys.executable, "-c", parse, "--config", path, *words]
    assert subprocess.run(child, check=True, capture_output=True, text=True).stdout == "discs\n"
    assert config.load(options) == dataclasses.replace(config.load(path), epochs=7)
    with pytest.raises(SpinejaxError, match="missing, so its folder is not a run"):
        train.parsed(["--config", str(tmp_path / "config.json"), "--data", "discs", "--workdir", "run"])


def test_a_run_starts_from_another_and_goes_on_without_it(uninterrupted, launcher, tiny, tmp_path):
    first, _ = uninterrupted
    straight = run_train(launcher, tiny, tmp_path / "straight", "--init-from", first, "--learning-rate", "1e-9")
    assert straight.status == 0, straight.stderr
    assert f"From {first}: head_brightness/fc6" in straight.stdout.replace("\n", " ")
    theirs, ours = (checkpoint.load(run)[1]["params"] for run in (first, tmp_path / "straight"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), ours, theirs)
    again = run_train(launcher, tiny, tmp_path / "straight", "--init-from", first, "--learning-rate", "1e-9")
    assert "is finished: step 15" in again.stdout
    assert "From" not in again.stdout


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, launcher, tiny):
    run, _ = uninterrupted
    before = digests(run, 15)
    again = run_train(launcher, tiny, run)
    assert again.status == 0, again.stderr
    assert "is finished: step 15" in again.stdout
    assert digests(run, 15) == before
    assert len(read_log(run / "log.jsonl")) == 5


def test_a_run_that_saves_by_time_ends_with_the_same_steps(uninterrupted, launcher, tiny, tmp_path):
    """It saves the first evaluation, and at its end the best step and the last."""
    often, run = uninterrupted[0], tmp_path / "run"
    assert run_train(launcher, tiny, run, "--save-minutes", "10").status == 0
    best = checkpoint.best_step(often)
    assert checkpoint.Checkpoints(run, read_only=True).all_steps() == sorted({3, best, 15})[-2:]  # the latest two
    assert checkpoint.best_step(run) == best
    for step in (best, 15):
        assert digests(run, step) == digests(often, step)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--tasks", "modic"], "Unknown task modic"),
        (["--width", "-1"], "--width is -1.0"),
        (["--task-weights", "sidee", "5"], "Unknown task sidee"),
        (["--workdir", "README.md"], "README.md"),
        (["--width", "0.03"], "width was 0.02, now 0.03"),
        (["--profile", "5:5"], "--profile is 5:5: expected FROM:TO"),
        (["--save-minutes", "-1"], "--save-minutes is -1.0: expected 0 or more"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_status_2(uninterrupted, launcher, tiny, options, fault):
    result = run_train(launcher, tiny, uninterrupted[0], *options)
    assert result.status == 2
    assert fault in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_help_shows_every_option_and_preset(launcher):
    result = launcher.run(["train.py", "--help"])
    assert result.status == 0
    for name in config.PRESETS:
        assert name in result.stdout
    names = {f.name for f in dataclasses.fields(Config)} | {f"views.{f.name}" for f in dataclasses.fields(ViewRanges)}
    for name in names - {"views"}:
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert result.stdout.count("default:") >= len(names) - 1


def main(data, run, **changes):
    train.main(train.Arguments(data, run, dataclasses.replace(OPTIONS, **changes)))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    main(tiny, run, epochs=1)
    step = train_step.train_step

    def poisoned(*args, **kwargs):
        state, figures = step(*args, **kwargs)
        return state, figures | {"skipped": np.float32(3)}

    monkeypatch.setattr(train_step, "train_step", poisoned)
    with pytest.raises(
        SpinejaxError,
        match=r"NaN.* 3 steps in a row.*checkpoint is kept.*another --workdir, with a lower --learning-rate",
    ):
        main(tiny, run, max_skipped=3)
    assert checkpoint.best_step(run) == 3
    assert len(read_log(run / "log.jsonl")) == 1
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)
    main(tiny, run)
    checkpoints = checkpoint.Checkpoints(run, read_only=True)
    assert checkpoints.latest_step() == 6


def test_a_run_does_not_go_on_with_other_data(tiny, tmp_path):
    run = tmp_path / "run"
    main(tiny, run, epochs=1)
    other = write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(SpinejaxError, match="another data set"):
        main(other, run)


def test_an_odd_last_epoch_does_not_count_towards_a_plateau(tiny, tmp_path):
    """Five epochs and then eight, evaluated every two, end as eight in one go."""
    for name, ends in (("twice", (5, 8)), ("once", (8,))):
        for epochs in ends:
            main(tiny, tmp_path / name, epochs=epochs, eval_epochs=2, plateau_patience=1)
    assert digests(tmp_path / "twice", 24) == digests(tmp_path / "once", 24)


def test_discs_in_device_memory_make_the_same_run_and_are_kept_there_if_they_fit(tiny, tmp_path, monkeypatch, capsys):
    made, device_cache = [], epoch.device_cache.DeviceCache
    monkeypatch.setattr(epoch.device_cache, "DeviceCache", lambda *args: made.append(1) or device_cache(*args))
    for cache, num_made in (("none", 0), ("device", 1), ("auto", 2)):
        main(tiny, tmp_path / cache, cache=cache)
        assert len(made) == num_made
        assert digests(tmp_path / cache, 6) == digests(tmp_path / "none", 6)
    assert "streamed" not in capsys.readouterr().out
    with monkeypatch.context() as between_cpus:
        between_cpus.setattr(epoch.devices, "joined_by_network", lambda mesh: True)
        main(tiny, tmp_path / "joined")
    assert len(made) == 2
    monkeypatch.setattr(epoch.device_cache, "free_bytes", lambda mesh: 1_000_000)
    main(tiny, tmp_path / "full", read_threads=3)
    assert len(made) == 2
    assert "30 discs do not fit half of the devices' free memory: they are streamed" in capsys.readouterr().out
    assert digests(tmp_path / "full", 6) == digests(tmp_path / "none", 6)


def test_grades_count_alike_within_each_source_if_asked(tiny, tmp_path, monkeypatch):
    """The weights that the steps get are those of each source's training discs; with one source they change nothing."""
    two = tmp_path / "two"
    shutil.copytree(tiny, two)
    path = two / "manifest.json"
    scans = np.unique(DataSet(tiny).scan).tolist()
    names = {scan: {"source": str(place % 2), "contrast": "t2"} for place, scan in enumerate(scans)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scans": names}))
    seen, step = [], train_step.train_step

    def watched(key, state, batch, class_weights, **options):
        seen.append((jax.tree.map(np.asarray, class_weights), np.asarray(batch["source"]), np.asarray(batch["row"])))
        return step(key, state, batch, class_weights, **options)

    monkeypatch.setattr(train_step, "train_step", watched)
    main(two, tmp_path / "run", epochs=1, balance="source")
    data = DataSet(two)
    rows = data.rows("train")
    weights, source, row = seen[0]
    np.testing.assert_array_equal(source, data.source[row])
    for place in (0, 1):
        own = losses.class_weights(data.labels[rows[data.source[rows] == place]], data.tasks)
        for task in data.tasks:
            np.testing.assert_array_equal(weights[task.name][place], own[task.name])
    for balance in ("all", "source"):
        main(tiny, tmp_path / balance, epochs=1, balance=balance)
    assert digests(tmp_path / "source", 3) == digests(tmp_path / "all", 3)


def test_a_batch_must_divide_by_the_devices(tiny, tmp_path):
    with pytest.raises(SpinejaxError, match="multiple of the 8 devices"):
        main(tiny, tmp_path / "run", batch_size=12)


def test_microbatches_must_divide_what_a_device_has_of_a_batch(tiny, tmp_path):
    with pytest.raises(
        SpinejaxError, match="--microbatches is 3: expected a divisor of 2, the discs of a batch on each"
    ):
        main(tiny, tmp_path / "run", batch_size=16, microbatches=3)
    assert not (tmp_path / "run").exists()


def test_too_little_device_memory_names_the_option_that_lowers_it_and_by_how_much(tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")

    monkeypatch.setattr(train_step, "train_step", full)
    with pytest.raises(SpinejaxError, match="Out of device memory: a step takes") as raised:
        main(tiny, tmp_path / "run", batch_size=16)
    found = re.search(
        r"takes (.+) MB on each device\. `--microbatches 2` lowers that to about (.+) MB", str(raised.value)
    )
    now, then = map(float, found.groups())
    assert 0.4 * now < then < 0.9 * now
    with pytest.raises(SpinejaxError, match="Use more devices, --layout split or a smaller --width"):
        main(tiny, tmp_path / "run", batch_size=8)


def test_the_precision_of_float32_is_set_before_anything_is_computed(tiny, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(runtime, "set_up", lambda **options: chosen.append(options["precision"]))
    for changes in ({}, {"precision": "tensorfloat32"}):
        with pytest.raises(SpinejaxError, match="multiple of the 8 devices"):
            main(tiny, tmp_path / "run", batch_size=12, **changes)
    with pytest.raises(SpinejaxError, match="--data DIR, a data set, or"):
        evaluate.main(evaluate.Arguments(precision="bfloat16"))
    assert chosen == ["float32", "tensorfloat32", "bfloat16"]


def test_a_task_without_a_label_is_refused_before_anything_is_computed(tmp_path):
    data = write_tiny(tmp_path / "data", num_patients=(4, 1, 1))
    labels = DataSet(data)
    labels.labels[:, 1] = -1
    with pytest.raises(SpinejaxError, match="no disc of split 'train' has a label for side"):
        refuse_unlabelled(labels, labels.tasks, ("train", "validation"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_either_held_out_split_can_decide_and_the_other_stays_unseen(tiny, tmp_path, monkeypatch, split):
    """The paper's standard deviation comes from two networks with validation and test swapped (Sect. 5)."""
    evaluated, eval_batches = [], epoch.eval_batches

    def recorded(data, rows, *args, **kwargs):
        evaluated.extend(rows)
        return eval_batches(data, rows, *args, **kwargs)

    monkeypatch.setattr(epoch, "eval_batches", recorded)
    main(tiny, tmp_path / "run", epochs=1, validation_split=split)
    assert evaluated == list(DataSet(tiny).rows(split))
    for folder in (checkpoint.find(tmp_path / "run"), tmp_path / "run" / "export"):
        assert checkpoint.read_record(folder)["validation_split"] == split


def test_one_task_alone_and_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboardX")
    main(tiny, tmp_path / "run", epochs=1, tasks=("side",), branch_point="none", tensorboard=True)
    entry = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert "loss/side" in entry
    assert "loss/brightness" not in entry
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_weights_and_biases_gets_the_log_offline_and_nothing_of_the_machine(tiny, compiled, tmp_path):
    pytest.importorskip("wandb")
    run, alone = tmp_path / "run", {"WANDB_MODE": "offline"}
    for epochs in ("1", "2"):  # the second goes on with the first's run
        command = train_command(tiny, run, "--epochs", epochs, "--wandb")
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(compiled) | alone, check=True)
    written = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    identity = (run / "wandb" / "id").read_text()
    assert [path.name for path in written] == [f"run-{identity}.wandb"] * 2
    for path, entry in zip(written, read_log(run / "log.jsonl"), strict=True):
        records = path.read_bytes()  # of Protocol Buffers, which keep text as it is
        for name in ("loss", "validation_error", "learning_rate"):
            assert re.search(rb"\b%b\b.{,9}%b" % (name.encode(), json.dumps(entry[name]).encode()), records, re.DOTALL)
        assert b"undisclosed" in records
        assert str(tiny).encode() not in records


def test_epochs_of_evaluation_end_with_the_last_and_go_on_where_they_were():
    for every, epochs in itertools.product((1, 2, 3), (1, 5, 6)):
        options = dataclasses.replace(OPTIONS, eval_epochs=every, epochs=epochs)
        whole = options.evaluation_epochs(0)
        assert whole[-1] == epochs
        assert options.evaluation_epochs(epochs) == []
        for place, done in enumerate(whole):
            assert options.evaluation_epochs(done) == whole[place + 1 :]
        longer = dataclasses.replace(options, epochs=12)
        assert longer.evaluation_epochs(epochs) == [n for n in longer.evaluation_epochs(0) if n > epochs]
