"""Where arrays live: the mesh of devices, and how batches and parameters are laid out over it."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spinejax.errors import SpinejaxError

DATA_AXIS = "data"


def keep_compiled() -> None:
    """Keep compiled programs between runs, so that only a first run waits for them. Call before computing."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/spinejax/compiled")
    jax.config.update("jax_compilation_cache_dir", cache)


def make_mesh() -> Mesh:
    """One axis, `data`, over all devices."""
    # Explicit axis types, the default, break Linen modules.
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


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
    """Copy every leaf to every device."""
    return jax.device_put(tree, replicated(mesh))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make one global batch of the parts that the hosts hold."""
    return {key: jax.make_array_from_process_local_data(by_disc(mesh), value) for key, value in batch.items()}


def to_host(tree):
    """Every leaf as a numpy array, the same on each host."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
