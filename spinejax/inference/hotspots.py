"""Evidence hotspots: where in a disc the evidence for its grades lies (paper, Sect. 3).

Around one window a grade's unnormalised score is nearly linear in the window's pixels, score ≈ wᵀx + b. The size of a
pixel's weight, |∂score/∂x|, says how much the pixel matters (Simonyan et al., 2013). A hotspot is the mean of such maps
over many random views of the disc, each put back through the inverse view. It needs only a trained network, neither
labels nor masks.

All tasks share one forward pass of a view.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, Shaped

from spinejax.errors import SpinejaxError
from spinejax.geometry import MARGINS, VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.network import views
from spinejax.network.spinenet import SpineNet, shown
from spinejax.network.views import View, ViewRanges
from spinejax.parallel.devices import by_disc, one_ahead, put_batch, put_replicated, to_host
from spinejax.parallel.memory import advice, halved
from spinejax.tasks import Task

IDENTITY_RANGES = ViewRanges(
    angle_deg=0, shift_rows_px=0, shift_columns_px=0, shift_slices=0, scale=0, intensity=0, flip=0
)
"""Ranges in which every sample is the identity view."""


@dataclass(frozen=True)
class Method:
    """How hotspots are made; the defaults are the paper's (Sect. 3), which leaves the number of views open."""

    num_views: int = 32
    """Random views averaged for each disc."""
    views_at_once: int = 32
    """At most this many views of a disc are in memory; memory grows with it, and with the discs that share a device.
    On CPUs no more than 8 are."""
    ranges: ViewRanges = field(default_factory=ViewRanges)
    """Ranges of the random views."""
    warp: Literal["inverse", "adjoint"] = "inverse"
    """Carry a map back through the inverse view (the paper), or take the gradient through the view (adjoint)."""
    signed: bool = False
    """Keep the gradient's sign: positive where a brighter pixel would raise the score."""
    noise: float = 0.0
    """Standard deviation of noise added to each window, in intensity (SmoothGrad, Smilkov et al., 2017)."""
    smoothing_px: float = 0.0
    """Standard deviation of the Gaussian over which a map is averaged at last, in pixels of a slice; slices count as
    `SLICE_PX` apart. 0 leaves the paper's map."""

    def __post_init__(self) -> None:
        for name in ("num_views", "views_at_once"):
            if getattr(self, name) < 1:
                raise SpinejaxError(f"Hotspots: {name} is {getattr(self, name)}, expected 1 or more.")
        for name in ("noise", "smoothing_px"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SpinejaxError(f"Hotspots: {name} is {getattr(self, name)}, expected 0 or more.")


SLICE_PX = 16
"""Pixels of a slice from one slice to the next, at the median of SPIDER's and Sudirman's discs."""

PLAIN_GRADIENT = Method(num_views=1, ranges=IDENTITY_RANGES)
"""The baseline of Simonyan et al.: the gradient at the identity view."""


@runtime_checkable
class Network(Protocol):
    """What is explained: a `SpineNet`, or anything with its `tasks` and `apply`."""

    tasks: Sequence[Task]

    def apply(self, variables: Any, windows: jax.Array) -> Any:
        """Unnormalised grade scores of windows by task name."""


def evidence(
    key: PRNGKeyArray,
    variables: Mapping[str, Any],
    volume: Num[Array | np.ndarray, "192 320 15"],
    slices: Int[Array | np.ndarray, "2"],
    grades: Int[Array | np.ndarray, " T"],
    view_set: View,
    *,
    model: Network,
    method: Method = Method(),
) -> Float[Array, "T 112 224 9"]:
    """One disc's maps over given views: Σ map / Σ coverage.

    Args:
        key: of the noise, if the method adds any.
        variables: the network's.
        volume: the disc.
        slices: first and one past the last slice of the volume inside the scan.
        grades: the grade whose score is traced back, for each of the network's tasks.
        view_set: views with a leading axis; `method.num_views` and `method.ranges` have no effect here.
        model: the network.
        method: how.

    Returns:
        Maps, ≥ 0 unless signed. Zero in pixels that no view saw, and in slices outside the scan.
    """
    num_views = view_set.flip.shape[0]
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_views))
    chosen = keys, view_set

    def sums(keys: jax.Array, view_set: View) -> tuple[jax.Array, jax.Array]:
        each = evidence_of_views(keys, variables, volume, grades, view_set, model=model, method=method)
        return jax.tree.map(lambda leaf: leaf.sum(0), each)

    num_groups = -(-num_views // method.views_at_once)
    size = -(-num_views // num_groups)
    in_groups = num_views // size * size
    if num_groups == 1:
        maps, coverage = sums(*chosen)  # on CPU a network runs at half its speed inside a loop
    else:
        groups = jax.tree.map(lambda leaf: leaf[:in_groups].reshape(-1, size, *leaf.shape[1:]), chosen)
        nothing = jnp.zeros((len(model.tasks), *WINDOW_SHAPE)), jnp.zeros(WINDOW_SHAPE)
        (maps, coverage), _ = jax.lax.scan(
            lambda before, group: (jax.tree.map(jnp.add, before, sums(*group)), None), nothing, groups
        )
        if in_groups < num_views:
            rest = sums(*jax.tree.map(lambda leaf: leaf[in_groups:], chosen))
            maps, coverage = maps + rest[0], coverage + rest[1]
    return mean_evidence(maps, coverage, slices, smoothing_px=method.smoothing_px)


def evidence_of_views(
    keys: Shaped[PRNGKeyArray, " V"],
    variables: Mapping[str, Any],
    volume: Num[Array | np.ndarray, "192 320 15"],
    grades: Int[Array | np.ndarray, " T"],
    view_set: View,
    *,
    model: Network,
    method: Method = Method(),
) -> tuple[Float[Array, "V T 112 224 9"], Float[Array, "V 112 224 9"]]:
    """Each view's maps, put back to the identity window, and its coverage of each pixel.

    The arguments are those of `evidence`, but for the keys of the noise, one per view.
    """
    dtype = getattr(model, "dtype", jnp.float32)
    windows = jax.vmap(functools.partial(views.take, dtype=dtype), in_axes=(None, 0))(volume, view_set)
    if method.noise:
        noise = jax.vmap(functools.partial(jax.random.normal, shape=WINDOW_SHAPE))(keys)
        windows += method.noise * jnp.where(shown(windows)[:, None, None], noise, 0)
    gradients = input_gradients(variables, windows, grades, model)
    put_back = _adjoint if method.warp == "adjoint" else functools.partial(_inverse, dtype=dtype)
    return jax.vmap(functools.partial(put_back, signed=method.signed))(gradients, view_set)


def mean_evidence(
    maps: Float[Array | np.ndarray, "T 112 224 9"],
    coverage: Float[Array | np.ndarray, "112 224 9"],
    slices: Int[Array | np.ndarray, "2"],
    *,
    smoothing_px: float = 0.0,
) -> Float[Array, "T 112 224 9"]:
    """Σ map / Σ coverage, from both sums over views; 0 where no view looked, and in `slices` outside the scan.

    With `smoothing_px` both sums also run over a pixel's neighbours, with the weights of a Gaussian. What no view saw
    then has no weight either, so that the borders do not fade.
    """
    # A network has weights for slices outside the scan too, but their content is not evidence.
    place = jnp.arange(WINDOW_SHAPE[2]) + MARGINS[2]
    inside = (place >= slices[0]) & (place < slices[1])
    seen = (coverage > 0) & inside[None, None]
    if smoothing_px:
        maps, coverage = (_smoothed(jnp.where(seen, sums, 0), smoothing_px) for sums in (maps, coverage))
    return jnp.where(seen[None], maps / jnp.where(seen, coverage, 1)[None], 0)


def _smoothed(sums: Float[Array, "*T 112 224 9"], sigma_px: float) -> Float[Array, "*T 112 224 9"]:
    """Sums over each pixel's neighbours in three dimensions, of which a Gaussian has e^(-distance² / 2 sigma²)."""
    places = [np.arange(size) * step for size, step in zip(WINDOW_SHAPE, (1, 1, SLICE_PX), strict=True)]
    weights = [np.exp(-(((place[:, None] - place) / sigma_px) ** 2) / 2).astype(np.float32) for place in places]
    return jnp.einsum("...hws,hH,wW,sS->...HWS", sums, *weights, precision="highest")


def input_gradients(
    variables: Mapping[str, Any],
    windows: Float[Array | np.ndarray, "V 112 224 9"],
    grades: Int[Array | np.ndarray, " T"],
    model: Network,
) -> Float[Array, "V T 112 224 9"]:
    """The gradient of each task's chosen score with respect to each window; all tasks share one forward pass."""

    def score(scores: Any, column: int) -> jax.Array:
        # A window's scores depend on that window alone, so the gradient of the sum holds each one's own.
        return scores[model.tasks[column].name][:, grades[column]].sum()

    columns = range(len(model.tasks))
    if isinstance(model, SpineNet) and model.branch_point is not None:
        # Each task's own layers one after the other, then the trunk once for the gradients of all tasks.
        trunk = functools.partial(model.apply, variables, features=True)
        features, backwards = jax.vjp(trunk, windows)

        def to_features(column: int) -> jax.Array:
            branch = model.clone(tasks=model.tasks[column : column + 1])  # tracing all of them takes seconds
            return jax.grad(lambda x: score(branch.apply(variables, x, of_features=True), column))(features)

        return jax.vmap(lambda gradient: backwards(gradient)[0], out_axes=1)(jnp.stack([*map(to_features, columns)]))

    def all_scores(windows: jax.Array) -> list[jax.Array]:
        scores = model.apply(variables, windows)
        return [score(scores, column) for column in columns]

    # Without a trunk not one `vmap`: the compiler then sees that a score's gradient avoids the other tasks' layers.
    _, backwards = jax.vjp(all_scores, windows)
    return jnp.stack([backwards(list(chosen))[0] for chosen in np.eye(len(columns), dtype=np.float32)], axis=1)


def _inverse(gradients: jax.Array, view: View, *, signed: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    maps = gradients if signed else jnp.abs(gradients)
    back, coverage = views.put_back(jnp.moveaxis(maps, 0, -1), view, dtype=dtype)
    return jnp.moveaxis(back, -1, 0), coverage


def _adjoint(gradients: jax.Array, view: View, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """The gradient with respect to the volume, through the view's own interpolation."""
    to_volume = jax.linear_transpose(
        lambda volume: views.take(volume, view._replace(intensity=jnp.float32(0))),
        jax.ShapeDtypeStruct(VOLUME_SHAPE, jnp.float32),
    )
    maps = jax.vmap(lambda gradient: central_window(to_volume(gradient)[0]))(gradients)
    return maps if signed else jnp.abs(maps), central_window(to_volume(jnp.ones(WINDOW_SHAPE))[0])


def keys_of(key: PRNGKeyArray, row: Any, num_views: int) -> tuple[Shaped[PRNGKeyArray, " V"], PRNGKeyArray]:
    """The keys of a disc's random views, and the key of its noise.

    View i is decided by the key, the disc's row and i: with more views, the first ones stay the same.
    """
    disc_key = jax.random.fold_in(key, row)
    noise_key = jax.random.fold_in(disc_key, np.uint32(2**32 - 1))  # no view has this number
    return jax.vmap(functools.partial(jax.random.fold_in, disc_key))(jnp.arange(num_views)), noise_key


CPU_VIEWS_AT_ONCE = 8
"""Views of a disc that a CPU has in memory. More do not make it faster."""


def hotspot_step(
    key: PRNGKeyArray,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array | np.ndarray],
    *,
    model: Network,
    method: Method = Method(),
) -> Float[Array, "N T 112 224 9"]:
    """The maps of a batch of discs, as by `evidence`. A disc's views do not depend on the other discs (`keys_of`).

    `batch` has `volume` uint16[N, 192, 320, 15], `slices` int[N, 2], `grades` int[N, T], and `row` int[N], the index in
    the data set.
    """
    # Without a loop, a program for all views has all of them in memory; in a loop, a CPU runs a network at half its
    # speed. So there one small program is called for one group of views after the other.
    step = _in_groups if jax.default_backend() == "cpu" else whole_step
    return step(key, variables, batch, model=model, method=method)


def _views_at_once(method: Method) -> int:
    most = CPU_VIEWS_AT_ONCE if jax.default_backend() == "cpu" else method.num_views
    return min(method.views_at_once, method.num_views, most)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def whole_step(
    key: PRNGKeyArray,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array | np.ndarray],
    *,
    model: Network,
    method: Method = Method(),
) -> Float[Array, "N T 112 224 9"]:
    """`hotspot_step` as one program."""

    def one_disc(volume: jax.Array, slices: jax.Array, grades: jax.Array, row: jax.Array) -> jax.Array:
        view_set, noise_key = _views_of_disc(key, row, method)
        return evidence(noise_key, variables, volume, slices, grades, view_set, model=model, method=method)

    return jax.vmap(one_disc)(*(jnp.asarray(batch[name]) for name in ("volume", "slices", "grades", "row")))


def _views_of_disc(key: PRNGKeyArray, row: jax.Array, method: Method) -> tuple[View, PRNGKeyArray]:
    view_keys, noise_key = keys_of(key, row, method.num_views)
    return jax.vmap(functools.partial(views.sample, ranges=method.ranges))(view_keys), noise_key


def _in_groups(
    key: PRNGKeyArray,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array | np.ndarray],
    *,
    model: Network,
    method: Method,
) -> Float[Array, "N T 112 224 9"]:
    num_groups = -(-method.num_views // _views_at_once(method))
    discs = {name: jnp.asarray(batch[name]) for name in ("volume", "slices", "grades", "row")}
    groups = np.array_split(np.arange(method.num_views), num_groups)

    def sums(numbers: np.ndarray) -> tuple[jax.Array, jax.Array]:
        found = _sums_of_group(key, variables, discs, numbers, model=model, method=method)
        return jax.block_until_ready(found)  # else the next group would be computed beside this one, in as much memory

    maps, coverage = functools.reduce(functools.partial(jax.tree.map, jnp.add), map(sums, groups))
    return _means_of_discs(maps, coverage, discs["slices"], smoothing_px=method.smoothing_px)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _sums_of_group(
    key: PRNGKeyArray,
    variables: Mapping[str, Any],
    discs: Mapping[str, Array],
    numbers: Int[Array | np.ndarray, " V"],
    *,
    model: Network,
    method: Method,
) -> tuple[Float[Array, "N T 112 224 9"], Float[Array, "N 112 224 9"]]:
    """Of each disc Σ map and Σ coverage, over its views of these numbers."""

    def one_disc(volume: jax.Array, grades: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        view_set, noise_key = _views_of_disc(key, row, method)
        chosen = jax.tree.map(lambda leaf: leaf[numbers], view_set)
        keys = jax.vmap(functools.partial(jax.random.fold_in, noise_key))(numbers)
        each = evidence_of_views(keys, variables, volume, grades, chosen, model=model, method=method)
        return jax.tree.map(lambda leaf: leaf.sum(0), each)

    return jax.vmap(one_disc)(discs["volume"], discs["grades"], discs["row"])


@functools.partial(jax.jit, static_argnames="smoothing_px")
def _means_of_discs(
    maps: Float[Array, "N T 112 224 9"],
    coverage: Float[Array, "N 112 224 9"],
    slices: Int[Array, "N 2"],
    *,
    smoothing_px: float,
) -> Float[Array, "N T 112 224 9"]:
    return jax.vmap(functools.partial(mean_evidence, smoothing_px=smoothing_px))(maps, coverage, slices)


def stream(
    key: PRNGKeyArray,
    model: SpineNet,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    slices: Int[np.ndarray, "D 2"],
    grades: Int[np.ndarray, "D T"],
    mesh: Mesh,
    *,
    method: Method = Method(),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The maps of a stream of batches from `data.batches.eval_batches`; two batches of them at most are in memory.

    The devices have the next batch while one is fetched. `slices` and `grades`, the grades whose scores are traced back
    (`choose_grades`), have a row for each disc of the data set. Every process gets the maps of all.

    Yields:
        For each batch the rows of its valid discs, int[M], and their maps, float32[M, T, 112, 224, 9].

    Raises:
        SpinejaxError: a device has too little memory; the message says what lowers it.
    """
    key, variables = put_replicated((key, variables), mesh)

    def dispatched(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        for batch in batches:
            row = batch["row"]
            part = {name: batch[name] for name in ("volume", "row", "valid")}
            part |= {"slices": slices[row].astype(np.int32), "grades": grades[row].astype(np.int32)}
            discs = put_batch(part, mesh)
            valid = discs.pop("valid")
            yield discs["row"], valid, hotspot_step(key, variables, discs, model=model, method=method)

    if (first := next(batches := iter(batches), None)) is None:
        return
    num_discs = len(first["row"]) * jax.process_count()
    at_once = _views_at_once(method)

    def lower() -> jax.stages.Lowered:
        shapes = {"volume": (VOLUME_SHAPE, np.uint16), "slices": ((2,), np.int32), "row": ((), np.int32)}
        shapes["grades"] = (len(model.tasks),), np.int32
        discs = {
            name: jax.ShapeDtypeStruct((num_discs, *one), kind, sharding=by_disc(mesh))
            for name, (one, kind) in shapes.items()
        }
        return whole_step.lower(key, variables, discs, model=model, method=replace(method, views_at_once=at_once))

    what = f"making hotspots with {at_once} views of a disc at once"
    shares = halved(at_once)
    with advice(lower, what, "--hotspot.views-at-once", shares, otherwise="Use --dtype bfloat16."):
        for each in one_ahead(dispatched(itertools.chain([first], batches))):
            rows, valid, maps = to_host(each)
            yield rows[valid], maps[valid]


def choose_grades(
    tasks: Sequence[Task], given: Mapping[str, np.ndarray], chosen: Mapping[str, str] | None = None
) -> Int[np.ndarray, "M T"]:
    """The grades whose scores hotspots trace back: each disc's own, or one for all discs of a task.

    Args:
        tasks: the network's.
        given: task name → int[M], the grade that each disc is given.
        chosen: task name → grade's name; a task that is not there takes each disc's own grade.

    Raises:
        SpinejaxError: a task or a grade of `chosen` is unknown.

    Example:
        >>> tasks = (Task("narrowing", ("no", "yes")), Task("marrow", ("normal", "fatty", "dark")))
        >>> choose_grades(tasks, {"narrowing": np.array([0]), "marrow": np.array([2])}, {"narrowing": "yes"})
        array([[1, 2]])
    """
    chosen = chosen or {}
    check_choice(tasks, chosen)
    traced = np.stack([given[task.name] for task in tasks], axis=1)
    for column, task in enumerate(tasks):
        if task.name in chosen:
            traced[:, column] = task.grades.index(chosen[task.name])
    return traced


def check_choice(tasks: Sequence[Task], chosen: Mapping[str, str]) -> None:
    """Raises SpinejaxError if `chosen`, task name → grade's name, has a task or a grade that is not in `tasks`."""
    grades = {task.name: task.grades for task in tasks}
    for name, grade in chosen.items():
        if name not in grades:
            raise SpinejaxError(f"Hotspots: unknown task {name}; the network grades {', '.join(grades)}.")
        if grade not in grades[name]:
            raise SpinejaxError(f"Hotspots: {name} has no grade {grade!r}, only {', '.join(grades[name])}.")
