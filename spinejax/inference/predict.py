"""From discs to grade probabilities: one view, or the paper's 54 views averaged (Sect. 4)."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt16

from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.network import views
from spinejax.network.spinenet import SpineNet
from spinejax.network.views import View
from spinejax.parallel import layout as layouts
from spinejax.parallel import processes
from spinejax.parallel.devices import by_disc, one_ahead, put_batch, put_replicated, to_host
from spinejax.parallel.layout import Layout
from spinejax.parallel.memory import SHARE_UNASKED, advice, free_bytes, halved

IN_PLANE_VIEWS = 9
"""Views of the grid that differ in their rows and columns only; they are adjacent in it."""


def predict_step(
    variables: Mapping,
    volumes: UInt16[Array | np.ndarray, "N 192 320 15"],
    view_set: View,
    *,
    model: SpineNet,
    average_logits: bool = False,
    grid: bool = False,
) -> tuple[dict[str, Float[Array, "N _"]], dict[str, Float[Array, " N"]]]:
    """Grade probabilities of disc volumes, averaged over a set of views, and how far the views disagree.

    Args:
        variables: the network's.
        volumes: the discs.
        view_set: views with a leading axis, the same for every disc; one at a time is in memory. They may only shift by
            whole pixels, and flip.
        model: the network.
        average_logits: average the scores before the softmax instead of the probabilities after it.
        grid: `view_set` is `views.grid()`. Its nine in-plane positions then go through the network at once, and share
            conv1 and pool1, to the same scores; nine views of each disc are in memory.

    Returns:
        By task name: probabilities, whose rows sum to 1; and the standard deviation over the views of the probability
        of the grade that the disc is given.

    Raises:
        SpinejaxError: `view_set` has other views, or is not the grid though `grid` says so. Inside `jit`, where views
            have no values yet, neither is checked.
    """
    views.refuse_all_but_shifts(view_set)
    if grid and not _is_grid(view_set):
        raise SpinejaxError("grid=True: expected the views of `views.grid()`, all 54 in their order.")
    return _predict_step(variables, volumes, view_set, model=model, average_logits=average_logits, grid=grid)


def _is_grid(view_set: View) -> bool:
    try:  # before `np.array_equal`, which takes any error for a difference
        known = jax.tree.map(np.asarray, view_set)
        return all(map(np.array_equal, known, views.grid()))
    except jax.errors.TracerArrayConversionError:
        return view_set.flip.shape == (views.NUM_TTA_VIEWS,)


@functools.partial(jax.jit, static_argnames=("model", "average_logits", "grid"))
def _predict_step(
    variables: Mapping, volumes: jax.Array, view_set: View, *, model: SpineNet, average_logits: bool, grid: bool
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    def one_view(_, view):
        windows = jax.vmap(views.crop, in_axes=(0, None))(volumes, view)
        return None, model.apply(variables, windows)

    if grid:
        scores = _grid_scores(variables, volumes, view_set, model)
    else:
        _, scores = jax.lax.scan(one_view, None, view_set)
    each = jax.tree.map(jax.nn.softmax, scores)
    mean = jax.tree.map(lambda per_view: per_view.mean(0), scores if average_logits else each)
    probabilities = jax.tree.map(jax.nn.softmax, mean) if average_logits else mean

    def spread(per_view, probabilities):
        given = probabilities.argmax(1)[:, None]
        return jnp.take_along_axis(per_view.std(0), given, axis=1)[:, 0]

    return probabilities, jax.tree.map(spread, each, probabilities)


def _grid_scores(variables: Mapping, volumes: jax.Array, grid: View, model: SpineNet) -> dict[str, jax.Array]:
    """Task name → float32[54, N, C]: the scores of every view of the grid, nine at a time."""
    positions = jax.tree.map(lambda leaf: leaf.reshape(-1, IN_PLANE_VIEWS, *leaf.shape[1:])[:, 0], grid)
    shifts = range(0, 2 * views.TTA_SHIFT_PX + 1, views.TTA_SHIFT_PX)
    places = tuple((row, column) for row in shifts for column in shifts)

    def nine_views(_, position):
        windows = jax.vmap(views.crop_around, in_axes=(0, None))(volumes, position)
        return None, model.apply(variables, windows, places=places)

    _, scores = jax.lax.scan(nine_views, None, positions)

    def by_view(each):
        each = each.reshape(len(each), volumes.shape[0], IN_PLANE_VIEWS, -1)
        return each.swapaxes(1, 2).reshape(views.NUM_TTA_VIEWS, volumes.shape[0], -1)

    return jax.tree.map(by_view, scores)


def view_set(tta: bool) -> View:
    """The 54 views of test-time augmentation, or only the identity; leading axis 54 or 1."""
    return views.grid() if tta else jax.tree.map(lambda leaf: leaf[None], views.identity())


def predict(
    model: SpineNet,
    variables: Mapping,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    tta: bool = False,
    average_logits: bool = False,
    layout: Layout | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Grade a stream of batches from `data.batches.eval_batches`. The devices have the next one while one is fetched.

    `layout` says how the network is divided over the devices. Default: `grading_layout`.

    Yields:
        For each batch the rows of its valid discs, int[M], and their probabilities and spread as by `predict_step`.

    Raises:
        SpinejaxError: a device has too little memory; the message says what lowers it.
    """
    layout = layout or grading_layout(mesh, variables)
    variables, model = layout.put(variables), layout.on(model)
    chosen = put_replicated(view_set(tta), mesh)
    how: dict = {"model": model, "average_logits": average_logits, "grid": tta}

    def dispatched(batches: Iterable[dict[str, np.ndarray]]) -> Iterator[tuple[jax.Array, jax.Array, Any]]:
        for batch in batches:
            laid_out = put_batch({name: batch[name] for name in ("volume", "row", "valid")}, mesh)
            volumes = laid_out.pop("volume")
            yield laid_out["row"], laid_out["valid"], predict_step(variables, volumes, chosen, **how)

    if (first := next(batches := iter(batches), None)) is None:
        return
    num_discs = len(first["row"]) * jax.process_count()

    def lower() -> jax.stages.Lowered:
        volumes = jax.ShapeDtypeStruct((num_discs, *VOLUME_SHAPE), np.uint16, sharding=by_disc(mesh))
        return _predict_step.lower(variables, volumes, chosen, **how)

    otherwise = f"Use --dtype bfloat16{', or leave out --tta' if tta else ''}."
    smaller = halved(num_discs, mesh.size)
    with advice(lower, f"grading {num_discs} discs at once", "--batch-size", smaller, otherwise=otherwise):
        for each in one_ahead(dispatched(itertools.chain([first], batches))):
            # Every process gets the discs of all, so that the one that writes has them.
            rows, valid, found = to_host(each)
            probabilities, spread = ({name: each[valid] for name, each in part.items()} for part in found)
            yield rows[valid], probabilities, spread


def grading_layout(mesh: Mesh, variables: Mapping) -> Layout:
    """A copy of the network on every device, if it takes no more than half of what is free there; else it is split.

    The choice is the same on every process.
    """
    params = variables["params"]
    fits = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= SHARE_UNASKED * free_bytes(mesh)
    return Layout(mesh) if processes.all_agree(fits) else layouts.for_grading(mesh, params)
