"""From discs to grade probabilities: one view, or the paper's 54 views averaged (Sect. 4)."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spinejax import views
from spinejax.devices import put_batch, put_replicated
from spinejax.model import SpineNet
from spinejax.views import View


@functools.partial(jax.jit, static_argnames=("model", "average_logits"))
def predict_step(
    variables: Mapping, volumes: jax.Array, view_set: View, *, model: SpineNet, average_logits: bool = False
) -> dict[str, jax.Array]:
    """Grade probabilities of disc volumes, averaged over a set of views.

    Args:
        variables: the network's.
        volumes: uint16[N, 192, 320, 15].
        view_set: views with leading axis V, the same for every disc; one at a time is in memory. They may shift and
            flip only, as those of `view_set` do.
        model: the network.
        average_logits: average the scores before the softmax instead of the probabilities after it.

    Returns:
        task name → float32[N, C]; rows sum to 1.
    """

    def one_view(total, view):
        windows = jax.vmap(views.crop, in_axes=(0, None))(volumes, view)
        scores = model.apply(variables, windows)
        scores = scores if average_logits else jax.tree.map(jax.nn.softmax, scores)
        return jax.tree.map(jnp.add, total, scores), None

    nothing = {task.name: jnp.zeros((volumes.shape[0], task.num_grades)) for task in model.tasks}
    total, _ = jax.lax.scan(one_view, nothing, view_set)
    mean = jax.tree.map(lambda scores: scores / view_set.angle_deg.shape[0], total)
    return jax.tree.map(jax.nn.softmax, mean) if average_logits else mean


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
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Grade a stream of batches from `pipeline.eval_batches`.

    Yields:
        For each batch the rows of its valid discs, int[M], and their probabilities, task name → float32[M, C].
    """
    variables = put_replicated(variables, mesh)
    chosen = put_replicated(view_set(tta), mesh)
    for batch in batches:
        volumes = put_batch({"volume": batch["volume"]}, mesh)["volume"]
        probabilities = predict_step(variables, volumes, chosen, model=model, average_logits=average_logits)
        valid = batch["valid"]
        yield batch["row"][valid], {name: np.asarray(scores)[valid] for name, scores in probabilities.items()}
