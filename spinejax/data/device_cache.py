"""A data set in the devices' memory: read once, after which only row numbers travel from the host.

The row numbers of each batch come from Grain's order in `batches`, as without a cache, so that both see the same discs.
The discs themselves are gathered inside jit.

Each device keeps a stretch of every disc's voxels, not some of the discs. So every device has an equal share of any
shuffled batch, and gathering is local. One all-to-all then turns the stretches into whole discs, split over the devices
as batches are; in it each device sends and receives its share of the batch and no more.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from spinejax.data.batches import Batch
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.parallel.devices import by_disc, disc_axes, put_batch, replicated
from spinejax.parallel.memory import SHARE_UNASKED, free_bytes

NUM_READ_AT_ONCE = 64
SHARE = 0.8  # fraction of the free memory; the remainder is for a step's arrays


class DeviceCache:
    """Some rows of a data set, in device memory. Each host reads all rows and keeps its devices' stretches.

    Raises:
        SpinejaxError: they do not fit.
    """

    def __init__(self, data: DataSet, rows: Int[np.ndarray, "M"], mesh: Mesh):
        self._rows, self._mesh = np.unique(np.append(rows, 0)), mesh  # padded batches repeat the data set's first disc
        num_voxels = math.prod(VOLUME_SHAPE)
        shape = (len(self._rows), _stretch(mesh) * mesh.size)
        check_fits(shape[0], 2 * shape[0] * _stretch(mesh), free_bytes(mesh), mesh.size)
        by_voxel = NamedSharding(mesh, PartitionSpec(None, disc_axes(mesh)))
        self._voxels = jax.jit(lambda: jnp.zeros(shape, jnp.uint16), out_shardings=by_voxel)()
        num_read = min(NUM_READ_AT_ONCE, shape[0])
        for start in range(0, shape[0], num_read):
            start = min(start, shape[0] - num_read)  # the last part overlaps, so that all are of one size
            part = np.zeros((num_read, shape[1]), np.uint16)
            part[:, :num_voxels] = data.volumes(self._rows[start : start + num_read]).reshape(num_read, -1)
            on_devices = jax.make_array_from_callback(part.shape, by_voxel, part.__getitem__)
            self._voxels = _write(self._voxels, on_devices, jax.device_put(np.int32(start), replicated(mesh)))

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """As `devices.put_batch`, for a batch without its volumes, which are added from the cache.

        Raises:
            SpinejaxError: a row is not in the cache.
        """
        rows = np.where(batch["valid"], batch["row"], 0)
        place = np.searchsorted(self._rows, rows)
        if (self._rows[np.minimum(place, len(self._rows) - 1)] != rows).any():
            raise SpinejaxError("A batch has a row that is not in device memory.")
        on_devices = put_batch(batch | {"place": place.astype(np.int32)}, self._mesh)
        return on_devices | {"volume": _take(self._voxels, on_devices.pop("place"), mesh=self._mesh)}


@functools.partial(jax.jit, donate_argnums=0)
def _write(voxels: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(voxels, part, start, axis=0)


@functools.partial(jax.jit, static_argnames="mesh")
def _take(voxels: jax.Array, place: jax.Array, *, mesh: Mesh) -> jax.Array:
    constrain = jax.lax.with_sharding_constraint
    place = constrain(place, replicated(mesh))
    stretches = constrain(jnp.take(voxels, place, axis=0), NamedSharding(mesh, PartitionSpec(None, disc_axes(mesh))))
    discs = constrain(stretches, by_disc(mesh))
    return discs[:, : math.prod(VOLUME_SHAPE)].reshape(-1, *VOLUME_SHAPE)


def _stretch(mesh: Mesh) -> int:
    """Voxels of each disc that a device keeps."""
    return -(-math.prod(VOLUME_SHAPE) // mesh.size)


def fits_unasked(num_discs: int, mesh: Mesh) -> bool:
    """Whether this host's devices have so much memory that discs are kept there with `--cache auto`."""
    return 2 * num_discs * _stretch(mesh) <= SHARE_UNASKED * free_bytes(mesh)


def check_fits(num_discs: int, needed_bytes: int, free_bytes: int, num_devices: int) -> None:
    """Raises SpinejaxError unless a device has memory for its share and for a step."""
    if needed_bytes > SHARE * free_bytes:
        raise SpinejaxError(
            f"--cache device: {num_discs:,} discs are {num_devices * needed_bytes / 1e9:.1f} GB, "
            f"{needed_bytes / 1e9:.2f} GB on each of {num_devices} devices; {SHARE * free_bytes / 1e9:.2f} GB can be "
            "used there. Use more devices, or leave --cache out, which then reads discs when they are needed."
        )
