"""Convolution and pooling for CPUs, several times as fast as XLA's there, and so are their gradients.

A 3×3 convolution of stride 1 is computed by Winograd's algorithm, with fewer products.

XLA computes the gradient of a strided convolution with respect to its input in one way: it puts zeros between the
pixels of the output's gradient, and convolves. On CPUs the products with these zeros cost as much as any other. Here
each row of the input is convolved from the rows of the output that it reaches, with the kernel's columns as channels,
and each column's share is then added where it belongs (`input_gradient`), so that no product is with a zero. A forward
pass with few features uses the same idea (`by_columns`).

The gradients are reverse-mode only: `jax.jvp` and `jax.linearize` need the network without these kernels.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from spinejax.network.spinenet import Kernels, SpineNet

FEW_CHANNELS = 32
"""Input channels up to which `input_gradient` is faster: conv1 has 9. With conv2's 96, XLA is as fast."""

FEW_FEATURES = 24
"""Output features up to which `by_columns` is faster, if the input's channels are few too."""

MANY_FEATURES = 128
"""With fewer features, Winograd's products are too small for several cores to share, and XLA is faster."""

FEW_DISCS = 4
"""With fewer discs, Winograd's transform of the kernel takes longer than the products that it saves."""

FEW_DISCS_FOR_KERNELS = 16
"""The same as `FEW_DISCS`, for the gradient with respect to the kernel."""


def with_cpu_kernels(model: SpineNet) -> SpineNet:
    """The same network, with this file's kernels if the computation runs on CPUs; equal to rounding."""
    return model.clone(kernels=CPU) if jax.default_backend() == "cpu" else model


def convolve(x: jax.Array, kernel: jax.Array, window_strides, padding, **options) -> jax.Array:
    """`lax.conv_general_dilated`, as `flax.linen.Conv` calls it: the same numbers to rounding.

    Two kinds of float32 convolution have an algorithm of their own: those of few channels and equal strides above 1,
    and 3×3 ones of stride 1 that keep the size, of more than a few discs and many features. Others are XLA's.
    """
    plain = all(set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    plain = plain and options.get("feature_group_count", 1) == 1 and x.ndim == 4
    if not plain or {x.dtype, kernel.dtype} != {jnp.dtype(jnp.float32)}:  # sums of parts need all of float32's digits
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    def by_xla(x, kernel):
        return _convolve(x, kernel, window_strides, padding)

    def to_input(x, kernel, gradient):
        return input_gradient(gradient, kernel, x.shape, window_strides[0], padding)

    strides, pads = set(window_strides), {tuple(pad) for pad in padding}
    if len(strides) == 1 and 1 < window_strides[0] <= min(kernel.shape[:2]) and x.shape[3] <= FEW_CHANNELS:
        in_columns = functools.partial(by_columns, stride=window_strides[0], padding=padding)
        forward = in_columns if kernel.shape[3] <= FEW_FEATURES else by_xla
        return _with_gradients(forward, to_input, _gradient_of(forward, 1))(x, kernel)
    is_3x3 = kernel.shape[:2] == (3, 3) and strides == {1} and pads == {(1, 1)}
    if is_3x3 and len(x) >= FEW_DISCS and kernel.shape[3] >= MANY_FEATURES:
        to_kernel = _gradient_of(winograd if len(x) >= FEW_DISCS_FOR_KERNELS else by_xla, 1)
        return _with_gradients(winograd, _gradient_of(winograd, 0), to_kernel)(x, kernel)
    return by_xla(x, kernel)


def _with_gradients(forward: Callable, to_input: Callable, to_kernel: Callable) -> Callable:
    """A convolution (x, kernel) → output with its gradients, each of (x, kernel, the output's gradient)."""
    convolve = jax.custom_vjp(forward)
    convolve.defvjp(
        lambda x, kernel: (forward(x, kernel), (x, kernel)),
        lambda given, gradient: (to_input(*given, gradient), to_kernel(*given, gradient)),
    )
    return convolve


def _gradient_of(convolve: Callable, which: int) -> Callable:
    """JAX's own gradient of a convolution with respect to its input (0) or its kernel (1)."""
    return lambda x, kernel, gradient: jax.vjp(convolve, x, kernel)[1](gradient)[which]


def by_columns(
    x: Float[Array, "N H W C"], kernel: Float[Array, "K L C F"], stride: int, padding: Sequence
) -> Float[Array, "N h w F"]:
    """A strided convolution along columns, for all rows of the kernel at once, whose results are then added up.

    XLA for CPUs first copies the pixels under the kernel side by side, for each pixel of the output. Here a pixel's
    column of them is copied once, not for every row that it reaches. Where features are few, the copies cost the most.
    The padding is ((before, after), (before, after)), in pixels of x.
    """
    (top, bottom), around = padding
    num_features = kernel.shape[3]
    taps = -(-kernel.shape[0] // stride)  # per row phase; the `stride` phases become channels
    height = (x.shape[1] + top + bottom - kernel.shape[0]) // stride + 1
    below = stride * (height - 1 + taps) - top - x.shape[1]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, below, 0), (0, 0, 0), (0, 0, 0)))
    x = x.reshape(x.shape[0], -1, stride, *x.shape[2:]).transpose(0, 1, 3, 2, 4)
    kernel = jnp.pad(kernel, ((0, stride * taps - kernel.shape[0]), (0, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, *kernel.shape[1:]).transpose(2, 1, 3, 0, 4)
    x, kernel = x.reshape(*x.shape[:3], -1), kernel.reshape(1, kernel.shape[0], -1, taps * num_features)
    rows = _convolve(x, kernel, (1, stride), ((0, 0), around))
    return functools.reduce(
        jnp.add,
        [rows[:, tap : tap + height, :, tap * num_features : (tap + 1) * num_features] for tap in range(taps)],
    )


def input_gradient(
    gradient: Float[Array, "N h w F"],
    kernel: Float[Array, "K L C F"],
    shape: Sequence[int],
    stride: int,
    padding: Sequence,
) -> Float[Array, "N H W C"]:
    """The gradient of a convolution with respect to its input, one phase of its rows at a time.

    `gradient` is with respect to the output. `shape` and the padding, ((before, after), (before, after)), are the
    input's.
    """
    num_channels, num_features = kernel.shape[2:]
    blocks = [-(-(size + sum(pads)) // stride) for size, pads in zip(shape[1:3], padding, strict=True)]

    def rows_of(phase):
        """Rows stride·q + phase: row q of the output reaches them through every stride-th row of the kernel."""
        taps = kernel[phase::stride][::-1].transpose(0, 3, 1, 2)
        taps = taps.reshape(-1, 1, num_features, kernel.shape[1] * num_channels)
        around = ((len(taps) - 1, blocks[0] - gradient.shape[1]), (0, 0))
        return _added_up(_convolve(gradient, taps, (1, 1), around), stride * num_channels, blocks[1])

    pixels = jnp.stack([rows_of(phase) for phase in range(stride)], axis=2)
    pixels = pixels.reshape(-1, stride * blocks[0], stride * blocks[1], num_channels)
    (top, _), (left, _) = padding
    return pixels[:, top : top + shape[1], left : left + shape[2]]


def _added_up(columns: jax.Array, size: int, num_blocks: int) -> jax.Array:
    """The sum of what each column contributes to itself and to those after it, `size` numbers to each.

    From float[N, H, w, M] to float[N, H, num_blocks, size]; the last block of a column may be shorter.
    """
    added = jnp.zeros((), columns.dtype)
    for after, start in enumerate(range(0, columns.shape[3], size)):
        part = columns[..., start : start + size]
        room = ((0, 0), (0, 0), (after, num_blocks - columns.shape[2] - after), (0, size - part.shape[3]))
        added += jnp.pad(part, room)
    return added


def max_pool(x: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
    """2×2 max-pool of stride 2, equal to `flax.linen.max_pool` and five times as fast; drops an odd last row or column.

    Its gradient goes to the largest pixel; of equal ones, to the first, as in other libraries. NaN stays NaN.
    """
    rows, columns = (size // 2 * 2 for size in x.shape[1:3])

    def larger(one, other):
        return jnp.where((one >= other) | jnp.isnan(one), one, other)

    return functools.reduce(larger, [x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)])


def _convolve(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def winograd(x: Float[Array, "N H W C"], kernel: Float[Array, "3 3 C F"]) -> Float[Array, "N H W F"]:
    """The convolution of stride 1 with one pixel of zeros around, by Winograd's F(2×2, 3×3) (Lavin and Gray, 2016)."""
    num, height, width, channels = x.shape
    tiles = (num, -(-height // 2), -(-width // 2))
    products = {
        place: jnp.matmul(pixels.reshape(-1, channels), weights).reshape(*tiles, -1)
        for (place, pixels), weights in zip(
            _tiles_transformed(x, tiles).items(), _kernel_transformed(kernel).values(), strict=True
        )
    }
    outputs = _both_axes(products, lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3]))
    rows = [jnp.stack([outputs[row, column] for column in (0, 1)], axis=3) for row in (0, 1)]
    blocks = jnp.stack(rows, axis=2)  # (N, row of tiles, row in the tile, column of tiles, column in the tile, F)
    return blocks.reshape(num, 2 * tiles[1], 2 * tiles[2], -1)[:, :height, :width]


def _tiles_transformed(x: jax.Array, tiles: tuple[int, int, int]) -> dict[tuple[int, int], jax.Array]:
    """Each of the 16 transformed pixels of every tile: float[N, rows of tiles, columns of tiles, C]."""
    _, rows, columns = tiles
    around = [(1, 2 * count - size + 1) for count, size in zip((rows, columns), x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *around, (0, 0)))
    pixels = {
        (row, column): padded[:, row : row + 2 * rows - 1 : 2, column : column + 2 * columns - 1 : 2]
        for row in range(4)
        for column in range(4)
    }
    return _both_axes(pixels, lambda d: (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]))


def _kernel_transformed(kernel: jax.Array) -> dict[tuple[int, int], jax.Array]:
    """Each of the 16 transformed weights: float[C, F]."""
    weights = {(row, column): kernel[row, column] for row in range(3) for column in range(3)}
    return _both_axes(weights, lambda g: (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]))


def _both_axes(values: dict, transform) -> dict[tuple[int, int], jax.Array]:
    """A one-dimensional transform, along columns and then along rows, of the values at (row, column)."""
    rows, columns = (1 + max(place[axis] for place in values) for axis in (0, 1))
    by_row = [transform([values[row, column] for column in range(columns)]) for row in range(rows)]
    by_column = [transform(list(column)) for column in zip(*by_row, strict=True)]
    return {(row, column): each[row] for row in range(len(by_column[0])) for column, each in enumerate(by_column)}


CPU = Kernels(convolve, max_pool, pool_first=False)
"""This file's kernels, for `SpineNet.kernels`."""
