"""The training steps between two evaluations, their metrics, and the validation after them."""

import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spinejax.config import Config
from spinejax.data import device_cache
from spinejax.data.batches import Batch, eval_batches, train_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.metrics.grading import mean_per_class_accuracy
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import devices, processes
from spinejax.tasks import Task
from spinejax.training.log import Progress
from spinejax.training.saved_step import Unlogged
from spinejax.training.train_step import TrainState, eval_step


class Ahead:
    """Batches on the devices, each sent there before it is asked for.

    Args:
        batches: on the host; closed with this.
        put: sends one to the devices, and does not wait for it.
    """

    def __init__(self, batches: Generator[Batch], put: Callable[[Batch], dict[str, jax.Array]]):
        self._batches, self._put = batches, put
        self._coming: list[dict[str, jax.Array]] = []  # one, or none

    def __next__(self) -> dict[str, jax.Array]:
        self.send()
        return self._coming.pop()

    def send(self) -> None:
        """Send the next batch, if it is not on its way yet."""
        if not self._coming:
            self._coming.append(self._put(next(self._batches)))

    def close(self) -> None:
        """Stop reading."""
        self._batches.close()


class Feed(NamedTuple):
    """The batches of a run, on the devices.

    Args:
        columns: for each task, its column in the data set's labels.
        batches: endless training batches, starting at the step to resume from.
        validation: returns the batches of one evaluation.
        note: what the user should know about the discs' memory; empty if nothing.
    """

    columns: list[int]
    batches: Ahead
    validation: Callable[[], Iterable[dict[str, jax.Array]]]
    note: str


def make_feed(options: Config, data: DataSet, tasks: Sequence[Task], mesh: Mesh, *, step: int) -> Feed:
    """Make a run's batches, starting at `step`: of discs that are kept on the devices, or read as they are needed."""
    columns = [data.tasks.index(task) for task in tasks]
    rows = data.rows(options.validation_split)
    kept = np.concatenate([data.rows("train"), rows])
    cached, note = options.cache == "device", ""
    if options.cache == "auto" and not devices.joined_by_network(mesh):
        cached = processes.all_agree(device_cache.fits_unasked(len(kept), mesh))
        note = "" if cached else f"{len(kept):,} discs do not fit half of the devices' free memory: they are streamed."
    share: dict = {"batch_size": options.batch_size, "host": jax.process_index(), "num_hosts": jax.process_count()}
    share |= {"volumes": not cached, "read_threads": options.read_threads}
    batches = train_batches(data, columns, seed=options.seed, step=step, workers=options.workers, **share)
    validation: Callable = functools.partial(eval_batches, data, rows, columns, **share)
    put: Callable = functools.partial(devices.put_batch, mesh=mesh)
    if cached:
        put = device_cache.DeviceCache(data, kept, mesh).put
        validation = list(validation()).__iter__  # row numbers alone, the same in each evaluation
    return Feed(columns, Ahead(batches, put), lambda: map(put, validation()), note)


class Taken(NamedTuple):
    """Steps that were dispatched, of which the last may still be computed.

    Args:
        metrics: each step's metrics, on the host but for the last step's.
        batch_size: discs in a step.
        start: `time.perf_counter()` before the first.
        seconds_waiting: for batches.
    """

    metrics: list[dict]
    batch_size: int
    start: float
    seconds_waiting: float

    def read(self) -> tuple[Unlogged, dict[str, float]]:
        """Wait for the last step.

        Returns:
            Each step's metrics, None where not finite; discs per second and the fraction of time waiting for data.
        """
        metrics_of_steps = [
            {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
            for metrics in devices.to_host(self.metrics)
        ]
        seconds = time.perf_counter() - self.start
        speed = len(self.metrics) * self.batch_size / seconds
        return metrics_of_steps, {"discs_per_second": speed, "waiting_for_data": self.seconds_waiting / seconds}


def take_steps(
    state: TrainState,
    feed: Feed,
    until: int,
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict]],
    stop: Callable[[int], bool],
    progress: Progress,
) -> tuple[TrainState, Taken]:
    """Train up to step `until`, or until `stop(step)` is true. Returns the new state, and the steps taken.

    Two steps at most are on their way to the devices: so these never wait for the host, and hold no more batches.
    """
    metrics_of_steps: list[dict] = []
    seconds_waiting, start = 0.0, time.perf_counter()
    for number in range(int(state.step), until):
        if stop(number):
            break
        wait_start = time.perf_counter()
        batch = next(feed.batches)
        seconds_waiting += time.perf_counter() - wait_start
        state, metrics = step(state, batch)
        feed.batches.send()  # after the epoch's last step too: the next epoch then begins without waiting
        if metrics_of_steps:
            metrics_of_steps[-1] = devices.to_host(metrics_of_steps[-1])  # waits for the step before this one
        metrics_of_steps.append(metrics)
        progress.step()
    return state, Taken(metrics_of_steps, progress.batch_size, start, seconds_waiting)


def summary(metrics_of_steps: Unlogged, *, max_skipped: int) -> dict[str, float | None]:
    """Average the metrics over the steps that were not skipped (None if all were), and count the skipped steps.

    Raises:
        SpinejaxError: at least `max_skipped` steps in a row were skipped.
    """
    in_a_row = max(int(metrics["skipped"] or 0) for metrics in metrics_of_steps)
    if in_a_row >= max_skipped:
        raise SpinejaxError(
            f"The loss or a gradient was NaN or infinite in {in_a_row} steps in a row. The last good checkpoint is "
            "kept. Train again in another --workdir, with a lower --learning-rate."
        )
    taken = [metrics for metrics in metrics_of_steps if not metrics["skipped"]]
    names = [name for name in metrics_of_steps[0] if name != "skipped"]
    means = {name: float(np.mean([metrics[name] for metrics in taken])) if taken else None for name in names}
    return means | {"skipped_steps": len(metrics_of_steps) - len(taken)}


def count(state: TrainState, feed: Feed, *, model: SpineNet) -> list[dict[str, jax.Array]]:
    """Begin to evaluate a state: each validation batch's confusion counts by task, which the devices still compute."""
    return [eval_step(state.variables, batch, model=model) for batch in feed.validation()]


def accuracy(counts: Sequence[Mapping[str, jax.Array]]) -> tuple[float, dict[str, float]]:
    """Wait for `count`. Returns 1 - the mean accuracy over tasks, and each task's accuracy by its name in the log."""
    confusions = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *devices.to_host(counts))
    accuracies = {
        f"validation_accuracy/{name}": float(mean_per_class_accuracy(confusion))
        for name, confusion in confusions.items()
    }
    return 1 - float(np.mean(list(accuracies.values()))), accuracies
