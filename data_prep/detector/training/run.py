"""A training run of the detector, from SPIDER's stacks and phantoms to a file of weights.

An interrupted run continues where it stopped. What a step sees depends on the seed and the step alone, so it ends in
the same weights.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.detector import weights
from data_prep.detector.training.augment import Crops, stack
from data_prep.detector.training.step import init, train_step
from data_prep.detector.training.truth import Slice, development_patients, slices_with_truth
from data_prep.phantom.phantom import phantom
from data_prep.read.metaimage import read_mha
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically

_SAVE_EVERY = 50
_MEMORY = 0.98  # weight of the old running average at each step
_PHANTOM_SLICES = 4  # slices used of each phantom, away from its flanks
_SPIDER = (
    "J. W. van der Graaf et al., Lumbar spine segmentation in MR images: a dataset and a public benchmark, Scientific "
    "Data 11, 264 (2024), doi:10.1038/s41597-024-03090-w; data doi:10.5281/zenodo.10159290, CC BY 4.0"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run's weights depend on, besides the data."""

    steps: int = 12000
    batch_size: int = 8
    learning_rate: float = 3e-3
    phantoms: int = 120
    real_share: float = 0.65  # fraction of crops from real scans, if there are phantoms too
    seed: int = 0  # of weights, phantoms and crops

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.phantoms < 0 or self.seed < 0 or not 0 < self.real_share < 1:
            raise SpinejaxError(f"{self}: expected 1 step or more, crops of 1 or more, and a share between 0 and 1.")


def train_detector(
    spider: Path | None,
    out: Path,
    recipe: Recipe,
    *,
    begin: Path | None = None,
    series: str = "t2_SPACE",
    tell: Callable[[str], None],
) -> None:
    """Train and write the weights.

    Args:
        spider: a folder with SPIDER's `images/` and `masks/`, whose six development patients (`development_patients`)
            are left out. Without it, the detector trains on phantoms alone.
        out: the weights, in .npz. The state of an interrupted run is in the folder `<out>.training`.
        recipe: the settings.
        begin: weights to start from, with the whole learning rate schedule; None for random ones.
        series: of the real scans.
        tell: called with a line of progress from time to time.

    Raises:
        SpinejaxError: there is nothing to train on, a file cannot be read, or an earlier run had other settings.
    """
    if spider is None and not recipe.phantoms:
        raise SpinejaxError("Nothing to train on: give --spider ROOT, --phantoms N or both.")
    work = out.with_suffix(".training")
    work.mkdir(parents=True, exist_ok=True)
    began = None if begin is None else weights.weights_sum(begin)
    settings = {**asdict(recipe), "spider": spider is not None, "series": series, "begin": began}
    _refuse_other_settings(work / "recipe.json", settings)
    stacks, held_out = ([], []) if spider is None else _stacks(spider, series)
    data, num_real = _slices(work / "slices.npz", stacks, recipe, tell)
    num_drawn = len(data.kinds) - num_real
    real_share = recipe.real_share if num_real and num_drawn else float(num_real > 0)
    share_of_one = real_share / max(num_real, 1), (1 - real_share) / max(num_drawn, 1)
    shares = np.repeat(share_of_one, (num_real, num_drawn))
    average = _fit(data, shares, recipe, begin, work / "state.npz", tell)
    provenance = {
        "recipe": asdict(recipe),
        "began_from": None if begin is None else json.loads(begin.with_suffix(".json").read_text()),
        "real_slices": num_real,
        "phantom_slices": num_drawn,
        "development_patients_left_out": len(held_out),
        "trained_on": ["phantoms of data_prep.phantom"] * (num_drawn > 0) + [_SPIDER] * (num_real > 0),
    }
    weights.save(out, jax.tree.map(np.asarray, average), provenance)


def _fit(data: Crops, shares: np.ndarray, recipe: Recipe, begin: Path | None, path: Path, tell) -> dict[str, Any]:
    """Run every step and return the running average of the variables, which is steadier than the last of them."""
    key = jax.random.key(recipe.seed)
    state = init(key, recipe.steps)
    if begin is not None:
        state = state._replace(variables=jax.tree.map(jnp.asarray, weights.load(begin)))
    average = jax.tree.map(jnp.copy, state.variables)  # the state itself is donated
    if path.exists():
        state, average = _load(path, (state, average))
        tell(f"continues from step {int(state.step)}")
    data, weight = jax.tree.map(jnp.asarray, data), jnp.asarray(shares, jnp.float32)
    step = partial(
        train_step, key, num_steps=recipe.steps, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate
    )
    start, first, parts = time.perf_counter(), int(state.step), []
    for number in range(first + 1, recipe.steps + 1):
        state, losses = step(state, data, weight)
        average = _averaged(average, state.variables, jnp.minimum(_MEMORY, number / (number + 10.0)))
        parts.append(losses)
        if number % _SAVE_EVERY == 0 or number == recipe.steps:
            means = {name: np.mean([float(part[name]) for part in parts]) for name in losses}
            if not np.isfinite(means["loss"]):
                raise SpinejaxError(f"step {number}: the loss is not finite. Lower the learning rate.")
            pace = (time.perf_counter() - start) / (number - first)
            tell(f"step {number}: " + ", ".join(f"{n} {value:.3f}" for n, value in means.items()) + f", {pace:.2f} s")
            parts = []
            leaves = jax.tree.leaves((state, average))
            weights.write_arrays(path, {str(index): np.asarray(leaf) for index, leaf in enumerate(leaves)})
    return average


@jax.jit
def _averaged(average: dict[str, Any], variables: dict[str, Any], memory: jax.Array) -> dict[str, Any]:
    return jax.tree.map(lambda old, new: memory * old + (1 - memory) * new, average, variables)


def _load(path: Path, like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as arrays:
        return jax.tree.unflatten(tree, [jnp.asarray(arrays[str(index)]) for index in range(len(leaves))])


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SpinejaxError(f"{path.parent}: holds a run with different settings. Remove it, or give another --out.")
    write_atomically(path, lambda part: part.write_text(json.dumps(settings, allow_nan=False) + "\n"))


def _stacks(root: Path, series: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The images and masks to train on, and the patients that are held out."""
    masks = sorted((root / "masks").glob(f"*_{series}.mha"))
    if not masks:
        raise SpinejaxError(f"--spider {root}: no masks/*_{series}.mha there.")
    held_out = development_patients([mask.name.split("_")[0] for mask in masks])
    kept = [mask for mask in masks if mask.name.split("_")[0] not in held_out]
    return [(root / "images" / mask.name, mask) for mask in kept], held_out


def _slices(path: Path, stacks: list[tuple[Path, Path]], recipe: Recipe, tell) -> tuple[Crops, int]:
    """All slices, real ones first, and the number of real ones; from a file if an earlier run has written it."""
    if not path.exists():
        slices: list[Slice] = []
        for image, mask in stacks:
            slices += slices_with_truth(read_mha(image, np.float32), read_mha(mask, np.uint8))
        num_real = len(slices)
        tell(f"{num_real} slices of {len(stacks)} stacks")
        for patient in range(recipe.phantoms):
            drawn = phantom(recipe.seed + 7, patient)
            inner = np.arange(2, drawn.scan.voxels.shape[2] - 2)
            chosen = np.random.default_rng(recipe.seed + patient).choice(inner, _PHANTOM_SLICES, replace=False)
            slices += slices_with_truth(drawn.scan, drawn.mask, sorted(chosen.tolist()))
        tell(f"{len(slices) - num_real} slices of {recipe.phantoms} phantoms")
        weights.write_arrays(path, {**stack(slices)._asdict(), "num_real": np.array(num_real)})
    with np.load(path, allow_pickle=False) as arrays:
        return Crops(*(arrays[name] for name in Crops._fields)), int(arrays["num_real"])
