"""SPIDER graded: cross-validation over its official training patients.

    python -m benchmarks.spider --spider SPIDER --out RUNS

It makes the data set: every mid-sagittal T2 slice, with detected discs, and the T2 SPACE stacks, with masks. It trains
a network on phantoms, and from its weights one network per fold with the preset `spider`. It grades each fold's test
patients with 54 views, and writes `spider.json` and `spider.md`: the pooled test grades beside chance, a majority vote
and a logistic regression on simple intensities, fitted in the same folds. Finished parts are kept: after an
interruption, start the same command again. Options after `--` go to every fold's training.
"""

import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import intensity_baseline
from benchmarks.running import require_trained, run_script, start
from data_prep.dataset.folds import fold_of_patients, labels_by_patient
from spinejax import config, paper
from spinejax.config import PRESETS
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.files.atomic import write_atomically
from spinejax.geometry import central_window
from spinejax.inference import hotspots
from spinejax.metrics import grading, pointing
from spinejax.metrics.grading import Estimate, TaskResult
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.parallel import devices, runtime
from spinejax.report.tables import OTHER_DATA, percent
from spinejax.tasks import Task, select
from spinejax.training import checkpoint

PRESET = "spider"
NETWORK, REGRESSION, MAJORITY = "spinejax", "logistic regression", "majority vote"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Cross-validate on SPIDER."""

    spider: Path
    """ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv."""
    out: Path
    """Folder of the data sets, the runs and the tables."""
    folds: int = 5
    """Number of folds."""
    seed: int = 0
    """Seed of the folds and of the trainings."""
    init_from: Path | None = None
    """Run whose weights every fold starts from. Default: one is trained on phantoms in `out`."""
    options: tyro.conf.Positional[tuple[str, ...]] = ()
    """Options of every fold's training, after `--`."""


def main(arguments: Arguments) -> None:
    """Run every fold, then write the tables."""
    runtime.set_up()
    data = DataSet(spider_discs(arguments))
    start = arguments.init_from or phantom_run(arguments.out)
    tasks = select(data.tasks, PRESETS[PRESET][1].tasks)
    folds = [arguments.out / f"fold-{number}" for number in range(1, arguments.folds + 1)]
    for number, folder in enumerate(folds, 1):
        print(f"fold {number} of {arguments.folds}", flush=True)
        train_and_grade(f"{number}/{arguments.folds}", folder, start, arguments)
        point_in_stacks(data, tasks, folder)
    splits = [
        fold_of_patients(labels_by_patient(data), number, arguments.folds, seed=arguments.seed)
        for number in range(1, arguments.folds + 1)
    ]
    found = findings(data, tasks, folds, splits)
    text = markdown(found)
    content = as_json(found) | {"hotspots": own_sides(folds)}
    write_atomically(
        arguments.out / "spider.json",
        lambda path: path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"),
    )
    text += hotspot_lines(content["hotspots"])
    write_atomically(arguments.out / "spider.md", lambda path: path.write_text(text))
    Console(width=None if sys.stdout.isatty() else 200).print(text, markup=False, highlight=False)


# Runs ----------------------------------------------------------------------------------------------------------------


def spider_discs(arguments: Arguments) -> Path:
    """The data set of all official training patients."""
    discs = arguments.out / "discs"
    if not (discs / "manifest.json").is_file():
        prepare = ("-m", "data_prep", "spider", arguments.spider, "--series", "t2", "t2_SPACE", "--detect-missing")
        options = ("--slices", "native", "--subset", "training")  # native as in docs/results.md
        try:
            run_script(*prepare, *options, "--out", discs)
        except subprocess.CalledProcessError:  # some scans failed, and the others were written
            if not (discs / "manifest.json").is_file():
                raise
    return discs


def phantom_run(out: Path) -> Path:
    """The run on phantoms whose weights the folds start from."""
    discs, run = out / "phantoms", out / "phantom-run"
    if not (run / "export").is_dir():
        if not (discs / "manifest.json").is_file():
            run_script("-m", "data_prep", "phantom", "--out", discs, "--patients", 200, "--seed", 0)
        # The rate is never lowered: a network that has converged on phantoms takes longer to adapt.
        constant_rate = ("--epochs", 72, "--plateau-patience", 72)
        run_script("train.py", "quickstart", "--data", discs, "--workdir", run, *constant_rate)
        require_trained(run)
    return run


def train_and_grade(fold: str, folder: Path, start: Path, arguments: Arguments) -> None:
    """Train one fold's network and grade its test patients. Finished parts are skipped."""
    discs, run, graded = folder / "discs", folder / "run", folder / "graded"
    if (graded / "predictions.csv").is_file():
        return
    if not (discs / "manifest.json").is_file():
        source = arguments.out / "discs"
        run_script("-m", "data_prep", "fold", source, "--out", discs, "--fold", fold, "--seed", arguments.seed)
    run_script(
        *("train.py", PRESET, "--data", discs, "--workdir", run, "--init-from", start, "--seed", arguments.seed),
        *arguments.options,
    )
    require_trained(run)
    run_script("evaluate.py", "--checkpoint", run, "--data", discs, "--split", "test", "--tta", "--out", graded)


# Hotspots ------------------------------------------------------------------------------------------------------------


def point_in_stacks(data: DataSet, tasks: tuple[Task, ...], folder: Path) -> None:
    """Write `own_side.json`: where the endplate tasks' hotspots lie in the fold's test stacks, which have masks.

    Only discs that the network grades abnormal count. The abnormal score is traced back, over views as in training.
    """
    path = folder / "own_side.json"
    if path.is_file():
        return
    graded = predictions(folder)
    key_of_row = [*zip(data.scan, data.level, strict=True)]
    rows = np.array(
        [row for row, key in enumerate(key_of_row) if key in graded and data.mask("region", row).any()], np.int64
    )
    sided = [task for task in tasks if task.name.split("_")[0] in pointing.SIDES]
    shares: list[dict] = []
    if len(rows):
        model, variables = checkpoint.load(folder / "run")
        model = with_cpu_kernels(model)
        mesh = devices.make_mesh()
        method = hotspots.Method(ranges=config.load(folder / "run" / checkpoint.OPTIONS).views)
        grades = np.ones((len(data), len(model.tasks)), np.int64)
        batches = eval_batches(data, rows, [], batch_size=mesh.size)
        stream = hotspots.stream(jax.random.key(0), model, variables, batches, data.slices, grades, mesh, method=method)
        for batch_rows, batch_maps in stream:
            for row, maps in zip(batch_rows, batch_maps, strict=True):
                shares += shares_of_disc(data, int(row), sided, model.tasks, maps, graded[key_of_row[row]])
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(shares, indent=1, allow_nan=False) + "\n"))


def shares_of_disc(data: DataSet, row: int, sided, tasks, maps: np.ndarray, graded: Mapping) -> list[dict]:
    """One disc's share of energy on the task's own side, for each task of a side on which it is graded abnormal."""
    region = central_window(data.mask("region", row))
    return [
        {
            "task": task.name,
            "patient": str(data.patient[row]),
            "own_side": pointing.own_side(task.name, maps[tasks.index(task)], region),
        }
        for task in sided
        if np.argmax(graded[task.name]) > 0
    ]


def own_sides(folds: list[Path]) -> dict:
    """Task name → n and the mean share with its interval over patients, over all folds."""
    shares = [share for folder in folds for share in json.loads((folder / "own_side.json").read_text())]
    found = {}
    for name in sorted({share["task"] for share in shares}):
        own = [share for share in shares if share["task"] == name]
        values, patients = np.array([s["own_side"] for s in own]), np.array([s["patient"] for s in own])
        found[name] = {"n": len(own), "own_side": grading.mean_over_patients(values, patients).to_json()}
    return found


# Figures -------------------------------------------------------------------------------------------------------------


def predictions(folder: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(Scan, level) → task name → each grade's probability, for a fold's test discs."""
    found = {}
    with open(folder / "graded" / "predictions.csv", newline="") as file:
        for line in csv.DictReader(file):
            given: dict[str, list[float]] = {}
            for name, cell in line.items():
                task, told, _ = name.partition("_p_")
                if told:
                    given.setdefault(task, []).append(float(cell))
            found[line["scan"], line["level"]] = given
    return found


def findings(
    data: DataSet, tasks: tuple[Task, ...], folds: list[Path], splits: list[dict[str, str]]
) -> dict[str, dict[str, list[TaskResult]]]:
    """Group of discs ("all", "one slice", "stacks") → grader → the results of every task."""
    labels = np.stack([data.labels[:, data.tasks.index(task)].astype(np.int64) for task in tasks], axis=1)
    num_grades = {task.name: task.num_grades for task in tasks}
    features = intensity_baseline.all_features(data)
    given = {who: {t.name: np.full((len(data), t.num_grades), np.nan) for t in tasks} for who in GRADERS}
    for folder, split in zip(folds, splits, strict=True):
        split_of = np.array([split[str(patient)] for patient in data.patient])
        test, train = split_of == "test", split_of == "train"
        graded = predictions(folder)
        keys = zip(data.scan[test], data.level[test], strict=True)
        of_fold = {
            REGRESSION: intensity_baseline.probabilities(features, labels, num_grades, train),
            MAJORITY: intensity_baseline.majority(labels, num_grades, train),
        }
        per_disc = [graded[str(scan), str(level)] for scan, level in keys]
        for task in tasks:
            given[NETWORK][task.name][test] = [disc[task.name] for disc in per_disc]
            for who, probabilities in of_fold.items():
                given[who][task.name][test] = probabilities[task.name][test]
    one_slice = data.slices[:, 1] - data.slices[:, 0] == 1
    groups = {"all": np.ones(len(data), bool), "one slice": one_slice, "stacks": ~one_slice}
    return {
        group: {
            who: [
                grading.evaluate_task(task, labels[inside, column], by_task[task.name][inside], data.patient[inside])
                for column, task in enumerate(tasks)
            ]
            for who, by_task in given.items()
        }
        for group, inside in groups.items()
    }


GRADERS = (NETWORK, REGRESSION, MAJORITY)


def by_chance(result: TaskResult, statistic: str) -> Estimate:
    """The statistic of guessing each grade with the same probability."""
    number_of = result.task.num_grades
    near = [sum(abs(one - other) <= 1 for other in range(number_of)) / number_of for one in range(number_of)]
    value = {
        "mean_per_class_accuracy": 1 / number_of,
        "normal_abnormal_accuracy": 0.5,
        "within_one": float(np.average(near, weights=result.grade_n)),
        "kappa": 0.0,
    }[statistic]
    return Estimate(value, np.nan, np.nan)


def as_json(found: Mapping[str, Mapping[str, list[TaskResult]]]) -> dict:
    """The results as JSON, with fractions in [0, 1]."""
    return {
        group: {who: {result.task.name: result.to_json() for result in results} for who, results in graders.items()}
        for group, graders in found.items()
    }


def rows_of(result: TaskResult) -> list[tuple[str, str]]:
    """A task's rows of the table: each statistic's name in words, and in `TaskResult.estimates`."""
    rows = [("mean per-class accuracy, %", "mean_per_class_accuracy")]
    if result.task.num_grades > 2:
        return [*rows, ("within ±1, %", "within_one"), ("quadratic κ", "kappa")]
    return [*rows, ("accuracy, %", "normal_abnormal_accuracy")]


def markdown(found: Mapping[str, Mapping[str, list[TaskResult]]]) -> str:
    """The tables of docs/results.md."""
    every = found["all"]
    theirs = paper.table_2("conv5")
    lines = [f"| task | n | measure | {' | '.join(GRADERS)} | chance | paper |", "|---" * 8 + "|"]
    for place, result in enumerate(every[NETWORK]):
        same = len(paper.TABLE_1.get(result.task.name, ())) == result.task.num_grades
        for words, name in rows_of(result):
            cells = [show_interval(every[who][place].estimates[name], name) for who in GRADERS]
            chance = show_interval(by_chance(result, name), name).partition(" ")[0]
            published = theirs[result.task.name][0] if same and name == "mean_per_class_accuracy" else None
            cells += [chance, "–" if published is None else f"{published:.1f}"]
            lines.append(f"| {result.task.name} | {result.n} | {words} | {' | '.join(cells)} |")
    lines += ["", OTHER_DATA, "", "| discs | task | n | mean per-class accuracy, % |", "|---" * 4 + "|"]
    for group in ("one slice", "stacks"):
        for result in found[group][NETWORK]:
            accuracy = percent(result.estimates["mean_per_class_accuracy"])
            lines.append(f"| {group} | {result.task.name} | {result.n} | {accuracy} |")
    return "\n".join(lines) + "\n"


def show_interval(estimate: Estimate, name: str) -> str:
    """An estimate with its interval: κ as a number, other statistics in per cent."""
    if name == "kappa":
        return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
    return percent(estimate)


def hotspot_lines(found: Mapping[str, Mapping]) -> str:
    """The table of the hotspots."""
    lines = ["", "| hotspots of | discs graded abnormal | energy at the own side, % |", "|---" * 3 + "|"]
    for name, each in found.items():
        share = Estimate(**each["own_side"])
        lines.append(f"| {name} | {each['n']} | {percent(share)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    start("spider", Arguments, main)
