"""How much memory is free, on the devices and on this machine within its container; what helps if it is too little."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spinejax.errors import SpinejaxError

SHARE_UNASKED = 0.5
"""Fraction of the free memory for what the user has not asked for: parameters, momentum and copies need room too."""


def free_bytes(mesh: Mesh) -> int:
    """Free memory of this host's fullest device; for CPU devices, their share of the machine's free memory."""
    here = mesh.local_devices
    stats = [device.memory_stats() for device in here]
    if all(stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return available_bytes() // len(here)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can have: the machine's, within its container's limit; read from `proc` and `sys`.

    The page cache counts as free in both, since the system gives it up when memory is needed.
    """

    def number(name: str, field: str = "") -> int:
        """A file's first number, or the sum of a field's; 0 if there is none, as where the limit is "max"."""
        path = root / name
        return sum(map(int, re.findall(rf"^{field}(\d+)", path.read_text(), re.MULTILINE))) if path.is_file() else 0

    free = 1024 * number("proc/meminfo", "MemAvailable: +")
    free = free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group, limit, used in (  # control groups, versions 2 and 1
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if most := number(f"{group}/{limit}"):
            cached = number(f"{group}/memory.stat", "(?:in)?active_file ")
            free = max(0, min(free, most - number(f"{group}/{used}") + cached))
    return free


@contextlib.contextmanager
def advice(
    lower: Callable[[], jax.stages.Lowered],
    what: str,
    option: str,
    shares: Mapping[int, float],
    *,
    otherwise: str,
    also: str = "",
) -> Iterator[None]:
    """Around computations: raises SpinejaxError, with what to do, if a device has too little memory.

    Args:
        lower: lowers what is computed, as `jax.jit(...).lower`.
        what: its name, such as "a step".
        option: the one that lowers what it needs.
        shares: value of the option → the fraction of what is passing that then remains; the largest first.
        otherwise: what to do if there is no such value.
        also: ends the advice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        first = next(iter(shares), None)
        try:
            needed: Any = lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError:  # TPUs find it out when they compile
            advised = otherwise if first is None else f"`{option} {first}` lowers it, to the same results.{also}"
            raise SpinejaxError(f"Out of device memory: {what} takes more than a device has. {advised}") from error
        # What is overwritten, as a state, becomes the new one.
        kept = needed.argument_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
        passing, limit = needed.temp_size_in_bytes, _limit_bytes()
        found = f"Out of device memory: {what} takes {_size(kept + passing)} on each device"
        found += f" of {_size(limit)}." if limit else "."
        if first is None:
            raise SpinejaxError(f"{found} {otherwise}") from error
        left = {value: kept + passing * share for value, share in shares.items()}
        fitting = [value for value in left if limit and left[value] <= 0.9 * limit]
        value = next(iter(fitting), first)
        advised = f"`{option} {value}` lowers that to about {_size(left[value])}, to the same results."
        raise SpinejaxError(f"{found} {advised}{also}") from error


def halved(value: int, least: int = 1) -> dict[int, float]:
    """Smaller values of an option that must be a multiple of `least` → their fraction of the value it has now."""
    smaller = (value // 2**power // least * least for power in range(1, value.bit_length()))
    return {each: each / value for each in smaller if each}


def _limit_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
