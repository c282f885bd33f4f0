"""The training steps between two evaluations, their metrics, and the validation after them."""

import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spinejax.config import Config
from spinejax.data.batches import Batch, eval_batches, train_batches
from spinejax.data.dataset import DataSet
from spinejax.data.device_cache import DeviceCache
from spinejax.errors import SpinejaxError
from spinejax.metrics.grading import mean_per_class_accuracy
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import devices
from spinejax.tasks import Task
from spinejax.training.log import Progress
from spinejax.training.saved_step import Unlogged
from spinejax.training.train_step import TrainState, eval_step


class Feed(NamedTuple):
    """The batches of a run.

    Args:
        columns: for each task, its column in the data set's labels.
        batches: endless training batches, starting at the step to resume from.
        validation: returns the batches of one evaluation.
        put: transfers a batch to the devices.
    """

    columns: list[int]
    batches: Generator[Batch]
    validation: Callable[[], Iterable[Batch]]
    put: Callable[[Batch], dict[str, jax.Array]]


def make_feed(options: Config, data: DataSet, tasks: Sequence[Task], mesh: Mesh, *, step: int) -> Feed:
    """Make a run's batches, starting at `step`: this process's discs, or only row numbers with --cache device."""
    columns = [data.tasks.index(task) for task in tasks]
    rows = data.rows(options.validation_split)
    put: Callable = functools.partial(devices.put_batch, mesh=mesh)
    if options.cache == "device":
        put = DeviceCache(data, np.concatenate([data.rows("train"), rows]), mesh).put
    share: dict = {"batch_size": options.batch_size, "host": jax.process_index(), "num_hosts": jax.process_count()}
    share["volumes"] = options.cache == "none"
    batches = train_batches(data, columns, seed=options.seed, step=step, workers=options.workers, **share)
    return Feed(columns, batches, functools.partial(eval_batches, data, rows, columns, **share), put)


def take_steps(
    state: TrainState,
    feed: Feed,
    until: int,
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict]],
    stop: Callable[[int], bool],
    progress: Progress,
) -> tuple[TrainState, Unlogged, dict[str, float]]:
    """Train up to step `until`, or until `stop(step)` is true.

    Returns:
        The new state; each step's metrics, None where not finite; discs per second and the fraction of time waiting.
    """
    on_devices, seconds_waiting, start = [], 0.0, time.perf_counter()
    for number in range(int(state.step), until):
        if stop(number):
            break
        wait_start = time.perf_counter()
        batch = next(feed.batches)
        seconds_waiting += time.perf_counter() - wait_start
        state, metrics = step(state, feed.put(batch))
        on_devices.append(metrics)
        progress.step()
    # Read the metrics only after the loop, so that the devices never wait for the host.
    metrics_of_steps = [
        {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        for metrics in devices.to_host(on_devices)
    ]
    seconds = time.perf_counter() - start
    speed = len(on_devices) * progress.batch_size / seconds
    return state, metrics_of_steps, {"discs_per_second": speed, "waiting_for_data": seconds_waiting / seconds}


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


def validate(state: TrainState, feed: Feed, *, model: SpineNet) -> tuple[float, dict[str, float]]:
    """Return 1 - the mean accuracy over tasks, and each task's mean per-class accuracy by its name in the log."""
    counts = [eval_step(state.variables, feed.put(batch), model=model) for batch in feed.validation()]
    confusions = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *devices.to_host(counts))
    accuracies = {
        f"validation_accuracy/{name}": float(mean_per_class_accuracy(confusion))
        for name, confusion in confusions.items()
    }
    return 1 - float(np.mean(list(accuracies.values()))), accuracies
