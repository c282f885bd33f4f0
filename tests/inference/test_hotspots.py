"""Hotspots of a linear model, whose gradient is known, and of a network: invariants, in batches, on eight devices."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.geometry import INTENSITY_STEP, VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.inference import hotspots
from spinejax.inference.hotspots import IDENTITY_RANGES, PLAIN_GRADIENT, Method
from spinejax.network import views
from spinejax.network.views import ViewRanges
from spinejax.parallel import devices
from spinejax.tasks import Task
from tests.conftest import TASKS

KEY = jax.random.key(3)
EVERY_SLICE = jnp.array([0, 15])
FEW = Method(num_views=6, views_at_once=2)


@dataclass(frozen=True)
class Linear:
    """score = w · window: its gradient is w for any disc."""

    tasks: tuple[Task, ...] = TASKS

    def apply(self, variables, windows):
        return {
            task.name: jnp.einsum("nhws,chws->nc", windows, variables[task.name], precision="highest")
            for task in self.tasks
        }


@dataclass(frozen=True)
class Energy:
    """score = Σ window² / 2 for every grade: the gradient is the window itself."""

    tasks: tuple[Task, ...] = TASKS

    def apply(self, variables, windows):
        energy = jnp.square(windows).sum((1, 2, 3)) / 2
        return {task.name: jnp.tile(energy[:, None], (1, task.num_grades)) for task in self.tasks}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {task.name: rng.normal(size=(task.num_grades, *WINDOW_SHAPE)).astype(np.float32) for task in TASKS}


@pytest.fixture(scope="module")
def volume():
    return jnp.asarray(np.random.default_rng(1).random(VOLUME_SHAPE), jnp.float32)


@pytest.fixture(scope="module")
def batch(tiny):
    data = DataSet(tiny)
    rows = np.arange(8)
    return {
        "volume": data.volumes(rows),
        "slices": data.slices[rows].astype(np.int32),
        "grades": np.tile(np.array([[2, 0]], np.int32), (8, 1)),
        "row": rows.astype(np.int32),
    }


@pytest.fixture(scope="module")
def maps(network, batch):
    model, variables = network
    return np.asarray(hotspots.hotspot_step(KEY, variables, batch, model=model, method=FEW))


def view_set(*chosen):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *chosen)


def shifted(rows, columns, slices, *, flip=False):
    view = views.identity()
    shift = {"shift_px": jnp.float32([rows, columns]), "shift_slices": jnp.int32(slices), "flip": jnp.bool_(flip)}
    return view._replace(**shift)


compiled = jax.jit(hotspots.evidence, static_argnames=("model", "method"))


def evidence(model, variables, volume, chosen, grades=(1, 1), slices=EVERY_SLICE, method=FEW):
    grades = jnp.asarray(grades)
    return np.asarray(compiled(KEY, variables, volume, slices, grades, chosen, model=model, method=method))


def carried(map, rows, columns, slices):
    """A map, and where it is seen, moved by whole voxels; by slicing alone."""
    room = np.zeros([3 * size for size in WINDOW_SHAPE])
    starts = [size + move for size, move in zip(WINDOW_SHAPE, (rows, columns, slices), strict=True)]
    room[tuple(slice(start, start + size) for start, size in zip(starts, WINDOW_SHAPE, strict=True))] = map
    return room[tuple(slice(size, 2 * size) for size in WINDOW_SHAPE)]


def test_the_identity_view_gives_the_gradient(weights, volume):
    chosen = view_set(views.identity())
    maps = evidence(Linear(), weights, volume, chosen, grades=(2, 0))
    np.testing.assert_array_equal(maps, np.abs([weights["brightness"][2], weights["side"][0]]))
    signed = evidence(Linear(), weights, volume, chosen, grades=(2, 0), method=Method(signed=True))
    np.testing.assert_array_equal(signed, [weights["brightness"][2], weights["side"][0]])


def test_the_baseline_is_the_networks_plain_gradient(network, batch):
    model, variables = network
    maps = hotspots.hotspot_step(KEY, variables, batch, model=model, method=PLAIN_GRADIENT)
    windows = central_window(batch["volume"][3]).astype(np.float32) * INTENSITY_STEP
    gradient = jax.grad(lambda window: model.apply(variables, window[None])["brightness"][0, 2])(windows)
    first, stop = batch["slices"][3] - 3
    inside = np.isin(np.arange(9), np.arange(first, stop))
    np.testing.assert_allclose(maps[3, 0], np.abs(gradient) * inside, atol=1e-6)


@pytest.mark.parametrize("branch_point", [None, "conv3", "fc6"])
def test_a_score_has_its_own_gradient_wherever_tasks_branch(network, batch, branch_point):
    model = network[0].clone(branch_point=branch_point)
    windows = jnp.asarray(central_window(batch["volume"][0])[None] * np.float32(INTENSITY_STEP))
    variables = model.init(KEY, windows)
    got = hotspots.input_gradients(variables, windows, jnp.array([2, 1]), model)
    for column, (name, grade) in enumerate((("brightness", 2), ("side", 1))):
        expected = jax.grad(lambda x, name=name, grade=grade: model.apply(variables, x)[name][0, grade])(windows)
        np.testing.assert_allclose(got[:, column], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("warp", ["inverse", "adjoint"])
def test_a_linear_models_map_over_shifts_equals_slicing(weights, volume, warp):
    """Whole-pixel views move |w| without blurring it: each pixel is averaged over the views that saw it."""
    moves = [(0, 0, 0, False), (30, -17, 2, True), (-24, 60, -1, False), (80, 150, 0, False)]
    chosen = view_set(*(shifted(rows, columns, slices, flip=flip) for rows, columns, slices, flip in moves))
    method = Method(views_at_once=3, warp=warp)
    maps = evidence(Linear(), weights, volume, chosen, grades=(0, 1), method=method)
    for column, w in enumerate((weights["brightness"][0], weights["side"][1])):
        total, seen = 0, 0
        for rows, columns, slices, flip in moves:
            total = total + carried(np.abs(w[:, :, ::-1] if flip else w), rows, columns, slices)
            seen = seen + carried(np.ones(WINDOW_SHAPE), rows, columns, slices)
        np.testing.assert_allclose(maps[column], total / seen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warp", ["inverse", "adjoint"])
def test_an_even_map_stays_even_under_any_views(volume, warp):
    """A constant gradient has a constant map: it neither fades nor adds up at the borders of the views."""
    even = {task.name: np.full((task.num_grades, *WINDOW_SHAPE), 0.7, np.float32) for task in TASKS}
    chosen = view_set(*(views.sample(key) for key in jax.random.split(KEY, 4)))
    method = Method(views_at_once=4, warp=warp)
    maps = evidence(Linear(), even, volume, chosen, method=method)
    seen = maps[0] > 0
    assert seen.mean() > 0.9
    np.testing.assert_allclose(maps[0][seen], 0.7, rtol=1e-3)


def test_a_shifted_disc_gives_a_shifted_map(network, volume):
    """A disc moved in its volume, and views that follow it: the map moves with them, where both views see it."""
    model, variables = network
    move = (9, -14, 1)
    chosen = [shifted(*shift) for shift in ((0, 0, 0), (-8, 6, 0), (4, 11, -1), (2, -3, 1))]
    followed = [
        view._replace(shift_px=view.shift_px + jnp.float32(move[:2]), shift_slices=view.shift_slices + move[2])
        for view in chosen
    ]
    # Two of the volume's borders would wrap around, but no view reaches that far.
    moved = jnp.roll(volume, move, axis=(0, 1, 2))
    at_once = Method(views_at_once=4)
    before = evidence(model, variables, volume, view_set(*chosen), method=at_once)
    after = evidence(model, variables, moved, view_set(*followed), method=at_once)
    inside = carried(np.ones(WINDOW_SHAPE), *move) > 0
    expected = carried(before[0], *move)
    assert expected.max() > 0
    np.testing.assert_allclose(after[0][inside], expected[inside], atol=1e-5 * expected.max())


def test_the_maps_peak_is_at_the_evidence_under_random_views():
    """A bright ball off the centre, in turned and shifted views: the map's peak is the middle of the ball."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in VOLUME_SHAPE), indexing="ij"))
    middle = np.array([40 + 30, 48 + 160, 3 + 6])
    distance = np.sqrt(
        (((grid - middle[:, None, None, None]) / np.array([8, 8, 1.5])[:, None, None, None]) ** 2).sum(0)
    )
    volume = jnp.asarray(np.exp(-(distance**2)), jnp.float32)
    ranges = ViewRanges(intensity=0, flip=0.5)
    chosen = view_set(*(views.sample(key, ranges) for key in jax.random.split(KEY, 8)))
    for warp in ("inverse", "adjoint"):
        map = evidence(Energy(), {}, volume, chosen, method=Method(warp=warp))[0]
        np.testing.assert_allclose(np.unravel_index(map.argmax(), map.shape), (30, 160, 6), atol=1)


def test_slices_outside_the_scan_have_no_evidence(maps, batch):
    np.testing.assert_array_equal(batch["slices"], [[2, 13]] * 8)
    assert (maps > 0).any((2, 3)).all()  # of the 9 slices, 3 to 11 of the volume, every one is inside
    model, ones = Linear(), {task.name: jnp.ones((task.num_grades, *WINDOW_SHAPE)) for task in TASKS}
    map = evidence(model, ones, jnp.zeros(VOLUME_SHAPE), view_set(views.identity()), slices=jnp.array([5, 10]))[0]
    np.testing.assert_array_equal(map.any((0, 1)), [False, False, True, True, True, True, True, False, False])


def test_a_smoothed_map_is_scipys_gaussian_mean_of_what_is_seen(weights, volume):
    """Of pixels that a view saw, in slices inside the scan: nothing comes from beyond, and nothing fades there."""
    unseen = 30  # rows above, which the shifted view has outside its window
    chosen, slices = view_set(shifted(unseen, 0, 0)), jnp.array([5, 10])
    plain, smoothed = (
        evidence(Linear(), weights, volume, chosen, (2, 0), slices, Method(smoothing_px=sigma)) for sigma in (0, 6)
    )
    seen = (plain != 0).any(0).astype(float)
    assert 0.4 < seen.mean() < 0.45  # 82 of 112 rows, 5 of 9 slices
    mean_of = functools.partial(ndimage.gaussian_filter, sigma=(6, 6, 6 / 16), mode="constant", truncate=12)
    for before, after in zip(plain, smoothed, strict=True):
        expected = np.where(seen, mean_of(before.astype(float)) / np.maximum(mean_of(seen), 1e-9), 0)
        np.testing.assert_allclose(after, expected, rtol=1e-4)
    ones = {task.name: jnp.ones((task.num_grades, *WINDOW_SHAPE)) for task in TASKS}
    even = evidence(Linear(), ones, volume, chosen, (2, 0), slices, Method(smoothing_px=6))
    np.testing.assert_allclose(even, np.broadcast_to(seen, even.shape), rtol=1e-5)


def test_a_disc_has_the_same_map_in_any_batch_and_for_any_views_at_once(network, batch, maps):
    model, variables = network
    other = {name: array[[6, 2, 5]] for name, array in batch.items()}
    method = Method(num_views=6, views_at_once=6)
    got = hotspots.hotspot_step(KEY, variables, other, model=model, method=method)
    np.testing.assert_allclose(got, maps[[6, 2, 5]], rtol=1e-4, atol=1e-6 * maps.max())
    another = hotspots.hotspot_step(jax.random.key(4), variables, batch, model=model, method=FEW)
    assert not np.allclose(another, maps, rtol=1e-2)


def test_on_cpus_a_few_views_at_a_time_give_the_maps_of_one_program(network, batch):
    """Memory grows with the views that go through the network together."""
    model, variables = network
    together = []

    @dataclass(frozen=True)
    class Watched:
        tasks: tuple[Task, ...] = TASKS

        def apply(self, variables, windows):
            together.append(len(windows))
            return model.apply(variables, windows)

    discs = {name: array[:2] for name, array in batch.items()}
    method = Method(num_views=19, noise=0.05, smoothing_px=4)
    got = hotspots.hotspot_step(KEY, variables, discs, model=Watched(), method=method)
    assert set(together) == {7, 6}
    expected = np.asarray(hotspots.whole_step(KEY, variables, discs, model=Watched(), method=method))
    assert set(together) == {7, 6, 19}
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_eight_devices_and_a_stream_agree_with_one(tiny, network, maps):
    model, variables = network
    data, mesh = DataSet(tiny), devices.make_mesh()
    assert mesh.size == 8
    batches = eval_batches(data, np.arange(6), [], batch_size=8)
    grades = np.tile([[2, 0]], (len(data), 1))
    stream = hotspots.stream(KEY, model, variables, batches, data.slices, grades, mesh, method=FEW)
    ((rows, got),) = stream
    np.testing.assert_array_equal(rows, np.arange(6))
    np.testing.assert_allclose(got, maps[:6], rtol=1e-4, atol=1e-6 * maps.max())


def test_a_stream_is_one_batch_ahead_and_no_more(tiny, network):
    """A data set may be larger than memory: two batches of it, and of their maps, are in memory at a time."""
    data, (model, variables) = DataSet(tiny), network
    asked = []

    def batches():
        for batch in eval_batches(data, np.arange(4), [], batch_size=1):
            asked.append(int(batch["row"][0]))
            yield batch

    grades = np.ones((len(data), 2), int)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    stream = hotspots.stream(KEY, model, variables, batches(), data.slices, grades, mesh, method=FEW)
    for count, (rows, _) in enumerate(stream, start=1):
        assert asked == list(range(min(count + 1, 4)))
        assert rows.tolist() == [count - 1]


def test_the_key_and_the_row_decide_a_discs_views(weights, batch):
    """View i of a disc is drawn from fold_in(fold_in(key, row), i): with more views, the first ones stay the same."""
    got = hotspots.hotspot_step(KEY, weights, batch, model=Linear(), method=Method(num_views=3))
    keys = (jax.random.fold_in(jax.random.fold_in(KEY, batch["row"][5]), i) for i in range(3))
    chosen = view_set(*(views.sample(key) for key in keys))
    slices, grades = jnp.asarray(batch["slices"][5]), batch["grades"][5]
    expected = evidence(Linear(), weights, jnp.asarray(batch["volume"][5]), chosen, grades=grades, slices=slices)
    np.testing.assert_allclose(got[5], expected, atol=2e-4)


def test_noise_is_seeded_and_does_not_change_a_linear_models_map(weights, volume):
    chosen = view_set(*[views.identity()] * 2)
    noisy = Method(noise=0.1)
    np.testing.assert_allclose(
        evidence(Linear(), weights, volume, chosen, method=noisy),
        evidence(Linear(), weights, volume, chosen),
        rtol=1e-6,
    )
    once, again = (evidence(Energy(), {}, volume, chosen, method=noisy) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert np.std(once[0] - central_window(np.asarray(volume))) == pytest.approx(0.1 / np.sqrt(2), rel=0.1)


def test_noise_leaves_slices_outside_the_scan_empty(volume):
    """A network with `fill_slices` recognises them by that."""
    one_slice = jnp.zeros(VOLUME_SHAPE).at[..., 7].set(volume[..., 7])
    map = evidence(Energy(), {}, one_slice, view_set(views.identity()), method=Method(noise=0.1))[0]
    assert np.flatnonzero(map.any((0, 1))).tolist() == [4]
    assert np.std(map[..., 4] - central_window(np.asarray(volume))[..., 4]) == pytest.approx(0.1, rel=0.1)


def test_views_go_through_the_network_together(weights, volume):
    """One by one under `vmap`, layers would see single discs; they have faster kernels for several."""
    together = []

    @dataclass(frozen=True)
    class Watched(Linear):
        def apply(self, variables, windows):
            together.append(len(windows))
            return Linear.apply(self, variables, windows)

    evidence(Watched(), weights, volume, view_set(*[views.identity()] * 6))
    assert set(together) == {FEW.views_at_once}


@pytest.mark.parametrize(("num_views", "groups"), [(37, {19, 18}), (7, {7}), (47, {24, 23}), (65, {22, 21})])
def test_any_number_of_views_goes_through_the_network_in_few_groups(weights, volume, num_views, groups):
    together = []

    @dataclass(frozen=True)
    class Watched(Linear):
        def apply(self, variables, windows):
            together.append(len(windows))
            return Linear.apply(self, variables, windows)

    chosen = view_set(*[views.identity()] * num_views)
    maps = evidence(Watched(), weights, volume, chosen, grades=(2, 0), method=Method(views_at_once=32))
    assert set(together) == groups
    np.testing.assert_allclose(maps, np.abs([weights["brightness"][2], weights["side"][0]]), rtol=1e-5)


def test_noise_and_views_have_keys_of_their_own():
    view_keys, noise_key = hotspots.keys_of(KEY, 5, 40)
    noise_keys = jax.vmap(lambda number: jax.random.fold_in(noise_key, number))(jnp.arange(40))
    parts = jax.vmap(lambda key: jax.random.split(key, 7))(view_keys).ravel()  # what `views.sample` draws from
    data = np.concatenate([jax.random.key_data(keys) for keys in (view_keys, noise_key[None], noise_keys, parts)])
    assert len(np.unique(data, axis=0)) == len(data)


def test_ranges_of_zero_give_the_identity():
    jax.tree.map(np.testing.assert_array_equal, views.sample(KEY, IDENTITY_RANGES), views.identity())


def test_unknown_tasks_and_grades_are_refused():
    given = {"brightness": np.array([1, 2]), "side": np.array([0, 1])}
    np.testing.assert_array_equal(hotspots.choose_grades(TASKS, given), [[1, 0], [2, 1]])
    np.testing.assert_array_equal(hotspots.choose_grades(TASKS, given, {"brightness": "dark"}), [[0, 0], [0, 1]])
    with pytest.raises(SpinejaxError, match="unknown task modic; the network grades brightness, side"):
        hotspots.choose_grades(TASKS, given, {"modic": "1"})
    with pytest.raises(SpinejaxError, match="side has no grade 'left', only front, back"):
        hotspots.choose_grades(TASKS, given, {"side": "left"})
    with pytest.raises(SpinejaxError, match="num_views is 0, expected 1 or more"):
        Method(num_views=0)
    with pytest.raises(SpinejaxError, match="smoothing_px is nan, expected 0 or more"):
        Method(smoothing_px=float("nan"))
