"""Where arrays live: the mesh of devices, and how batches and parameters are laid out over it."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spinejax.errors import SpinejaxError

DATA_AXIS = "data"

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


def make_mesh() -> Mesh:
    """One axis, `data`, over all devices, those of a process side by side."""
    # `jax.make_mesh` may mix the processes' devices, on TPUs; then a disc's place in the batch, and with it its view,
    # would hang on how many processes there are. Explicit axis types, the default, break Linen modules.
    in_order = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(in_order), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def check_batch(batch_size: int, mesh: Mesh, option: str) -> None:
    """Raises SpinejaxError unless a batch splits evenly over the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        raise SpinejaxError(f"Option {option} is {batch_size}: expected a multiple of the {mesh.size} devices.")


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_disc(mesh: Mesh) -> NamedSharding:
    """The layout of batches: the leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_replicated(tree, mesh: Mesh):
    """Copy every leaf to every device; every process holds all of it."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put(tree, shardings):
    """Lay out a tree of arrays, a sharding for each; every process holds all of it."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    # With several processes `device_put` would first gather every array from each of them, to compare.
    return jax.tree.map(_put_own, tree, shardings)


def _put_own(leaf, sharding: NamedSharding) -> jax.Array:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        data = _put_own(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make one global batch of the parts that the hosts hold."""
    return {key: jax.make_array_from_process_local_data(by_disc(mesh), value) for key, value in batch.items()}


def to_host(tree):
    """Every leaf as a numpy array, whole and the same on each host. All processes must call it together."""
    return jax.tree.map(_whole, tree)


def _whole(leaf) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
