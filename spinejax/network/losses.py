"""The training loss: softmax log-losses, masked, balanced over grades, weighted over tasks (paper, Sect. 2)."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spinejax.tasks import UNLABELLED, Task


def class_weights(
    labels: Int[np.ndarray, "N T"], tasks: Sequence[Task], sources: Int[np.ndarray, " N"] | None = None
) -> dict[str, Float[np.ndarray, "..."]]:
    """Weights that make every grade of a task count alike (paper, Sect. 2, "Class-balanced loss").

    The paper's α_c = 1 / freq(c), times one factor per task so that the weights average 1 over the labelled discs:
    N / (C · n_c). Balancing the grades of a task thus leaves the balance between tasks to the task weights.

    Args:
        labels: the training set's, a column per task.
        tasks: T tasks.
        sources: each disc's source, counted from 0. Every grade then counts alike within each source: where one
            hospital's rarest grade is another's commonest, weights over all discs would leave it rare.

    Returns:
        Weights by task name, float32[C], or with `sources` float32[S, C]. Zero for a grade that no disc has.

    Example:
        >>> class_weights(np.array([[0], [0], [0], [1], [-1]]), [Task("narrowing", ("no", "yes"))])["narrowing"]
        array([0.6666667, 2.       ], dtype=float32)
    """
    weights = {}
    for task, column in zip(tasks, np.asarray(labels).T, strict=True):
        if sources is None:
            weights[task.name] = _balancing(column, task.num_grades)
        else:
            of_each = [column[sources == source] for source in range(sources.max() + 1)]
            weights[task.name] = np.stack([_balancing(own, task.num_grades) for own in of_each])
    return weights


def _balancing(labels: Int[np.ndarray, "N"], num_grades: int) -> Float[np.ndarray, "C"]:
    """The class weights of one task from its labels."""
    counts = np.bincount(labels[labels != UNLABELLED], minlength=num_grades)
    present = counts > 0
    balanced = counts.sum() / (max(present.sum(), 1) * np.maximum(counts, 1))
    return np.where(present, balanced, 0).astype(np.float32)


def task_loss(
    logits: Float[Array | np.ndarray, "N C"],
    labels: Int[Array | np.ndarray, "..."],
    class_weights: Float[Array | np.ndarray, "..."],
    softness: float = 0.0,
    num_labelled: Int[Array, ""] | None = None,
    sources: Int[Array | np.ndarray, " N"] | None = None,
) -> Float[Array, ""]:
    """Class-balanced softmax log-loss of one task, averaged over its labelled discs (paper, Sect. 2).

    A disc marked `UNLABELLED` adds nothing to the sum or to the divisor.

    Args:
        logits: unnormalised grade scores.
        labels: [N]. Grade in [0, C), or `UNLABELLED`.
        class_weights: [C], or [S, C] for each source. A disc's loss is multiplied by its grade's weight.
        softness: in [0, 1), the share of a disc's target that its neighbouring grades have, half of it each; at either
            end of the scale the only neighbour has all of it. Raters differ by one grade far more often than by two.
        num_labelled: the divisor. Default: the labelled discs here. With those of a whole batch, the losses of its
            parts add up to the batch's.
        sources: the row of `class_weights` for each disc, if there is one for each source.

    Returns:
        The loss in nats. Zero, with zero gradient, if no disc is labelled.

    Raises:
        ValueError: `labels` disagrees with `logits` on N, or `class_weights` on C; or `sources` are missing.

    Example:
        >>> labels = jnp.array([0, 1, UNLABELLED])
        >>> print(f"{task_loss(jnp.zeros((3, 2)), labels, jnp.ones(2)):.4f}")  # two discs, at chance: log 2
        0.6931
    """
    if labels.shape != logits.shape[:1] or class_weights.shape[-1:] != logits.shape[1:]:
        raise ValueError(
            f"logits{list(logits.shape)}, labels{list(labels.shape)}, class_weights{list(class_weights.shape)}: "
            "expected [N, C], [N] and [C] or [S, C]."
        )
    if class_weights.ndim > 1 and sources is None:
        raise ValueError("class_weights of each source: expected the discs' sources, too.")
    labelled = labels != UNLABELLED
    grade = jnp.where(labelled, labels, 0)  # as an index, -1 would be the last grade
    log_probability = jax.nn.log_softmax(logits)
    if softness:
        target = _softened(logits.shape[1], softness)[grade]
        losses = -jnp.sum(target * log_probability, axis=1)
    else:
        losses = -jnp.take_along_axis(log_probability, grade[:, None], axis=1)[:, 0]
    of_grade = jnp.asarray(class_weights)
    losses *= of_grade[grade] if of_grade.ndim == 1 else of_grade[sources, grade]
    divisor = jnp.sum(labelled) if num_labelled is None else num_labelled
    return jnp.sum(losses, where=labelled) / jnp.maximum(divisor.astype(losses.dtype), 1)


def _softened(num_grades: int, softness: float) -> Float[Array, "C C"]:
    """A row for each grade: the target of a disc that has this label. Rows sum to 1."""
    neighbours = np.eye(num_grades, k=1) + np.eye(num_grades, k=-1)
    shares = neighbours / neighbours.sum(1, keepdims=True)
    return jnp.asarray((1 - softness) * np.eye(num_grades) + softness * shares, jnp.float32)


def multi_task_loss(
    logits: Mapping[str, jax.Array],
    labels: Mapping[str, jax.Array],
    class_weights: Mapping[str, jax.Array | np.ndarray],
    task_weights: Mapping[str, float],
    softness: float = 0.0,
    num_labelled: Mapping[str, jax.Array] | None = None,
    sources: Int[Array | np.ndarray, " N"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of all tasks' losses, L = Σ_t ω_t L_t (paper, Sect. 2), and each L_t by name.

    Args:
        logits, labels, class_weights: `task_loss`'s arguments by task name.
        task_weights: ω_t by task name; a task that is not listed has weight 1, as in the paper.
        softness, sources: as for `task_loss`, the same for all tasks.
        num_labelled: as for `task_loss`, by task name.
    """
    counts = num_labelled or {}
    losses = {
        name: task_loss(logits[name], labels[name], class_weights[name], softness, counts.get(name), sources)
        for name in logits
    }
    total = jnp.asarray(sum(task_weights.get(name, 1.0) * loss for name, loss in losses.items()))
    return total, losses
