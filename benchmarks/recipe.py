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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from rich.console import Console

from benchmarks.graded_folds import JUDGES, group, predictions
from benchmarks.own_side import own_sides, point_in_stacks
from benchmarks.running import require_trained, run_script, start
from benchmarks.tables import show, table
from benchmarks.variants import BASE, OTHER_SEED, POOLED, TEACHERS, VARIANTS, Patches, Turned, contradicted, taught
from data_prep.dataset.folds import write_split
from data_prep.dataset.pseudonyms import load_or_make_key
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.sources.pooled import patients_of, splits_of
from spinejax.commands import train
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import shard_name, write_shard
from spinejax.errors import require_option
from spinejax.files.atomic import write_atomically
from spinejax.files.json_files import write_json
from spinejax.inference import predict
from spinejax.metrics import grading
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.parallel import devices, runtime
from spinejax.tasks import UNLABELLED
from spinejax.training import checkpoint

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
GROUPS = ("SPIDER T2", "SPIDER T1", "Sudirman T2")

Graded = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Sources:
    """What all trainings learn from, and where they are."""

    weights: Path
    """The `--out` of `benchmarks.weights`: its data set, its key and its run on phantoms."""
    spider: Path
    """ROOT of SPIDER, as for `benchmarks.weights`."""
    sudirman: Path
    """ROOT of the Lumbar Spine MRI Dataset, as for `benchmarks.weights`."""
    out: Path
    """Folder of the runs and the table."""


@dataclasses.dataclass(frozen=True)
class Arguments(Sources):
    """Train and judge variants of the recipe."""

    only: tuple[str, ...] = ()
    """Variants to train now, after the base; all of them if none is named. The table has what is finished."""


# Training and grading ------------------------------------------------------------------------------------------------


def main(arguments: Arguments) -> None:
    """Train and grade the variants, then print the table of those that are finished."""
    runtime.set_up()
    for name in arguments.only:
        require_option(name in VARIANTS, "only", name, f"one of {', '.join(VARIANTS)}")
    discs = inner_split(arguments)
    for name in dict.fromkeys((BASE, *(arguments.only or VARIANTS))):
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


def inner_split(arguments: Sources) -> Path:
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


def train_and_grade(name: str, discs: Path, arguments: Sources) -> None:
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
        judging = written(variant.judged(DataSet(discs)), here / "discs") if variant.judged else discs
        run_script("evaluate.py", "--checkpoint", run, "--data", judging, "--split", "test", "--tta", "--out", graded)
    point_in_stacks(DataSet(discs), here)


def written(data: DataSet, folder: Path) -> Path:
    """The discs that judge, as a data set of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    discs = (data.disc(row, masks=False) for row in data.rows("test"))
    summary = write_shard(folder / shard_name(0, 1), discs, data.tasks, ())
    write_manifest(folder, [summary], data.tasks, {}, (), {"scans": data.manifest["scans"]})
    return folder


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
    # As many steps as the base takes, at half its rate: at its rate a network of fewer patients graded all discs alike.
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

    The teachers have learned from the same training patients.
    """
    rows = data.rows("train")
    means = {task.name: np.zeros((len(data), task.num_grades), np.float32) for task in data.tasks}
    for run in runs:
        for some, probabilities in graded_by(run, data, rows):
            for name, each in probabilities.items():
                means[name][some] += each / len(runs)
    return data, taught(data, means)


def graded_by(run: Path, data: DataSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Some of the rows at a time, and each task's probabilities for them by a run's network, on one view."""
    model, variables = checkpoint.load(run)
    batches = eval_batches(data, rows, [], batch_size=64)
    for some, probabilities, _ in predict.predict(with_cpu_kernels(model), variables, batches, devices.make_mesh()):
        yield some, probabilities


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
    sets = {
        f"{BASE} and {OTHER_SEED}": [BASE, OTHER_SEED],
        "the five teachers": TEACHERS,
        f"all {len(same_tasks)} with ten tasks": same_tasks,
    }
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
    own_side = table(
        ("hotspots' energy at the own side, %", "upper endplate", "lower endplate"),
        [
            (words, *(show(tasks[task]["own_side"]) for task in sorted(tasks)[::-1]))
            for words, tasks in content["own side"].items()
        ],
    )
    return difference_tables(content["variants"] | content["from their grades"]) + "\n" + own_side


def difference_tables(variants: Mapping[str, Any]) -> str:
    """For each group of discs the base's figures, and how much better each variant's are."""

    def row(words: str, found: Mapping[str, Any], measures: Mapping[str, Any]) -> list[str]:
        return [words, *(_cell(found[each], each, is_base=words == BASE) for each in measures if each in found)]

    return "\n".join(
        table(
            (f"{name} (n = {measures['Pfirrmann, %']['n']})", *measures),
            [row(words, found[name], measures) for words, found in variants.items()],
        )
        for name, measures in variants[BASE].items()
    )


def _cell(found: Mapping[str, Any], measure: str, *, is_base: bool) -> str:
    statistic = "" if measure.endswith("%") else "kappa"
    if is_base:
        return f"{found['value']:.2f}" if statistic else f"{100 * found['value']:.1f}"
    return show(found["better than the base by"], statistic)


if __name__ == "__main__":
    start("recipe", Arguments, main)
