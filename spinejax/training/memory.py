"""When a training step does not fit a device's memory: which option lowers what it needs, and by how much."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from spinejax.config import Config
from spinejax.errors import SpinejaxError


@contextlib.contextmanager
def advice(lower: Callable[[], jax.stages.Lowered], options: Config, num_discs: int) -> Iterator[None]:
    """Around training steps: raises SpinejaxError, with what to do, if a device has too little memory.

    Args:
        lower: lowers a step, as `jax.jit(...).lower`.
        options: the run's.
        num_discs: discs of a batch on each device.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        needed = lower().compile().memory_analysis()
        raise SpinejaxError(_explained(needed, options, num_discs, _limit_bytes())) from error


def _explained(needed, options: Config, num_discs: int, limit_bytes: int | None) -> str:
    """What a step needs on a device, and the option that lowers it."""
    # The old state's memory becomes the new one's.
    kept = needed.argument_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
    passing = needed.temp_size_in_bytes
    found = f"Out of device memory: a step takes {_size(kept + passing)} on each device"
    found += f" of {_size(limit_bytes)}." if limit_bytes else "."
    more = [n for n in range(options.microbatches + 1, num_discs + 1) if num_discs % n == 0]
    if not more:
        return f"{found} Use more devices, --layout split or a smaller --width."

    def left(parts: int) -> float:
        return kept + passing * options.microbatches / parts

    fitting = [parts for parts in more if limit_bytes and left(parts) <= 0.9 * limit_bytes]
    parts = fitting[0] if fitting else more[0]
    advised = f"{found} `--microbatches {parts}` lowers that to about {_size(left(parts))}, to the same results."
    return advised + ("" if options.cache == "none" else " `--cache none` keeps no discs there.")


def _limit_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
