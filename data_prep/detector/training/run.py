"""A training of the detectors, from scans with masks, slices with marks and phantoms to one file of weights.

There are five networks, each trained without one fifth of the patients (`cross_fitting`), in two halves: on masks and
phantoms, and then also on the marked slices, with the corners that the network of the first half gives them.

An interrupted run continues where it stopped. What a step sees depends on the seed, the fold and the step alone, so it
ends in the same weights.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.dataset.workers import workers
from data_prep.detector import weights
from data_prep.detector.training.augment import Crops, stack
from data_prep.detector.training.calibration import calibrated
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.detector.training.marked import SPIDER, SUDIRMAN, MarkedSlice, spider_slices, sudirman_slices
from data_prep.detector.training.pseudo_labels import pseudo_labelled
from data_prep.detector.training.step import init, train_step
from data_prep.detector.training.truth import Slice, slices_with_truth
from data_prep.phantom.hard_phantom import hard_phantom
from data_prep.phantom.phantom import phantom
from data_prep.read.metaimage import read_mha
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of
from spinejax.parallel import runtime

_SAVE_EVERY = 100
_MEMORY = 0.98  # weight of the old running average at each step
_PHANTOM_SLICES = 4  # slices used of each phantom
_MIDDLE_MM = 15.0  # they are this near to the middle one: at the flanks a body's outline is another
_HARD_PHANTOMS = 0.6  # fraction of the phantoms with unusual anatomy, contrast or field of view
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

    steps: int = 5000
    first_half: float = 0.4  # fraction of the steps before the marked slices take part
    batch_size: int = 8
    learning_rate: float = 3e-3
    phantoms: int = 150
    shares: tuple[float, float, float] = (0.4, 0.2, 0.4)  # of crops: scans with masks, phantoms, marked slices
    seed: int = 0  # of weights, phantoms and crops

    def __post_init__(self):
        if self.steps < 2 or self.batch_size < 1 or self.phantoms < 0 or self.seed < 0 or min(self.shares) <= 0:
            raise SpinejaxError(f"{self}: expected 2 steps or more, crops of 1 or more, and shares above 0.")


class Material(NamedTuple):
    """Slices to learn from, and the patient of each: "spider/5". Phantoms have none: ""."""

    slices: Crops
    patients: np.ndarray

    def without(self, fold: int) -> Crops:
        """The slices of all patients but those of a fold."""
        return jax.tree.map(lambda array: array[[not _is_of(fold, patient) for patient in self.patients]], self.slices)


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
            from the one that has not seen its fold either.
        series: of the scans with masks.
        num_workers: number of detectors trained at the same time, each in a process of its own.
        tell: called with a line of progress from time to time.

    Raises:
        SpinejaxError: there is nothing to train on, a file cannot be read, or an earlier run had other settings.
    """
    if spider is None and not recipe.phantoms:
        raise SpinejaxError("Nothing to train on: give --spider ROOT, --phantoms N or both.")
    runtime.set_up()
    work = out.with_suffix(".training")
    work.mkdir(parents=True, exist_ok=True)
    stacks = [] if spider is None else _stacks(spider, series)
    marked = ([] if spider is None else spider_slices(spider)) + ([] if sudirman is None else sudirman_slices(sudirman))
    sources = _digest([path for pair in stacks for path in pair] + [one.path for one in marked])
    began = None if begin is None else weights.weights_sum(begin)
    _refuse_other_settings(work / "recipe.json", {**asdict(recipe), "sources": sources, "begin": began})
    masked = _kept(work / _MASKED, lambda: _masked(stacks, tell))
    drawn = _kept(work / _DRAWN, lambda: _drawn(recipe, tell))
    patients = sorted({*masked.patients, *(_name(one) for one in marked)})
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
        "folds": [[patient for patient in patients if _is_of(fold, patient)] for fold in folds],
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
    """Both halves of the training of one fold's detector."""
    folder = work / f"fold-{fold}"
    folder.mkdir(exist_ok=True)
    tell = partial(_tell_with, tell, f"detector {fold + 1}")
    first_steps = max(1, round(recipe.first_half * recipe.steps))
    key = jax.random.fold_in(jax.random.key(recipe.seed), fold)
    start = None if begin is None else weights.load(begin)[fold % len(weights.load(begin))]
    files = [work / _MASKED, work / _DRAWN]
    first = _fit(key, files, fold, recipe, first_steps, start, folder / "first.npz", tell)
    mine = [one for one in marked if not _is_of(fold, _name(one))]
    if mine:
        files.append(folder / "marked.npz")
        _kept(files[-1], lambda: _taught(first, mine, tell))
    key = jax.random.fold_in(key, 1)
    return _fit(key, files, fold, recipe, recipe.steps - first_steps, first, folder / "second.npz", tell)


def _train_apart(*arguments) -> dict[str, Any]:
    """`_train_one` in a process of its own, in which JAX has not been set up."""
    runtime.set_up()
    return _train_one(*arguments)


def _fit(
    key: jax.Array,
    files: Sequence[Path],
    fold: int,
    recipe: Recipe,
    num_steps: int,
    begin: dict[str, Any] | None,
    path: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Run every step and return the running average of the variables, which is steadier than the last of them.

    Args:
        key: of this half.
        files: the slices: with masks, phantoms, and marked ones if they take part. Each has its share of crops.
        fold: whose patients are left out.
        recipe, num_steps: the settings, and the steps of this half.
        begin: variables to start from; None for random ones.
        path: where the state is kept.
        tell: called with a line of progress.
    """
    state = init(key, num_steps)
    if begin is not None:
        state = state._replace(variables=jax.tree.map(jnp.asarray, begin))
    average = jax.tree.map(jnp.copy, state.variables)  # the state itself is donated
    if path.exists():
        state, average = _load(path, (state, average))
        tell(f"continues from step {int(state.step)}")
    data, weight = _joined([_read(file).without(fold) for file in files], recipe.shares)
    step = partial(
        train_step, key, num_steps=num_steps, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate
    )
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
            weights.write_arrays(path, {str(index): np.asarray(leaf) for index, leaf in enumerate(leaves)})
    return jax.tree.map(np.asarray, average)


@jax.jit
def _averaged(average: dict[str, Any], variables: dict[str, Any], memory: jax.Array) -> dict[str, Any]:
    return jax.tree.map(lambda old, new: memory * old + (1 - memory) * new, average, variables)


def _joined(parts: Sequence[Crops], shares: Sequence[float]) -> tuple[Crops, jax.Array]:
    """All slices, and how often each is drawn: every part that has any in proportion to its share."""
    filled = [(part, share) for part, share in zip(parts, shares, strict=False) if len(part.kinds)]
    shape = np.max([part.image.shape[1:3] for part, _ in filled], axis=0)

    def padded(array):
        if array.ndim < 3 or array.shape[1:3] == tuple(shape) or array.dtype != np.uint8:
            return array
        missing = [(0, 0), *((0, size - n) for size, n in zip(shape, array.shape[1:3], strict=True))]
        return np.pad(array, missing + [(0, 0)] * (array.ndim - 3))

    data = jax.tree.map(lambda *arrays: jnp.asarray(np.concatenate(list(map(padded, arrays)))), *(p for p, _ in filled))
    weight = np.concatenate([np.full(len(part.kinds), share / len(part.kinds)) for part, share in filled])
    return data, jnp.asarray(weight / weight.sum(), jnp.float32)


def _load(path: Path, like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as arrays:
        return jax.tree.unflatten(tree, [jnp.asarray(arrays[str(index)]) for index in range(len(leaves))])


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # in a process of its own: the caller's way to tell cannot be sent there


def _tell_with(tell: Callable[[str], None], name: str, line: str) -> None:
    tell(f"{name}: {line}")


# What is learned from --------------------------------------------------------------------------------------------


def _name(one: MarkedSlice) -> str:
    return f"{one.source}/{one.patient}"


def _is_of(fold: int, patient: str) -> bool:
    return bool(patient) and fold_of(*patient.split("/", 1)) == fold


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SpinejaxError(f"{path.parent}: holds a run with different settings. Remove it, or give another --out.")
    write_atomically(path, lambda part: part.write_text(json.dumps(settings, allow_nan=False) + "\n"))


def _digest(paths: Iterable[Path]) -> str:
    """One SHA-256 over all files and their names."""
    lines = sorted(f"{path.parent.name}/{path.name} {sha256_of(path)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stacks(root: Path, series: str) -> list[tuple[Path, Path]]:
    """The images and masks to train on."""
    masks = sorted((root / "masks").glob(f"*_{series}.mha"))
    if not masks:
        raise SpinejaxError(f"--spider {root}: no masks/*_{series}.mha there.")
    return [(root / "images" / mask.name, mask) for mask in masks]


def _masked(stacks: Sequence[tuple[Path, Path]], tell: Callable[[str], None]) -> Material:
    slices: list[tuple[str, Slice]] = []
    for image, mask in stacks:
        patient = f"{SPIDER}/{mask.name.split('_')[0]}"
        made = slices_with_truth(read_mha(image, np.float32), read_mha(mask, np.uint8))
        slices += [(patient, one) for one in made]
    tell(f"{len(slices)} slices of {len(stacks)} scans with masks")
    return _material(slices)


def _drawn(recipe: Recipe, tell: Callable[[str], None]) -> Material:
    slices: list[tuple[str, Slice]] = []
    for patient in range(recipe.phantoms):
        draw = hard_phantom if patient < _HARD_PHANTOMS * recipe.phantoms else phantom
        drawn = draw(recipe.seed + 7, patient)
        count = drawn.scan.voxels.shape[2]
        away_mm = abs(np.arange(count) - (count - 1) / 2) * drawn.scan.spacing_mm[2]
        inner = np.flatnonzero(away_mm <= _MIDDLE_MM)
        chosen = np.random.default_rng(recipe.seed + patient).choice(inner, _PHANTOM_SLICES, replace=False)
        slices += [("", one) for one in slices_with_truth(drawn.scan, drawn.mask, sorted(chosen.tolist()))]
    tell(f"{len(slices)} slices of {recipe.phantoms} phantoms")
    return _material(slices)


def _taught(variables: dict[str, Any], marked: Sequence[MarkedSlice], tell: Callable[[str], None]) -> Material:
    slices = [(_name(one), made) for one in marked for made in pseudo_labelled(variables, [one])]
    tell(f"corners for {len(slices)} of {len(marked)} marked slices")
    return _material(slices)


def _material(slices: Sequence[tuple[str, Slice]]) -> Material:
    if not slices:
        none = np.zeros((0,), np.float32)
        return Material(Crops(*(none for _ in Crops._fields)), np.zeros((0,), "U1"))
    return Material(stack([one for _, one in slices]), np.array([patient for patient, _ in slices]))


def _kept(path: Path, make: Callable[[], Material]) -> Material:
    """Slices from a file, if an earlier run with these settings has written it; otherwise they are made and written."""
    if not path.exists():
        made = make()
        weights.write_arrays(path, {**made.slices._asdict(), "patients": made.patients})
    return _read(path)


def _read(path: Path) -> Material:
    with np.load(path, allow_pickle=False) as arrays:
        return Material(Crops(*(arrays[name] for name in Crops._fields)), arrays["patients"])
