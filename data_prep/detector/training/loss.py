"""Training of the detector: the loss, one step, and a run that can be stopped and goes on."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_prep.detector.grid import CELL_PX, OFFSET_MM, PIXEL_MM
from data_prep.detector.network import BodyNet
from data_prep.detector.training.augment import Crops, random_crop
from data_prep.detector.training.truth import BODY, DOUBTFUL, SACRUM, Slice

_HEAT_MM = 4.5  # standard deviation of a centre's heat
_VOTING_MM = 7.5  # cells this near to a centre tell its corners
_DOUBT_MM = 13.0
_NEARBY_MM = 9.0  # cells this near to a corner tell where exactly it is
_CORNER_WEIGHT = 2.0


class TrainState(NamedTuple):
    """Arrays only: what a step changes."""

    step: jax.Array
    variables: dict[str, Any]
    optimiser: Any


def stack(slices: Sequence[Slice]) -> Crops:
    """Slices as one set of arrays, zero-padded to the largest; images as uint8, where 200 stands for 1."""
    height, width = np.max([one.image.shape for one in slices], axis=0)

    def padded(image):
        return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1])))

    return Crops(
        image=np.stack([padded(np.rint(one.image * 200).astype(np.uint8)) for one in slices]),
        tissue=np.stack([padded(one.tissue) for one in slices]),
        size=np.array([one.image.shape for one in slices], np.float32),
        kinds=np.stack([one.kinds for one in slices]),
        centres=np.stack([one.centres for one in slices]),
        corners=np.stack([one.corners for one in slices]),
    )


def detector_loss(
    heat: jax.Array, far: jax.Array, near: jax.Array, crops: Crops
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Focal loss of the heat-maps (as CenterNet's, Zhou et al. 2019, eq. 1) plus the corners' Huber losses.

    Args:
        heat: float32[N, h, w, 2]. Logits.
        far, near: float32[N, h, w, 4, 2]. In `OFFSET_MM`: from the cells about a centre, and about a corner.
        crops: the truth, in network pixels.

    Returns:
        float32[], and its parts by name; `corner_mm` and `nearby_mm` are the mean distances of the votes from the true
        corners.
    """
    rows, columns = (jnp.arange(n, dtype=jnp.float32) * CELL_PX + (CELL_PX - 1) / 2 for n in heat.shape[1:3])
    cells = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)  # [h, w, 2]
    away_mm = PIXEL_MM * jnp.linalg.norm(
        cells[None, :, :, None] - crops.centres[:, None, None], axis=-1
    )  # [N, h, w, K]
    kinds = crops.kinds[:, None, None]
    warmth = jnp.exp(-0.5 * (away_mm / _HEAT_MM) ** 2)
    target = jnp.stack([jnp.where(kinds == kind, warmth, 0.0).max(-1) for kind in (BODY, SACRUM)], axis=-1)
    sure = ~((kinds == DOUBTFUL) & (away_mm < _DOUBT_MM)).any(-1, keepdims=True)

    log_p, log_q = jax.nn.log_sigmoid(heat), jax.nn.log_sigmoid(-heat)
    p = jax.nn.sigmoid(heat)
    # A centre is between cells: those next to it count as it, by their warmth.
    at_centre = target > 0.85
    focal = jnp.where(at_centre, -((1 - p) ** 2) * log_p * target, -((1 - target) ** 4) * p**2 * log_q)
    num_centres = 1 + jnp.sum((crops.kinds == BODY) | (crops.kinds == SACRUM), dtype=jnp.float32)
    heat_loss = jnp.where(jnp.broadcast_to(sure, focal.shape), focal, 0.0).sum() / num_centres

    told = (crops.kinds == BODY) | (crops.kinds == SACRUM)
    to_centres = jnp.where(told[:, None, None], away_mm, jnp.inf)
    of_nearest = jax.vmap(lambda points, index: points[index])(crops.corners, to_centres.argmin(-1))  # [N, h, w, 4, 2]
    voting = (to_centres.min(-1) < _VOTING_MM)[..., None]
    corner_loss, corner_mm = _corner_loss(far, of_nearest, voting, cells)

    corners = jnp.where(told[:, :, None, None], crops.corners, jnp.nan)
    corners = corners.swapaxes(1, 2)[:, None, None]  # [N, 1, 1, 4, K, 2]
    to_corners = PIXEL_MM * jnp.linalg.norm(cells[None, :, :, None, None] - corners, axis=-1)
    to_corners = jnp.where(jnp.isnan(to_corners), jnp.inf, to_corners)  # [N, h, w, 4, K]
    nearest = jnp.take_along_axis(corners, to_corners.argmin(-1)[..., None, None], axis=-2)[..., 0, :]
    nearby_loss, nearby_mm = _corner_loss(near, nearest, to_corners.min(-1) < _NEARBY_MM, cells)

    loss = heat_loss + _CORNER_WEIGHT * (corner_loss + nearby_loss)
    return loss, {"heat": heat_loss, "corner_mm": corner_mm, "nearby_mm": nearby_mm}


def _corner_loss(
    told: jax.Array, corners: jax.Array, voting: jax.Array, cells: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean Huber loss of the ways that voting cells tell, quadratic below 1 mm, and the mean distance in mm.

    Args:
        told: float32[N, h, w, 4, 2]. In `OFFSET_MM`.
        corners: likewise. The true ones in pixels, NaN where not known.
        voting: bool[N, h, w, 4 or 1].
        cells: float32[h, w, 2]. Their centres in pixels.
    """
    known = voting & jnp.isfinite(corners).all(-1)
    true = jnp.where(known[..., None], (corners - cells[None, :, :, None]) * PIXEL_MM / OFFSET_MM, 0.0)
    wrong = jnp.where(known[..., None], told - true, 0.0)
    distance = jnp.sqrt((wrong**2).sum(-1) + 1e-8)
    num_known = 1 + jnp.sum(known, dtype=jnp.float32)
    loss = jnp.where(known, optax.huber_loss(distance, delta=0.1) * 10, 0.0).sum() / num_known
    return loss, jnp.where(known, distance, 0.0).sum() / num_known * OFFSET_MM


def optimiser(num_steps: int, learning_rate: float = 3e-3) -> optax.GradientTransformation:
    """AdamW with a one-cycle cosine."""
    schedule = optax.cosine_onecycle_schedule(num_steps, learning_rate, pct_start=0.15, div_factor=10)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=1e-3))


def init(key: jax.Array, num_steps: int) -> TrainState:
    """A fresh state; a function of the key."""
    variables = dict(BodyNet().init(key, jnp.zeros((1, 32, 32)), train=False))
    return TrainState(jnp.zeros((), jnp.int32), variables, optimiser(num_steps).init(variables["params"]))


@partial(jax.jit, static_argnames=("num_steps", "batch_size", "learning_rate"), donate_argnums=(1,))
def train_step(
    key: jax.Array,
    state: TrainState,
    data: Crops,
    weights: jax.Array,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float = 3e-3,
):
    """One step on random crops of random slices; which ones depends on the key and the step alone.

    Args:
        key: of the run.
        state: donated.
        data: every slice.
        weights: float32[slices]. How often each is drawn.
        num_steps: of the whole run; it shapes the learning rate.
        batch_size: crops.
        learning_rate: at its peak.

    Returns:
        The next state, and the loss with its parts.
    """
    key = jax.random.fold_in(key, state.step)
    draw, augment = jax.random.split(key)
    rows = jax.random.categorical(draw, jnp.log(weights), shape=(batch_size,))
    chosen = jax.tree.map(lambda array: array[rows], data)
    crops = jax.vmap(random_crop)(jax.random.split(augment, batch_size), chosen)

    def loss_of(params):
        variables = state.variables | {"params": params}
        (heat, far, near), new = cast(
            tuple, BodyNet().apply(variables, crops.image, train=True, mutable=["batch_stats"])
        )
        loss, parts = detector_loss(heat, far, near, crops)
        return loss, (new, parts)

    (loss, (new, parts)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.variables["params"])
    updates, moments = optimiser(num_steps, learning_rate).update(gradient, state.optimiser, state.variables["params"])
    params = optax.apply_updates(state.variables["params"], updates)
    return TrainState(state.step + 1, {"params": params} | new, moments), {"loss": loss} | parts
