"""The loss against scikit-learn's, its gradient against finite differences, missing labels against none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from spinejax.network import losses
from spinejax.tasks import PAPER_TASKS, UNLABELLED, Task


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(20, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(-1, 5, 20), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32)
    return logits, labels, weights


def test_loss_equals_scikit_learn(batch):
    logits, labels, weights = batch
    labelled = np.asarray(labels) != UNLABELLED
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)[labelled]
    sample_weight = np.asarray(weights)[np.asarray(labels)[labelled]]
    total = log_loss(
        np.asarray(labels)[labelled],
        probabilities / probabilities.sum(1, keepdims=True),
        normalize=False,
        sample_weight=sample_weight,
        labels=range(5),
    )
    np.testing.assert_allclose(losses.task_loss(*batch), total / labelled.sum(), rtol=1e-5)


def test_gradient_equals_finite_differences(batch):
    logits, labels, weights = batch
    check_grads(lambda scores: losses.task_loss(scores, labels, weights), (logits,), order=2, modes=("rev",), eps=1e-2)


def test_unlabelled_discs_change_nothing(batch):
    logits, labels, weights = batch
    keep = np.asarray(labels) != UNLABELLED
    only = losses.task_loss(logits[keep], labels[keep], weights)
    np.testing.assert_allclose(losses.task_loss(*batch), only, rtol=1e-6)
    gradient = jax.grad(losses.task_loss)(*batch)
    np.testing.assert_array_equal(gradient[~keep], 0)
    np.testing.assert_allclose(
        gradient[keep], jax.grad(losses.task_loss)(logits[keep], labels[keep], weights), rtol=1e-6
    )


def test_no_label_at_all_gives_zero_and_zero_gradient(batch):
    logits, labels, weights = batch
    value, gradient = jax.value_and_grad(losses.task_loss)(logits, jnp.full_like(labels, UNLABELLED), weights)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_jit_and_vmap_agree(batch):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), batch)
    expected = [losses.task_loss(*(leaf[i] for leaf in stacked)) for i in range(2)]
    np.testing.assert_allclose(jax.jit(jax.vmap(losses.task_loss))(*stacked), expected, rtol=1e-6)
    logits, labels, weights = batch
    closed_over = jax.jit(lambda scores, grades: losses.task_loss(scores, grades, np.asarray(weights)))
    np.testing.assert_allclose(closed_over(logits, labels), expected[0], rtol=1e-6)


def test_class_weights_balance_grades_and_average_one():
    rng = np.random.default_rng(1)
    labels = rng.choice([-1, 0, 1, 2, 3, 4], size=(500, 1), p=[0.1, 0.4, 0.2, 0.15, 0.1, 0.05])
    weights = losses.class_weights(labels, PAPER_TASKS[:1])["pfirrmann"]
    labelled = labels[labels != UNLABELLED]
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(5), y=labelled), rtol=1e-6)
    assert weights[labelled].mean() == pytest.approx(1, rel=1e-5)


def test_a_grade_without_discs_weighs_nothing_and_the_others_still_average_one():
    weights = losses.class_weights(np.array([[0], [0], [2]]), [Task("t", ("a", "b", "c"))])["t"]
    np.testing.assert_allclose(weights, [0.75, 0, 1.5])
    nothing = losses.class_weights(np.full((3, 1), UNLABELLED), [Task("t", ("a", "b", "c"))])["t"]
    np.testing.assert_array_equal(nothing, 0)


def test_tasks_add_up_by_their_weights(batch):
    logits, labels, weights = batch
    named = (
        {"a": logits, "b": logits[:, :2]},
        {"a": labels, "b": jnp.minimum(labels, 1)},
        {"a": weights, "b": weights[:2]},
    )
    total, each = losses.multi_task_loss(*named, {"b": 3.0})
    np.testing.assert_allclose(total, each["a"] + 3 * each["b"], rtol=1e-6)
    single, _ = losses.multi_task_loss(*named, {"a": 0.0})
    np.testing.assert_allclose(single, each["b"], rtol=1e-6)


def test_weights_of_each_source_are_those_of_its_discs_alone(batch):
    """Against scikit-learn's balance of either source, and the weighted sum of the discs' losses written out."""
    logits, _, _ = batch
    rng = np.random.default_rng(1)
    sources = np.repeat([0, 1], [8, 12])
    labels = np.where(sources == 0, rng.integers(0, 4, 20), rng.integers(2, 5, 20))  # of different habits
    labels[[3, 15]] = UNLABELLED
    weights = losses.class_weights(labels[:, None], PAPER_TASKS[:1], sources)["pfirrmann"]
    assert weights.shape == (2, 5)
    assert weights.dtype == np.float32
    for source in (0, 1):
        own = labels[(sources == source) & (labels != UNLABELLED)]
        balanced = compute_class_weight("balanced", classes=np.unique(own), y=own)
        np.testing.assert_allclose(weights[source][np.unique(own)], balanced, rtol=1e-6)
        assert (weights[source][np.setdiff1d(range(5), own)] == 0).all()

    known = labels != UNLABELLED
    log_probability = np.asarray(jax.nn.log_softmax(logits))[np.arange(20), np.maximum(labels, 0)]
    expected = -(weights[sources, np.maximum(labels, 0)] * log_probability)[known].sum() / known.sum()
    found = jax.jit(losses.task_loss)(logits, jnp.asarray(labels), weights, sources=jnp.asarray(sources))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    named = ({"a": each} for each in (logits, jnp.asarray(labels), weights))
    total, _ = losses.multi_task_loss(*named, {}, sources=sources)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_shapes_that_disagree_are_named(batch):
    logits, labels, weights = batch
    with pytest.raises(ValueError, match=r"labels\[19\]"):
        losses.task_loss(logits, labels[:19], weights)
    with pytest.raises(ValueError, match=r"class_weights\[4\]"):
        losses.task_loss(logits, labels, weights[:4])
    with pytest.raises(ValueError, match="expected the discs' sources"):
        losses.task_loss(logits, labels, jnp.stack([weights, weights]))


def test_soft_labels_give_a_share_to_the_neighbours():
    """Written out: half of the share on either side, all of it at an end; with two grades it is optax's smoothing."""
    logits = jnp.array([[0.3, -1.0, 0.5, 2.0]] * 4)
    labels = jnp.arange(4)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    targets = np.array([[0.8, 0.2, 0, 0], [0.1, 0.8, 0.1, 0], [0, 0.1, 0.8, 0.1], [0, 0, 0.2, 0.8]])
    balance = jnp.array([1.0, 2.0, 0.5, 1.5])
    expected = -(targets * log_p).sum(1) * np.asarray(balance)
    np.testing.assert_allclose(losses.task_loss(logits, labels, balance, 0.2), expected.mean(), rtol=1e-6)
    two = jnp.array([[0.3, -1.0], [0.5, 2.0]])
    smoothed = optax.smooth_labels(jnp.eye(2), 0.3)
    np.testing.assert_allclose(
        losses.task_loss(two, jnp.arange(2), jnp.ones(2), 0.15),
        optax.softmax_cross_entropy(two, smoothed).mean(),
        rtol=1e-6,
    )


def test_soft_labels_ignore_discs_without_a_label():
    logits = jnp.array([[0.3, -1.0, 0.5], [9.0, 0.0, -9.0]])
    some = losses.task_loss(logits, jnp.array([2, UNLABELLED]), jnp.ones(3), 0.2)
    np.testing.assert_allclose(some, losses.task_loss(logits[:1], jnp.array([2]), jnp.ones(3), 0.2), rtol=1e-6)
