"""What JAX can only be told before it computes: CPU kernels, memory, and where compiled programs are kept."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

import jax
import jaxlib

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


QUICK_CPU_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
"""Keeps XLA for CPUs from handing convolutions to YNNPACK: its own take 6 ms a disc for conv1 at full width, not 21."""

KNOWN_TO_HAVE_THEM = ("0.10.2",)
"""Versions of jaxlib with which that was measured. XLA ends the process at a flag that it does not know."""


def set_up() -> None:
    """Choose what JAX can only be told before it computes: CPU kernels, memory, and where compiled programs are kept.

    Compiled programs are kept between runs, so that only a first run waits for them.
    """
    _keep_freed_memory()
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__ in KNOWN_TO_HAVE_THEM and "ynn_fusion" not in flags and not _has_accelerator_plugin():
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK_CPU_CONVOLUTIONS}".strip()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/spinejax/compiled")
    jax.config.update("jax_compilation_cache_dir", cache)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, in one heap for all threads.

    It would give large buffers back to the system, and XLA for CPUs asks for them anew in every step: clearing their
    pages takes a third of a training step's time. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def _has_accelerator_plugin() -> bool:
    """Whether another XLA than jaxlib's may read the same flags; asked without starting any."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
