"""What must be decided before JAX starts: XLA's flags, malloc's settings, and where compiled programs are kept."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h

QUICK_CPU_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
"""Keeps XLA for CPUs from handing convolutions to YNNPACK: its own take 6 ms a disc for conv1 at full width, not 21."""

DETERMINISTIC = (
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_autotune_level=0",  # the fastest kernel may be another one in the next run
)

_DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd", "accel*", "vfio/[0-9]*")  # of NVIDIA, WSL, AMD, and two kinds of TPU


def set_up(*, deterministic: bool = False, precision: str = "float32") -> None:
    """Prepare this process for JAX. The commands call it; importing the library changes nothing.

    Args:
        deterministic: have XLA for GPUs choose only kernels that give the same bits in every run.
        precision: of products of float32 numbers on GPUs and TPUs, a name of `jax_default_matmul_precision`. By default
            JAX lets GPUs round their factors to TF32, and TPUs to bfloat16.
    """
    jax.config.update("jax_enable_x64", False)  # JAX_ENABLE_X64 would silently change the results of training
    if folder := cache_folder():
        jax.config.update("jax_compilation_cache_dir", folder)
    if on_cpu():
        _keep_freed_memory()
        _add_flag(QUICK_CPU_CONVOLUTIONS)
    else:
        jax.config.update("jax_default_matmul_precision", precision)
    for flag in DETERMINISTIC if deterministic else ():
        _add_flag(flag)


def on_cpu() -> bool:
    """Whether JAX will compute on CPUs; found out without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    if not _plugins():
        return True
    found = (path for pattern in _DEVICE_FILES for path in Path("/dev").glob(pattern))
    return sys.platform == "linux" and next(found, None) is None


def cache_folder() -> str | None:
    """Where compiled programs are kept between runs; None without a home, or where nothing can be written."""
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return chosen
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "spinejax", "compiled")
    if not folder.is_absolute():  # without a home `~` stays
        return None
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder) if os.access(folder, os.W_OK) else None


def _add_flag(flag: str) -> None:
    """Add a flag to XLA_FLAGS, unless the user has set it or XLA does not know it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] not in flags and _is_known(flag):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _is_known(flag: str) -> bool:
    """Whether XLA accepts a flag. It ends the process at one that it does not know, so a child process tries it once.

    The answer is kept beside the compiled programs, for these versions of jaxlib and of the plugins.
    """
    versions = f"{jaxlib.__version__} {_plugins()} {flag}"
    folder = cache_folder() or "://"
    answer = Path(folder, f"flag-{hashlib.sha256(versions.encode()).hexdigest()[:16]}")
    local = "://" not in folder  # and no bucket
    if local and answer.is_file():
        return answer.read_text() == "known"
    # Plugins read the flags too: on a CPU they are loaded like here. An accelerator is left alone.
    platforms = {} if on_cpu() else {"JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    child = subprocess.run(program, env=os.environ | platforms | {"XLA_FLAGS": flag}, capture_output=True)  # noqa: S603
    known = child.returncode == 0
    if local and (known or b"Unknown flag" in child.stderr):
        with contextlib.suppress(OSError):
            answer.parent.mkdir(parents=True, exist_ok=True)
            answer.write_text("known" if known else "unknown")
    return known


def _plugins() -> list[str]:
    """Installed packages that bring another XLA than jaxlib's, which reads the same flags."""
    found = importlib.metadata.entry_points(group="jax_plugins")
    libtpu = ["libtpu"] if importlib.util.find_spec("libtpu") else []
    return libtpu + sorted(f"{point.name} {point.dist and point.dist.version}" for point in found)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next request, in one heap for all threads.

    By default it returns large buffers to the system, and XLA for CPUs requests them anew in every step: clearing their
    pages takes a third of a training step's time. Other C libraries are left unchanged.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(parameter, value)
