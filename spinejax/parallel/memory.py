"""How much memory is free: on the devices, and on this machine within its container."""

import os
import re
from pathlib import Path

from jax.sharding import Mesh

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
