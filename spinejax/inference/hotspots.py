"""Evidence hotspots: where in a disc the evidence for its grades lies (paper, Sect. 3).

Around one window a grade's unnormalised score is nearly linear in the window's pixels, score ≈ wᵀx + b. The size of a
pixel's weight, |∂score/∂x|, says how much the pixel matters (Simonyan et al., 2013). A hotspot is the mean of such maps
over many random views of the disc, each put back to where its view looked. It takes a trained network and nothing else:
no label, no mask.

One forward pass of a view serves every task: the gradients differ in what is sent backwards only.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.network import views
from spinejax.network.spinenet import SpineNet, shown
from spinejax.network.views import View, ViewRanges
from spinejax.parallel.devices import put_batch, put_replicated
from spinejax.tasks import Task

ONE_PLACE = ViewRanges(angle_deg=0, shift_rows_px=0, shift_columns_px=0, shift_slices=0, scale=0, intensity=0, flip=0)
"""Ranges of which every sample is the identity view."""


@dataclass(frozen=True)
class Method:
    """How hotspots are made; the defaults are the paper's (Sect. 3), which leaves the number of views open."""

    num_views: int = 32
    """Random views averaged for each disc."""
    views_at_once: int = 32
    """Views of one disc in memory at once, at most: memory grows with it, and with the discs that share a device."""
    ranges: ViewRanges = field(default_factory=ViewRanges)
    """What the views are drawn from."""
    warp: Literal["inverse", "adjoint"] = "inverse"
    """Carry a map back through the inverse view, as the paper does, or take the gradient through the view itself."""
    signed: bool = False
    """Keep the gradient's sign: positive where a brighter pixel would raise the score."""
    noise: float = 0.0
    """Standard deviation of noise added to each window, in intensity (SmoothGrad, Smilkov et al., 2017)."""

    def __post_init__(self):
        for name in ("num_views", "views_at_once"):
            if getattr(self, name) < 1:
                raise SpinejaxError(f"Hotspots: {name} is {getattr(self, name)}, expected 1 or more.")
        if not 0 <= self.noise < float("inf"):
            raise SpinejaxError(f"Hotspots: noise is {self.noise}, expected 0 or more.")


PLAIN_GRADIENT = Method(num_views=1, ranges=ONE_PLACE)
"""The baseline of Simonyan et al.: the gradient at the identity view, nothing averaged."""


def evidence(
    key: jax.Array,
    variables: Mapping,
    volume: jax.Array,
    slices: jax.Array,
    grades: jax.Array,
    view_set: View,
    *,
    model: SpineNet,
    method: Method = Method(),
) -> jax.Array:
    """One disc's maps over given views: Σ map / Σ coverage.

    Args:
        key: of the noise, if the method adds any.
        variables: the network's.
        volume: uint16[192, 320, 15] as stored, or a float array of intensities.
        slices: int[2]. First and one past the last slice of the volume that lie inside the scan.
        grades: int[T]. Whose score is traced back, for each of the network's tasks.
        view_set: views with leading axis V; `method.num_views` and `method.ranges` play no part here.
        model: the network, or anything with its `tasks` and `apply`.
        method: how.

    Returns:
        float32[T, 112, 224, 9], ≥ 0 unless signed. Zero where no view looked, and in slices outside the scan.
    """
    num_views = view_set.flip.shape[0]
    at_once = max(n for n in range(1, method.views_at_once + 1) if num_views % n == 0)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_views))

    def sums(keys, view_set):
        each = evidence_of_views(keys, variables, volume, grades, view_set, model=model, method=method)
        return jax.tree.map(lambda leaf: leaf.sum(0), each)

    if num_views == at_once:
        maps, coverage = sums(keys, view_set)  # on CPU a network runs at half its speed inside a loop
    else:
        in_chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, at_once, *leaf.shape[1:]), (keys, view_set))
        nothing = jnp.zeros((len(model.tasks), *WINDOW_SHAPE)), jnp.zeros(WINDOW_SHAPE)
        (maps, coverage), _ = jax.lax.scan(
            lambda total, chunk: (jax.tree.map(jnp.add, total, sums(*chunk)), None), nothing, in_chunks
        )
    return mean_evidence(maps, coverage, slices)


def evidence_of_views(
    keys: jax.Array,
    variables: Mapping,
    volume: jax.Array,
    grades: jax.Array,
    view_set: View,
    *,
    model: SpineNet,
    method: Method = Method(),
) -> tuple[jax.Array, jax.Array]:
    """What each of some views adds to a disc's maps, put back to the identity window.

    Args:
        keys: of the noise, one a view.
        variables, volume, grades, model, method: as for `evidence`.
        view_set: views with leading axis V.

    Returns:
        Maps float32[V, T, 112, 224, 9], and each view's coverage of each pixel, float32[V, 112, 224, 9].
    """
    windows = jax.vmap(views.take, in_axes=(None, 0))(volume, view_set)
    if method.noise:
        noise = jax.vmap(functools.partial(jax.random.normal, shape=WINDOW_SHAPE))(keys)
        windows += method.noise * jnp.where(shown(windows)[:, None, None], noise, 0)
    gradients = input_gradients(variables, windows, grades, model)
    put_back = _adjoint if method.warp == "adjoint" else _inverse
    return jax.vmap(functools.partial(put_back, signed=method.signed))(gradients, view_set)


def mean_evidence(maps: jax.Array, coverage: jax.Array, slices: jax.Array) -> jax.Array:
    """Σ map / Σ coverage, and nothing where no view looked or the scan has no slice.

    Args:
        maps: float[T, 112, 224, 9]. Sum over views.
        coverage: float[112, 224, 9]. Sum over views.
        slices: int[2], as for `evidence`.

    Returns:
        float32[T, 112, 224, 9].
    """
    # A network has weights for slices outside the scan too, but there is nothing to see there.
    place = jnp.arange(WINDOW_SHAPE[2]) + (VOLUME_SHAPE[2] - WINDOW_SHAPE[2]) // 2
    inside = (place >= slices[0]) & (place < slices[1])
    seen = (coverage > 0) & inside[None, None]
    return jnp.where(seen[None], maps / jnp.where(seen, coverage, 1)[None], 0)


def input_gradients(variables: Mapping, windows: jax.Array, grades: jax.Array, model: SpineNet) -> jax.Array:
    """The gradient of each task's chosen score with respect to each window, from one forward pass of all.

    Args:
        variables, grades, model: as for `evidence`.
        windows: float32[V, 112, 224, 9].

    Returns:
        float32[V, T, 112, 224, 9].
    """

    def chosen_scores(windows):
        scores = cast(dict, model.apply(variables, windows))
        # A window's scores depend on that window alone, so the gradient of the sum holds each one's own.
        return [scores[task.name][:, grades[column]].sum() for column, task in enumerate(model.tasks)]

    _, backwards = jax.vjp(chosen_scores, windows)
    # One backward pass a task, not one `vmap` over all: so it is plain to the compiler that a score's gradient does not
    # go through the other tasks' branches, and gradients of all tasks are not in memory at once.
    one_score = np.eye(len(model.tasks), dtype=np.float32)
    return jnp.stack([backwards(list(chosen))[0] for chosen in one_score], axis=1)


def _inverse(gradients: jax.Array, view: View, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    maps = gradients if signed else jnp.abs(gradients)
    back, coverage = views.put_back(jnp.moveaxis(maps, 0, -1), view)
    return jnp.moveaxis(back, -1, 0), coverage


def _adjoint(gradients: jax.Array, view: View, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """The gradient with respect to the volume: each pixel of the window pays back the voxels that it was made of."""
    pay_back = jax.linear_transpose(
        lambda volume: views.take(volume, view._replace(intensity=jnp.float32(0))),
        jax.ShapeDtypeStruct(VOLUME_SHAPE, jnp.float32),
    )
    maps = jax.vmap(lambda gradient: central_window(pay_back(gradient)[0]))(gradients)
    return maps if signed else jnp.abs(maps), central_window(pay_back(jnp.ones(WINDOW_SHAPE))[0])


@functools.partial(jax.jit, static_argnames=("model", "method"))
def hotspot_step(
    key: jax.Array, variables: Mapping, batch: Mapping[str, jax.Array], *, model: SpineNet, method: Method = Method()
) -> jax.Array:
    """The maps of a batch of discs. A disc's views depend on the key and its row alone, never on its neighbours.

    Of two methods that differ in `num_views`, one averages over the first views of the other.

    Args:
        key: decides the views.
        variables: the network's.
        batch: `volume` uint16[N, 192, 320, 15], `slices` int[N, 2], `grades` int[N, T] and `row` int[N], the place in
            the data set.
        model: the network.
        method: how.

    Returns:
        float32[N, T, 112, 224, 9], as `evidence`.
    """

    def one_disc(volume, slices, grades, row):
        disc_key = jax.random.fold_in(key, row)
        view_keys = jax.vmap(functools.partial(jax.random.fold_in, disc_key))(jnp.arange(method.num_views))
        view_set = jax.vmap(functools.partial(views.sample, ranges=method.ranges))(view_keys)
        return evidence(disc_key, variables, volume, slices, grades, view_set, model=model, method=method)

    return jax.vmap(one_disc)(batch["volume"], batch["slices"], batch["grades"], batch["row"])


def stream(
    key: jax.Array,
    model: SpineNet,
    variables: Mapping,
    batches: Iterable[dict[str, np.ndarray]],
    slices: np.ndarray,
    grades: np.ndarray,
    mesh: Mesh,
    *,
    method: Method = Method(),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The maps of a stream of batches from `pipeline.eval_batches`; one batch of them is in memory.

    Args:
        key: decides the views.
        model, variables: the network.
        batches: the discs.
        slices: int[D, 2]. The data set's column.
        grades: int[D, T]. Whose score is traced back, for every row of the data set; from `choose_grades`.
        mesh: the devices that share a batch.
        method: how.

    Yields:
        For each batch the rows of its valid discs, int[M], and their maps, float32[M, T, 112, 224, 9].
    """
    key, variables = put_replicated((key, variables), mesh)
    for batch in batches:
        row = batch["row"]
        discs = {
            "volume": batch["volume"],
            "row": row,
            "slices": slices[row].astype(np.int32),
            "grades": grades[row].astype(np.int32),
        }
        maps = hotspot_step(key, variables, put_batch(discs, mesh), model=model, method=method)
        yield row[batch["valid"]], np.asarray(maps)[batch["valid"]]


def choose_grades(
    tasks: Sequence[Task], probabilities: Mapping[str, np.ndarray], chosen: Mapping[str, str] | None = None
) -> np.ndarray:
    """Whose score a hotspot traces back: each disc's most probable grade, or one grade for all discs of a task.

    Args:
        tasks: the network's.
        probabilities: task name → float[M, C].
        chosen: task name → grade's name; a task that is not there takes each disc's most probable grade.

    Returns:
        int[M, T].

    Raises:
        SpinejaxError: a task or a grade of `chosen` is unknown.

    Example:
        >>> tasks = (Task("narrowing", ("no", "yes")), Task("marrow", ("normal", "fatty", "dark")))
        >>> probabilities = {"narrowing": np.array([[0.9, 0.1]]), "marrow": np.array([[0.2, 0.1, 0.7]])}
        >>> choose_grades(tasks, probabilities, {"narrowing": "yes"})
        array([[1, 2]])
    """
    chosen = chosen or {}
    check_choice(tasks, chosen)
    columns = []
    for task in tasks:
        column = probabilities[task.name].argmax(1)
        if task.name in chosen:
            column = np.full_like(column, task.grades.index(chosen[task.name]))
        columns.append(column)
    return np.stack(columns, axis=1)


def check_choice(tasks: Sequence[Task], chosen: Mapping[str, str]) -> None:
    """Raises SpinejaxError if `chosen`, task name → grade's name, has a task or a grade that is not in `tasks`."""
    grades = {task.name: task.grades for task in tasks}
    for name, grade in chosen.items():
        if name not in grades:
            raise SpinejaxError(f"Hotspots: unknown task {name}; the network grades {', '.join(grades)}.")
        if grade not in grades[name]:
            raise SpinejaxError(f"Hotspots: {name} has no grade {grade!r}, only {', '.join(grades[name])}.")
