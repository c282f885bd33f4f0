"""3×3 convolution by Winograd's minimal filtering, F(2×2, 3×3) of Lavin and Gray (CVPR 2016, Sect. 4.1).

A tile of 2×2 outputs is a linear map of 4×4 inputs. Transformed, tile and kernel meet in 16 products instead of 36,
each of them a plain matrix product over channels. The transforms are sums and halves, and cost float32 a few more
roundings.
"""

import jax
import jax.numpy as jnp


def convolve(x: jax.Array, kernel: jax.Array, *, precision=None) -> jax.Array:
    """The convolution of stride 1 with one pixel of zeros around, as `lax.conv_general_dilated` defines it.

    Args:
        x: float[N, H, W, C].
        kernel: float[3, 3, C, F].
        precision: of the products.

    Returns:
        float[N, H, W, F].
    """
    num, height, width, channels = x.shape
    tiles = (num, -(-height // 2), -(-width // 2))
    products = {
        place: jnp.matmul(pixels.reshape(-1, channels), weights, precision=precision).reshape(*tiles, -1)
        for (place, pixels), weights in zip(_of_tiles(x, tiles).items(), _of_kernel(kernel).values(), strict=True)
    }
    outputs = _both_axes(products, lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3]))
    rows = [jnp.stack([outputs[row, column] for column in (0, 1)], axis=3) for row in (0, 1)]
    blocks = jnp.stack(rows, axis=2)  # (N, row of tiles, row in the tile, column of tiles, column in the tile, F)
    return blocks.reshape(num, 2 * tiles[1], 2 * tiles[2], -1)[:, :height, :width]


def _of_tiles(x: jax.Array, tiles: tuple[int, int, int]) -> dict[tuple[int, int], jax.Array]:
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


def _of_kernel(kernel: jax.Array) -> dict[tuple[int, int], jax.Array]:
    """Each of the 16 transformed weights: float[C, F]."""
    weights = {(row, column): kernel[row, column] for row in range(3) for column in range(3)}
    return _both_axes(weights, lambda g: (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]))


def _both_axes(values: dict, transform) -> dict[tuple[int, int], jax.Array]:
    """A one-dimensional transform, along columns and then along rows, of what lies at (row, column)."""
    rows, columns = (1 + max(place[axis] for place in values) for axis in (0, 1))
    by_row = [transform([values[row, column] for column in range(columns)]) for row in range(rows)]
    by_column = [transform(list(column)) for column in zip(*by_row, strict=True)]
    return {(row, column): each[row] for row in range(len(by_column[0])) for column, each in enumerate(by_column)}
