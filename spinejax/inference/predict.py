"""From discs to grade probabilities: one view, or the paper's 54 views averaged (Sect. 4)."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spinejax.network import views
from spinejax.network.spinenet import SpineNet
from spinejax.network.views import View
from spinejax.parallel import layout as layouts
from spinejax.parallel.devices import put_batch, put_replicated, to_host

IN_PLANE_VIEWS = 9
"""Views of the grid that differ in their rows and columns only, and lie side by side in it."""


@functools.partial(jax.jit, static_argnames=("model", "average_logits", "grid"))
def predict_step(
    variables: Mapping,
    volumes: jax.Array,
    view_set: View,
    *,
    model: SpineNet,
    average_logits: bool = False,
    grid: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Grade probabilities of disc volumes, averaged over a set of views, and how far the views disagree.

    Args:
        variables: the network's.
        volumes: uint16[N, 192, 320, 15].
        view_set: views with leading axis V, the same for every disc; one at a time is in memory. They may shift and
            flip only, as those of `view_set` do.
        model: the network.
        average_logits: average the scores before the softmax instead of the probabilities after it.
        grid: `view_set` is `views.grid()`. Its nine in-plane positions then go through the network at once, and share
            conv1 and pool1, to the same scores; nine views of each disc are in memory.

    Returns:
        Task name → float32[N, C], rows sum to 1; and task name → float32[N], the standard deviation over the views of
        the probability of the grade that the disc is given.
    """

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
    """The 54 views of test-time augmentation, or the identity alone; leading axis 54 or 1."""
    return views.grid() if tta else jax.tree.map(lambda leaf: leaf[None], views.identity())


def predict(
    model: SpineNet,
    variables: Mapping,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    tta: bool = False,
    average_logits: bool = False,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Grade a stream of batches from `pipeline.eval_batches`.

    Yields:
        For each batch the rows of its valid discs, int[M], their probabilities, task name → float32[M, C], and the
        views' spread, task name → float32[M], as `predict_step`.
    """
    layout = layouts.for_grading(mesh, variables["params"])
    variables, model = layout.put(variables), layout.on(model)
    chosen = put_replicated(view_set(tta), mesh)
    for batch in batches:
        laid_out = put_batch({name: batch[name] for name in ("volume", "row", "valid")}, mesh)
        volumes = laid_out["volume"]
        found = predict_step(variables, volumes, chosen, model=model, average_logits=average_logits, grid=tta)
        # Every process gets the discs of all, so that the one that writes has them.
        rows, valid, found = to_host((laid_out["row"], laid_out["valid"], found))
        probabilities, spread = ({name: each[valid] for name, each in part.items()} for part in found)
        yield rows[valid], probabilities, spread
