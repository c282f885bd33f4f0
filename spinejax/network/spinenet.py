"""SpineNet: VGG-M-1024 on disc windows, shared up to a branch point, then one branch per task (paper, Sect. 4, Fig. 2).

The network is a table of layers. Those up to the branch point are applied once. Those after it, and a last layer with
one output per grade, are applied once per task. A variant is another set of arguments, never another class.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import Task


class Conv(NamedTuple):
    """A convolution with a square kernel and ReLU, then a 2×2 max-pool of stride 2 if `pool`."""

    name: str
    features: int
    kernel: int
    stride: int
    padding: int
    pool: bool


class Dense(NamedTuple):
    """A fully connected layer with ReLU and dropout."""

    name: str
    features: int


LAYERS = (
    Conv("conv1", 96, kernel=7, stride=2, padding=0, pool=True),
    Conv("conv2", 256, kernel=5, stride=2, padding=1, pool=True),
    Conv("conv3", 512, kernel=3, stride=1, padding=1, pool=False),
    Conv("conv4", 512, kernel=3, stride=1, padding=1, pool=False),
    Conv("conv5", 512, kernel=3, stride=1, padding=1, pool=True),
    Dense("fc6", 4096),
    Dense("fc7", 1024),
)
"""The VGG-M-1024 of Chatfield et al. (2014) as the paper changes it: 2×2 pools, no response normalisation."""

SHARED_STRIDE = 4
"""Pixels of the window per pixel of conv1's pooled output."""

BRANCH_POINTS = (None, "conv3", "conv4", "conv5", "fc6", "fc7")
"""The last shared layer, for each network of the paper's Table 2; None is one network per task."""

INITIALISERS = {"glorot": nn.initializers.glorot_uniform, "he": nn.initializers.he_normal}
"""Glorot and Bengio (2010) is the paper's; He et al. (2015) keeps the signal's scale through ReLUs."""


class Kernels(NamedTuple):
    """The functions that compute a convolution and a pool.

    Args:
        convolve: called like `jax.lax.conv_general_dilated`.
        max_pool: 2×2, stride 2, of float[N, H, W, C]; drops an odd last row or column.
        pool_first: take the ReLU of the maxima, not the maxima of the ReLU: the same numbers and gradients, and a TPU
            reads and writes a quarter of the pixels.
    """

    convolve: Callable[..., jax.Array]
    max_pool: Callable[[jax.Array], jax.Array]
    pool_first: bool = True


XLA = Kernels(jax.lax.conv_general_dilated, functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)))
"""For any platform and any transformation of JAX. `cpu_kernels.CPU` is faster on CPUs, with reverse-mode gradients."""


@dataclass(frozen=True)
class OneDevice:
    """The layout of a network that is not spread over devices; `parallel.layout.Layout` has the same methods."""

    def lay_out(self, x: jax.Array, layer: str) -> jax.Array:
        """Place a layer's output, after its pool or before its ReLU (fully connected), for the layer that follows."""
        return x

    def convolve(self, layer: str, convolve: Callable[..., jax.Array], *args: Any, **options: Any) -> jax.Array:
        """Call `convolve(*args, **options)`, a layer's convolution, on the devices that hold its kernel."""
        return convolve(*args, **options)

    def multiply(self, layer: str, multiply: Callable[..., jax.Array], *args: Any, **options: Any) -> jax.Array:
        """Call `multiply(*args, **options)`, a fully connected layer's product, on the devices that hold its kernel."""
        return multiply(*args, **options)


class SpineNet(nn.Module):
    """Grades disc windows on several tasks at once.

    Args:
        tasks: one branch each, named after it.
        branch_point: the last shared layer, one of `BRANCH_POINTS`.
        width: multiplies the features of every layer but the last.
        dropout: the fraction dropped after fc6 and fc7 in training; the others are scaled up (inverted dropout).
        num_slices: slices in a window.
        dtype: of the computation up to fc7. Parameters, fc8 and the logits are float32.
        initialiser: a key of `INITIALISERS`. Biases start at zero.
        fill_slices: repeat the nearest slice where the scan has none (`filled`). The paper leaves them black.
        kernels: how convolutions and pools are computed.
        layout: how layers are spread over devices.

    Variables: `params`, with `trunk` and `head_<task>` below it, and `constants`, which holds `slice_mean`,
    float32[num_slices], the mean that is subtracted from each slice. It is zero at first; training sets it from the
    training set, and it is saved with the weights.

    Example:
        >>> model = SpineNet(tasks=(Task("narrowing", ("no", "yes")),), branch_point="conv5", width=0.05)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
        >>> model.apply(variables, jnp.zeros((3, 112, 224, 9)))["narrowing"].shape
        (3, 2)
        >>> model.apply(variables, jnp.zeros((3, 112, 224, 9)), features=True).shape  # after conv5 and its pool
        (3, 3, 6, 26)
    """

    tasks: Sequence[Task]
    branch_point: str | None = "conv5"
    width: float = 1.0
    dropout: float = 0.5
    num_slices: int = WINDOW_SHAPE[2]
    dtype: Any = jnp.float32
    initialiser: str = "glorot"
    fill_slices: bool = False
    kernels: Kernels = XLA
    layout: Any = OneDevice()

    @nn.compact
    def __call__(
        self,
        windows: Float[Array | np.ndarray, "..."],
        *,
        train: bool = False,
        features: bool = False,
        of_features: bool = False,
        places: Sequence[tuple[int, int]] = ((0, 0),),
        part_of: tuple[int, Int[Array, " N"]] | None = None,
    ) -> dict[str, Float[Array, "_ _"]] | Float[Array, "..."]:
        """Unnormalised grade scores (fc8) of each window.

        Args:
            windows: float[N, 112, 224, num_slices], intensities in [0, 1]. Other heights and widths work too, if the
                parameters were initialised with them.
            train: apply dropout; needs the key "dropout".
            features: return the trunk's output instead, to train other heads on it.
            of_features: `windows` are the trunk's output already.
            places: rows and columns, multiples of `SHARED_STRIDE`, of several windows inside each of `windows`, which
                are then larger than a window by the greatest of them. conv1 and pool1 have no padding, and are
                computed once for all places.
            part_of: how many windows a larger batch has, and where these are in it. Dropout is then as in that batch.

        Returns:
            task name → float32[N · places, grades of the task]; the places of one of `windows` are adjacent.
            With `features` float32[N · places, …]: (h, w, C) after a convolution, (C) after fc6 or fc7.

        Raises:
            SpinejaxError: the branch point is unknown, the windows' shape does not fit, a place is not a multiple, or
                `features` is asked of a network without a trunk.
        """
        if self.branch_point not in BRANCH_POINTS:
            raise SpinejaxError(f"branch_point {self.branch_point!r}: expected one of {BRANCH_POINTS}.")
        if not of_features and (windows.ndim != 4 or windows.shape[-1] != self.num_slices):
            raise SpinejaxError(f"windows{list(windows.shape)}: expected [N, height, width, {self.num_slices}].")
        if any(shift < 0 or shift % SHARED_STRIDE for place in places for shift in place):
            raise SpinejaxError(f"places {places}: expected rows and columns in multiples of {SHARED_STRIDE} px.")
        if features and self.branch_point is None:
            raise SpinejaxError("features=True: the branch point is None, so the network has no shared layers.")
        slice_mean = self.variable("constants", "slice_mean", jnp.zeros, (self.num_slices,), jnp.float32)

        num_shared = [None, *(layer.name for layer in LAYERS)].index(self.branch_point)
        fields = ("width", "dropout", "dtype", "initialiser", "kernels", "layout")
        stack = functools.partial(Stack, places=tuple(places), **{name: getattr(self, name) for name in fields})
        if of_features:
            x = jnp.asarray(windows, self.dtype)
        else:
            windows = filled(windows) if self.fill_slices else jnp.asarray(windows)
            x = (windows - slice_mean.value[None, None, None]).astype(self.dtype)
            x = stack(layers=LAYERS[:num_shared], name="trunk")(x, train=train, part_of=part_of)
        if features:
            return x.astype(jnp.float32)
        return {
            task.name: stack(layers=LAYERS[num_shared:], num_outputs=task.num_grades, name=f"head_{task.name}")(
                x, train=train, part_of=part_of
            )
            for task in self.tasks
        }


class Stack(nn.Module):
    """Some of the table's layers, one after the other, then a linear layer (fc8) if `num_outputs` is not zero."""

    layers: Sequence[Conv | Dense]
    width: float
    dropout: float
    dtype: Any
    initialiser: str
    kernels: Kernels = XLA
    layout: Any = OneDevice()
    num_outputs: int = 0
    places: Sequence[tuple[int, int]] = ((0, 0),)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, part_of: tuple[int, Int[Array, " N"]] | None = None) -> jax.Array:
        options: dict[str, Any] = {"kernel_init": INITIALISERS[self.initialiser]()}
        for layer in self.layers:
            features = max(1, round(layer.features * self.width))
            options |= {"dtype": self.dtype, "name": layer.name}
            if isinstance(layer, Conv):
                convolve = functools.partial(self.layout.convolve, layer.name, self.kernels.convolve)
                kernel = (layer.kernel, layer.kernel)
                conv = nn.Conv(features, kernel, layer.stride, layer.padding, conv_general_dilated=convolve, **options)
                x = conv(x) if layer.pool and self.kernels.pool_first else nn.relu(conv(x))
                x = self.kernels.max_pool(x) if layer.pool else x
                x = nn.relu(x) if layer.pool and self.kernels.pool_first else x
                x = self.layout.lay_out(x, layer.name)
                x = _at_places(x, self.places) if layer == LAYERS[0] else x
            else:
                multiply = functools.partial(self.layout.multiply, layer.name, jax.lax.dot_general)
                dense = nn.Dense(features, dot_general=multiply, **options)
                x = nn.relu(self.layout.lay_out(dense(_flat(x)), layer.name))
                x = Dropout(self.dropout)(x, part_of=part_of) if train else x
        if self.num_outputs:
            options |= {"dtype": jnp.float32, "name": "fc8"}  # a score in bfloat16 has two or three digits
            x = self.layout.lay_out(nn.Dense(self.num_outputs, **options)(_flat(x)), "fc8")
        return x


class Dropout(nn.Module):
    """Inverted dropout: a fraction of the features becomes zero, and the others are scaled up.

    The mask is that of a whole batch, also for a part of it (`part_of`, as in `SpineNet`), which `flax.linen.Dropout`
    cannot do; without parts it is the same as there.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, part_of: tuple[int, Int[Array, " N"]] | None = None) -> jax.Array:
        if not self.rate:
            return x
        num = len(x) if part_of is None else part_of[0]
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (num, *x.shape[1:]))
        kept = kept if part_of is None else kept[part_of[1]]
        return jnp.where(kept, x / (1 - self.rate), 0)


def filled(windows: Float[Array | np.ndarray, "N H W S"]) -> Float[Array, "N H W S"]:
    """Windows in which each slice outside the scan is replaced by the nearest slice inside.

    A scan of one slice fills a ninth of a window, and conv1, which sums over slices, would see a ninth of what it sees
    of a stack. A window with no slice inside the scan is unchanged.
    """
    inside = shown(windows)
    place = jnp.arange(windows.shape[-1])
    distance = jnp.abs(place[:, None] - place[None])[None]
    nearest = jnp.where(inside[:, None], distance, distance + windows.shape[-1]).argmin(-1)
    source = jax.nn.one_hot(nearest, windows.shape[-1], dtype=windows.dtype)
    return jnp.einsum("nhws,nts->nhwt", windows, source, precision=jax.lax.Precision.HIGHEST)


def shown(windows: Float[Array | np.ndarray, "N H W S"]) -> Bool[Array | np.ndarray, "N S"]:
    """Which slices of windows are inside the scan: those whose pixels are not all equal."""
    return windows.max((1, 2)) > windows.min((1, 2))


def _at_places(x: jax.Array, places: Sequence[tuple[int, int]]) -> jax.Array:
    """Separate the output into the outputs of the windows at `places`: (N, H, W, C) → (N · places, h, w, C)."""
    if len(places) == 1:
        return x
    steps = [(row // SHARED_STRIDE, column // SHARED_STRIDE) for row, column in places]
    height, width = (x.shape[axis + 1] - max(step[axis] for step in steps) for axis in (0, 1))
    each = [x[:, row : row + height, column : column + width] for row, column in steps]
    return jnp.stack(each, axis=1).reshape(-1, height, width, x.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)
