"""Where arrays are: the mesh of devices, and how batches and parameters are divided over it."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spinejax.errors import NoDeviceError, SpinejaxError

DATA_AXIS = "data"
SLICE_AXIS = "slice"
"""Slices of TPU pods, between which the network is slower than within them. A mesh of one slice has no such axis."""

T = TypeVar("T")


def all_devices() -> list[jax.Device]:
    """JAX's devices, sorted so that each process's devices are adjacent.

    Raises:
        NoDeviceError: `JAX_PLATFORMS` names a platform that this machine lacks.
    """
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda without its plugin
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise
        reason = next(iter(str(error).splitlines()), "") or "no such device or plugin"
        raise NoDeviceError(
            f"JAX_PLATFORMS is {platforms}, which JAX cannot use on this machine ({reason}). Unset it, "
            "set it to cpu, or install JAX for that platform."
        ) from error
    return sorted(found, key=_place)


def make_mesh(found: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis, `data`, over all devices; of several slices of a TPU pod two, `slice` and `data`.

    Args:
        found: the devices, sorted as by `all_devices`, the default.

    Raises:
        SpinejaxError: the slices differ in size.
    """
    found = all_devices() if found is None else found
    num_slices = len({getattr(device, "slice_index", 0) for device in found}) if found[0].platform == "tpu" else 1
    # `jax.make_mesh` may mix the processes' devices, on TPUs. Then a disc's place in the batch, and with it its view,
    # would depend on the number of processes. Explicit axis types, the default there, break Linen modules.
    if num_slices == 1:
        return Mesh(np.array(found), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    try:
        slices = mesh_utils.create_hybrid_device_mesh((1, len(found) // num_slices), (num_slices, 1), found)
    except ValueError as error:
        raise SpinejaxError(f"Devices: the {num_slices} slices are not equal in size ({error}).") from error
    in_order = [sorted(devices, key=_place) for devices in slices]
    return Mesh(np.array(in_order), (SLICE_AXIS, DATA_AXIS), axis_types=(AxisType.Auto,) * 2)


def _place(device: jax.Device) -> tuple[int, int]:
    return device.process_index, device.id


def joined_by_network(mesh: Mesh) -> bool:
    """Whether the devices are CPUs of several processes: to move a disc between them takes longer than to read it."""
    found = mesh.devices.flat
    return found[0].platform == "cpu" and len({device.process_index for device in found}) > 1


def slice_axis(mesh: Mesh) -> str | None:
    """The mesh's axis of slices, if it has several."""
    return SLICE_AXIS if SLICE_AXIS in mesh.axis_names else None


def disc_axes(mesh: Mesh) -> str | tuple[str, str]:
    """The axes that divide discs: all."""
    return (SLICE_AXIS, DATA_AXIS) if slice_axis(mesh) else DATA_AXIS


def check_batch(batch_size: int, mesh: Mesh, option: str) -> None:
    """Raises SpinejaxError unless a batch splits evenly over the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        raise SpinejaxError(f"Option {option} is {batch_size}: expected a multiple of the {mesh.size} devices.")


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: parameters."""
    return NamedSharding(mesh, PartitionSpec())


def by_disc(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices: batches."""
    return NamedSharding(mesh, PartitionSpec(disc_axes(mesh)))


def put_replicated(tree, mesh: Mesh) -> Any:
    """Copy every leaf to every device; every process holds all of it."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put(tree, shardings) -> Any:
    """Transfer a tree of arrays to the devices, by a sharding for each leaf; every process holds all of it."""
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


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make one global batch of the parts that the processes hold."""
    if jax.process_count() == 1:  # one call for all arrays
        return jax.device_put(dict(batch), by_disc(mesh))
    return {key: jax.make_array_from_process_local_data(by_disc(mesh), value) for key, value in batch.items()}


def one_ahead(dispatched: Iterable[T]) -> Iterator[T]:
    """The same items, each once the next one has been asked for: so devices compute that while this one is fetched."""
    for item, _ in itertools.pairwise(itertools.chain(dispatched, [None])):
        yield cast(T, item)


def to_host(tree) -> Any:
    """Every leaf as a numpy array, whole and the same on each process. All processes must call it together."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()  # all at once, and none waits for the one before it
    return jax.tree.map(_whole, tree)


def _whole(leaf) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
