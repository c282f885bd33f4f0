"""Training as pure functions over arrays: the state, a step, an evaluation, and the plateau rule (paper, Sect. 4)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt16

from spinejax.config import Config
from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE
from spinejax.network import appearance, losses, views
from spinejax.network.spinenet import SpineNet
from spinejax.network.views import View, ViewRanges
from spinejax.parallel.layout import Layout
from spinejax.tasks import UNLABELLED, Task

ClassWeights = Mapping[str, jax.Array | np.ndarray]
Metrics = dict[str, Float[Array, ""]]

DISCS_AT_ONCE = 64
"""Discs whose windows a device draws together. XLA for TPUs makes the matrices of 64 discs inside the product; those of
128 it first writes to memory, all 15 GB of them."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes from step to step; arrays only.

    Args:
        step: int32[]. Steps taken.
        params: the network's weights.
        constants: what the network carries but does not learn: `slice_mean`.
        momentum: the optimiser's state.
        plateau: optax's record of the validation error; its `scale` multiplies the learning rate.
        skipped: int32[]. Steps in a row, up to the last one, whose gradient was NaN or infinite.
        average: the running average of the weights, like `params`; empty without `Config.average_weights`.
    """

    step: Any
    params: dict
    constants: dict
    momentum: optax.OptState
    plateau: Any
    skipped: Any
    average: dict = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is evaluated with, and what is saved as its weights."""
        return {"params": self.average or self.params, "constants": self.constants}


def make_model(config: Config, tasks: Sequence[Task]) -> SpineNet:
    """The network that a run's options describe."""
    return SpineNet(
        tasks=tuple(tasks),
        branch_point=config.model_branch_point(),
        width=config.width,
        dropout=config.dropout,
        dtype=jnp.dtype(config.dtype),
        initialiser=config.initialiser,
        fill_slices=config.fill_slices,
    )


def init(key: jax.Array, model: SpineNet, config: Config, slice_mean: Float[Array | np.ndarray, "9"]) -> TrainState:
    """A new run's state. The key decides the initial weights; `slice_mean` is the training set's mean of each slice.

    Raises:
        SpinejaxError: `config.freeze` names a layer that the network does not have, or leaves none to learn.
    """
    variables = jax.jit(model.init)(key, jnp.zeros((1, *WINDOW_SHAPE)))
    _check_frozen(variables["params"], config.freeze)
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        constants={"slice_mean": jnp.asarray(slice_mean, jnp.float32)},
        momentum=make_optimiser(config).init(variables["params"]),
        plateau=make_plateau(config).init(variables["params"]),
        skipped=jnp.int32(0),
        average=jax.tree.map(jnp.copy, variables["params"]) if config.average_weights else {},
    )


def initialise_from(state: TrainState, params: Mapping) -> tuple[TrainState, list[str]]:
    """A new run's state, with another network's weights wherever name and shape are the same.

    Args:
        state: from `init`.
        params: the other network's weights. `slice_mean` is not copied, because it belongs to the data set.

    Returns:
        The state, and the layers with the other network's weights, `trunk/conv1` and so on.

    Raises:
        SpinejaxError: not one weight fits.
    """
    new, loaded = (flax.traverse_util.flatten_dict(tree) for tree in (state.params, params))
    fitting = {path: leaf for path, leaf in loaded.items() if path in new and new[path].shape == leaf.shape}
    # A bias alone may fit by accident: that of the last layer has a number for each grade, in a network of any width.
    fitting = {path: leaf for path, leaf in fitting.items() if (*path[:-1], "kernel") in fitting}
    if not fitting:
        raise SpinejaxError(
            "--init-from: none of that run's weights fits this network by name and shape. Does its --width differ?"
        )
    initialised = {path: np.asarray(leaf, new[path].dtype) for path, leaf in fitting.items()}
    params = flax.traverse_util.unflatten_dict(new | initialised)
    state = state.replace(params=params, average=params if state.average else {})
    return state, sorted({"/".join(path[:-1]) for path in initialised})


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """SGD's velocity with momentum, and weight decay on weights: v ← µv + (g + λw). A step is then w ← w − ηv.

    Of a frozen layer g is zero (`update`), and so is λ: it keeps its weights, bit for bit.
    """

    def decays(params: dict) -> dict:
        frozen = _is_frozen(params, config.freeze)
        return jax.tree.map_with_path(lambda path, frozen: path[-1].key == "kernel" and not frozen, frozen)

    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask=decays), optax.trace(config.momentum))


def make_plateau(config: Config) -> optax.GradientTransformationExtraArgs:
    """The rule that lowers the learning rate. It gets the validation error once per evaluation, not per step."""
    return optax.contrib.reduce_on_plateau(factor=config.plateau_factor, patience=config.plateau_patience)


def is_over(state: TrainState, config: Config) -> bool:
    """Whether the error has plateaued once more after the last decay."""
    num_decays = np.log(float(state.plateau.scale)) / np.log(config.plateau_factor)
    return round(num_decays) > config.num_decays


def train_step(
    key: jax.Array,
    state: TrainState,
    batch: Mapping[str, jax.Array | np.ndarray],
    class_weights: ClassWeights,
    *,
    model: SpineNet,
    config: Config,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of SGD on one global batch, with a random view of each disc.

    If the loss or a gradient is NaN or infinite, the step is skipped: it counts, but leaves weights and momentum
    unchanged.

    Args:
        key: the run's key. A step's randomness is derived from it and `state.step`.
        state: donated to the new state.
        batch: from `data.batches`.
        class_weights: by task name, from `losses.class_weights`; those for each source need the batch's `source`.
        model, config: the network and the run's options.
        layout: how the new state is divided over the devices, with the network from `layout.on(model)`; None leaves it
            to JAX.

    Returns:
        The new state, and the step's metrics: `loss`, `loss/<task>`, `gradient_norm` and `skipped`, the number of
        skipped steps in a row up to this one.
    """
    # Two programs, because XLA for CPUs would fuse the resampling into the convolutions that read its result, and
    # compute it several times over: one program takes 1.7 times as long as these two. Elsewhere one program saves
    # writing the windows to memory.
    step = _in_several_programs if jax.default_backend() == "cpu" else whole_step
    return step(key, state, batch, class_weights, model=model, config=config, layout=layout)


def _in_several_programs(key, state, batch, class_weights, *, config, layout=None, **options):
    how = {"ranges": config.views, "dtype": config.dtype, "layout": layout}
    windows = draw_windows(key, state.step, batch["volume"], **how)
    if config.contrast or config.blur:
        windows = change_looks(key, state.step, windows, contrast=config.contrast, blur=config.blur, layout=layout)
    options |= {"config": config, "layout": layout, "sources": batch.get("source")}
    return update(key, state, windows, batch["labels"], class_weights, **options)


whole_step = jax.jit(_in_several_programs, static_argnames=("model", "config", "layout"), donate_argnames="state")
"""`train_step` as one program."""


@functools.partial(jax.jit, static_argnames=("ranges", "dtype", "layout"))
def draw_windows(
    key: jax.Array,
    step: Int[Array, ""],
    volumes: UInt16[Array, "N 192 320 15"],
    *,
    ranges: ViewRanges,
    dtype: str = "float32",
    layout: Layout | None = None,
) -> Float[Array, "N 112 224 9"]:
    """A window of each disc through its own random view, decided by the key, the step and its index in the batch.

    `dtype` is the network's, as for `views.take`; `layout` divides the discs over devices, None leaves them on one.
    """
    take = functools.partial(_take_each, dtype=jnp.dtype(dtype))
    each_its_own = layout.by_disc(take) if layout else take
    keys = _keys_of_discs(key, step, len(volumes))
    return each_its_own(volumes, jax.vmap(functools.partial(views.sample, ranges=ranges))(keys))


def _take_each(volumes: jax.Array, chosen: View, *, dtype) -> jax.Array:
    """One device's windows, a group at a time."""
    take = jax.vmap(functools.partial(views.take, dtype=dtype))
    windows = []
    for start in range(0, len(volumes), DISCS_AT_ONCE):
        group = slice(start, start + DISCS_AT_ONCE)
        windows.append(take(volumes[group], View(*(leaf[group] for leaf in chosen))))
    return jnp.concatenate(windows)


@functools.partial(jax.jit, static_argnames=("contrast", "blur", "layout"))
def change_looks(
    key: jax.Array,
    step: Int[Array, ""],
    windows: Float[Array, "N 112 224 9"],
    *,
    contrast: float,
    blur: float,
    layout: Layout | None = None,
) -> Float[Array, "N 112 224 9"]:
    """The windows, each with its own random contrast and blur, decided like its view.

    `contrast` and `blur` are as for `appearance.sample`, `layout` as for `draw_windows`.
    """

    def change(windows: jax.Array, drawn: appearance.Appearance) -> jax.Array:
        windows = jax.vmap(appearance.with_contrast)(windows, drawn.contrast) if contrast else windows
        return jax.vmap(appearance.softened)(windows, drawn.blur) if blur else windows

    each_its_own = layout.by_disc(change) if layout else change
    keys = jax.vmap(functools.partial(jax.random.fold_in, data=1))(_keys_of_discs(key, step, len(windows)))
    return each_its_own(windows, jax.vmap(functools.partial(appearance.sample, contrast=contrast, blur=blur))(keys))


@functools.partial(jax.jit, static_argnames=("model", "config", "layout"), donate_argnames="state")
def update(
    key: jax.Array,
    state: TrainState,
    windows: Float[Array, "N 112 224 9"],
    labels: Int[Array, "N T"],
    class_weights: ClassWeights,
    *,
    model: SpineNet,
    config: Config,
    layout: Layout | None = None,
    sources: Int[Array, " N"] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of SGD on windows: `train_step` without the views. A missing label is `UNLABELLED`."""
    _, dropout_key = _keys(key, state.step)
    label = _by_task(labels, model.tasks)

    num_labelled = {name: (each != UNLABELLED).sum() for name, each in label.items()}

    def loss(params, windows, label, sources, part_of=None):
        frozen = _is_frozen(params, config.freeze)
        params = jax.tree.map(lambda leaf, frozen: jax.lax.stop_gradient(leaf) if frozen else leaf, params, frozen)
        variables = {"params": params, "constants": state.constants}
        rngs = {"dropout": dropout_key}
        logits = cast(dict, model.apply(variables, windows, train=True, rngs=rngs, part_of=part_of))
        weights = class_weights, dict(config.task_weights)
        return losses.multi_task_loss(logits, label, *weights, config.soft_labels, num_labelled, sources)

    loss_and_gradients = jax.value_and_grad(loss, has_aux=True)
    if config.microbatches == 1:
        (total, by_task), gradients = loss_and_gradients(state.params, windows, label, sources)
    else:
        num_devices = layout.mesh.size if layout else 1
        places = jnp.arange(len(windows))
        parts = jax.tree.map(
            functools.partial(_in_parts, num=config.microbatches, num_devices=num_devices),
            (windows, label, sources, places),
        )
        (total, by_task), gradients = _summed(
            lambda part: loss_and_gradients(state.params, *part[:3], (len(windows), part[3])), parts
        )
    norm = optax.tree.norm(gradients)
    good = jnp.isfinite(total) & jnp.isfinite(norm)  # the norm is finite only if every gradient is
    if_good = functools.partial(jax.tree.map, functools.partial(jnp.where, good))
    _, momentum = make_optimiser(config).update(gradients, state.momentum, state.params)
    momentum = _written_first(if_good(momentum, state.momentum))
    velocity = optax.tree.get(momentum, "trace")
    rate = config.learning_rate * state.plateau.scale
    params = if_good(jax.tree.map(lambda weight, v: weight - rate * v, state.params, velocity), state.params)
    skipped = jnp.where(good, 0, state.skipped + 1)
    metrics = {"loss": total, "gradient_norm": norm, "skipped": skipped.astype(jnp.float32)}
    metrics |= {f"loss/{name}": value for name, value in by_task.items()}
    average = if_good(_averaged(state, params, config), state.average) if config.average_weights else {}
    state = state.replace(step=state.step + 1, params=params, momentum=momentum, skipped=skipped, average=average)
    return layout.constrain(state) if layout else state, metrics


def _in_parts(array: jax.Array, *, num: int, num_devices: int) -> jax.Array:
    """(N, …) → (num, N / num, …): each part has discs of every device, so that none moves."""
    parts = array.reshape(num_devices, num, -1, *array.shape[1:])
    return parts.swapaxes(0, 1).reshape(num, -1, *array.shape[1:])


def _summed(function: Callable, parts: Any) -> Any:
    """The sum of a function's results over parts along the leading axis, one of which is in memory at a time."""
    like = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), nothing, parts)[0]


@functools.partial(jax.jit, static_argnames=("model",))
def eval_step(
    variables: Mapping, batch: Mapping[str, jax.Array | np.ndarray], *, model: SpineNet
) -> dict[str, Int[Array, "_ _"]]:
    """Task name → confusion counts of one batch on the identity view, of its valid and labelled discs.

    Rows are labels, columns predicted grades. Counts of batches add up.
    """
    windows = jax.vmap(lambda volume: views.crop(volume, views.identity()))(batch["volume"])
    logits = cast(dict, model.apply(variables, windows))
    labels = _by_task(batch["labels"], model.tasks)
    counts = {}
    for name, scores in logits.items():
        counted = batch["valid"] & (labels[name] != UNLABELLED)
        grade = jnp.where(counted, labels[name], 0)
        empty = jnp.zeros((scores.shape[1],) * 2, jnp.int32)
        counts[name] = empty.at[grade, jnp.argmax(scores, axis=1)].add(counted.astype(jnp.int32))
    return counts


def _averaged(state: TrainState, params: dict, config: Config) -> dict:
    """The running average after a step. Its first steps count like a plain mean, so that it forgets the start."""
    kept = jnp.minimum(config.average_weights, (state.step + 1) / (state.step + 10))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, state.average, params)


def evaluated(state: TrainState, error: float, config: Config) -> TrainState:
    """The state after an evaluation: the plateau rule has seen its error."""
    return state.replace(plateau=_seen(state.plateau, np.float32(error), config=config))


@functools.partial(jax.jit, static_argnames="config")  # one program: its operations one by one take milliseconds
def _seen(plateau, error: jax.Array, *, config: Config):
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies an integer count with a float
        return make_plateau(config).update({}, plateau, value=error)[1]


def _keys(key: jax.Array, step: jax.Array | np.ndarray) -> jax.Array:
    """The keys of a step's views and of its dropout."""
    return jax.random.split(jax.random.fold_in(key, step))


def _keys_of_discs(key: jax.Array, step: jax.Array | np.ndarray, num: int) -> jax.Array:
    """A key for each disc of a batch, by its place there."""
    view_key, _ = _keys(key, step)
    return jax.vmap(functools.partial(jax.random.fold_in, view_key))(jnp.arange(num))


def _written_first(tree):
    """The tree, on CPUs written to memory before anything reads it.

    XLA for CPUs would otherwise compute the velocity twice, for itself and for the weights,
    with a copy of both.
    """
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def _is_frozen(params: Mapping, names: Sequence[str]) -> dict:
    """Whether each weight belongs to a layer, or to a stack of layers, that `names` lists."""

    def is_frozen(path: Sequence, _) -> bool:
        place = "/".join(part.key for part in path)
        return any(place.startswith(f"{name}/") for name in names)

    return jax.tree.map_with_path(is_frozen, params)


def _check_frozen(params: Mapping, names: Sequence[str]) -> None:
    layers = ["/".join(path[:-1]) for path in flax.traverse_util.flatten_dict(params) if path[-1] == "kernel"]
    for name in names:
        if not any(f"{layer}/".startswith(f"{name}/") for layer in layers):
            raise SpinejaxError(f"--freeze {name}: no such layer. The network has {', '.join(layers)}.")
    if all(jax.tree.leaves(_is_frozen(params, names))):
        raise SpinejaxError(f"--freeze {' '.join(names)}: no layer is left to learn.")


def _by_task(labels: jax.Array | np.ndarray, tasks: Sequence[Task]) -> dict[str, jax.Array]:
    return {task.name: jnp.asarray(labels[:, column]) for column, task in enumerate(tasks)}
