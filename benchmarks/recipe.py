"""What each part of the recipe of the network that ships brings: one change at a time, and what was left out.

    python -m benchmarks.recipe --weights OUT_OF_BENCHMARKS_WEIGHTS --spider ROOT --sudirman ROOT --out DIR

All networks learn from the same patients, those of folds 2 to 4 of `benchmarks.weights`; one in eight of these chooses
the epoch. The patients of folds 0 and 1 judge the variants. So a choice made by this table leaves the figures of folds
2 to 4 untouched. It writes `recipe.json` and `recipe.md`, the table of docs/results.md: each variant's difference from
the base, over patients. Two networks of the base, which differ in the seed alone, show what is chance.

Finished parts are kept: after an interruption, start the same command again.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from scipy import stats

from benchmarks.graded_folds import group, predictions, show
from benchmarks.own_side import own_sides, point_in_stacks
from benchmarks.running import require_trained, run_script, start
from data_prep.dataset.folds import write_split
from data_prep.dataset.pseudonyms import load_or_make_key
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.sources.pooled import patients_of, splits_of
from spinejax.commands import train
from spinejax.config import PRESETS
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import require_option
from spinejax.files.atomic import write_atomically
from spinejax.files.json_files import write_json
from spinejax.inference import predict
from spinejax.metrics import grading
from spinejax.network import losses
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import filled
from spinejax.parallel import devices, runtime
from spinejax.tasks import UNLABELLED, Task
from spinejax.training import checkpoint, train_step

JUDGES = (0, 1)
"""Folds whose patients judge the variants."""
POOLED = PRESETS["pooled"][1]
BASE, OTHER_SEED, SPIDER_ALONE = "base", "another seed", "SPIDER alone"
SPIDER_TASKS = (
    *("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic"),
    *("bulging", "herniation", "spondylolisthesis"),
)
"""The tasks that SPIDER's gradings label."""
MEASURES = {
    "Pfirrmann, %": ("pfirrmann", grading.mean_per_class_accuracy),
    "within ±1, %": ("pfirrmann", grading.within_one),
    "κ": ("pfirrmann", grading.kappa),
    "narrowing, %": ("narrowing", grading.mean_per_class_accuracy),
    "upper endplate, %": ("upper_endplate", grading.mean_per_class_accuracy),
    "lower endplate, %": ("lower_endplate", grading.mean_per_class_accuracy),
    "Modic, %": ("modic", grading.mean_per_class_accuracy),
}
_TURNED_EPOCHS = 20
_IN_PLANE = ((slice(None), None, None), (None, slice(None), None))
"""Indices that lay an array along a window's height, and along its width."""
GROUPS = ("SPIDER T2", "SPIDER T1", "Sudirman T2")

Graded = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
Patches = Sequence[tuple[Any, str, Callable]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train and judge variants of the recipe."""

    weights: Path
    """The `--out` of `benchmarks.weights`: its data set, its key and its run on phantoms."""
    spider: Path
    """ROOT of SPIDER, as for `benchmarks.weights`."""
    sudirman: Path
    """ROOT of the Lumbar Spine MRI Dataset, as for `benchmarks.weights`."""
    out: Path
    """Folder of the runs and the table."""
    only: tuple[str, ...] = ()
    """Variants to train now; all of them if none is named. The table has what is finished."""


# The variants --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of the recipe.

    Args:
        options: of `train.py`, that differ from the preset's.
        discs: makes the training discs out of the base's.
        patches: put in place of functions of the library while the network is trained: module, name, function.
        turned_first: the trunk first learns, from the phantoms' weights on, how discs without grades are turned.
        uncontradicted: labels that networks of other patients contradict do not teach.
        teachers: variants, trained before, whose networks' mean probabilities teach beside the labels.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    discs: Callable[[DataSet, Path], DataSet] = lambda data, weights: data
    patches: Patches = ()
    turned_first: bool = False
    uncontradicted: bool = False
    teachers: Sequence[str] = ()


def _contrasts(data: DataSet) -> np.ndarray:
    return np.array([data.manifest["scans"][scan]["contrast"] for scan in data.scan.tolist()])


def spider_alone(data: DataSet, weights: Path) -> DataSet:
    """No patient of Sudirman's teaches or chooses the epoch."""
    source = np.array([data.manifest["scans"][scan]["source"] for scan in data.scan.tolist()])
    data.split = np.where((source != "spider") & (data.split != "test"), "unused", data.split)
    return data


def t2_alone(data: DataSet, weights: Path) -> DataSet:
    """No T1 slice teaches or chooses the epoch."""
    data.split = np.where((_contrasts(data) == "t1") & (data.split != "test"), "unused", data.split)
    return data


def t1_without_pfirrmann(data: DataSet, weights: Path) -> DataSet:
    """T1 slices teach the other tasks: a disc's signal, of which the grade is made, is a matter of T2."""
    column = [task.name for task in data.tasks].index("pfirrmann")
    data.labels = data.labels.copy()
    data.labels[_contrasts(data) == "t1", column] = UNLABELLED
    return data


def by_source(data: DataSet, weights: Path) -> DataSet:
    """Training labels of Sudirman's patients, numbered after all grades: `_by_source_loss` has weights for each source.

    The class weights are then N / (C · n), over the grades of either source: its rare grades count like its frequent.
    """
    sources = np.array([data.manifest["scans"][scan]["source"] for scan in data.scan.tolist()])
    further = ((sources != "spider") & (data.split == "train"))[:, None] & (data.labels != UNLABELLED)
    data.labels = np.where(further, data.labels + [task.num_grades for task in data.tasks], data.labels)
    return data


class Turned(DataSet):
    """Discs without grades, some of them turned: the task is to tell how. Patients who judge are left out."""

    task = Task("turned", ("upright", "upside down", "back to front", "by 180°"))

    @classmethod
    def of(cls, data: DataSet) -> "Turned":
        """The discs of a data set that train or choose, each turned in a way of its own."""
        turned = cls(data.folder)
        turned.tasks = (cls.task,)
        turned.split = data.split
        turns = np.random.default_rng(0).integers(0, cls.task.num_grades, (len(data), 1))
        turned.labels = turns.astype(data.labels.dtype)
        return turned

    def volumes(self, rows, *, threads: int = 1) -> np.ndarray:
        """As `DataSet.volumes`, turned."""
        volumes = super().volumes(rows, threads=threads)
        for volume, (turn,) in zip(volumes, self.labels[rows], strict=True):
            volume[:] = volume[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1].copy()
        return volumes


class WithPhantoms(DataSet):
    """Real discs, and the training discs of phantoms with the labels that mean the same in both."""

    shared = ("pfirrmann", "upper_endplate", "lower_endplate")
    endplates = ("upper_endplate", "lower_endplate")

    @classmethod
    def added(cls, data: DataSet, weights: Path, *, tasks: Sequence[str] = shared) -> "WithPhantoms":
        """The real discs first, then the phantoms' as further training discs, which teach some tasks."""
        both = cls(data.folder)
        both._drawn = DataSet(weights / "phantoms")
        both._num_real, both._drawn_rows = len(data), both._drawn.rows("train")
        names, drawn_names = ([task.name for task in each.tasks] for each in (data, both._drawn))
        labels = np.full((len(both._drawn_rows), len(names)), UNLABELLED)
        for name in tasks:
            labels[:, names.index(name)] = both._drawn.labels[both._drawn_rows, drawn_names.index(name)]
        both.labels = np.concatenate([data.labels, labels])
        both.slices = np.concatenate([data.slices, both._drawn.slices[both._drawn_rows]])
        both.split = np.concatenate([data.split, np.repeat("train", len(labels))])
        return both

    def volumes(self, rows, *, threads: int = 1) -> np.ndarray:
        """As `DataSet.volumes`, of either kind."""
        real = rows < self._num_real
        volumes = super().volumes(np.where(real, rows, 0), threads=threads)
        volumes[~real] = self._drawn.volumes(self._drawn_rows[rows[~real] - self._num_real])
        return volumes


with_endplates = functools.partial(WithPhantoms.added, tasks=WithPhantoms.endplates)


def squared_distance(logits, labels, class_weights, softness: float = 0.0, num_labelled=None) -> jax.Array:
    """An ordinal loss: the squared difference of the cumulated probabilities of grades and of the label."""
    labelled = labels != UNLABELLED
    grade = jnp.where(labelled, labels, 0)
    target = jax.nn.one_hot(grade, logits.shape[1])
    distance = jnp.sum(jnp.square(jnp.cumsum(jax.nn.softmax(logits) - target, axis=1)), axis=1)
    # Twelve times the distance pulls about as hard as the log-loss does, which the other tasks keep.
    each = 12 * distance / (logits.shape[1] - 1) * jnp.asarray(class_weights)[grade]
    return jnp.sum(each, where=labelled) / _divisor(labels, num_labelled)


def _ordinal(logits, *options) -> jax.Array:
    loss = squared_distance if logits.shape[1] > 2 else _task_loss
    return loss(logits, *options)


def bounded_loss(logits, labels, class_weights, softness: float = 0.0, num_labelled=None) -> jax.Array:
    """A loss that forgives what looks mislabelled: generalised cross entropy (Zhang and Sabuncu 2018, eq. 6).

    With an exponent of a half it is at most 2, however sure the network is that a label is wrong.
    """
    labelled = labels != UNLABELLED
    grade = jnp.where(labelled, labels, 0)
    of_label = jnp.take_along_axis(jax.nn.log_softmax(logits), grade[:, None], axis=1)[:, 0]
    each = 2 * (1 - jnp.exp(of_label / 2)) * jnp.asarray(class_weights)[grade]
    return jnp.sum(each, where=labelled) / _divisor(labels, num_labelled)


def _by_source_loss(logits, labels, class_weights, softness: float = 0.0, num_labelled=None) -> jax.Array:
    """The losses of both sources' discs, each with the class weights of its source (`by_source`)."""
    num_grades = logits.shape[1]
    if len(class_weights) == num_grades:  # SPIDER alone labels this task
        return _task_loss(logits, labels, class_weights, softness, num_labelled)
    further = labels >= num_grades
    divisor = (labels != UNLABELLED).sum() if num_labelled is None else num_labelled
    return sum(
        _task_loss(logits, jnp.where(of_source, labels - first, UNLABELLED), weights, softness, divisor)
        for of_source, first, weights in (
            (~further, 0, class_weights[:num_grades]),
            (further, num_grades, class_weights[num_grades:]),
        )
    )


def _divisor(labels, num_labelled) -> jax.Array:
    """As `losses.task_loss` has it: a batch's labelled discs."""
    return jnp.maximum(jnp.sum(labels != UNLABELLED) if num_labelled is None else num_labelled, 1).astype(jnp.float32)


def _shares(num: int) -> jax.Array:
    """Mixup's share of each disc of a batch beside its partner's: quantiles of Beta(0.2, 0.2), from a half up.

    A batch is in random order, so that a share fixed by the place in it is a random share.
    """
    return jnp.asarray(stats.beta(0.2, 0.2).ppf(0.5 + (np.arange(num) + 0.5) / (2 * num)), jnp.float32)


def _mixed_windows(key, step, windows, **options) -> jax.Array:
    windows = _change_looks(key, step, windows, **options)
    share = _shares(len(windows))[:, None, None, None]
    return share * windows + (1 - share) * windows[::-1]


def _mixed_loss(logits, labels, class_weights, softness: float = 0.0, num_labelled=None) -> jax.Array:
    """The loss of each disc's label and of its partner's, by their shares."""
    share = _shares(len(labels))

    def weighted(labels, share):
        each = jax.vmap(lambda *one: _task_loss(*(part[None] for part in one), jnp.asarray(class_weights), softness))
        return jnp.sum(share * each(logits, labels))

    return (weighted(labels, share) + weighted(labels[::-1], 1 - share)) / _divisor(labels, num_labelled)


def _worse_windows(key, step, windows, **options) -> jax.Array:
    """What scanners and exports do to a scan, at random: a bias field, thicker slices, fewer grey levels."""
    windows = filled(_change_looks(key, step, windows, **options))
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), 2), len(windows))
    return _worse(keys, windows)


@jax.jit
@jax.vmap
def _worse(key, window) -> jax.Array:
    bias_key, profile_key, levels_key = jax.random.split(key, 3)
    # A coil's field: the exponential of a polynomial of degree 2, up to a factor of about 1.5 towards an edge.
    height, width = (jnp.linspace(-1, 1, size)[axes] for size, axes in zip(window.shape, _IN_PLANE, strict=False))
    terms = (height, width, height * width, height**2, width**2)
    sizes = jax.random.uniform(bias_key, (len(terms),), minval=-0.2, maxval=0.2)
    window = window * jnp.exp(sum(size * term for size, term in zip(sizes, terms, strict=True)))
    # A slice that is excited over more than its own place: up to half of it comes from its neighbours.
    wide = jnp.concatenate([window[..., :1], window, window[..., -1:]], axis=-1)
    share = jax.random.uniform(profile_key, maxval=0.5)
    window = (1 - share) * window + share / 2 * (wide[..., :-2] + wide[..., 2:])
    # Eight bits for the whole scan leave a disc between 32 and 256 of them.
    levels = jnp.floor(2 ** jax.random.uniform(levels_key, minval=5, maxval=8))
    return jnp.round(jnp.clip(window, 0, 1) * levels) / levels


def _mirrored_windows(key, step, windows, **options) -> jax.Array:
    """Every other disc of a batch upside down."""
    windows = _change_looks(key, step, windows, **options)
    return windows.at[::2].set(windows[::2, ::-1])


def _mirrored_loss(logits, labels, *options) -> tuple:
    """What is upper in a disc that is upside down is lower."""
    upper, lower = labels["upper_endplate"], labels["lower_endplate"]
    swapped = {"upper_endplate": upper.at[::2].set(lower[::2]), "lower_endplate": lower.at[::2].set(upper[::2])}
    return _multi_task_loss(logits, labels | swapped, *options)


_task_loss, _multi_task_loss, _change_looks = losses.task_loss, losses.multi_task_loss, train_step.change_looks
_class_weights = losses.class_weights
ORDINAL = ((losses, "task_loss", _ordinal),)
MIRRORED = ((train_step, "change_looks", _mirrored_windows), (losses, "multi_task_loss", _mirrored_loss))

TEACHERS = (BASE, OTHER_SEED, "ordinal loss", "ordinal loss, another seed", "blur")

VARIANTS = {
    BASE: Variant(),
    OTHER_SEED: Variant({"seed": 1}),
    "T1 without Pfirrmann": Variant(discs=t1_without_pfirrmann),
    SPIDER_ALONE: Variant({"tasks": SPIDER_TASKS}, discs=spider_alone),
    "hard labels": Variant({"soft_labels": 0.0}),
    "mixup": Variant(patches=((train_step, "change_looks", _mixed_windows), (losses, "task_loss", _mixed_loss))),
    "ordinal loss": Variant(patches=ORDINAL),
    "ordinal loss, another seed": Variant({"seed": 1}, patches=ORDINAL),
    "bounded loss": Variant(patches=((losses, "task_loss", bounded_loss),)),
    "turned first": Variant(turned_first=True),
    "phantoms along": Variant(discs=WithPhantoms.added),
    "phantoms for endplates": Variant(discs=with_endplates),
    "phantoms for endplates, mirrored": Variant(discs=with_endplates, patches=MIRRORED),
    "mirrored": Variant(patches=MIRRORED),
    "phantoms along, mirrored": Variant(discs=WithPhantoms.added, patches=MIRRORED),
    "T2 alone": Variant(discs=t2_alone),
    "five tasks": Variant({"tasks": ("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic")}),
    "no contrast": Variant({"contrast": 0.0}),
    "greys unchanged": Variant({"contrast": 0.0, "views": dataclasses.replace(POOLED.views, intensity=0.0)}),
    "no average": Variant({"average_weights": 0.0}),
    "blur": Variant({"blur": 0.5}),
    "from nothing": Variant({"init_from": None}),
    "worse scans": Variant(patches=((train_step, "change_looks", _worse_windows),)),
    "class weights by source": Variant(discs=by_source, patches=((losses, "task_loss", _by_source_loss),)),
    "contradicted labels left out": Variant(uncontradicted=True),
    "distilled from five": Variant(teachers=TEACHERS),
    "branch at fc6": Variant({"branch_point": "fc6"}),
    "branch at conv4": Variant({"branch_point": "conv4"}),
    "three times as long": Variant({"epochs": 120, "plateau_patience": 15}),
    "twice as wide": Variant({"width": 0.25, "init_from": None}),
    "twice as wide, another seed": Variant({"width": 0.25, "init_from": None, "seed": 1}),
}


# Training and grading ------------------------------------------------------------------------------------------------


def main(arguments: Arguments) -> None:
    """Train and grade the variants, then print the table of those that are finished."""
    runtime.set_up()
    for name in arguments.only:
        require_option(name in VARIANTS, "only", name, f"one of {', '.join(VARIANTS)}")
    discs = inner_split(arguments)
    for name in arguments.only or VARIANTS:
        train_and_grade(name, discs, arguments)
    data = DataSet(discs)
    graded = {name: predictions(folder(arguments.out, name)) for name in VARIANTS if is_graded(arguments.out, name)}
    content = {"variants": {name: differences(data, each, graded[BASE]) for name, each in graded.items()}}
    content["from their grades"] = from_grades(data, graded)
    content["own side"] = {name: own_sides([folder(arguments.out, name)]) for name in graded}
    write_json(arguments.out / "recipe.json", content)
    text = markdown(content)
    write_atomically(arguments.out / "recipe.md", lambda path: path.write_text(text))
    Console(width=200).print(text, markup=False, highlight=False)


def folder(out: Path, name: str) -> Path:
    """The folder of a variant."""
    return out / name.replace(",", "").replace(" ", "-")


def is_graded(out: Path, name: str) -> bool:
    """Whether a variant is finished."""
    return (folder(out, name) / "own_side.json").is_file()


def inner_split(arguments: Arguments) -> Path:
    """The data set of `benchmarks.weights`, with the patients of the judging folds as its test split."""
    out = arguments.out / "discs"
    if not (out / "manifest.json").is_file():
        data = DataSet(arguments.weights / "discs")
        key = load_or_make_key(arguments.weights / "discs.key", arguments.weights / "discs")
        everyone = patients_of(arguments.spider, arguments.sudirman, key)
        patients = {name: everyone[name] for name in np.unique(data.patient).tolist()}
        splits = splits_of(patients)
        splits |= {name: "test" for name, patient in patients.items() if fold_of(*patient) in JUDGES}
        write_split(data, out, splits, {"judges": list(JUDGES)})
    return out


def train_and_grade(name: str, discs: Path, arguments: Arguments) -> None:
    """Train one variant, grade the judging patients with 54 views, and point in their stacks."""
    variant, here = VARIANTS[name], folder(arguments.out, name)
    if is_graded(arguments.out, name):
        return
    run, graded = here / "run", here / "graded"
    if not (run / "export").is_dir():
        options = {"init_from": arguments.weights / "phantom-run", "cache": "none"} | dict(variant.options)
        data, patches = variant.discs(DataSet(discs), arguments.weights), variant.patches
        if variant.teachers:
            for teacher in variant.teachers:
                train_and_grade(teacher, discs, arguments)
            data, patches = distilling(data, [folder(arguments.out, teacher) / "run" for teacher in variant.teachers])
        with patched(patches):
            if variant.uncontradicted:
                data = without_contradicted(data, here, options)
            if variant.turned_first:
                options["init_from"] = _turned_run(here / "turned", data, options)
            train.run(dataclasses.replace(POOLED, **options), data, run, lambda step: False)
        require_trained(run)
    if not (graded / "predictions.csv").is_file():
        run_script("evaluate.py", "--checkpoint", run, "--data", discs, "--split", "test", "--tta", "--out", graded)
    point_in_stacks(DataSet(discs), here)


def _turned_run(run: Path, data: DataSet, options: Mapping[str, Any]) -> Path:
    """The run in which the trunk learns how discs are turned."""
    if not (run / "export").is_dir():
        turned = {"tasks": (Turned.task.name,), "epochs": _TURNED_EPOCHS}
        train.run(dataclasses.replace(POOLED, **options, **turned), Turned.of(data), run, lambda step: False)
        require_trained(run)
    return run


def without_contradicted(data: DataSet, here: Path, options: Mapping[str, Any]) -> DataSet:
    """The data set without the training labels that a network contradicts which has not seen the patient.

    Three networks learn from two thirds of the patients each, the judging ones left out, and grade the last third. How
    many labels are left out is written to `contradicted.json`.
    """
    # As many steps as the base takes, at half its rate, with which a network of fewer patients graded all discs alike.
    longer = {"epochs": 3 * POOLED.epochs // 2, "plateau_patience": 3 * POOLED.plateau_patience // 2}
    options = {**options, **longer, "learning_rate": POOLED.learning_rate / 2}
    thirds = np.unique(data.patient, return_inverse=True)[1] % 3
    labels, found = data.labels.copy(), {}
    probabilities = {task.name: np.full((len(data), task.num_grades), np.nan) for task in data.tasks}
    for third in range(3):
        run, others = here / f"without-third-{third}", DataSet(data.folder)
        others.split = np.where((thirds == third) & (data.split != "test"), "unused", data.split)
        if not (run / "export").is_dir():
            train.run(dataclasses.replace(POOLED, **options), others, run, lambda step: False)
            require_trained(run)
        for rows, graded in graded_by(run, data, np.flatnonzero((thirds == third) & (data.split == "train"))):
            for name, each in graded.items():
                probabilities[name][rows] = each
    for column, task in enumerate(data.tasks):
        rows = np.flatnonzero((data.split == "train") & (labels[:, column] != UNLABELLED))
        wrong = contradicted(labels[rows, column], probabilities[task.name][rows])
        found[task.name] = {"labels": len(rows), "contradicted": int(wrong.sum())}
        labels[rows[wrong], column] = UNLABELLED
    write_json(here / "contradicted.json", found)
    data.labels = labels
    return data


def distilling(data: DataSet, runs: Sequence[Path]) -> tuple[DataSet, Patches]:
    """Training by labels and by the mean probabilities of several networks, half and half (Hinton et al. 2015).

    The networks' own patients are those that it learns from, and what they say of a task counts for unlabelled discs
    too. So that the loss knows which disc it is about, training labels carry its row: 16 (row + 1) + label + 1.
    """
    rows = data.rows("train")
    means = {task.name: np.zeros((len(data), task.num_grades), np.float32) for task in data.tasks}
    for run in runs:
        for some, probabilities in graded_by(run, data, rows):
            for name, each in probabilities.items():
                means[name][some] += each / len(runs)
    data.labels = data.labels.astype(np.int32)
    data.labels[rows] += 1 + 16 * (rows[:, None] + 1)

    def class_weights(labels, tasks):
        return _class_weights(labels % 16 - 1, tasks)

    def loss(logits, labels, weights, task_weights, softness, num_labelled):
        total, by_task = 0.0, {}
        for name, each in logits.items():
            label, told = labels[name] % 16 - 1, jnp.asarray(means[name])[labels[name] // 16 - 1]
            of_disc = -jnp.sum(told * jax.nn.log_softmax(each), axis=1)  # the teachers have balanced the grades already
            by_task[name] = (_task_loss(each, label, weights[name], softness) + of_disc.mean()) / 2
            total += task_weights.get(name, 1.0) * by_task[name]
        return total, by_task

    return data, ((losses, "class_weights", class_weights), (losses, "multi_task_loss", loss))


def graded_by(run: Path, data: DataSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Some of the rows at a time, and each task's probabilities for them by a run's network, on one view."""
    model, variables = checkpoint.load(run)
    batches = eval_batches(data, rows, [], batch_size=64)
    for some, probabilities, _ in predict.predict(with_cpu_kernels(model), variables, batches, devices.make_mesh()):
        yield some, probabilities


def contradicted(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Which labels a network contradicts: it is confident of another grade (confident learning, Northcutt et al. 2021).

    It is confident of a grade if that is as probable as on average over the discs with this label; of several, of the
    most probable one. Where there are three grades or more, a neighbour of the label does not contradict it: the soft
    labels allow for that already.

    Args:
        labels: int[N].
        probabilities: float[N, C], of a network that has not seen the labels.

    Returns:
        bool[N].
    """
    num_grades = probabilities.shape[1]
    thresholds = np.ones(num_grades)
    for grade in np.unique(labels):
        thresholds[grade] = probabilities[labels == grade, grade].mean()
    confident = np.where(probabilities >= thresholds, probabilities, 0)
    distance = np.abs(confident.argmax(1) - labels)
    return confident.any(1) & (distance >= min(2, num_grades - 1))


@contextlib.contextmanager
def patched(functions: Patches) -> Iterator[None]:
    """A variant's functions are in place of the library's while the block runs."""
    jax.clear_caches()  # what was traced before has the library's own functions in it
    with contextlib.ExitStack() as patches:
        for where, what, by in functions:
            patches.enter_context(mock.patch.object(where, what, by))
        yield


# The table -----------------------------------------------------------------------------------------------------------


def differences(data: DataSet, graded: Graded, base: Graded) -> dict[str, Any]:
    """Group → measure → n, the variant's value, and how much better it is than the base's; JSON."""
    found: dict[str, Any] = {}
    groups = np.array([group(*data.manifest["scans"][scan].values()) for scan in data.scan.tolist()])
    for name in GROUPS:
        for words, (task, statistic) in MEASURES.items():
            labels = data.labels[:, [each.name for each in data.tasks].index(task)].astype(np.int64)
            rows = np.flatnonzero((data.split == "test") & (groups == name) & (labels != UNLABELLED))
            if not len(rows):
                continue
            keys = [*zip(data.scan[rows].tolist(), data.level[rows].tolist(), strict=True)]
            num_grades = len(base[keys[0]][task])
            variant, reference = (
                grading.patient_confusions(
                    labels[rows], np.argmax([each[key][task] for key in keys], axis=1), data.patient[rows], num_grades
                )
                for each in (graded, base)
            )
            found.setdefault(name, {})[words] = {
                "n": len(rows),
                "value": float(statistic(variant.sum(0))),
                "better than the base by": grading.difference(statistic, variant, reference).to_json(),
            }
    return found


def from_grades(data: DataSet, graded: Mapping[str, Graded]) -> dict[str, Any]:
    """The mean probabilities of several networks, and another choice of the grade, compared like a variant."""
    ten_tasks = set(next(iter(graded[BASE].values())))
    same_tasks = [name for name, each in graded.items() if set(next(iter(each.values()))) == ten_tasks]
    sets = {f"{BASE} and {OTHER_SEED}": [BASE, OTHER_SEED], f"all {len(same_tasks)} with ten tasks": same_tasks}
    found = {BASE: graded[BASE]}
    found |= {
        words: mean_of([graded[name] for name in names]) for words, names in sets.items() if set(names) <= set(graded)
    }
    found |= {f"{words}, least expected distance": by_distance(each) for words, each in found.items()}
    return {words: differences(data, each, graded[BASE]) for words, each in found.items() if words != BASE}


def mean_of(graded: Sequence[Graded]) -> Graded:
    """The mean of several networks' probabilities."""
    return {
        key: {task: np.mean([each[key][task] for each in graded], axis=0).tolist() for task in given}
        for key, given in graded[0].items()
    }


def by_distance(graded: Graded) -> Graded:
    """Certainty of the grade that is fewest grades away from the true one, on average over the probabilities."""

    def decided(probabilities: Sequence[float]) -> list[float]:
        (grade,) = grading.decide(np.array([probabilities]), "distance")
        return np.eye(len(probabilities))[grade].tolist()

    return {key: {task: decided(each) for task, each in given.items()} for key, given in graded.items()}


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of docs/results.md: one for each group, a row for each variant."""
    lines = ["", "| hotspots' energy at the own side, % | upper endplate | lower endplate |", "|---|---|---|"]
    for words, tasks in content["own side"].items():
        lines.append(f"| {words} | {' | '.join(show(tasks[task]['own_side']) for task in sorted(tasks)[::-1])} |")
    return difference_tables(content["variants"] | content["from their grades"]) + "\n".join(lines) + "\n"


def difference_tables(variants: Mapping[str, Any]) -> str:
    """For each group of discs the base's figures, and how much better each variant's are."""
    lines: list[str] = []
    for name, measures in variants[BASE].items():
        lines += ["", f"| {name} (n = {measures['Pfirrmann, %']['n']}) | {' | '.join(measures)} |"]
        lines.append("|---" * (len(measures) + 1) + "|")
        for words, found in variants.items():
            cells = [_cell(found[name][each], each, is_base=words == BASE) for each in measures if each in found[name]]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n"


def _cell(found: Mapping[str, Any], measure: str, *, is_base: bool) -> str:
    statistic = "" if measure.endswith("%") else "kappa"
    if is_base:
        return f"{found['value']:.2f}" if statistic else f"{100 * found['value']:.1f}"
    return show(found["better than the base by"], statistic)


if __name__ == "__main__":
    start("recipe", Arguments, main)
