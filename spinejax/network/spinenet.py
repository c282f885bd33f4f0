"""SpineNet: VGG-M-1024 on disc windows, shared up to a branch point, then one branch a task (paper, Sect. 4, Fig. 2).

The network is a table of layers. Those up to the branch point are applied once; those after it, and a last layer with
one output per grade, once for each task. A variant is another set of arguments, never another class.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE
from spinejax.network.cpu_kernels import conv_general_dilated, max_pool
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
"""Pixels of the window that one pixel of conv1's pooled output steps over."""

BRANCH_POINTS = (None, "conv3", "conv4", "conv5", "fc6", "fc7")
"""The last shared layer, for each network of the paper's Table 2; None is one network a task."""

INITIALISERS = {"glorot": nn.initializers.glorot_uniform, "he": nn.initializers.he_normal}
"""Glorot and Bengio (2010) is the paper's; He et al. (2015) keeps the signal's scale through ReLUs."""


def _as_it_lies(x: jax.Array, layer: str) -> jax.Array:
    return x


def _convolve(layer: str, *args, **options) -> jax.Array:
    return conv_general_dilated(*args, **options)


class SpineNet(nn.Module):
    """Grades disc windows on several tasks at once.

    Args:
        tasks: one branch each, named by it.
        branch_point: the last shared layer, one of `BRANCH_POINTS`.
        width: multiplies the features of every layer but the last.
        dropout: the fraction dropped after fc6 and fc7 while training; the kept ones are scaled up (inverted dropout).
        num_slices: slices in a window.
        dtype: of the computation; parameters and logits stay float32.
        initialiser: a key of `INITIALISERS`. Biases start at zero.
        fill_slices: repeat the nearest slice where the scan has none (`filled`). The paper leaves them black.
        lay_out: called with what each layer makes, after its pool or before a Dense's ReLU, and with the layer's name;
            gives it back laid out over devices as what follows wants it. `layout.Layout.lay_out` is one.
        convolve: called with a layer's name and `jax.lax.conv_general_dilated`'s arguments; `layout.Layout.convolve`.

    Variables: `params`, with `trunk` and `head_<task>` below it, and `constants`, which holds `slice_mean`,
    float32[num_slices], the mean that is subtracted from each slice. It starts at zero; training sets it from the
    training set, and it travels with the weights.

    Example:
        >>> model = SpineNet(tasks=(Task("narrowing", ("no", "yes")),), branch_point="conv5", width=0.05)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
        >>> model.apply(variables, jnp.zeros((3, 112, 224, 9)))["narrowing"].shape
        (3, 2)
    """

    tasks: Sequence[Task]
    branch_point: str | None = "conv5"
    width: float = 1.0
    dropout: float = 0.5
    num_slices: int = WINDOW_SHAPE[2]
    dtype: Any = jnp.float32
    initialiser: str = "glorot"
    fill_slices: bool = False
    lay_out: Callable[[jax.Array, str], jax.Array] = _as_it_lies
    convolve: Callable[..., jax.Array] = _convolve

    @nn.compact
    def __call__(
        self, windows: jax.Array, *, train: bool = False, places: Sequence[tuple[int, int]] = ((0, 0),)
    ) -> dict[str, jax.Array]:
        """Unnormalised grade scores (fc8) of each window.

        Args:
            windows: float[N, 112, 224, num_slices], intensities in [0, 1]. Other heights and widths work too, if the
                parameters were initialised with them.
            train: apply dropout; needs the key "dropout".
            places: rows and columns, multiples of `SHARED_STRIDE`, of several windows inside each of `windows`, which
                are then larger than a window by the greatest of them. conv1 and pool1 have no padding, and are
                computed once for all.

        Returns:
            task name → float32[N · places, grades of the task]; the places of one of `windows` lie side by side.

        Raises:
            SpinejaxError: the branch point is unknown, the windows' shape does not fit, or a place is none.
        """
        if self.branch_point not in BRANCH_POINTS:
            raise SpinejaxError(f"branch_point {self.branch_point!r}: expected one of {BRANCH_POINTS}.")
        if windows.ndim != 4 or windows.shape[-1] != self.num_slices:
            raise SpinejaxError(f"windows{list(windows.shape)}: expected [N, height, width, {self.num_slices}].")
        if any(shift < 0 or shift % SHARED_STRIDE for place in places for shift in place):
            raise SpinejaxError(f"places {places}: expected rows and columns in multiples of {SHARED_STRIDE} px.")
        slice_mean = self.variable("constants", "slice_mean", jnp.zeros, (self.num_slices,), jnp.float32)

        num_shared = [None, *(layer.name for layer in LAYERS)].index(self.branch_point)
        shared, branch = LAYERS[:num_shared], LAYERS[num_shared:]
        stack = {"width": self.width, "dropout": self.dropout, "dtype": self.dtype, "initialiser": self.initialiser}
        stack |= {"lay_out": self.lay_out, "convolve": self.convolve}
        stack["places"] = tuple(places)
        windows = filled(windows) if self.fill_slices else windows
        features = (windows - slice_mean.value[None, None, None]).astype(self.dtype)
        features = Stack(shared, **stack, name="trunk")(features, train=train)
        return {
            task.name: Stack(branch, num_outputs=task.num_grades, **stack, name=f"head_{task.name}")(
                features, train=train
            ).astype(jnp.float32)
            for task in self.tasks
        }


class Stack(nn.Module):
    """Some of the table's layers, one after the other, then a linear layer (fc8) if `num_outputs` is not zero."""

    layers: Sequence[Conv | Dense]
    width: float
    dropout: float
    dtype: Any
    initialiser: str
    lay_out: Callable[[jax.Array, str], jax.Array] = _as_it_lies
    convolve: Callable[..., jax.Array] = _convolve
    num_outputs: int = 0
    places: Sequence[tuple[int, int]] = ((0, 0),)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": INITIALISERS[self.initialiser]()}
        for layer in self.layers:
            features = max(1, round(layer.features * self.width))
            if isinstance(layer, Conv):
                kernel = (layer.kernel, layer.kernel)
                how = {"conv_general_dilated": functools.partial(self.convolve, layer.name), **options}
                convolve = nn.Conv(features, kernel, layer.stride, layer.padding, **how, name=layer.name)
                x = nn.relu(convolve(x))
                x = max_pool(x) if layer.pool else x
                x = self.lay_out(x, layer.name)
                x = _at_places(x, self.places) if layer == LAYERS[0] else x
            else:
                x = nn.relu(self.lay_out(nn.Dense(features, **options, name=layer.name)(_flat(x)), layer.name))
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self.num_outputs:
            x = self.lay_out(nn.Dense(self.num_outputs, **options, name="fc8")(_flat(x)), "fc8")
        return x


def filled(windows: jax.Array) -> jax.Array:
    """Windows whose every slice shows something: one outside the scan becomes the nearest that lies inside.

    A scan of one slice fills a ninth of a window, and conv1, which sums over slices, would see a ninth of what it sees
    of a stack. A window in which no slice shows anything stays as it is.

    Args:
        windows: float[N, H, W, S].
    """
    shows = shown(windows)
    place = jnp.arange(windows.shape[-1])
    distance = jnp.abs(place[:, None] - place[None])[None]
    nearest = jnp.where(shows[:, None], distance, distance + windows.shape[-1]).argmin(-1)
    source = jax.nn.one_hot(nearest, windows.shape[-1], dtype=windows.dtype)
    return jnp.einsum("nhws,nts->nhwt", windows, source, precision=jax.lax.Precision.HIGHEST)


def shown(windows: jax.Array) -> jax.Array:
    """bool[N, S]: which slices of windows, float[N, H, W, S], lie in the scan: those whose pixels are not all alike."""
    return windows.max((1, 2)) > windows.min((1, 2))


def _at_places(x: jax.Array, places: Sequence[tuple[int, int]]) -> jax.Array:
    """What each place's own window would have given; (N, H, W, C) → (N · places, h, w, C)."""
    if len(places) == 1:
        return x
    steps = [(row // SHARED_STRIDE, column // SHARED_STRIDE) for row, column in places]
    height, width = (x.shape[axis + 1] - max(step[axis] for step in steps) for axis in (0, 1))
    each = [x[:, row : row + height, column : column + width] for row, column in steps]
    return jnp.stack(each, axis=1).reshape(-1, height, width, x.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)
