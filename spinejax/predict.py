"""From discs to grade probabilities: one view, or the paper's 54 views averaged (Sect. 4)."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spinejax import layout as layouts
from spinejax import views
from spinejax.devices import put_batch, put_replicated
from spinejax.model import SpineNet
from spinejax.views import View


@functools.partial(jax.jit, static_argnames=("model", "average_logits"))
def predict_step(
    variables: Mapping, volumes: jax.Array, view_set: View, *, model: SpineNet, average_logits: bool = False
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Grade probabilities of disc volumes, averaged over a set of views, and how far the views disagree.

    Args:
        variables: the network's.
        volumes: uint16[N, 192, 320, 15].
        view_set: views with leading axis V, the same for every disc; one at a time is in memory. They may shift and
            flip only, as those of `view_set` do.
        model: the network.
        average_logits: average the scores before the softmax instead of the probabilities after it.

    Returns:
        Task name → float32[N, C], rows sum to 1; and task name → float32[N], the standard deviation over the views of
        the probability of the grade that the disc is given.
    """

    def one_view(_, view):
        windows = jax.vmap(views.crop, in_axes=(0, None))(volumes, view)
        return None, model.apply(variables, windows)

    _, scores = jax.lax.scan(one_view, None, view_set)
    each = jax.tree.map(jax.nn.softmax, scores)
    mean = jax.tree.map(lambda per_view: per_view.mean(0), scores if average_logits else each)
    probabilities = jax.tree.map(jax.nn.softmax, mean) if average_logits else mean

    def spread(per_view, probabilities):
        given = probabilities.argmax(1)[:, None]
        return jnp.take_along_axis(per_view.std(0), given, axis=1)[:, 0]

    return probabilities, jax.tree.map(spread, each, probabilities)


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
        volumes = put_batch({"volume": batch["volume"]}, mesh)["volume"]
        found = predict_step(variables, volumes, chosen, model=model, average_logits=average_logits)
        valid = batch["valid"]
        probabilities, spread = ({name: np.asarray(each)[valid] for name, each in part.items()} for part in found)
        yield batch["row"][valid], probabilities, spread
