"""Which device keeps which part of the network: the rule table, and what it makes of a step.

97 % of this network's parameters are fully connected, and 97 % of its arithmetic is not. So two layouts share one axis
of devices:

    data    every device has all parameters and its share of the discs; every gradient travels, every step
    split   convolutions work on each device's own discs; fully connected layers are split over the same devices
            (Krizhevsky, 2014). The features of all discs are gathered, fc6 is split by columns and fc7 by rows, so that
            nothing travels between the two, and each device gets back the sums of its own discs. Features are small
            beside the weights; gradients of fc6 and fc7 never travel.

Of a convolution's kernel each device keeps, and updates, a slice (Rajbhandari et al., 2020). The slices are gathered
where they are used, in the precision of the computation, and gradients are summed straight into slices: as much travels
as if whole gradients were summed, but neither kernels nor momentum are read and written on every device.

Both layouts compute the same numbers, to the rounding of sums that are taken in another order: randomness is a function
of keys and places (`jax_threefry_partitionable`), never of devices.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
"""Of layout split: the first pattern that is found in a parameter's path says how it is stored. What an optimiser keeps
for a parameter has the parameter's path as the end of its own, and so lives beside it. Convolutions are cut where the
slices lie best in memory: by input channels, but conv2 has only 96 of them. conv1, fc8 and biases are too small to
split."""

ONE_RING = 8
"""Up to so many devices gather what they share in one ring."""


@dataclass(frozen=True)
class Layout:
    """How arrays lie on a mesh; hashable, so that compiled functions can take it as a static argument.

    Args:
        mesh: one axis, `devices.DATA_AXIS`.
        split: whether the table holds; without it every device has everything.
        whole: of layout split, the patterns of the table that are not followed: a dimension does not divide.
        row: how many devices, side by side in the mesh, share a kernel's slices among themselves before rows do.
    """

    mesh: Mesh
    split: bool = False
    whole: tuple[str, ...] = ()
    row: int = 1

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
        """The same network, with the layout's say on where its activations lie."""
        return model.clone(layout=self) if self.split else model

    def notes(self) -> list[str]:
        """What the user should know: the parameters that could not be split."""
        if not self.whole:
            return []
        layers = ", ".join(dict.fromkeys(pattern.strip(r"\b$").split("/")[0] for pattern in self.whole))
        return [
            f"Layout: {layers}: a dimension does not divide by the {self.mesh.size} devices, so that each of them "
            "keeps all of it. Another --width, or number of devices, would split it."
        ]

    def put(self, tree):
        """Lay a tree of arrays out; each host gives all of it."""
        return devices.put(tree, self.shardings(tree))

    def constrain(self, tree) -> Any:
        """Inside jit: keep the tree divided as by `put`."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def by_disc(self, function: Callable) -> Callable:
        """Inside jit: a function of arrays with discs along the first axis, which each device applies to its own."""
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=PartitionSpec(DATA_AXIS), out_specs=PartitionSpec(DATA_AXIS)
        )

    def lay_out(self, x: jax.Array, layer: str) -> jax.Array:
        """Inside jit: what a layer made, laid out as what follows wants it.

        Args:
            x: float[N, …]. Of conv5 after its pool, of fc6 and fc7 before the ReLU.
            layer: the layer's name.
        """
        if self.spec("fc6/kernel") == PartitionSpec():
            return x
        if layer == "conv5":  # gathered; the gradients that come back are sums over devices, each disc's for its own
            return self._of_all_discs(x)
        if layer == "fc6":
            return _lie(x, (self._by_column,), (self._by_column,))
        if layer in ("fc7", "fc8"):
            # What follows is so little that every device does it for every disc: nothing travels on the way back.
            return _lie(x, (self._everywhere,), (self._everywhere,))
        return x

    def convolve(
        self, layer: str, convolve: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, *args, **options
    ) -> jax.Array:
        """Inside jit: each device convolves its own discs, with the kernel that all devices share.

        Args:
            layer: the layer's name.
            convolve: called like `jax.lax.conv_general_dilated`.
            x: float[N, H, W, C].
            kernel: float[h, w, C, F], as the table stores it.
            args, options: more of `jax.lax.conv_general_dilated`'s.
        """
        spec = self.spec(f"{layer}/kernel")
        if spec == PartitionSpec():
            return convolve(x, kernel, *args, **options)

        # By hand, because the compiler would sum whole gradients on every device and then throw most of them away.
        @functools.partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(self._by_disc.spec, spec),
            out_specs=self._by_disc.spec,
            check_vma=False,
        )
        def of_own_discs(x, kernel):
            return convolve(x, self._gather(kernel, spec.index(DATA_AXIS)), *args, **options)

        return of_own_discs(x, kernel)

    def _gather(self, own: jax.Array, axis: int) -> jax.Array:
        """What all devices have, side by side along an axis: gathered along rows of devices, then along columns.

        Its gradient goes back the same way, as sums. In one ring of all devices a share is so small, and the way so
        long, that XLA for TPUs sends whole arrays instead, filled up with zeros: twice as much.
        """
        place = np.arange(self.mesh.size).reshape(-1, self.row)
        for rings in (place, place.T):
            own = jax.lax.all_gather(own, DATA_AXIS, axis=axis, tiled=True, axis_index_groups=rings.tolist())
        return own

    def _of_all_discs(self, x: jax.Array) -> jax.Array:
        gather = jax.shard_map(
            lambda own: self._gather(own, 0),
            mesh=self.mesh,
            in_specs=self._by_disc.spec,
            out_specs=self._everywhere.spec,
            check_vma=False,
        )
        by_disc = self._by_disc

        @jax.custom_vjp
        def gathered(x):
            return gather(x)

        gathered.defvjp(
            lambda x: (gather(x), None),
            lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, by_disc),),
        )
        return gathered(x)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def _by_disc(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(DATA_AXIS))

    @property
    def _by_column(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(None, DATA_AXIS))


def make(choice: str, mesh: Mesh, params: Mapping, *, batch_size: int) -> Layout:
    """The layout that was asked for, or for "auto" the one of which less travels between devices in a step.

    Where a dimension does not divide by the devices, the parameter is replicated; `Layout.notes` says so.

    Args:
        choice: "data", "split" or "auto".
        mesh: the devices.
        params: the network's parameters, or their shapes.
        batch_size: discs in a step.
    """
    shapes = {_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    if choice == "data":
        return Layout(mesh)
    whole = tuple(
        pattern
        for pattern, spec in RULES
        if any(size % mesh.size for name, shape in shapes.items() for size in _split_sizes(name, shape, pattern, spec))
    )
    split = Layout(mesh, True, whole, _row(mesh.size))
    if choice == "split" or num_moved(split, shapes, batch_size) < num_moved(Layout(mesh), shapes, batch_size):
        return split
    return Layout(mesh)


def for_grading(mesh: Mesh, params: Mapping) -> Layout:
    """The split layout, with convolutions whole on each device: they are used once a view, and never updated.

    Args:
        mesh: the devices.
        params: the network's parameters, or their shapes.
    """
    layout = make("split", mesh, params, batch_size=1)
    convolutions = tuple(pattern for pattern, _ in RULES if "conv" in pattern)
    return replace(layout, whole=tuple(dict.fromkeys((*layout.whole, *convolutions))))


def num_moved(layout: Layout, shapes: Mapping[str, tuple[int, ...]], batch_size: int) -> int:
    """Numbers that a device sends in a training step, to first order: an all-reduce sends each one twice.

    Args:
        layout: the layout.
        shapes: parameter's path → its shape.
        batch_size: discs in a step.
    """
    if layout.mesh.size == 1:
        return 0
    moved = 2 * sum(
        math.prod(shape) for path, shape in shapes.items() if "conv" in path or layout.spec(path) == PartitionSpec()
    )
    if layout.spec("fc6/kernel") != PartitionSpec():
        num_gathered = sum(path.endswith("conv5/kernel") for path in shapes)
        features = next(shape[0] for path, shape in shapes.items() if path.endswith("fc6/kernel"))
        sums = sum(shape[1] for path, shape in shapes.items() if path.endswith("fc7/kernel"))
        moved += batch_size * (num_gathered * 3 * features + 2 * sums)
    return moved


def _row(num_devices: int) -> int:
    """Of what length rows are, as near to a square as it goes; up to `ONE_RING` devices are one column."""
    if num_devices <= ONE_RING:
        return 1
    return max(length for length in range(1, math.isqrt(num_devices) + 1) if num_devices % length == 0)


def _split_sizes(name: str, shape: tuple[int, ...], pattern: str, spec: PartitionSpec) -> list[int]:
    """The sizes that a rule would split, if it is this parameter's."""
    return [size for size, axis in zip(shape, spec, strict=False) if axis] if re.search(pattern, name) else []


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _lie(x: jax.Array, forwards: tuple[NamedSharding, ...], backwards: tuple[NamedSharding, ...]) -> jax.Array:
    """x, laid out in these ways one after the other; its gradient in those. A plain constraint holds both to the same.

    Two ways in a row say where the data travel: without the first, the compiler may move it to before a pool.
    """
    return functools.reduce(jax.lax.with_sharding_constraint, forwards, x)


_lie.defvjp(
    lambda x, forwards, backwards: (_lie(x, forwards, backwards), None),
    lambda forwards, backwards, _, gradient: (functools.reduce(jax.lax.with_sharding_constraint, backwards, gradient),),
)
