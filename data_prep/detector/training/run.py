"""A training of the detectors, from scans with masks, slices with marks and phantoms to one file of weights.

There are five of them, each trained without one fifth of the patients (`cross_fitting`). The network that finds bodies
is trained in two halves: on masks and phantoms, and then also on the marked slices, with the corners that the network
of the first half gives them. The network that looks at endplates learns from masks and phantoms only: where nobody has
drawn a body, nobody knows where its endplates end.

An interrupted run continues where it stopped. What a step sees depends on the seed, the fold and the step alone, so it
ends in the same weights.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data_prep.dataset.workers import workers
from data_prep.detector import weights
from data_prep.detector.network import PATCH_SHAPE, BodyNet, EndplateNet
from data_prep.detector.training import material
from data_prep.detector.training.calibration import calibrated
from data_prep.detector.training.cross_fitting import NUM_FOLDS
from data_prep.detector.training.endplates import endplates_of, loss_of_patches
from data_prep.detector.training.marked import SPIDER, SUDIRMAN, MarkedSlice, spider_slices, sudirman_slices
from data_prep.detector.training.material import is_of, name_of
from data_prep.detector.training.step import LossOf, init, loss_of_crops, train_step
from data_prep.detector.weights import BODIES, ENDPLATES
from spinejax.errors import SpinejaxError
from spinejax.files.arrays import write_arrays
from spinejax.files.atomic import write_atomically
from spinejax.parallel import runtime

_SAVE_EVERY = 100
_MEMORY = 0.98  # weight of the old running average at each step
_MASKED, _DRAWN = "masked.npz", "drawn.npz"
_CITATIONS = {
    SPIDER: "J. W. van der Graaf et al., Lumbar spine segmentation in MR images: a dataset and a public benchmark, "
    "Scientific Data 11, 264 (2024), doi:10.1038/s41597-024-03090-w; data doi:10.5281/zenodo.10159290, CC BY 4.0; "
    "level points of the Lumbar Coordinate Dataset, CC BY 4.0",
    SUDIRMAN: "S. Sudirman et al., Lumbar Spine MRI Dataset, doi:10.17632/k57fr854j2; boxes of LSMA-PQR, "
    "doi:10.17632/p3r4xd2488.1; both CC BY 4.0",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run's weights depend on, besides the data."""

    steps: int = 5000  # of the network that finds bodies; 0 keeps that of the weights to begin from
    first_half: float = 0.4  # fraction of the steps before the marked slices take part
    batch_size: int = 8
    learning_rate: float = 3e-3
    phantoms: int = 150
    shares: tuple[float, float, float] = (0.4, 0.2, 0.4)  # of crops: scans with masks, phantoms, marked slices
    endplate_steps: int = 0  # 0: four fifths of `steps`, or 4,000 if the networks that find bodies are kept
    endplate_batch_size: int = 64
    endplate_shares: tuple[float, float] = (0.75, 0.25)  # of patches: scans with masks, phantoms
    seed: int = 0  # of weights, phantoms, crops and patches

    def __post_init__(self):
        if not self.endplate_steps:
            object.__setattr__(self, "endplate_steps", max(1, 4 * self.steps // 5) if self.steps else 4000)
        sizes = (self.batch_size, self.endplate_steps, self.endplate_batch_size, self.phantoms + 1, self.seed + 1)
        if self.steps == 1 or min(self.steps + 1, *sizes) < 1 or min(*self.shares, *self.endplate_shares) <= 0:
            raise SpinejaxError(f"{self}: expected 2 steps or more, or 0, crops of 1 or more, and shares above 0.")


def train_detector(
    spider: Path | None,
    out: Path,
    recipe: Recipe,
    *,
    sudirman: Path | None = None,
    begin: Path | None = None,
    series: str = "t2_SPACE",
    num_workers: int = 1,
    tell: Callable[[str], None],
) -> None:
    """Train the detectors and write their weights.

    Args:
        spider: a folder with SPIDER's `images/` and `masks/`, and perhaps the `level_points.csv` of its slices. Without
            it, one detector is trained on phantoms alone.
        out: the weights, in .npz. The state of an interrupted run is in the folder `<out>.training`.
        recipe: the settings.
        sudirman: a folder with Sudirman's `images/` and `boxes.csv`.
        begin: weights to start from, with the whole learning rate schedule; None for random ones. Each detector starts
            from the one that has not seen its fold either. With no `steps`, what finds bodies stays as it is there.
        series: of the scans with masks.
        num_workers: number of detectors trained at the same time, each in a process of its own.
        tell: called with a line of progress from time to time.

    Raises:
        SpinejaxError: there is nothing to train on, a file cannot be read, or an earlier run had other settings.
    """
    if spider is None and not recipe.phantoms:
        raise SpinejaxError("Nothing to train on: give --spider ROOT, --phantoms N or both.")
    if begin is None and not recipe.steps:
        raise SpinejaxError("--steps 0: expected --begin WEIGHTS, whose networks for bodies are kept.")
    runtime.set_up()
    work = out.with_suffix(".training")
    work.mkdir(parents=True, exist_ok=True)
    stacks = [] if spider is None else material.stacks_of(spider, series)
    marked = ([] if spider is None else spider_slices(spider)) + ([] if sudirman is None else sudirman_slices(sudirman))
    sources = material.digest([path for pair in stacks for path in pair] + [one.path for one in marked])
    began = None if begin is None else weights.weights_sum(begin)
    _refuse_other_settings(work / "recipe.json", {**asdict(recipe), "sources": sources, "begin": began})
    masked = material.kept(work / _MASKED, lambda: material.of_stacks(stacks, tell))
    drawn = material.kept(work / _DRAWN, lambda: material.of_phantoms(recipe.phantoms, recipe.seed, tell))
    patients = sorted({*masked.patients, *(name_of(one) for one in marked)})
    folds = range(NUM_FOLDS) if patients else range(1)
    train_one, say = (_train_one, tell) if num_workers == 1 else (_train_apart, _print)
    with workers(min(num_workers, len(folds)), None) as run_all:
        members = list(run_all(partial(train_one, work, recipe, marked, begin, say), folds))
    provenance = {
        "recipe": asdict(recipe),
        "began_from": None if begin is None else json.loads(begin.with_suffix(".json").read_text()),
        "sources_sha256": sources,
        "masked_slices": len(masked.patients),
        "phantom_slices": len(drawn.patients),
        "marked_slices": len(marked),
        "folds": [[patient for patient in patients if is_of(fold, patient)] for fold in folds],
        "trained_on": ["phantoms of data_prep.phantom"] * (recipe.phantoms > 0)
        + [_CITATIONS[source] for source in (SPIDER, SUDIRMAN) if any(one.startswith(source) for one in patients)],
    }
    weights.save(out, members, provenance)
    if marked:
        with workers(num_workers, None) as run_all:
            together, each = calibrated(out, marked, stacks, tell, run_all)
        fitted = {"all": asdict(together), "members": [asdict(one) for one in each]}
        weights.describe(out, {**weights.provenance(out), "calibrations": fitted})


def _train_one(
    work: Path,
    recipe: Recipe,
    marked: Sequence[MarkedSlice],
    begin: Path | None,
    tell: Callable[[str], None],
    fold: int,
) -> dict[str, Any]:
    """The networks of one fold, by what they look at."""
    folder = work / f"fold-{fold}"
    folder.mkdir(exist_ok=True)
    tell = partial(_tell_with, tell, f"detector {fold + 1}")
    key = jax.random.fold_in(jax.random.key(recipe.seed), fold)
    begun = {} if begin is None else weights.load(begin)[fold % len(weights.load(begin))]
    bodies = _train_bodies(key, work, folder, recipe, marked, begun.get(BODIES), tell, fold)
    slices = [material.read(work / name).without(fold) for name in (_MASKED, _DRAWN)]
    together, weight = material.joined(slices, recipe.endplate_shares)
    data = endplates_of(jax.tree.map(np.asarray, together))
    endplates = _fit(
        *(loss_of_patches, jax.random.fold_in(key, 2), EndplateNet(), jnp.zeros((1, *PATCH_SHAPE))),
        *(data, weight[data.rows], begun.get(ENDPLATES)),
        num_steps=recipe.endplate_steps,
        batch_size=recipe.endplate_batch_size,
        learning_rate=recipe.learning_rate,
        path=folder / "endplates.npz",
        tell=tell,
    )
    return {BODIES: bodies, ENDPLATES: endplates}


def _train_bodies(
    key: jax.Array,
    work: Path,
    folder: Path,
    recipe: Recipe,
    marked: Sequence[MarkedSlice],
    begin: dict[str, Any] | None,
    tell: Callable[[str], None],
    fold: int,
) -> dict[str, Any]:
    """Both halves of the training of the network that finds bodies."""
    if not recipe.steps:
        assert begin is not None  # noqa: S101
        return begin

    def half(key, files, begin, num_steps, path) -> dict[str, Any]:
        data, weight = material.joined([material.read(file).without(fold) for file in files], recipe.shares)
        return _fit(
            *(loss_of_crops, key, BodyNet(), jnp.zeros((1, 32, 32, 3)), data, weight, begin),
            num_steps=num_steps,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            path=path,
            tell=tell,
        )

    first_steps = max(1, round(recipe.first_half * recipe.steps))
    files = [work / _MASKED, work / _DRAWN]
    first = half(key, files, begin, first_steps, folder / "first.npz")
    mine = [one for one in marked if not is_of(fold, name_of(one))]
    if mine:
        files.append(folder / "marked.npz")
        material.kept(files[-1], lambda: material.of_marked(first, mine, tell))
    return half(jax.random.fold_in(key, 1), files, first, recipe.steps - first_steps, folder / "second.npz")


def _train_apart(*arguments) -> dict[str, Any]:
    """`_train_one` in a process of its own, in which JAX has not been set up."""
    runtime.set_up()
    return _train_one(*arguments)


def _fit(
    loss_of: LossOf,
    key: jax.Array,
    network: nn.Module,
    example: jax.Array,
    data: Any,
    weight: jax.Array,
    begin: dict[str, Any] | None,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    path: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Run every step and return the running average of the variables, which is steadier than the last of them.

    Args:
        loss_of: as `train_step` takes it.
        key: of this part of the training.
        network, example: what is trained, and one of what it takes.
        data, weight: the examples, and how often each is drawn.
        begin: variables to start from; None for random ones.
        num_steps, batch_size, learning_rate: of this part.
        path: where the state is kept.
        tell: called with a line of progress.
    """
    state = init(key, network, example, num_steps)
    if begin is not None:
        state = state._replace(variables=jax.tree.map(jnp.asarray, begin))
    average = jax.tree.map(jnp.copy, state.variables)  # the state itself is donated
    if path.exists():
        state, average = _load(path, (state, average))
        tell(f"continues from step {int(state.step)}")
    data = jax.tree.map(jnp.asarray, data)
    step = partial(train_step, loss_of, key, num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate)
    start, first, seen = time.perf_counter(), int(state.step), []
    for number in range(first + 1, num_steps + 1):
        state, losses = step(state, data, weight)
        average = _averaged(average, state.variables, jnp.minimum(_MEMORY, number / (number + 10.0)))
        seen.append(losses)
        if number % _SAVE_EVERY == 0 or number == num_steps:
            means = {name: np.mean([float(part[name]) for part in seen]) for name in losses}
            if not np.isfinite(means["loss"]):
                raise SpinejaxError(f"step {number}: the loss is not finite. Lower the learning rate.")
            pace = (time.perf_counter() - start) / (number - first)
            losses_text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            tell(f"step {number} of {num_steps}: {losses_text}, {pace:.2f} s")
            seen = []
            leaves = jax.tree.leaves((state, average))
            write_arrays(path, {str(index): np.asarray(leaf) for index, leaf in enumerate(leaves)})
    return jax.tree.map(np.asarray, average)


@jax.jit
def _averaged(average: dict[str, Any], variables: dict[str, Any], memory: jax.Array) -> dict[str, Any]:
    return jax.tree.map(lambda old, new: memory * old + (1 - memory) * new, average, variables)


def _load(path: Path, like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as arrays:
        return jax.tree.unflatten(tree, [jnp.asarray(arrays[str(index)]) for index in range(len(leaves))])


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # in a process of its own: the caller's way to tell cannot be sent there


def _tell_with(tell: Callable[[str], None], name: str, line: str) -> None:
    tell(f"{name}: {line}")


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SpinejaxError(f"{path.parent}: holds a run with different settings. Remove it, or give another --out.")
    write_atomically(path, lambda part: part.write_text(json.dumps(settings, allow_nan=False) + "\n"))
