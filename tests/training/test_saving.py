"""When a run saves; and that no step is saved before the best one up to it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from spinejax.config import Config
from spinejax.errors import SpinejaxError
from spinejax.training import checkpoint, saving, train_step
from spinejax.training.log import Log
from spinejax.training.saving import Saver

PATIENCE = 3


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(saving, "time", clock)
    return clock


def state_at(step):
    return train_step.TrainState(jnp.int32(step), {"w": jnp.float32(step)}, {}, {}, {}, jnp.int32(0))


class Run:
    """A run whose saves are recorded as (step, error, its weight when it is written)."""

    def __init__(self, folder, minutes=10.0):
        self.saved, self.flushed = [], []
        checkpoints = checkpoint.Checkpoints(folder)
        log = Log(folder, step=0)
        log.flush = lambda: self.flushed.append(len(self.saved))
        self.saver = Saver(checkpoints, self.save, log, Config(save_minutes=minutes, plateau_patience=PATIENCE))

    def save(self, state, *, error, unlogged=()):
        assert float(state.params["w"]) == int(state.step)  # what was held is what it was
        self.saved.append((int(state.step), error))

    def evaluate(self, *errors, start=1):
        for step, error in enumerate(errors, start):
            self.saver.after_evaluation(state_at(step), error)


def test_it_saves_at_the_first_evaluation_by_time_and_at_the_end(tmp_path, clock):
    run = Run(tmp_path)
    run.evaluate(0.5)
    assert run.saved == [(1, 0.5)]
    clock.now += 599
    run.evaluate(0.6, start=2)
    assert len(run.saved) == 1
    clock.now += 1
    run.evaluate(0.7, 0.8, start=3)
    assert run.saved == [(1, 0.5), (3, 0.7)]
    run.saver.at_end(state_at(4))
    assert run.saved == [(1, 0.5), (3, 0.7), (4, 0.8)]
    assert run.flushed == [0, 1, 2]  # the log is on disk before each


def test_the_best_step_is_saved_once_it_is_confirmed(tmp_path, clock):
    run = Run(tmp_path)
    run.evaluate(0.5, 0.4, 0.3, 0.6, 0.6)
    assert run.saved == [(1, 0.5)]
    run.evaluate(0.6, 0.7, start=6)
    assert run.saved == [(1, 0.5), (3, 0.3)]
    run.evaluate(0.3, 0.6, 0.6, 0.6, start=8)  # of equals the latest is the best
    assert run.saved == [(1, 0.5), (3, 0.3), (8, 0.3)]


@pytest.mark.parametrize("minutes", [0.0, 0.05, 10.0])
def test_a_kill_at_any_moment_leaves_no_step_that_is_later_than_an_unsaved_best(tmp_path, clock, minutes):
    run, rng = Run(tmp_path, minutes), np.random.default_rng(0)
    errors = rng.integers(0, 30, 400) / 30
    for step, error in enumerate(errors, 1):
        clock.now += 1
        run.evaluate(error, start=step)
        latest = run.saved[-1][0]
        best = max(range(1, latest + 1), key=lambda step: (-errors[step - 1], step))
        assert (best, errors[best - 1]) in run.saved
    steps = [step for step, _ in run.saved]
    assert all(before < after for before, after in itertools.pairwise(steps))
    assert (len(steps) == 400) == (minutes == 0)


def test_a_stop_between_two_evaluations_saves_the_best_and_then_the_state_without_an_error(tmp_path, clock):
    run = Run(tmp_path)
    run.evaluate(0.5, 0.4, 0.6)
    run.saver.at_stop(state_at(4), [{"loss": 1.0}])
    assert run.saved == [(1, 0.5), (2, 0.4), (4, None)]


def test_a_stop_right_after_an_evaluation_keeps_its_error(tmp_path, clock):
    run = Run(tmp_path)
    run.evaluate(0.5, 0.6)
    run.saver.at_stop(state_at(2), [])
    assert run.saved == [(1, 0.5), (2, 0.6)]


def test_a_resumed_run_knows_the_least_error_that_was_saved(tmp_path, clock):
    model = {"branch_point": None, "width": 1.0, "dropout": 0.5, "num_slices": 9, "initialiser": "he"}
    record = {"version": 3, "model": model | {"dtype": "float32"}, "tasks": [], "data": "abc", "step": 0, "error": 0.3}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.write({"w": np.zeros(3)}, {"v": np.zeros(3)}, record)
    checkpoints.close()
    run = Run(tmp_path)
    run.evaluate(0.4, 0.35, 0.5, 0.5, 0.5)
    assert run.saved == []  # a resumed run is saved after ten minutes, and 0.35 is not its best
    run.evaluate(0.3, 0.4, 0.4, 0.4, start=6)
    assert run.saved == [(6, 0.3)]


def test_a_save_that_failed_ends_the_run_at_the_next_evaluation(tmp_path, clock, monkeypatch):
    run = Run(tmp_path)
    run.evaluate(0.5)

    def failed():
        raise SpinejaxError("the disk is full")

    monkeypatch.setattr(run.saver._checkpoints, "check", failed)
    with pytest.raises(SpinejaxError, match="disk is full"):
        run.evaluate(0.4, start=2)
