"""What an epoch costs beside its steps: the main thread's time by part, with an accelerator that only sleeps.

    python -m benchmarks.epoch [--step-ms 5] [--epochs 200] [--json FILE]

The loop is that of `train.py` with the preset `paper` at full width: the same state of 2 GB, order of discs,
evaluations, log and saves, for as many discs as the paper has. Only the device's programs are replaced, each by a
sleep: a step by `--step-ms`; a batch of an evaluation by 0.27 of that, its share of a step's operations by XLA's count
(docs/scaling.md); the copy of the best state by what a memory of 3.35 TB/s takes. As on an accelerator, a call returns
at once, programs run one after the other, and only asking for a result waits. The discs count as kept in device memory.
The validation error is drawn at random, so that there is a best step now and then.

`overhead_share` is the share of an epoch's wall time in which no step runs: evaluation on the device, everything that
the device waits for, and saves. A save is counted by what it adds to the epochs that it overlaps, over the ten minutes
(`--save-minutes`) until the next one. Wall time includes waiting for a core that other work has; CPU time does not.
"""

import contextlib
import json
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.running import start
from spinejax import config
from spinejax.commands import train
from spinejax.config import Config
from spinejax.data import device_cache
from spinejax.data.batches import num_steps
from spinejax.data.dataset import DataSet
from spinejax.data.device_cache import DeviceCache
from spinejax.parallel import runtime
from spinejax.tasks import PAPER_TASKS
from spinejax.training import checkpoint, epoch, saving, train_step
from spinejax.training.log import Log

NUM_DISCS = {"train": 9614, "validation": 1202, "test": 1202}
"""The paper's 12,018 discs, split 80:10:10."""
FORWARD_SHARE = 0.27  # 4,003.8 / 9 GFLOP for a view of 256 discs, of 1,652.2 for a step
NUM_UNTIMED = 2  # first epochs, which compile
DEVICE_BYTES_PER_SECOND = 3.35e12  # of an H100's memory


@dataclass(frozen=True)
class Arguments:
    """Time the parts of an epoch."""

    step_ms: float = 5.0
    """Time of a training step on the device: 5 ms is what eight H100 would take in bfloat16."""
    epochs: int = 200
    """Epochs to run: more than the first save lasts."""
    width: float = 1.0
    """Width of the network."""
    save_minutes: float = 10
    """As of `train.py`."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""


class Clock:
    """Seconds of the main thread by part; a part within another is counted for itself alone."""

    def __init__(self):
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.epochs: list[tuple[float, bool]] = []  # seconds, and whether a save was in progress
        self._last, self._inner = time.perf_counter(), 0.0
        self.cpu_seconds: list[float] = []  # of the main thread at each epoch's end

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`."""
        began, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.parts[name].append(took - self._inner)
            self._inner = outer + took

    def timed(self, name: str, function):
        """The function, whose time is counted as `name`."""

        def call(*args, **options):
            with self.part(name):
                return function(*args, **options)

        return call

    def end_epoch(self, saving: bool) -> None:
        """Count the time since the last call as one epoch's."""
        now = time.perf_counter()
        self.epochs.append((now - self._last, saving))
        self._last = now
        self.cpu_seconds.append(time.thread_time())


class Accelerator:
    """A device that runs programs in the order of their calls, and takes a given time for each."""

    def __init__(self, clock: Clock):
        self.clock, self.free_at = clock, 0.0

    def run(self, seconds: float, value) -> "Result":
        """Begin a program when those before it are done."""
        self.free_at = max(time.perf_counter(), self.free_at) + seconds
        return Result(self, self.free_at, np.asarray(value))


@dataclass
class Result:
    """What a program will have computed; reading it waits until then."""

    device: Accelerator
    done_at: float
    value: np.ndarray

    def block_until_ready(self) -> "Result":
        """Wait for the device."""
        with self.device.clock.part("waiting for the device"):
            time.sleep(max(0.0, self.done_at - time.perf_counter()))
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.block_until_ready().value


class Discs(DataSet):
    """The labels and splits of as many discs as the paper has; there are no volumes."""

    def __init__(self):
        names = np.array(list(NUM_DISCS))
        rng, counts = np.random.default_rng(0), list(NUM_DISCS.values())
        self.folder, self.tasks = Path("discs"), PAPER_TASKS
        self.manifest: Any = {"tasks": [], "files": []}
        self.split = np.repeat(names, counts)
        self.labels = np.stack([rng.integers(task.num_grades, size=sum(counts)) for task in PAPER_TASKS], axis=1)
        self.source = np.zeros(sum(counts), np.int32)
        self.slice_mean = np.full(9, 0.3, np.float32)
        self._copies, self.cache_dir = None, None


class NoVolumes(DeviceCache):
    """Sends row numbers to the device as `DeviceCache` does; that it gathers discs is part of a step's time."""

    def __init__(self, data: DataSet, rows: np.ndarray, mesh):
        self._rows, self._mesh, self._voxels = np.unique(np.append(rows, 0)), mesh, np.zeros(1, np.uint16)


def main(arguments: Arguments) -> None:
    """Print a row for each part, and the share of an epoch beside its steps."""
    runtime.set_up()
    options = replace(config.PRESETS["paper"][1], epochs=arguments.epochs, width=arguments.width, cache="device")
    options = replace(options, save_minutes=arguments.save_minutes)
    options = replace(options, plateau_patience=10**6)  # the sleeping network never learns
    clock = Clock()
    device = Accelerator(clock)
    with contextlib.ExitStack() as patches:
        for where, name, by in replaced(clock, device, arguments.step_ms / 1e3):
            patches.enter_context(mock.patch.object(where, name, by))
        with tempfile.TemporaryDirectory() as folder:
            print(train.run(options, Discs(), Path(folder) / "run", lambda step: False))
    figures = summary(clock, arguments, options)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


def replaced(clock: Clock, device: Accelerator, step_seconds: float) -> Iterator[tuple[Any, str, Any]]:
    """What the benchmark puts in place of the device's programs, and around the host's parts."""
    rng = np.random.default_rng(0)
    names = ("loss", "gradient_norm", "skipped", *(f"loss/{task.name}" for task in PAPER_TASKS))

    @jax.jit
    def counted(number):
        return number + 1

    def step(key, state, batch, weights, **options):
        done = device.run(step_seconds, np.float32(0))
        metrics = {name: Result(device, done.done_at, done.value) for name in names}
        return state.replace(step=counted(state.step)), metrics

    def evaluate(variables, batch, *, model):
        done = device.run(FORWARD_SHARE * step_seconds, 0)
        counts = {task.name: rng.integers(1, 100, (task.num_grades,) * 2) for task in PAPER_TASKS}
        return {name: Result(device, done.done_at, count) for name, count in counts.items()}

    def copy(state):
        device.run(2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / DEVICE_BYTES_PER_SECOND, 0)
        return state

    make_checkpoints = checkpoint.Checkpoints
    made: list[checkpoint.Checkpoints] = []

    def checkpoints(*args, **options):
        made.append(make_checkpoints(*args, **options))
        return made[-1]

    write = Log.write

    def log(self, entry):
        with clock.part("log"):
            write(self, entry)
        clock.end_epoch(made[-1].is_saving())

    yield train_step, "train_step", clock.timed("dispatch of steps", step)
    yield epoch, "eval_step", evaluate
    yield saving, "_copy", copy
    yield device_cache, "DeviceCache", NoVolumes
    yield NoVolumes, "put", clock.timed("transfer", NoVolumes.put)
    yield device_cache, "_take", lambda voxels, place, *, mesh: place
    yield epoch.Ahead, "send", clock.timed("input", epoch.Ahead.send)
    yield epoch, "count", clock.timed("evaluation", epoch.count)
    yield epoch, "accuracy", clock.timed("evaluation", epoch.accuracy)
    yield saving.Saver, "after_evaluation", clock.timed("save", saving.Saver.after_evaluation)
    yield checkpoint, "Checkpoints", checkpoints
    yield Log, "write", log


def summary(clock: Clock, arguments: Arguments, options: Config) -> dict[str, Any]:
    """The figures as JSON: an epoch's seconds, of these the steps', and each part's milliseconds an epoch."""
    steps = num_steps(NUM_DISCS["train"], options.batch_size)
    timed = clock.epochs[NUM_UNTIMED:]
    quiet = np.array([took for took, saving in timed if not saving])
    during_saves = np.array([took for took, saving in clock.epochs[1:] if saving])
    if not len(quiet):  # one save after the other
        quiet, during_saves = during_saves, quiet
    undisturbed = float(np.median(quiet))
    save = float(np.sum(during_saves - undisturbed)) if len(during_saves) else 0.0
    a_save_every = 60 * options.save_minutes or undisturbed
    wall = undisturbed * (1 + save / a_save_every)
    parts = {name: 1e3 * float(np.sum(times)) / len(clock.epochs) for name, times in clock.parts.items()}
    return {
        "step_ms": arguments.step_ms,
        "steps": steps,
        "epochs": len(timed),
        "epoch_seconds": wall,
        "epoch_seconds_least_to_greatest": [float(quiet.min()), float(quiet.max())],
        "save_adds_seconds": save,
        "overhead_share": 1 - steps * arguments.step_ms / 1e3 / wall,
        "main_thread_ms": parts,
        "main_thread_cpu_ms": 1e3 * float(np.median(np.diff(clock.cpu_seconds))),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("part", "ms an epoch")
    for name, spent in figures["main_thread_ms"].items():
        table.add_row(name, f"{spent:.2f}")
    Console().print(table)
    print({name: value for name, value in figures.items() if name != "main_thread_ms"})


if __name__ == "__main__":
    start("epoch", Arguments, main)
