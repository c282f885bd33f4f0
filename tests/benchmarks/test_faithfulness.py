"""Deletion, insertion and the randomisation check, on networks that see one known place."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from benchmarks import faithfulness
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import Task

TASKS = (Task("front", ("dark", "bright")), Task("back", ("dark", "bright")))


@dataclass(frozen=True)
class Looks:
    """Each task sees the mean of one block of 16 patches; the second grade's score is ten times it."""

    tasks: tuple[Task, ...] = TASKS

    def apply(self, variables, windows):
        bright = {"front": windows[:, :32, :32, 2].mean((1, 2)), "back": windows[:, 64:96, 128:160, 6].mean((1, 2))}
        return {name: jnp.stack([jnp.zeros_like(value), 10 * value], axis=1) for name, value in bright.items()}


VARIABLES = {"params": {}, "constants": {"slice_mean": jnp.zeros(9)}}


def curves(maps):
    window = jnp.ones(WINDOW_SHAPE)
    grades = jnp.array([1, 1])
    return faithfulness.deletion_and_insertion(VARIABLES, window, jnp.asarray(maps), grades, model=Looks())


def test_the_right_map_removes_the_evidence_first_and_the_opposite_map_last():
    right = np.zeros((2, *WINDOW_SHAPE), np.float32)
    right[0, :32, :32, 2], right[1, 64:96, 128:160, 6] = 1, 1
    sure, half = 1 / (1 + np.exp(-10)), 0.5
    deletion, insertion = curves(right)
    np.testing.assert_allclose(deletion, [[sure] + [half] * 16] * 2, rtol=1e-5)
    np.testing.assert_allclose(insertion, [[half] + [sure] * 16] * 2, rtol=1e-5)
    deletion, insertion = curves(-right)
    np.testing.assert_allclose(deletion, [[sure] * 16 + [half]] * 2, rtol=1e-5)
    np.testing.assert_allclose(insertion, [[half] * 16 + [sure]] * 2, rtol=1e-5)
    swapped, _ = curves(right[::-1])
    assert (swapped[:, 1] > half + 0.4).all()


def test_forgetting_shuffles_the_weights():
    params = {"conv1": {"kernel": jnp.arange(60.0).reshape(3, 4, 5), "bias": jnp.zeros(5)}}
    variables = {"params": params, "constants": {"slice_mean": jnp.arange(9.0)}}
    forgotten = faithfulness.forget(jax.random.key(0), variables)
    kernel = np.asarray(forgotten["params"]["conv1"]["kernel"])
    np.testing.assert_array_equal(np.sort(kernel, axis=None), np.arange(60))
    assert (kernel.ravel() != np.arange(60)).mean() > 0.8
    np.testing.assert_array_equal(forgotten["constants"]["slice_mean"], np.arange(9))


def test_similarity_is_spearmans_over_voxels_with_evidence_in_either_map():
    rng = np.random.default_rng(0)
    map = rng.random(WINDOW_SHAPE)
    other = map + rng.random(WINDOW_SHAPE)
    assert abs(faithfulness.similarity(map, other) - spearmanr(map.ravel(), other.ravel()).statistic) < 1e-12
    assert abs(faithfulness.similarity(map, rng.random(WINDOW_SHAPE))) < 0.02
    outside = np.zeros(WINDOW_SHAPE)
    outside[:, :, 3:6] = 1  # shared zeros outside the scan would look like agreement
    unlike = faithfulness.similarity(map * outside, rng.random(WINDOW_SHAPE) * outside)
    assert abs(unlike) < 0.02
    assert np.isnan(faithfulness.similarity(outside * 0, outside * 0))
