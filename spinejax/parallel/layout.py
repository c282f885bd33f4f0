"""Which device keeps which part of the network: the rule table, and what follows from it for a step.

97 % of this network's parameters are fully connected, and 97 % of its arithmetic is not. So two layouts share one axis
of devices:

    data    every device has all parameters and its share of the discs; all gradients are summed over devices each step
    split   convolutions work on each device's own discs; fully connected layers are split over the same devices
            (Krizhevsky, 2014). The features of all discs are gathered, fc6 is split by columns and fc7 by rows, so that
            nothing is sent between the two, and each device gets back the sums of its own discs. Features are small
            beside the weights; gradients of fc6 and fc7 are never sent.

Each device keeps and updates a slice of every convolution's kernel (Rajbhandari et al., 2020). The slices are gathered
where they are used, in the precision of the computation, and gradients are summed straight into slices. That sends as
much as summing whole gradients, but no device reads and writes whole kernels and momentum.

On several slices of a TPU pod each slice has all parameters, and its share of the discs; "devices" above are then those
of one slice. A parameter's gradient is summed within the slice first: only the share that a device keeps goes through
the slower network between slices.

Both layouts compute the same numbers, up to the rounding of sums in another order: randomness is a function of keys and
places (`jax_threefry_partitionable`), never of devices.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from spinejax.network.spinenet import SpineNet
from spinejax.parallel import devices
from spinejax.parallel.devices import DATA_AXIS

RULES = (
    (r"\bfc6/kernel$", PartitionSpec(None, DATA_AXIS)),
    (r"\bfc6/bias$", PartitionSpec(DATA_AXIS)),
    (r"\bfc7/kernel$", PartitionSpec(DATA_AXIS, None)),
    (r"\bconv2/kernel$", PartitionSpec(None, None, None, DATA_AXIS)),
    (r"\bconv[3-5]/kernel$", PartitionSpec(None, None, DATA_AXIS, None)),
    (r"", PartitionSpec()),
)
"""For layout split: the first pattern found in a parameter's path decides how it is stored. What an optimiser keeps for
a parameter has a path that ends in the parameter's, and is stored alike. Convolutions are split by input channels,
whose slices are contiguous in memory, but conv2 has only 96 of them. conv1, fc8 and biases are too small to split."""

ONE_RING = 8
"""Maximum number of devices that gather in one ring."""


@dataclass(frozen=True)
class Layout:
    """How arrays are divided over a mesh; hashable, so that compiled functions can take it as a static argument.

    Args:
        mesh: from `devices.make_mesh`.
        split: whether the table applies; without it every device has everything.
        whole: patterns of the table that are not followed, because a dimension does not divide.
        row: number of neighbouring devices that first gather a kernel's slices among themselves.
    """

    mesh: Mesh
    split: bool = False
    whole: tuple[str, ...] = ()
    row: int = 1

    @property
    def num_parts(self) -> int:
        """The devices that share parameters: all, or those of a slice."""
        return self.mesh.shape[DATA_AXIS]

    def spec(self, path: str) -> PartitionSpec:
        """How the array at a path like `params/head_narrowing/fc6/kernel` is stored."""
        if not self.split:
            return PartitionSpec()
        pattern, spec = next((pattern, spec) for pattern, spec in RULES if re.search(pattern, path))
        return PartitionSpec() if pattern in self.whole else spec

    def shardings(self, tree) -> Any:
        """A sharding for each leaf."""
        return jax.tree.map_with_path(lambda path, _: NamedSharding(self.mesh, self.spec(_name(path))), tree)

    def on(self, model: SpineNet) -> SpineNet:
        """The same network, whose activations this layout divides."""
        return model.clone(layout=self) if self.split else model

    def notes(self) -> list[str]:
        """What the user should know: the parameters that could not be split."""
        if not self.whole:
            return []
        layers = ", ".join(dict.fromkeys(pattern.strip(r"\b$").split("/")[0] for pattern in self.whole))
        return [
            f"Layout: {layers}: a dimension does not divide by the {self.num_parts} devices, so that each of them "
            "keeps all of it. Another --width, or number of devices, would split it."
        ]

    def put(self, tree) -> Any:
        """Transfer a tree of arrays to the devices; each process holds all of it."""
        return devices.put(tree, self.shardings(tree))

    def create(self, function: Callable[[], Any]) -> Any:
        """What a function returns, a tree of arrays, each device computing its own parts; none ever has all of it."""
        return jax.jit(function, out_shardings=self.shardings(jax.eval_shape(function)))()

    def constrain(self, tree) -> Any:
        """Inside jit: keep the tree divided as by `put`."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def by_disc(self, function: Callable) -> Callable:
        """Inside jit: a function of arrays with discs along the first axis, which each device applies to its own."""
        return self._shard_map(function, self._by_disc, self._by_disc, check_vma=True)

    def lay_out(self, x: Float[Array, "N ..."], layer: str) -> Float[Array, "M ..."]:
        """Inside jit: a layer's output (conv5 after its pool, fc6 and fc7 before the ReLU), for the layer after it.

        Of conv5 each device gets the features of all discs, for its columns of fc6. The result has these copies one
        after the other: M is N times the number of devices. As one array that all devices have, it would have one
        gradient that all have, which compilers sum whole. The copies' gradients are summed in parts (`_gather`): each
        device gets its own discs' alone.
        """
        if self.spec("fc6/kernel") == PartitionSpec():
            return x
        if layer == "conv5":
            return self._shard_map(lambda own: self._gather(own, 0), self._by_disc, self._by_disc)(x)
        if layer == "fc6":
            return jax.lax.with_sharding_constraint(x, self._sharding(self._slice, DATA_AXIS))
        if layer in ("fc7", "fc8"):
            # What follows is so little that every device does it for every disc: no gradient is sent back.
            return jax.lax.with_sharding_constraint(x, self._sharding(self._slice))
        return x

    def convolve(
        self,
        layer: str,
        convolve: Callable[..., jax.Array],
        x: Float[Array, "N H W C"],
        kernel: Float[Array, "h w C F"],
        *args,
        **options,
    ) -> Float[Array, "N _ _ F"]:
        """Inside jit: each device convolves its own discs, with the kernel whose slices all devices share.

        Args:
            layer: the layer's name.
            convolve: called like `jax.lax.conv_general_dilated`.
            x, kernel, args, options: its arguments; the kernel is divided as the table says.
        """
        spec = self.spec(f"{layer}/kernel")
        if spec == PartitionSpec():
            return convolve(x, kernel, *args, **options)

        # Left to the compiler, every device would sum whole gradients and then discard most of them.
        def of_own_discs(x, kernel):
            return convolve(x, self._gather(kernel, spec.index(DATA_AXIS)), *args, **options)

        return self._shard_map(of_own_discs, (self._by_disc, spec), self._by_disc)(x, kernel)

    def multiply(
        self, layer: str, multiply: Callable[..., jax.Array], x: Array, kernel: Float[Array, "C F"], *args, **options
    ) -> Array:
        """Inside jit: a fully connected layer's product. Each device has its own columns of fc6, for all discs.

        Args:
            layer: the layer's name.
            multiply: called like `jax.lax.dot_general`.
            x, kernel, args, options: its arguments; for fc6, x is as from `lay_out`.
        """
        spec = self.spec(f"{layer}/kernel")
        if layer != "fc6" or spec == PartitionSpec():
            return multiply(x, kernel, *args, **options)

        def own_columns(x, kernel):
            return multiply(x, kernel, *args, **options)

        in_columns = PartitionSpec(self._slice, DATA_AXIS)
        return self._shard_map(own_columns, (self._by_disc, spec), in_columns)(x, kernel)

    def _gather(self, own: Array, axis: int) -> Array:
        """The devices' parts, side by side along an axis: gathered along rows of devices, then along columns.

        Its gradient is summed the same way back. In one ring of many devices each share is so small that XLA for TPUs
        sends whole arrays padded with zeros instead: twice as much.
        """
        place = np.arange(self.num_parts).reshape(-1, self.row)
        for rings in (place, place.T):
            own = jax.lax.all_gather(own, DATA_AXIS, axis=axis, tiled=True, axis_index_groups=rings.tolist())
        return own

    def _shard_map(self, function: Callable, in_specs, out_specs, *, check_vma: bool = False) -> Callable:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

    @property
    def _slice(self) -> str | None:
        return devices.slice_axis(self.mesh)

    @property
    def _by_disc(self) -> PartitionSpec:
        return PartitionSpec(devices.disc_axes(self.mesh))

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def make(choice: str, mesh: Mesh, params: Mapping, *, batch_size: int) -> Layout:
    """The layout "data" or "split"; for "auto", the one that communicates less in a step of `batch_size` discs.

    Where a dimension does not divide by the devices, the parameter is replicated; `Layout.notes` says so. `params` are
    the network's parameters, or their shapes.
    """
    shapes = {_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    if choice == "data":
        return Layout(mesh)
    whole = tuple(
        pattern
        for pattern, spec in RULES
        if any(
            size % mesh.shape[DATA_AXIS]
            for name, shape in shapes.items()
            if re.search(pattern, name)
            for size, axis in zip(shape, spec, strict=False)
            if axis
        )
    )
    split = Layout(mesh, True, whole, _row(mesh.shape[DATA_AXIS]))
    if choice == "split" or num_moved(split, shapes, batch_size) < num_moved(Layout(mesh), shapes, batch_size):
        return split
    return Layout(mesh)


def for_grading(mesh: Mesh, params: Mapping) -> Layout:
    """The split layout, with convolutions whole on each device: they are used once per view, and never updated."""
    layout = make("split", mesh, params, batch_size=1)
    convolutions = tuple(pattern for pattern, _ in RULES if "conv" in pattern)
    return replace(layout, whole=tuple(dict.fromkeys((*layout.whole, *convolutions))))


def num_moved(layout: Layout, shapes: Mapping[str, tuple[int, ...]], batch_size: int) -> int:
    """Numbers that a device sends in a training step, to first order: an all-reduce sends each one twice.

    `shapes` are the parameters' by path; `batch_size` counts discs.
    """
    if layout.mesh.size == 1:
        return 0
    moved = 2 * sum(
        math.prod(shape) for path, shape in shapes.items() if "conv" in path or layout.spec(path) == PartitionSpec()
    )
    if layout.spec("fc6/kernel") != PartitionSpec():
        discs = batch_size * layout.num_parts // layout.mesh.size  # of a slice
        num_gathered = sum(path.endswith("conv5/kernel") for path in shapes)
        features = next(shape[0] for path, shape in shapes.items() if path.endswith("fc6/kernel"))
        sums = sum(shape[1] for path, shape in shapes.items() if path.endswith("fc7/kernel"))
        moved += discs * (num_gathered * 2 * features + 2 * sums)
    return moved


def _row(num_devices: int) -> int:
    """Length of the rows of a grid of devices, as near to a square as possible; one column up to `ONE_RING`."""
    if num_devices <= ONE_RING:
        return 1
    return max(length for length in range(1, math.isqrt(num_devices) + 1) if num_devices % length == 0)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
