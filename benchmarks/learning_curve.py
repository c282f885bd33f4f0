"""How many of your own patients fine-tuning needs: a network of one hospital's discs, fine-tuned on another's.

    python -m benchmarks.learning_curve --weights OUT --spider ROOT --sudirman ROOT --out DIR

It starts from the variant "SPIDER alone" of `benchmarks.recipe`, whose `--out` is this one's as well. The preset
`finetune` trains it on 10, 30 and 100 of Sudirman's patients, a fifth of whom choose the epoch. The patients of folds 0
and 1 are graded with 54 views: Sudirman's, and SPIDER's to see what the network forgets. It writes
`learning-curve.json` and `learning-curve.md`, a table of docs/results.md. Finished parts are kept.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.graded_folds import gains, group, predictions
from benchmarks.recipe import Sources, folder, inner_split, train_and_grade
from benchmarks.running import require_trained, run_script, start
from benchmarks.tables import show, table
from benchmarks.variants import SPIDER_ALONE
from spinejax.commands import train
from spinejax.config import PRESETS
from spinejax.data.dataset import DataSet
from spinejax.files.atomic import write_atomically
from spinejax.files.json_files import write_json
from spinejax.metrics import grading
from spinejax.parallel import runtime
from spinejax.tasks import UNLABELLED

NUM_PATIENTS = (10, 30, 100)
TASKS = ("pfirrmann", "bulging", "spondylolisthesis", "degenerated", "stenosis")
"""What Sudirman's labels are of. The last two are new to the network."""
SOURCES = ("Sudirman T2", "SPIDER T2")
GAINED = "better than before fine-tuning by"


def main(arguments: Sources) -> None:
    """Fine-tune, grade, and print the table."""
    runtime.set_up()
    discs = inner_split(arguments)
    train_and_grade(SPIDER_ALONE, discs, arguments)
    begin = folder(arguments.out, SPIDER_ALONE)
    content = {"0": measured(DataSet(discs), begin, begin)}
    for num in NUM_PATIENTS:
        here = arguments.out / f"fine-tuned-{num}"
        data = taught_by(DataSet(discs), num)
        if not (here / "graded" / "predictions.csv").is_file():
            fine_tune_and_grade(data, here, begin / "run")
        learned = data.rows("train"), data.rows("validation")
        content[str(num)] = {"discs": [len(rows) for rows in learned]} | measured(data, here, begin)
    write_json(arguments.out / "learning-curve.json", content)
    text = markdown(content)
    write_atomically(arguments.out / "learning-curve.md", lambda path: path.write_text(text))
    Console(width=200).print(text, markup=False, highlight=False)


def taught_by(data: DataSet, num: int) -> DataSet:
    """The data set in which `num` of Sudirman's patients, chosen by a hash, teach; one in five chooses the epoch."""
    source = np.array([data.manifest["scans"][scan]["source"] for scan in data.scan.tolist()])
    others = (source == "sudirman") & (data.split != "test")
    graded = others & (data.labels[:, [task.name for task in data.tasks].index("pfirrmann")] != UNLABELLED)
    names = sorted(np.unique(data.patient[graded]).tolist(), key=lambda name: hashlib.sha256(name.encode()).digest())
    splits = {name: "validation" if place % 5 == 0 else "train" for place, name in enumerate(names[:num])}
    unused = [splits.get(patient, "unused") for patient in data.patient.tolist()]
    data.split = np.where(data.split == "test", "test", unused)
    return data


def fine_tune_and_grade(data: DataSet, here: Path, begin: Path) -> None:
    """`train.py finetune` from a run, then the grades of the test patients."""
    run = here / "run"
    if not (run / "export").is_dir():
        options = train.like_shipped(PRESETS["finetune"][1])
        options = dataclasses.replace(options, init_from=begin, tasks=TASKS, cache="none")
        train.run(options, data, run, lambda step: False)
        require_trained(run)
    words = ("--checkpoint", run, "--data", data.folder, "--split", "test", "--tta", "--out", here / "graded")
    run_script("evaluate.py", *words)


def measured(data: DataSet, here: Path, begin: Path) -> dict[str, Any]:
    """Source → task → n and the measures, of the test patients' labelled discs, and what is gained; JSON.

    Args:
        data: the discs.
        here: the folder of a network's run and grades.
        begin: that of the network that was fine-tuned, to compare with.
    """
    given, before = predictions(here), predictions(begin)
    groups = np.array([group(*data.manifest["scans"][scan].values()) for scan in data.scan.tolist()])
    found: dict[str, Any] = {}
    for name in SOURCES:
        for column, task in enumerate(data.tasks):
            rows = np.flatnonzero((data.split == "test") & (groups == name) & (data.labels[:, column] != UNLABELLED))
            keys = [*zip(data.scan[rows].tolist(), data.level[rows].tolist(), strict=True)]
            if not len(rows) or task.name not in given[keys[0]] or task.name not in TASKS:
                continue
            labels = data.labels[rows, column].astype(np.int64)
            probabilities = [
                np.array([each[key][task.name] for key in keys])
                for each in (given, before)
                if task.name in each[keys[0]]
            ]
            result = grading.evaluate_task(task, labels, probabilities[0], data.patient[rows])
            if result is None:
                continue
            found.setdefault(name, {})[task.name] = result.to_json()
            if len(probabilities) > 1:
                after, start = (each.argmax(1) for each in probabilities)
                found[name][task.name][GAINED] = gains(task, labels, after, start, data.patient[rows])
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of docs/results.md: the figures, and what is gained, each with a row for each number of patients."""
    columns = {
        "Sudirman: Pfirrmann, %": ("Sudirman T2", "pfirrmann", "mean_per_class_accuracy"),
        "within ±1, %": ("Sudirman T2", "pfirrmann", "within_one"),
        "κ": ("Sudirman T2", "pfirrmann", "kappa"),
        "bulging, %": ("Sudirman T2", "bulging", "mean_per_class_accuracy"),
        "stenosis, %": ("Sudirman T2", "stenosis", "mean_per_class_accuracy"),
        "SPIDER: Pfirrmann, %": ("SPIDER T2", "pfirrmann", "mean_per_class_accuracy"),
    }
    head = ("patients", "discs", *columns)

    def rows(numbers: Iterable[str], measures_of: Callable[[Mapping], Mapping]) -> Iterator[Iterable]:
        for num in numbers:
            cells = []
            for source, task, statistic in columns.values():
                measures = measures_of(content[num][source].get(task, {}))
                cells.append(show(measures[statistic], statistic) if statistic in measures else "–")
            yield num, sum(content[num].get("discs", [])), *cells

    figures = rows(content, lambda measures: measures)
    gained = rows([num for num in content if num != "0"], lambda measures: measures.get(GAINED, {}))
    return f"{table(head, figures)}\nGained:\n\n{table(head, gained)}"


if __name__ == "__main__":
    start("learning_curve", Sources, main)
