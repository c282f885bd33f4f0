"""One training step of a detector's network: its state and its optimiser, and the loss of the one that finds bodies."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from data_prep.detector.grid import CELL_PX, OFFSET_MM, PIXEL_MM
from data_prep.detector.network import BodyNet
from data_prep.detector.training.augment import Crops, random_crop
from data_prep.detector.training.truth import BODY, DOUBTFUL, SACRUM

_HEAT_MM = 4.5  # standard deviation of a centre's heat
_VOTING_MM = 7.5  # cells this near to a centre predict its corners
_DOUBT_MM = 13.0
_NEARBY_MM = 9.0  # cells this near to a corner predict where exactly it is
_CORNER_WEIGHT = 2.0

LossOf = Callable[[jax.Array, dict[str, Any], Any, jax.Array], tuple[jax.Array, tuple[dict[str, Any], dict[str, Any]]]]


class TrainState(NamedTuple):
    """Arrays only: what a step changes."""

    step: jax.Array
    variables: dict[str, Any]
    optimiser: Any


def detector_loss(
    heat: Float[Array, "N h w 2"], far: Float[Array, "N h w 4 2"], near: Float[Array, "N h w 4 2"], crops: Crops
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Focal loss of the heat maps (as CenterNet's, Zhou et al. 2019, eq. 1) plus the corners' Huber losses.

    Args:
        heat: logits.
        far, near: offsets in `OFFSET_MM`, as `BodyNet` returns them.
        crops: the truth, in network pixels.

    Returns:
        The loss and its parts by name; `corner_mm` and `nearby_mm` are mean distances from the true corners.
    """
    rows, columns = (jnp.arange(n, dtype=jnp.float32) * CELL_PX + (CELL_PX - 1) / 2 for n in heat.shape[1:3])
    cells = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)  # [h, w, 2]
    kinds = crops.kinds

    def away_mm(*of_kind):
        centres = jnp.where(jnp.isin(kinds, jnp.array(of_kind))[..., None], crops.centres, jnp.nan)
        return _nearest(centres, crops.corners, cells)

    to_bodies_mm, _ = away_mm(BODY)
    to_sacrum_mm, _ = away_mm(SACRUM)
    target = jnp.exp(-0.5 * (jnp.stack([to_bodies_mm, to_sacrum_mm], axis=-1) / _HEAT_MM) ** 2)
    sure = (away_mm(DOUBTFUL)[0] >= _DOUBT_MM)[..., None]

    log_p, log_q = jax.nn.log_sigmoid(heat), jax.nn.log_sigmoid(-heat)
    p = jax.nn.sigmoid(heat)
    # A centre is between cells: those next to it count as it, weighted by their warmth.
    at_centre = target > 0.85
    focal = jnp.where(at_centre, -((1 - p) ** 2) * log_p * target, -((1 - target) ** 4) * p**2 * log_q)
    known = (kinds == BODY) | (kinds == SACRUM)
    heat_loss = jnp.where(jnp.broadcast_to(sure, focal.shape), focal, 0.0).sum() / (1 + known.sum(dtype=jnp.float32))

    to_centres_mm, of_nearest = away_mm(BODY, SACRUM)
    voting = (to_centres_mm < _VOTING_MM)[..., None]
    corner_loss, corner_mm = _corner_loss(far, of_nearest, voting, cells)

    corners = jnp.where(known[:, :, None, None], crops.corners, jnp.nan)
    each_kind = [_nearest(corners[:, :, kind], corners[:, :, kind], cells) for kind in range(4)]
    to_corners_mm, nearest = (jnp.stack(parts, axis=3) for parts in zip(*each_kind, strict=True))
    nearby_loss, nearby_mm = _corner_loss(near, nearest, to_corners_mm < _NEARBY_MM, cells)

    loss = heat_loss + _CORNER_WEIGHT * (corner_loss + nearby_loss)
    return loss, {"heat": heat_loss, "corner_mm": corner_mm, "nearby_mm": nearby_mm}


def _nearest(
    points: Float[Array, "N K 2"], of_points: Float[Array, "N K *any"], cells: Float[Array, "h w 2"]
) -> tuple[Float[Array, "N h w"], Float[Array, "N h w *any"]]:
    """Distance in mm from each cell to the nearest point, and what belongs to that point. NaN points do not count.

    One point after the other: all distances at once, and a choice among them, take five times as long on a CPU.
    """
    nearest_px = jnp.full((len(points), *cells.shape[:2]), jnp.inf)
    chosen = jnp.full((*nearest_px.shape, *of_points.shape[2:]), jnp.nan)
    for k in range(points.shape[1]):
        distance_px = jnp.linalg.norm(cells[None] - points[:, k, None, None], axis=-1)
        nearer = distance_px < nearest_px
        nearest_px = jnp.where(nearer, distance_px, nearest_px)
        expand = nearer.reshape(nearer.shape + (1,) * (of_points.ndim - 2))
        chosen = jnp.where(expand, of_points[:, k, None, None], chosen)
    return PIXEL_MM * nearest_px, chosen


def _corner_loss(
    offsets: Float[Array, "N h w 4 2"], corners: Float[Array, "N h w 4 2"], voting: Array, cells: Float[Array, "h w 2"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean Huber loss of the voting cells' offsets, quadratic below 1 mm, and the mean distance in mm.

    `corners` are the true ones and `cells` the cells' centres, in pixels; corners are NaN where not known.
    """
    known = voting & jnp.isfinite(corners).all(-1)
    true = jnp.where(known[..., None], (corners - cells[None, :, :, None]) * PIXEL_MM / OFFSET_MM, 0.0)
    wrong = jnp.where(known[..., None], offsets - true, 0.0)
    distance = jnp.sqrt((wrong**2).sum(-1) + 1e-8)
    num_known = 1 + jnp.sum(known, dtype=jnp.float32)
    loss = jnp.where(known, optax.huber_loss(distance, delta=0.1) * 10, 0.0).sum() / num_known
    return loss, jnp.where(known, distance, 0.0).sum() / num_known * OFFSET_MM


def optimiser(num_steps: int, learning_rate: float = 3e-3) -> optax.GradientTransformation:
    """AdamW with a one-cycle cosine."""
    schedule = optax.cosine_onecycle_schedule(num_steps, learning_rate, pct_start=0.15, div_factor=10)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=1e-3))


def init(key: jax.Array, network: nn.Module, example: jax.Array, num_steps: int) -> TrainState:
    """A fresh state of a network that takes what `example` is one of."""
    variables = dict(network.init(key, example, train=False))
    return TrainState(jnp.zeros((), jnp.int32), variables, optimiser(num_steps).init(variables["params"]))


@partial(jax.jit, static_argnames=("loss_of", "num_steps", "batch_size", "learning_rate"), donate_argnums=(2,))
def train_step(
    loss_of: LossOf,
    key: jax.Array,
    state: TrainState,
    data: Any,
    weights: Float[Array, "examples"],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float = 3e-3,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step on random views of random examples, which depend on the run's key and the step alone.

    Args:
        loss_of: from a key, the network's variables, the data and the numbers of some examples to their loss, with the
            new variables that are no parameters, and parts of the loss by name.
        key, state: of the run; the state is donated.
        data, weights: every example, and how often it is drawn.
        num_steps, batch_size, learning_rate: of the whole run, with the rate at its peak.

    Returns:
        The next state, and the loss with its parts.
    """
    key = jax.random.fold_in(key, state.step)
    draw, augment = jax.random.split(key)
    numbers = jax.random.categorical(draw, jnp.log(weights), shape=(batch_size,))

    def of_params(params):
        return loss_of(augment, state.variables | {"params": params}, data, numbers)

    (loss, (new, parts)), gradient = jax.value_and_grad(of_params, has_aux=True)(state.variables["params"])
    updates, moments = optimiser(num_steps, learning_rate).update(gradient, state.optimiser, state.variables["params"])
    params = optax.apply_updates(state.variables["params"], updates)
    return TrainState(state.step + 1, {"params": params} | new, moments), {"loss": loss} | parts


def loss_of_crops(
    key: jax.Array, variables: dict[str, Any], data: Crops, numbers: jax.Array
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The loss of `BodyNet` on random crops of some slices."""
    chosen = jax.tree.map(lambda array: array[numbers], data)
    crops = jax.vmap(random_crop)(jax.random.split(key, len(numbers)), chosen)
    (heat, far, near), new = BodyNet().apply(variables, crops.image, train=True, mutable=["batch_stats"])
    loss, parts = detector_loss(heat, far, near, crops)
    return loss, (dict(new), parts)
