"""When a training step does not fit a device's memory: which option lowers what it needs, and by how much."""

import contextlib
from collections.abc import Callable

import jax

from spinejax.config import Config
from spinejax.parallel import memory


def advice(
    lower: Callable[[], jax.stages.Lowered], options: Config, num_discs: int
) -> contextlib.AbstractContextManager[None]:
    """Around training steps: raises SpinejaxError, with what to do, if a device has too little memory.

    Args:
        lower: lowers a step, as `jax.jit(...).lower`.
        options: the run's.
        num_discs: discs of a batch on each device.
    """
    more = [n for n in range(options.microbatches + 1, num_discs + 1) if num_discs % n == 0]
    return memory.advice(
        lower,
        "a step",
        "--microbatches",
        {parts: options.microbatches / parts for parts in more},
        otherwise="Use more devices, --layout split or a smaller --width.",
        also="" if options.cache == "none" else " `--cache none` keeps no discs there.",
    )
