"""How well the devices are used: the share of their peak rate, their memory, and a trace of some steps."""

import contextlib
import itertools
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from spinejax.errors import SpinejaxError

PEAK_TERAFLOPS = {
    "H200": {"bfloat16": 989.0, "tensorfloat32": 494.0, "float32": 67.0},
    "H100": {"bfloat16": 989.0, "tensorfloat32": 494.0, "float32": 67.0},
    "A100": {"bfloat16": 312.0, "tensorfloat32": 156.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "tensorfloat32": 183.0, "float32": 91.6},
    "TPU v4": {"bfloat16": 275.0},
    "TPU v5 lite": {"bfloat16": 197.0},
    "TPU v5p": {"bfloat16": 459.0},
    "TPU v6 lite": {"bfloat16": 918.0},
}
"""Kind of device, as JAX names it, or a part of that → precision → the vendor's figure for dense matrices, in 10¹²
operations a second."""


def peak_flops(device_kind: str, precision: str) -> float | None:
    """The most operations a second that a kind of device can do in a precision; None if the table does not know it."""
    rates = next((rates for kind, rates in PEAK_TERAFLOPS.items() if kind in device_kind), {})
    return 1e12 * rates[precision] if precision in rates else None


class Utilisation:
    """The model's operations in a step, by XLA's count, over what all devices could do in that time.

    Args:
        lower: lowers a step, as `jax.jit(…).lower`; called once, and only for devices whose peak rate is known.
        precision: in which factors are multiplied.
    """

    def __init__(self, lower: Callable[[], jax.stages.Lowered], precision: str):
        peak = peak_flops(jax.devices()[0].device_kind, precision)
        self._share_of_a_step_a_second = None
        if peak:
            counted = lower().cost_analysis()
            self._share_of_a_step_a_second = counted["flops"] / (peak * jax.device_count()) if counted else None

    def at(self, steps_per_second: float) -> float | None:
        """The utilisation at a speed, from 0 to 1; None if the devices' peak rate or the count is not known."""
        share = self._share_of_a_step_a_second
        return None if share is None else share * steps_per_second


def peak_memory_mb() -> float:
    """The most memory in use so far on this host's fullest device, or of this process if devices do not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(each["peak_bytes_in_use"] for each in stats) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def parse_steps(text: str) -> range:
    """`FROM:TO`, steps counted from 0, the last one excluded. Raises SpinejaxError if it is not that."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise SpinejaxError(f"Option --profile is {text}: expected FROM:TO, two steps of which the second is later.")
    return range(int(match[1]), int(match[2]))


@contextlib.contextmanager
def traced(step: Callable, first: int, steps: range, folder: Path) -> Iterator[Callable]:
    """A function like `step`, called for the steps from `first` on, that writes a trace of some of them.

    Args:
        step: takes a state and a batch, and returns the new state and the metrics.
        first: number of the step that it is called for first.
        steps: those to trace.
        folder: for the trace: TensorBoard's profiler plugin opens it, and Perfetto the `perfetto_trace.json.gz` in it.
    """
    numbers, running = itertools.count(first), contextlib.ExitStack()

    def call(state, batch):
        number = next(numbers)
        if number == steps.start:
            running.enter_context(jax.profiler.trace(str(folder), create_perfetto_trace=True))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = step(state, batch)
        if number == steps.stop - 1:
            jax.block_until_ready(metrics)
            running.close()
        return state, metrics

    with running:
        yield call
