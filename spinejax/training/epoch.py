"""Between two evaluations: steps, their metrics, and the validation that follows them."""

import math
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from spinejax.data.batches import Batch
from spinejax.errors import SpinejaxError
from spinejax.metrics.grading import mean_per_class_accuracy
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import devices
from spinejax.training.log import Progress
from spinejax.training.saved_step import Unlogged
from spinejax.training.train_step import TrainState, eval_step


def take_steps(
    state: TrainState,
    batches: Iterator[Batch],
    until: int,
    step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    stop: Callable[[int], bool],
    progress: Progress,
) -> tuple[TrainState, Unlogged, dict[str, float]]:
    """Take steps up to number `until`, or until `stop` says so.

    Returns:
        The new state; the metrics of each step, null where they are not finite; and the speed, for the log.
    """
    on_devices, waited, started = [], 0.0, time.perf_counter()
    for number in range(int(state.step), until):
        if stop(number):
            break
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, metrics = step(state, batch)
        on_devices.append(metrics)
        progress.step()
    # Metrics are read back once, here: inside the loop the devices never wait for the host.
    metrics_of_steps = [
        {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        for metrics in devices.to_host(on_devices)
    ]
    seconds = time.perf_counter() - started
    speed = len(on_devices) * progress.batch_size / seconds
    return state, metrics_of_steps, {"discs_per_second": speed, "waiting_for_data": waited / seconds}


def summary(metrics_of_steps: Unlogged, *, most_skipped: int) -> dict[str, float | None]:
    """The means over the steps that were not skipped, null if all were, and how many were.

    Raises:
        SpinejaxError: at least `most_skipped` steps in a row were skipped.
    """
    in_a_row = max(int(metrics["skipped"] or 0) for metrics in metrics_of_steps)
    if in_a_row >= most_skipped:
        raise SpinejaxError(
            f"The loss or a gradient was NaN or infinite in {in_a_row} steps in a row. The last good checkpoint is "
            "kept. Train again in another --workdir, with a lower --learning-rate."
        )
    taken = [metrics for metrics in metrics_of_steps if not metrics["skipped"]]
    names = [name for name in metrics_of_steps[0] if name != "skipped"]
    means = {name: float(np.mean([metrics[name] for metrics in taken])) if taken else None for name in names}
    return means | {"skipped_steps": len(metrics_of_steps) - len(taken)}


def validate(
    state: TrainState, batches: Iterable[Batch], *, model: SpineNet, put: Callable[[Batch], dict[str, jax.Array]]
) -> tuple[float, dict[str, float]]:
    """The validation error, 1 - the mean over tasks, and each task's mean per-class accuracy, named as in the log."""
    variables = {"params": state.params, "constants": state.constants}
    counts = [eval_step(variables, put(batch), model=model) for batch in batches]
    confusions = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *devices.to_host(counts))
    found = {f"validation_accuracy/{name}": float(mean_per_class_accuracy(each)) for name, each in confusions.items()}
    return 1 - float(np.mean(list(found.values()))), found
