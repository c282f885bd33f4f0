"""Measures of whether a hotspot is faithful to the network, for discs without a mask of what it should show.

Deletion and insertion (Petsiuk et al., 2018): the grade's probability should fall when the hottest parts of the disc
are removed first, and rise when they are inserted first. The randomisation check (Adebayo et al., 2018): the map should
change when the network's weights are shuffled. A map that does not change shows the image's edges, not the network's
reasons.
"""

import functools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from spinejax.geometry import WINDOW_SHAPE
from spinejax.network.spinenet import SpineNet

PATCH_PX = 8
NUM_STEPS = 16

_PATCHES = (WINDOW_SHAPE[0] // PATCH_PX, WINDOW_SHAPE[1] // PATCH_PX, WINDOW_SHAPE[2])


@functools.partial(jax.jit, static_argnames=("model",))
def deletion_and_insertion(
    variables: Mapping, window: jax.Array, maps: jax.Array, grades: jax.Array, *, model: SpineNet
) -> tuple[jax.Array, jax.Array]:
    """A grade's probability while patches are removed, hottest first, and while they are inserted in that order.

    A patch is 8×8 pixels of one slice, since removing single pixels would add noise. A removed patch gets the training
    set's mean of its slice, which the network subtracts to zero.

    Args:
        variables: the network's weights.
        window: float32[112, 224, 9].
        maps: float32[T, 112, 224, 9]. One map for each of the network's tasks.
        grades: int[T]. For each task, the grade whose probability is followed.
        model: the network.

    Returns:
        Deletion and insertion, float32[T, 17] each: the probability with 0, 1/16, … 1 of the patches removed or
        inserted. A small mean is good for deletion, a large one for insertion.
    """
    nothing = jnp.broadcast_to(variables["constants"]["slice_mean"], WINDOW_SHAPE)
    steps = jnp.asarray(np.linspace(0, np.prod(_PATCHES), NUM_STEPS + 1).round(), jnp.int32)

    def curves(map):
        heat = map.reshape(_PATCHES[0], PATCH_PX, _PATCHES[1], PATCH_PX, _PATCHES[2]).mean((1, 3)).ravel()
        rank = jnp.argsort(jnp.argsort(-heat)).reshape(_PATCHES)
        rank = jnp.repeat(jnp.repeat(rank, PATCH_PX, axis=0), PATCH_PX, axis=1)
        hottest = rank[None] < steps.reshape(-1, 1, 1, 1)
        shown = jnp.stack(
            [jnp.where(hottest, nothing[None], window[None]), jnp.where(hottest, window[None], nothing[None])]
        )
        scores = cast(dict, model.apply(variables, shown.reshape(-1, *WINDOW_SHAPE)))
        return jnp.stack([jax.nn.softmax(scores[task.name])[:, grades[t]] for t, task in enumerate(model.tasks)])

    probabilities = jax.lax.map(curves, maps)  # [T of the map, T of the grade, 2 × 17]
    own = jnp.diagonal(probabilities, axis1=0, axis2=1).T.reshape(len(model.tasks), 2, NUM_STEPS + 1)
    return own[:, 0], own[:, 1]


def forget(key: jax.Array, variables: Mapping) -> dict:
    """The variables with the entries of every weight array shuffled."""
    leaves, structure = jax.tree.flatten(variables["params"])
    keys = jax.random.split(key, len(leaves))
    shuffled = [
        jax.random.permutation(k, leaf.ravel()).reshape(leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return {**variables, "params": jax.tree.unflatten(structure, shuffled)}


def similarity(map: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, over the voxels where either has evidence; NaN if there is none.

    It is 1 for maps of the same order. Between the maps of a network before and after `forget` it is low but rarely 0,
    because the gradients of any network follow the image's edges a little.
    """
    seen = (map != 0) | (other != 0)
    ranks = rankdata(map[seen]), rankdata(other[seen])
    if not seen.any() or any(np.ptp(rank) == 0 for rank in ranks):
        return np.nan
    return float(np.corrcoef(*ranks)[0, 1])
