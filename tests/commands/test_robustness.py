"""Nothing is lost: kills, notices, full disks, poisoned gradients, and what a killed trainer leaves behind."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from spinejax.commands import train
from spinejax.config import Config
from spinejax.network.views import ViewRanges
from spinejax.parallel import runtime
from spinejax.training import checkpoint, epoch, train_step
from tests.running import ROOT, digests, environment, figures, train_command

OPTIONS = Config(width=0.02, batch_size=8, learning_rate=0.01, initialiser="he", views=ViewRanges(5, 4, 4, 1))
NUM_KILLS = 20
TO_THE_LAST = ("--plateau-patience", 5000, "--epochs")  # no plateau ends the run before


@pytest.fixture
def no_compilation_cache(monkeypatch):
    # Within one process the cache of compiled programs would warn that it was set up too late.
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)


def latest(run):
    root = run / "checkpoints"
    return max((int(p.name) for p in root.iterdir() if p.name.isdigit()), default=0) if root.is_dir() else 0


def half_written(run):
    return set((run / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_killed_at_20_random_moments_saves_included_it_ends_with_the_same_bits(tiny, tmp_path, launcher):
    run, moments, during_saves = tmp_path / "run", random.Random(0), 0
    for number in range(3 * NUM_KILLS):
        if number >= NUM_KILLS and during_saves >= 3:
            break
        before, leftovers = latest(run), half_written(run)
        trainer = launcher.start(train_command(tiny, run, *TO_THE_LAST, 5000))  # more than it gets to before a kill
        # Every other kill aims at a save: it comes soon after a folder was begun, the others at any moment of an epoch.
        if number % 2:
            trainer.wait_until(lambda leftovers=leftovers: half_written(run) - leftovers)
        else:
            trainer.wait_until(lambda before=before: latest(run) > before)
        time.sleep(moments.uniform(0, (0.2, 0.03, 0.2, 0)[number % 4]))
        assert trainer.kill().status == -signal.SIGKILL
        during_saves += bool(half_written(run))
    assert during_saves >= 3
    assert latest(run) > 0
    epochs, straight = latest(run) // 3 + 1, tmp_path / "straight"
    for folder in (run, straight):
        assert launcher.run(train_command(tiny, folder, *TO_THE_LAST, epochs)).status == 0
    assert digests(run, 3 * epochs) == digests(straight, 3 * epochs)
    assert figures(run) == figures(straight)


@pytest.mark.slow
def test_what_a_kill_took_is_repeated_and_the_run_says_so(tiny, tmp_path, launcher):
    run, straight = tmp_path / "run", tmp_path / "straight"
    by_time = (*TO_THE_LAST, 5000, "--save-minutes", "10")
    trainer = launcher.start(train_command(tiny, run, *by_time))
    trainer.wait_until(lambda: len(figures(run)) > 3 and latest(run))
    trainer.kill()
    assert latest(run) == 3
    lost = figures(run)[-1]["step"]
    epochs = lost // 3 + 1
    ends = [launcher.run(train_command(tiny, folder, *TO_THE_LAST, epochs)) for folder in (run, straight)]
    assert [end.status for end in ends] == [0, 0], ends
    said = f"goes on from step 3. Steps up to {lost} were not saved: it repeats them."
    assert [said in end.stdout for end in ends] == [True, False]
    assert digests(run, 3 * epochs) == digests(straight, 3 * epochs)
    assert checkpoint.best_step(run) == checkpoint.best_step(straight)
    assert figures(run) == figures(straight)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run, straight)]
    losses = [[(line["step"], line["loss"]) for line in map(json.loads, each)] for each in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3 * epochs


@pytest.mark.slow
def test_a_stop_notice_saves_between_two_epochs_and_the_run_ends_as_if_it_had_never_come(tiny, tmp_path, launcher):
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = ("--eval-epochs", 20, "--epochs")  # far apart: a notice comes between two evaluations
    for _ in range(5):  # a notice that comes while the network is evaluated finds all that there is to save
        before = latest(run)
        trainer = launcher.start(train_command(tiny, run, *options, 5000))
        trainer.wait_until(lambda before=before: latest(run) > before)
        trainer.send(signal.SIGTERM)
        end = trainer.end()
        assert end.status == 0, end
        stopped = latest(run)
        assert f"is saved at step {stopped}: start it again to go on" in end.stdout
        if stopped % 60:
            break
    assert stopped % 60
    assert checkpoint.read_record(run / "checkpoints" / str(stopped))["error"] is None
    assert not half_written(run)
    epochs = 20 * (stopped // 60 + 1)
    for folder in (run, straight):
        assert launcher.run(train_command(tiny, folder, *options, epochs)).status == 0
    assert digests(run, 3 * epochs) == digests(straight, 3 * epochs)
    assert figures(run) == figures(straight)


def children_of(pid):
    """Process ids of all that descend from a process."""
    parents = {}
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/stat") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(folder))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


def alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}") and "State:\tZ" not in status_text(pid)]


def status_text(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return file.read()
    except OSError:
        return "State:\tZ"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers end with their parent on Linux alone")
@pytest.mark.parametrize("notice", [signal.SIGKILL, signal.SIGTERM])
def test_neither_a_killed_nor_a_stopped_trainer_leaves_a_worker_behind(tiny, compiled, tmp_path, notice):
    run = tmp_path / "run"
    command = [sys.executable, *train_command(tiny, run, "--workers", "2", "--epochs", "2000")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(compiled), start_new_session=True, **pipes)
    try:
        deadline = time.monotonic() + 600
        while process.poll() is None and not latest(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert latest(run), process.poll()
        below = children_of(process.pid)
        assert len(below) >= 2
        if notice == signal.SIGKILL:
            process.kill()
        else:  # as schedulers do it: to every process of the job
            os.killpg(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        deadline = time.monotonic() + 20
        while alive(below) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(below) == []
        assert process.returncode == (-signal.SIGKILL if notice == signal.SIGKILL else 0), stderr
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_disk_that_takes_no_more_in_the_middle_of_a_save_stops_the_run_at_the_last_good_step(
    tiny, launcher, tmp_path
):
    run = tmp_path / "run"
    assert launcher.run(train_command(tiny, run, "--epochs", 1)).status == 0
    largest = max(path.stat().st_size for path in (run / "checkpoints" / "3").rglob("*"))
    end = launcher.run(train_command(tiny, run, "--epochs", 3), limit=largest // 2)
    assert end.status == 2, end
    assert len(end.said) == 1, end
    assert "step 6 could not be saved" in end.said[0]
    assert "Step 3 is kept" in end.said[0]
    assert "A step needs" in end.said[0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"]


def main(data, run, **changes):
    train.main(train.Arguments(data, run, dataclasses.replace(OPTIONS, **changes)))


def test_the_loop_moves_nothing_by_accident_and_compiles_each_program_once(
    tiny, tmp_path, monkeypatch, no_compilation_cache
):
    """Through evaluations, lowered rates and a run that goes on: one program each for views, a step and counting."""
    programs = (train_step.draw_windows, train_step.update, train_step.eval_step)
    for program in programs:
        program.clear_cache()
    loop = epoch.take_steps

    def guarded(*args):
        with jax.transfer_guard("disallow"):
            return loop(*args)

    monkeypatch.setattr(epoch, "take_steps", guarded)
    main(tiny, tmp_path / "run", epochs=3, plateau_patience=1)
    main(tiny, tmp_path / "run", epochs=5, plateau_patience=1)  # neither does another number of epochs
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_the_guard_would_have_noticed(tiny, tmp_path, monkeypatch, no_compilation_cache):
    step, weights = train_step.train_step, {"brightness": np.ones(3, np.float32), "side": np.ones(2, np.float32)}

    def careless(key, state, batch, class_weights, **options):
        return step(key, state, batch, weights, **options)  # numpy straight into a compiled step

    monkeypatch.setattr(train_step, "train_step", careless)
    loop = epoch.take_steps

    def guarded(*args):
        with jax.transfer_guard("disallow"):
            return loop(*args)

    monkeypatch.setattr(epoch, "take_steps", guarded)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        main(tiny, tmp_path / "run", epochs=1)


def test_poisoned_steps_are_skipped_counted_and_learned_around(tiny, tmp_path, monkeypatch, no_compilation_cache):
    """Two steps of the second epoch have no usable gradient; the run ends all the same, and its log says so."""
    step = train_step.train_step

    def sometimes_poisoned(key, state, batch, class_weights, **kwargs):
        sick = int(state.step) in (3, 4)
        factor = np.float32("nan") if sick else np.float32(1)
        return step(key, state, batch, jax.tree.map(lambda leaf: leaf * factor, class_weights), **kwargs)

    monkeypatch.setattr(train_step, "train_step", sometimes_poisoned)
    main(tiny, tmp_path / "run", epochs=3, max_skipped=3)
    assert [entry["skipped_steps"] for entry in figures(tmp_path / "run")] == [0, 2, 0]
    assert all(np.isfinite(entry["loss"]) for entry in figures(tmp_path / "run"))


def test_a_stretch_of_skipped_steps_is_null_in_the_log_which_stays_json(
    tiny, tmp_path, monkeypatch, no_compilation_cache
):
    """All three steps of the second epoch are skipped; then the log is read again, with a NaN of earlier versions."""
    step = train_step.train_step

    def poisoned(key, state, batch, class_weights, **kwargs):
        factor = np.float32("nan") if int(state.step) in (3, 4, 5) else np.float32(1)
        return step(key, state, batch, jax.tree.map(lambda leaf: leaf * factor, class_weights), **kwargs)

    monkeypatch.setattr(train_step, "train_step", poisoned)
    main(tiny, tmp_path / "run", epochs=2)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(2):
        second = json.loads(log.read_text().splitlines()[1], parse_constant=pytest.fail)
        assert (second["skipped_steps"], second["loss"], second["gradient_norm"]) == (3, None, None)
        log.write_text(log.read_text().replace("null", "NaN"))
        main(tiny, tmp_path / "run", epochs=3)
    assert np.isfinite(figures(tmp_path / "run")[2]["loss"])
    assert (tmp_path / "run" / "curves.png").is_file()
