"""Views: how one network input is taken out of a disc volume, and how a map over it is put back.

Training augmentation, test-time augmentation and hotspots all use views. Sampling a view is random; applying one is
deterministic. Every function here takes one disc and one view, and works under `jit` and `vmap`.

A window's pixel at q, counted from the window's centre, shows the volume at shift + R(angle) q / scale, counted from
the volume's centre. That map is affine, and is resampled once, by linear interpolation in two one-dimensional passes:
along columns, then along rows (Catmull and Smith, 1980). Outside the volume everything is 0, as outside the scan.

Volumes are uint16 as stored (65535 is intensity 1), or floats: intensities in [0, 1].
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from spinejax.errors import SpinejaxError, require_option
from spinejax.geometry import INTENSITY_STEP, MARGINS, VOLUME_SHAPE, WINDOW_SHAPE

TTA_SHIFT_PX = 16
NUM_TTA_VIEWS = 54


@dataclass(frozen=True)
class ViewRanges:
    """The ranges of random views; the defaults are the paper's (Sect. 4, "Data augmentation details")."""

    angle_deg: float = 15.0
    """Rotation by up to this angle either way."""
    shift_rows_px: float = 24.0
    """Shift by up to this many rows either way."""
    shift_columns_px: float = 32.0
    """Shift by up to this many columns either way."""
    shift_slices: int = 2
    """Shift by up to this many whole slices either way, 3 at most."""
    scale: float = 0.1
    """Scaling by 1 plus or minus up to this."""
    intensity: float = 0.1
    """Intensity offset of up to this either way, of a range of 1."""
    flip: float = 0.5
    """Probability of reversing the slices."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        limits = {"angle_deg": 45, "shift_rows_px": 96, "shift_columns_px": 160, "shift_slices": MARGINS[2]}
        for name, limit in (limits | {"scale": 0.5, "intensity": 1, "flip": 1}).items():
            value = getattr(self, name)
            require_option(0 <= value <= limit, f"views.{name}", value, f"0 to {limit}")


class View(NamedTuple):
    """How a window is taken out of a disc volume. Fields are scalars, or share leading axes for `vmap`.

    Args:
        angle_deg: float. Turns the image counter-clockwise.
        shift_px: float[2]. Rows and columns of the volume from its centre to the window's.
        shift_slices: int. Slices of the volume from its centre to the window's.
        scale: float. Above 1 the image is magnified.
        intensity: float. Added to the window.
        flip: bool. Reverses the window's slices, after they are chosen.
    """

    angle_deg: jax.Array
    shift_px: jax.Array
    shift_slices: jax.Array
    scale: jax.Array
    intensity: jax.Array
    flip: jax.Array


def identity() -> View:
    """The view that takes the central window, the paper's input, bit for bit."""
    zero = jnp.float32(0)
    return View(zero, jnp.zeros(2, jnp.float32), jnp.int32(0), jnp.float32(1), zero, jnp.bool_(False))


def sample(key: PRNGKeyArray, ranges: ViewRanges = ViewRanges()) -> View:
    """One random view, uniform in each range (paper, Sect. 4, "Data augmentation details")."""
    angle, row, column, slices, scale, intensity, flip = jax.random.split(key, 7)

    def symmetric(key: jax.Array, limit: float) -> jax.Array:
        return jax.random.uniform(key, minval=-limit, maxval=limit)

    return View(
        angle_deg=symmetric(angle, ranges.angle_deg),
        shift_px=jnp.stack([symmetric(row, ranges.shift_rows_px), symmetric(column, ranges.shift_columns_px)]),
        shift_slices=jax.random.randint(slices, (), -ranges.shift_slices, ranges.shift_slices + 1),
        scale=1 + symmetric(scale, ranges.scale),
        intensity=symmetric(intensity, ranges.intensity),
        flip=jax.random.bernoulli(flip, float(ranges.flip)),
    )


def grid() -> View:
    """The 54 views whose predictions are averaged at test time (paper, Sect. 4), as one View with leading axis 54.

    Nine in-plane positions, at 0 and ±16 px, times three slice positions, at 0 and ±1, times both slice orders. The
    first 27 are not flipped; the identity is number 13.
    """
    flip, slices, rows, columns = (
        axis.ravel() for axis in np.meshgrid([0, 1], [-1, 0, 1], [-1, 0, 1], [-1, 0, 1], indexing="ij")
    )
    shift_px = TTA_SHIFT_PX * np.stack([rows, columns], axis=1)
    plain = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (NUM_TTA_VIEWS, *leaf.shape)), identity())
    return plain._replace(
        shift_px=jnp.asarray(shift_px, jnp.float32),
        shift_slices=jnp.asarray(slices, jnp.int32),
        flip=jnp.asarray(flip, bool),
    )


def take(
    volume: Num[Array | np.ndarray, "192 320 15"], view: View, *, dtype: Any = jnp.float32
) -> Float[Array, "112 224 9"]:
    """The window that a view shows, float32.

    Args:
        volume: the disc.
        view: one view.
        dtype: of the network that sees the window. For bfloat16 a TPU resamples in bfloat16 (`_by_matrix`).

    Example:
        >>> volume = np.full((192, 320, 15), 65535, np.uint16)
        >>> float(take(volume, identity()._replace(intensity=jnp.float32(-0.25))).mean())
        0.75
    """
    first = MARGINS[2] + view.shift_slices
    slices = jax.lax.dynamic_slice_in_dim(volume, first, WINDOW_SHAPE[2], axis=2)
    centre = [_fixed((VOLUME_SHAPE[axis] - 1) / 2 + view.shift_px[axis]) for axis in (0, 1)]
    window = _resample(slices, *_positions(view.angle_deg, 1 / view.scale, centre), dtype=dtype)
    return jax.lax.platform_dependent(window, view.flip, tpu=_flip, default=_flip_by_index) + view.intensity


def crop(volume: Num[Array | np.ndarray, "192 320 15"], view: View) -> Float[Array, "112 224 9"]:
    """`take` for a view that only shifts by whole pixels within the volume, and flips: bit for bit, for a copy's cost.

    Raises:
        SpinejaxError: the view does something else. Inside `jit` views have no values yet, and are not checked.
    """
    refuse_all_but_shifts(view)
    shift = jnp.append(view.shift_px.astype(jnp.int32), view.shift_slices)
    window = _intensities(jax.lax.dynamic_slice(volume, jnp.array(MARGINS) + shift, WINDOW_SHAPE))
    return _flip(window, view.flip)


def crop_around(volume: Num[Array | np.ndarray, "192 320 15"], view: View) -> Float[Array, "144 256 9"]:
    """The slices that a view of the grid shows, wide enough in plane for all nine in-plane positions of the grid.

    Its window at (0, 0) is the window of the view at -16 rows and -16 columns. The view's own in-plane shift is not
    used.

    Raises:
        SpinejaxError: as for `crop`.
    """
    refuse_all_but_shifts(view)
    shape = (WINDOW_SHAPE[0] + 2 * TTA_SHIFT_PX, WINDOW_SHAPE[1] + 2 * TTA_SHIFT_PX, WINDOW_SHAPE[2])
    first = (MARGINS[0] - TTA_SHIFT_PX, MARGINS[1] - TTA_SHIFT_PX, MARGINS[2] + view.shift_slices)
    return _flip(_intensities(jax.lax.dynamic_slice(volume, first, shape)), view.flip)


def refuse_all_but_shifts(view: View) -> None:
    """Check views for `crop`; they may have leading axes.

    Raises:
        SpinejaxError: a view turns, scales, changes the intensity, or shifts by part of a pixel or beyond the volume.
    """
    try:
        known = jax.tree.map(np.asarray, view)
    except jax.errors.TracerArrayConversionError:  # inside jit
        return
    plain = (known.angle_deg == 0) & (known.scale == 1) & (known.intensity == 0)
    shift = np.concatenate([known.shift_px, known.shift_slices[..., None]], axis=-1)
    inside = (shift == np.round(shift)) & (np.abs(shift) <= np.array(MARGINS))
    if not (plain.all() and inside.all()):
        raise SpinejaxError(
            "Views: expected only shifts by whole pixels within the volume, and flips, as in `views.grid()`. "
            "`views.take` takes any view."
        )


def put_back(
    map: Float[Array | np.ndarray, "112 224 9 *values"], view: View, *, dtype: Any = jnp.float32
) -> tuple[Float[Array, "112 224 9 *values"], Float[Array, "112 224 9"]]:
    """Carry a map over a view's window back to the identity window, through the inverse view.

    Args:
        map: one or several values for each pixel of the window that `take(volume, view)` gives.
        view: that view. Its intensity has no effect.
        dtype: of the network whose map it is, as for `take`.

    Returns:
        The map, and its coverage: how much of each pixel of the identity window the view saw, from 0 to 1. The map is 0
        where the coverage is, and fades with it at the border: averages over views are Σ map / Σ coverage.
    """
    # p = shift + R(angle) q / scale, so q = scale R(-angle) (p - shift).
    cos, sin = _cos_sin(-view.angle_deg, view.scale)
    row, column = view.shift_px
    centre = [
        _fixed((WINDOW_SHAPE[0] - 1) / 2) - _fixed(cos * row) - _fixed(sin * column),
        _fixed((WINDOW_SHAPE[1] - 1) / 2) + _fixed(sin * row) - _fixed(cos * column),
    ]
    where = _positions(-view.angle_deg, view.scale, centre)
    source = jnp.arange(WINDOW_SHAPE[2]) - view.shift_slices
    inside = (source >= 0) & (source < WINDOW_SHAPE[2])
    source = jnp.where(view.flip, WINDOW_SHAPE[2] - 1 - source, source)

    def in_plane(values: jax.Array) -> jax.Array:
        return _resample(values.reshape(*WINDOW_SHAPE[:2], -1), *where, dtype=dtype).reshape(values.shape)

    def across_slices(values: jax.Array) -> jax.Array:
        return jnp.where(inside[:, None], jnp.take(values, source, axis=2, mode="clip"), 0)

    # The values of a pixel are adjacent and move together: several maps cost little more than one. On TPUs slices come
    # first: a sum over views is then part of the last product, and no view's map is stored.
    back = jax.lax.platform_dependent(
        jnp.asarray(map, jnp.float32).reshape(*WINDOW_SHAPE, -1),
        tpu=lambda values: in_plane(across_slices(values)),
        default=lambda values: across_slices(in_plane(values)),
    )
    return back.reshape(map.shape), jnp.where(inside[None, None], _coverage(*where)[:, :, None], 0)


# One affine map ------------------------------------------------------------------------------------------------------

# Positions are multiples of 2⁻²¹ px, so that every computation of a position gives the same result: a compiler may
# compute one twice, for the pixel's address and for its weight, and round a float differently each time.
_FIXED_BITS = 21


def _positions(
    angle_deg: jax.Array, scale: jax.Array, centre: list[jax.Array]
) -> tuple[Int[Array, "112 224"], Int[Array, " 224"], Int[Array, ""]]:
    """Where a window lies in an image: its pixel at q, counted from its centre, is at centre + scale R(angle) q.

    Args:
        angle_deg, scale: float32[].
        centre: row and column in the image, fixed-point int32[] each.

    Returns:
        Fixed-point: output pixel (i, j) is on row[i, j], and output column j crosses the image's row r at
        in_row_0[j] - slope r.
    """
    cos, sin = _cos_sin(angle_deg, scale)
    half_rows, half_columns = (2 * jnp.arange(size) - (size - 1) for size in WINDOW_SHAPE[:2])
    # row = centre + cos q_row + sin q_column and column = centre - sin q_row + cos q_column; without q_row,
    # column = centre - tan (row - centre) + scale² / cos q_column.
    tan = sin / cos
    centre_row_px = centre[0].astype(jnp.float32) / 2**_FIXED_BITS
    in_row_0 = centre[1] + _fixed(tan * centre_row_px) + _times(scale * scale / cos, half_columns)
    row = centre[0] + _times(cos, half_rows)[:, None] + _times(sin, half_columns)[None]
    return row, in_row_0, _fixed(tan)


def _resample(
    image: jax.Array, row: jax.Array, in_row_0: jax.Array, slope: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """A window of an image, by `_positions`.

    The first pass resamples the image's rows: every output column gets its position in each row that it crosses. The
    second resamples the columns that the first has made. Both need cos(angle) well above 0; views stay near 0°.

    There are two forms, equal to rounding. CPUs and GPUs compute each pixel from its four taps, and store nothing
    between the passes. On TPUs such a gather would move hundreds of times the image's bytes, so each pass is a product
    with a banded matrix.

    Args:
        image: float32[H, W, S], or uint16 as stored.
        row, in_row_0, slope: where the window is.
        dtype: as for `take`.
    """
    by_matrices = functools.partial(_by_matrices, dtype=dtype)
    return jax.lax.platform_dependent(image, row, in_row_0, slope, tpu=by_matrices, default=_by_taps)


def _coverage(row: jax.Array, in_row_0: jax.Array, slope: jax.Array) -> Float[Array, "112 224"]:
    """`_resample` of a window of ones: the weights of the taps that are inside, so that nothing is read."""

    def inside(place: jax.Array, size: int, weight: jax.Array) -> jax.Array:
        return jnp.where((place >= 0) & (place < size), weight, 0)

    def along_row(row: jax.Array) -> jax.Array:
        column, weight = _split(in_row_0[None] - slope * row)
        both = inside(column, WINDOW_SHAPE[1], 1 - weight) + inside(column + 1, WINDOW_SHAPE[1], weight)
        return inside(row, WINDOW_SHAPE[0], both)

    row, weight = _split(row)
    return along_row(row) * (1 - weight) + along_row(row + 1) * weight


def _by_taps(image: jax.Array, row: jax.Array, in_row_0: jax.Array, slope: jax.Array) -> jax.Array:
    height, width, num_slices = image.shape
    pixels = jnp.asarray(image).reshape(height * width, num_slices)  # as stored: reading them takes most of the time

    def tap(row: jax.Array, column: jax.Array, weight: jax.Array) -> jax.Array:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        read = pixels.at[jnp.where(inside, row * width + column, 0)].get(mode="promise_in_bounds")
        return _intensities(read) * jnp.where(inside, weight, 0)[:, :, None]

    def along_row(row: jax.Array) -> jax.Array:
        column, weight = _split(in_row_0[None] - slope * row)
        return tap(row, column, 1 - weight) + tap(row, column + 1, weight)

    row, weight = _split(row)
    weight = weight[:, :, None]
    return along_row(row) * (1 - weight) + along_row(row + 1) * weight


def _by_matrices(image: jax.Array, row: jax.Array, in_row_0: jax.Array, slope: jax.Array, dtype: Any) -> jax.Array:
    column = in_row_0[None] - slope * jnp.arange(image.shape[0])[:, None]
    columns = _by_matrix(_intensities(image), column, dtype)
    return _by_matrix(columns.swapaxes(0, 1), row.T, dtype).swapaxes(0, 1)


def _by_matrix(image: jax.Array, position: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """One pass: out[r, j] = image[r] at position[r, j], linear, 0 outside; float32[H, J, S] from int32[H, J].

    In bfloat16 positions are rounded to 1/256 px, where both weights are exact and add up to 1: a uniform image stays
    uniform, and an edge moves by at most 0.002 px. Values are rounded as in a bfloat16 network.
    """
    bits = _FIXED_BITS
    if dtype == jnp.bfloat16:
        position, bits = (position + (1 << (_FIXED_BITS - 9))) >> (_FIXED_BITS - 8), 8
    column = jnp.arange(image.shape[1]) << bits
    distance = jnp.abs(position[:, :, None] - column[None, None]).astype(jnp.float32) / 2**bits
    hat = jnp.maximum(0, 1 - distance).astype(dtype)
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("rjw,rws->rjs", hat, image.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _split(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pixel at or before a position, and the next one's weight."""
    first = position >> _FIXED_BITS
    return first, (position - (first << _FIXED_BITS)).astype(jnp.float32) / 2**_FIXED_BITS


def _flip(window: jax.Array, flip: jax.Array) -> jax.Array:
    return jnp.where(flip, window[:, :, ::-1], window)


def _flip_by_index(window: jax.Array, flip: jax.Array) -> jax.Array:
    """`_flip` for CPUs and GPUs: XLA would compute the window twice, once for each side of a `where`."""
    order = jnp.arange(window.shape[2])
    return jnp.take(window, jnp.where(flip, order[::-1], order), axis=2, mode="clip")


def _intensities(stored: jax.Array) -> jax.Array:
    return stored.astype(jnp.float32) * INTENSITY_STEP if jnp.issubdtype(stored.dtype, jnp.integer) else stored


def _cos_sin(angle_deg: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    angle = jnp.deg2rad(angle_deg)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _fixed(position_px: jax.Array | np.ndarray | float) -> jax.Array:
    return jnp.round(jnp.asarray(position_px, jnp.float32) * 2**_FIXED_BITS).astype(jnp.int32)


def _times(slope: jax.Array, half_pixels: jax.Array) -> jax.Array:
    return (_fixed(slope) * half_pixels) >> 1
