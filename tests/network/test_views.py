"""Views against scipy, slicing and invariants; under vmap, under jit, in both forms of the resampling."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from spinejax.geometry import INTENSITY_ONE, INTENSITY_STEP, VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.network import views
from spinejax.network.views import ViewRanges

# Positions up to 320 px carry float32 errors of some 1e-5 px, and white noise changes by up to 1 from pixel to pixel.
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).integers(0, INTENSITY_ONE, VOLUME_SHAPE, dtype=np.uint16)


@pytest.fixture(scope="module")
def smooth():
    """A float volume whose detail is much coarser than a pixel."""
    noise = np.random.default_rng(1).normal(size=VOLUME_SHAPE).astype(np.float32)
    blurred = ndimage.gaussian_filter(noise, (9, 9, 0), mode="reflect")
    return blurred / np.abs(blurred).max()


def a_view(**changes):
    return views.identity()._replace(**{name: jnp.asarray(value) for name, value in changes.items()})


def some_views(number, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return [views.sample(key) for key in keys]


def one_dimensional(image, position):
    """Linear interpolation of each row by scipy, 0 outside."""
    rows = np.broadcast_to(np.arange(image.shape[0])[:, None], position.shape)
    slices = [
        ndimage.map_coordinates(image[:, :, s], [rows, position], order=1, mode="grid-constant")
        for s in range(image.shape[2])
    ]
    return np.stack(slices, axis=2)


def taken_by_scipy(volume, view):
    """The definition of a view, computed in float64 with scipy's interpolation, one pass after the other."""
    view = jax.tree.map(np.asarray, view)
    first = 3 + int(view.shift_slices)
    slices = volume[:, :, first : first + 9].astype(np.float64) / INTENSITY_ONE
    slices = slices[:, :, ::-1] if view.flip else slices
    angle = np.deg2rad(np.float64(view.angle_deg))
    a, b = np.array([np.cos(angle), np.sin(angle)]) / view.scale
    c, d = np.array([-np.sin(angle), np.cos(angle)]) / view.scale
    offset = np.array([95.5, 159.5]) + view.shift_px - np.array([[a, b], [c, d]]) @ [55.5, 111.5]
    row, column = np.arange(192.0)[:, None], np.arange(224.0)[None]
    columns = one_dimensional(slices, c * (row - b * column - offset[0]) / a + d * column + offset[1])
    rows = a * np.arange(112.0)[None] + b * np.arange(224.0)[:, None] + offset[0]
    return one_dimensional(columns.swapaxes(0, 1), rows).swapaxes(0, 1) + view.intensity


def test_identity_is_the_central_window_bit_for_bit(volume):
    expected = central_window(volume).astype(np.float32) * INTENSITY_STEP
    for take in (views.take, jax.jit(views.take)):
        np.testing.assert_array_equal(take(volume, views.identity()), expected)


def test_take_equals_scipy(volume):
    for view in some_views(6):
        np.testing.assert_allclose(views.take(volume, view), taken_by_scipy(volume, view), atol=ROUNDING)


def test_two_passes_agree_with_two_dimensional_interpolation_where_the_image_is_smooth(smooth):
    for view in some_views(4, seed=1):
        view = view._replace(intensity=jnp.float32(0), shift_slices=jnp.int32(0), flip=jnp.bool_(False))
        angle, scale = np.deg2rad(float(view.angle_deg)), float(view.scale)
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
        from_centre = np.stack(np.meshgrid(np.arange(112) - 55.5, np.arange(224) - 111.5, indexing="ij"))
        centre = np.array([95.5, 159.5]) + np.asarray(view.shift_px)
        where = np.tensordot(matrix, from_centre, 1) + centre[:, None, None]
        expected = ndimage.map_coordinates(smooth[:, :, 7], where, order=1, mode="grid-constant")
        # At the volume's own border the two forms fade to 0 along different directions.
        inside = ((where > 1) & (where < np.array([190, 318])[:, None, None])).all(0)
        got = np.asarray(views.take(smooth, view))[:, :, 4]
        assert np.abs(got - expected)[inside].max() < 0.01


def test_under_vmap_and_jit_as_one_by_one(volume):
    chosen = some_views(5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)
    one_by_one = jnp.stack([views.take(volume, view) for view in chosen])
    for take in (jax.vmap(views.take, (None, 0)), jax.jit(jax.vmap(views.take, (None, 0)))):
        np.testing.assert_allclose(take(volume, stacked), one_by_one, atol=ROUNDING)
    maps = jnp.asarray(np.random.default_rng(2).random((5, *WINDOW_SHAPE)), jnp.float32)
    one_by_one = [views.put_back(map, view) for map, view in zip(maps, chosen, strict=True)]
    for put_back in (jax.vmap(views.put_back), jax.jit(jax.vmap(views.put_back))):
        for got, expected in zip(put_back(maps, stacked), zip(*one_by_one, strict=True), strict=True):
            np.testing.assert_allclose(got, jnp.stack(expected), atol=ROUNDING)


def test_both_forms_are_the_two_passes_and_exact_at_whole_positions():
    """With rows and columns outside the image, and columns as oblique as at 15°."""
    rng = np.random.default_rng(3)
    image = jnp.asarray(rng.random((7, 20, 3)), jnp.float32)
    row, in_row_0 = views._fixed(rng.uniform(-3, 10, (5, 11))), views._fixed(rng.uniform(-3, 23, 11))
    for slope in (views._fixed(-0.27), views._fixed(0.27)):
        column = (np.asarray(in_row_0) - int(slope) * np.arange(7)[:, None]) / 2**views._FIXED_BITS
        columns = one_dimensional(image, column)
        expected = one_dimensional(columns.swapaxes(0, 1), np.asarray(row).T / 2**views._FIXED_BITS).swapaxes(0, 1)
        for form in (views._by_taps, functools.partial(views._by_matrices, dtype=jnp.float32)):
            np.testing.assert_allclose(form(image, row, in_row_0, slope), expected, atol=1e-6)
    rows, columns = jnp.broadcast_to(jnp.arange(7)[:, None], (7, 20)), jnp.arange(20)
    for form in (views._by_taps, functools.partial(views._by_matrices, dtype=jnp.float32)):
        np.testing.assert_array_equal(form(image, views._fixed(rows), views._fixed(columns), jnp.int32(0)), image)


def test_products_in_bfloat16_lose_what_a_network_in_bfloat16_loses(smooth):
    """No more than two roundings of values and 1/512 px per pass; whole positions and uniform images stay exact."""
    rng = np.random.default_rng(3)
    form = functools.partial(views._by_matrix, dtype=jnp.bfloat16)
    stored = jnp.asarray(rng.integers(0, 256, (7, 20, 3)) / 256, jnp.float32)  # exact in bfloat16
    whole = views._fixed(jnp.broadcast_to(jnp.arange(20), (7, 20)))
    np.testing.assert_array_equal(form(stored, whole), stored)
    position = views._fixed(rng.uniform(1, 18, (7, 11)))
    np.testing.assert_array_equal(form(jnp.full((7, 20, 3), 0.75), position), np.full((7, 11, 3), 0.75, np.float32))
    expected = one_dimensional(stored, np.asarray(position) / 2**views._FIXED_BITS)
    np.testing.assert_allclose(form(stored, position), expected, atol=1 / 512 + 1e-6)

    image = jnp.asarray(smooth[:, :, :3] / 2 + 0.5)
    position = views._fixed(rng.uniform(-3, 323, (192, 224)))
    exact, rounded = views._by_matrix(image, position), form(image, position)
    rounding = np.std(exact - exact.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.std(exact - rounded) < 1.2 * rounding


def test_a_shift_shows_the_shifted_volume(volume):
    view = a_view(shift_px=np.float32([16, -32]), shift_slices=np.int32(-2))
    expected = volume[40 + 16 : 152 + 16, 48 - 32 : 272 - 32, 1:10].astype(np.float32) * INTENSITY_STEP
    np.testing.assert_array_equal(views.take(volume, view), expected)


def test_flip_and_intensity(volume):
    plain = views.take(volume, views.identity())
    np.testing.assert_array_equal(views.take(volume, a_view(flip=True)), plain[:, :, ::-1])
    np.testing.assert_allclose(views.take(volume, a_view(intensity=np.float32(-0.1))), plain - 0.1, atol=1e-7)


def test_crop_is_take_for_every_view_of_the_grid_bit_for_bit(volume):
    take, crop = (jax.jit(jax.vmap(form, (None, 0))) for form in (views.take, views.crop))
    some = jax.tree.map(lambda leaf: leaf[::7], views.grid())
    np.testing.assert_array_equal(crop(volume, some), take(volume, some))


def test_positive_angle_turns_the_picture_counter_clockwise_and_scale_magnifies():
    """A dot to the right of the centre goes up; a dot moves away from the centre in proportion."""
    volume = np.zeros(VOLUME_SHAPE, np.float32)
    volume[94:98, 219:222, :] = 1  # centred 0 rows and 60.5 columns from the volume's centre at (95.5, 159.5)

    def dot(**changes):
        window = np.asarray(views.take(volume, a_view(**changes)))[:, :, 4]
        return np.array(ndimage.center_of_mass(window)) - [55.5, 111.5]

    np.testing.assert_allclose(dot(), [0, 60.5], atol=0.01)
    expected = 60.5 * np.array([-np.sin(np.deg2rad(15)), np.cos(np.deg2rad(15))])
    np.testing.assert_allclose(dot(angle_deg=np.float32(15)), expected, atol=0.1)
    np.testing.assert_allclose(dot(scale=np.float32(1.1)), [0, 60.5 * 1.1], atol=0.1)
    np.testing.assert_allclose(dot(shift_px=np.float32([10, 20])), [-10, 40.5], atol=0.01)


def test_outside_the_volume_is_zero():
    ones = np.full(VOLUME_SHAPE, INTENSITY_ONE, np.uint16)
    far = views.take(ones, a_view(shift_px=np.float32([150, 0])))  # rows 190.. of 192: two rows are left
    np.testing.assert_array_equal(far[:2], 1)
    np.testing.assert_array_equal(far[2:], 0)


def test_taking_and_putting_back_a_smooth_image_agrees_inside_the_coverage(smooth):
    window = central_window(smooth)
    for view in some_views(8, seed=2):
        taken = views.take(smooth, view._replace(intensity=jnp.float32(0)))
        back, coverage = views.put_back(taken, view)
        inside = np.asarray(coverage) > 0.999
        assert inside.mean() > 0.3
        assert np.abs(np.asarray(back) - window)[inside].max() < 0.03
        np.testing.assert_array_equal(np.asarray(back)[np.asarray(coverage) == 0], 0)


def test_put_back_of_the_identity_is_the_map_with_full_coverage():
    map = jnp.asarray(np.random.default_rng(4).random(WINDOW_SHAPE), jnp.float32)
    back, coverage = views.put_back(map, views.identity())
    np.testing.assert_array_equal(back, map)
    np.testing.assert_array_equal(coverage, np.ones(WINDOW_SHAPE))


def test_put_back_of_a_shift_and_flip_equals_slicing():
    map = np.random.default_rng(5).random(WINDOW_SHAPE).astype(np.float32)
    view = a_view(shift_px=np.float32([3, -5]), shift_slices=np.int32(2), flip=True)
    back, coverage = (np.asarray(part) for part in views.put_back(map, view))
    # Window pixel (i, j) lies at (i + 3, j - 5) of the identity window, window slice s at 8 - s + 2.
    np.testing.assert_array_equal(back[3:, :219, 2:], map[:109, 5:, ::-1][:, :, :7])
    assert coverage.sum() == 109 * 219 * 7
    np.testing.assert_array_equal(back[coverage == 0], 0)


def test_put_back_carries_several_maps_as_it_carries_one():
    maps = np.random.default_rng(6).random((*WINDOW_SHAPE, 2)).astype(np.float32)
    view = some_views(1, seed=3)[0]
    both, coverage = views.put_back(maps, view)
    for place in range(2):
        alone, alone_coverage = views.put_back(maps[..., place], view)
        np.testing.assert_array_equal(both[..., place], alone)
        np.testing.assert_array_equal(coverage, alone_coverage)


def test_coverage_is_the_resampled_image_of_ones_in_both_forms():
    ones = jnp.ones((*WINDOW_SHAPE[:2], 1), jnp.float32)
    for view in some_views(4, seed=4):
        centre = [
            views._fixed((size - 1) / 2 + shift) for size, shift in zip(WINDOW_SHAPE, view.shift_px, strict=False)
        ]
        where = views._positions(view.angle_deg, view.scale, centre)
        coverage = views._coverage(*where)
        for form in (views._by_taps, functools.partial(views._by_matrices, dtype=jnp.float32)):
            np.testing.assert_allclose(coverage, form(ones, *where)[:, :, 0], atol=1e-6)


def test_put_back_on_tpus_takes_slices_first_and_gives_the_same(monkeypatch):
    map = jnp.asarray(np.random.default_rng(8).random((*WINDOW_SHAPE, 2)), jnp.float32)
    view = some_views(1, seed=5)[0]._replace(shift_slices=jnp.int32(-2), flip=jnp.bool_(True))
    expected = views.put_back(map, view)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    for got, wanted in zip(views.put_back(map, view), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=ROUNDING)
    rounded, coverage = views.put_back(map, view, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(coverage, expected[1])
    np.testing.assert_allclose(rounded, expected[0], atol=0.01)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_put_back_compiled_for_tpus_ends_in_its_second_product(dtype):
    """XLA makes a sum over views part of a product that the sum follows. Nothing else costs products: no coverage."""

    def summed(maps, view):
        return jax.vmap(functools.partial(views.put_back, dtype=dtype))(maps, view)[0].sum(0)

    maps = jax.ShapeDtypeStruct((4, *WINDOW_SHAPE, 2), jnp.float32)
    view = jax.eval_shape(lambda: jax.tree.map(lambda *leaves: jnp.stack(leaves), *some_views(4)))
    program = jax.export.export(jax.jit(summed), platforms=["tpu"])(maps, view).mlir_module()
    operations = re.findall(r"stablehlo\.dot_general|stablehlo\.reduce\(|call @_take", program)
    assert operations == ["call @_take", "stablehlo.dot_general", "stablehlo.dot_general", "stablehlo.reduce("]
    types = re.findall(r"stablehlo\.dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", program)
    assert set(types) == {("bf16", "bf16") if dtype == jnp.bfloat16 else ("f32", "f32")}


def test_the_grid_is_the_papers_54_views():
    grid = jax.tree.map(np.asarray, views.grid())
    rows = [
        (*shift, slices, flip) for shift, slices, flip in zip(grid.shift_px, grid.shift_slices, grid.flip, strict=True)
    ]
    expected = set(itertools.product((-16, 0, 16), (-16, 0, 16), (-1, 0, 1), (False, True)))
    assert len(rows) == views.NUM_TTA_VIEWS
    assert set(rows) == expected
    assert rows[13] == (0, 0, 0, False)
    for plain, value in ((grid.angle_deg, 0), (grid.intensity, 0), (grid.scale, 1)):
        np.testing.assert_array_equal(plain, value)


def test_samples_fill_their_ranges_and_depend_on_the_key_alone():
    ranges = ViewRanges()
    keys = jax.random.split(jax.random.key(6), 4000)
    drawn = jax.tree.map(np.asarray, jax.jit(jax.vmap(functools.partial(views.sample, ranges=ranges)))(keys))
    for values, limit in [
        (drawn.angle_deg, 15),
        (drawn.shift_px[:, 0], 24),
        (drawn.shift_px[:, 1], 32),
        (drawn.scale - 1, 0.1),
        (drawn.intensity, 0.1),
    ]:
        assert -limit <= values.min() < -0.98 * limit
        assert 0.98 * limit < values.max() <= limit
        assert abs(values.mean()) < 0.05 * limit  # the mean of 4000 uniform draws has a deviation of 0.009
    np.testing.assert_array_equal(np.unique(drawn.shift_slices), [-2, -1, 0, 1, 2])
    assert abs(drawn.flip.mean() - 0.5) < 0.03
    again = jax.tree.map(np.asarray, views.sample(keys[17]))
    jax.tree.map(lambda one, many: np.testing.assert_array_equal(one, many[17]), again, drawn)


def test_ranges_of_zero_give_the_identity(volume):
    view = views.sample(jax.random.key(7), ViewRanges(0, 0, 0, 0, 0, 0, 0))
    np.testing.assert_array_equal(views.take(volume, view), views.take(volume, views.identity()))


def test_gradient_reaches_exactly_the_voxels_that_were_shown(volume):
    view = a_view(shift_px=np.float32([16, 0]))
    gradient = jax.grad(lambda v: views.take(v, view).sum())(volume.astype(np.float32))
    expected = np.zeros(VOLUME_SHAPE, np.float32)
    expected[56:168, 48:272, 3:12] = 1
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
