"""Two evaluations of the same discs, side by side: `comparison.json`, tables on the terminal, and a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from rich.console import Console
from rich.table import Table

from spinejax.errors import SpinejaxError, printable
from spinejax.files.atomic import write_atomically
from spinejax.files.html import style_and_script
from spinejax.files.json_files import write_json
from spinejax.metrics.comparison import TaskComparison, compare_task
from spinejax.report import page, spine, tables
from spinejax.report.predictions import Predictions
from spinejax.report.results import RESEARCH_ONLY
from spinejax.tasks import UNLABELLED, Task

JSON, PAGE = "comparison.json", "index.html"
REPLACED = (JSON, PAGE)
"""Patterns of the files of a comparison, which the next one into the same folder replaces."""
HOW = (
    "Differences are B − A; their 95 % intervals are a bootstrap over patients, in which both get the same patients. "
    "McNemar's test is exact and two-sided, over discs; it takes those of one patient as independent, so trust the "
    "interval more. Its p-values are not corrected for the number of tasks."
)


@dataclass(frozen=True, eq=False)
class GradedTask:
    """One task of the discs that A and B share; grades and labels are indices, `UNLABELLED` where there is none."""

    found: TaskComparison
    a: Int[np.ndarray, "M"]
    b: Int[np.ndarray, "M"]
    labels: Int[np.ndarray, "M"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two evaluations, A and B, of the discs that they share."""

    a: Predictions
    b: Predictions
    patients: Shaped[np.ndarray, "M"]
    discs: Sequence[tuple[str, str]]
    """(scan, level), in A's order."""
    tasks: Sequence[GradedTask]
    notes: Sequence[str]
    """What could not be compared."""

    def changed(self) -> list[dict[str, Any]]:
        """Every disc and task with different grades, the largest change first; then A's order."""
        found = []
        for number, task in enumerate(self.tasks):
            differs = (task.a != task.b) & (task.a != UNLABELLED) & (task.b != UNLABELLED)
            for place in np.flatnonzero(differs).tolist():
                scan, level = self.discs[place]
                a, b, label = (int(column[place]) for column in (task.a, task.b, task.labels))
                found.append(
                    {"patient": str(self.patients[place]), "scan": scan, "level": level, "task": number}
                    | {"a": a, "b": b, "label": label}
                    | {f"{who}_p": self._confidence(who, number, place) for who in ("a", "b")}
                )
        return sorted(found, key=lambda each: -abs(each["a"] - each["b"]))

    def _confidence(self, who: str, task: int, place: int) -> float | None:
        predictions: Predictions = getattr(self, who)
        chances = predictions.confidence.get(self.tasks[task].found.task.name)
        return None if chances is None else round(float(chances[predictions.discs[self.discs[place]]]), 4)


def compare(a: Predictions, b: Predictions) -> Comparison:
    """Match two evaluations by scan and level, and compare them task by task.

    Raises:
        SpinejaxError: they share no disc, or no task with the same grades; or a disc has two different labels.
    """
    discs = [disc for disc in a.discs if disc in b.discs]
    if not discs:
        raise SpinejaxError(
            f"{a.path.parent} and {b.path.parent} share no disc: one is of the data set {a.digest} ({len(a.discs)} "
            f"discs), the other of {b.digest} ({len(b.discs)} discs). Compare evaluations of the same discs; of raw "
            "scans, with the same --key."
        )
    places_a, places_b = ([each.discs[disc] for disc in discs] for each in (a, b))
    patients = np.array([a.patients[place] for place in places_a])
    notes = [
        f"{len(each.discs) - len(discs)} discs are in {name} alone, and left out."
        for name, each in (("A", a), ("B", b))
        if len(each.discs) > len(discs)
    ]
    tasks = []
    for name in a.given:
        grades = a.grades_of.get(name) or b.grades_of.get(name, ())
        if name not in b.given or not grades:
            notes.append(f"{name}: {'only A graded it' if name not in b.given else 'its grades are not known'}.")
            continue
        if grades != b.grades_of.get(name, grades):
            notes.append(f"{name}: A has the grades {', '.join(grades)}, B has {', '.join(b.grades_of[name])}.")
            continue
        task = Task(name, grades)
        labels = _labels(a.indices(task, a.labels, places_a), b.indices(task, b.labels, places_b), task, discs, b)
        ours, theirs = a.indices(task, a.given, places_a), b.indices(task, b.given, places_b)
        both = (ours != UNLABELLED) & (theirs != UNLABELLED)
        if not both.any():
            notes.append(f"{name}: no disc was graded by both.")
            continue
        found = compare_task(task, labels[both], ours[both], theirs[both], patients[both])
        tasks.append(GradedTask(found, ours, theirs, labels))
    notes += [f"{name}: only B graded it." for name in b.given if name not in a.given]
    if not tasks:
        raise SpinejaxError(f"{a.path.parent} and {b.path.parent} have no task to compare. {' '.join(notes)}")
    return Comparison(a, b, patients, discs, tasks, notes)


def _labels(
    a: Int[np.ndarray, "M"], b: Int[np.ndarray, "M"], task: Task, discs: Sequence[tuple[str, str]], second: Predictions
) -> Int[np.ndarray, "M"]:
    """The label of either; both know the same one."""
    for place in np.flatnonzero((a != b) & (a != UNLABELLED) & (b != UNLABELLED)).tolist():
        scan, level = discs[place]
        raise SpinejaxError(
            f"{second.path}: scan {scan}, level {level}: the label of {task.name} is {task.grades[b[place]]}, in the "
            f"other {task.grades[a[place]]}. Compare evaluations against the same labels."
        )
    return np.where(a == UNLABELLED, b, a)


def write(comparison: Comparison, out: Path) -> None:
    """Write `comparison.json`; fractions are in [0, 1], and null where a metric is not defined."""
    names = [task.found.task.name for task in comparison.tasks]
    grades = [(*task.found.task.grades, None) for task in comparison.tasks]  # the last is of `UNLABELLED`
    content = {
        **{
            name: {"name": each.name, "data": each.digest, "discs": len(each.discs), **each.about}
            for name, each in (("a", comparison.a), ("b", comparison.b))
        },
        "discs": len(comparison.discs),
        "patients": len(set(comparison.patients)),
        "how": HOW,
        "notes": list(comparison.notes),
        "tasks": {task.found.task.name: task.found.to_json() for task in comparison.tasks},
        "changed": [
            each | {"task": names[each["task"]]} | {who: grades[each["task"]][each[who]] for who in ("a", "b", "label")}
            for each in comparison.changed()
        ],
        "note": RESEARCH_ONLY,
    }
    write_json(out / JSON, content)


def show(console: Console, comparison: Comparison) -> None:
    """Print who is compared, and two tables."""
    for name, each in (("A", comparison.a), ("B", comparison.b)):
        console.print(f"{name}: {printable(each.name)}", highlight=False, soft_wrap=True, markup=False)
    for note in comparison.notes:
        console.print(printable(note), highlight=False, soft_wrap=True, markup=False)
    found = [task.found for task in comparison.tasks]
    if any(task.metrics for task in found):
        title = "Mean per-class accuracy, %, and McNemar's exact test over discs"
        table = Table(title=title, title_justify="left", caption_justify="left", caption=HOW)
        table.add_column("task")
        for name in ("labelled", "A", "B", "B − A [95 %, patients]", "only A right", "only B right", "p"):
            table.add_column(name, justify="right")
        for task in found:
            if task.mcnemar:
                accuracy = task.metrics["mean_per_class_accuracy"]
                cells = (f"{100 * accuracy.a.value:.1f}", f"{100 * accuracy.b.value:.1f}", points(accuracy.difference))
                right = (str(task.mcnemar.only_a), str(task.mcnemar.only_b), f"{task.mcnemar.p_value:.3g}")
                table.add_row(task.task.name, str(task.labelled), *cells, *right)
        console.print(table)
    table = Table(title="Agreement between A and B", title_justify="left")
    table.add_column("task")
    for name in ("discs", "same grade, % [95 %]", "quadratic κ", "changed"):
        table.add_column(name, justify="right")
    for task in found:
        same = tables.percent(task.same)
        table.add_row(task.task.name, str(task.n), same, tables.number(task.kappa), str(task.changed))
    console.print(table)


def points(difference: Any, scale: float = 100) -> str:
    """`+3.1 [-0.4, +6.0]`, or – where it is not defined."""
    if np.isnan(difference.value):
        return "–"
    digits = 1 if scale == 100 else 2
    value, low, high = (f"{scale * each:+.{digits}f}" for each in (difference.value, difference.low, difference.high))
    return f"{value} [{low}, {high}]"


def write_page(comparison: Comparison, folder: Path) -> Path:
    """Write the page, and return its path. It makes no request and has no path of a file."""
    names = spine.short_names(comparison.patients.tolist(), [scan for scan, _ in comparison.discs])
    found = [task.found for task in comparison.tasks]
    facts = {
        "tasks": [
            {"name": task.task.name, "title": page.title(task.task.name), "grades": list(task.task.grades)}
            for task in found
        ],
        "names": names,
        "changed": comparison.changed(),
    }
    text = (
        page.environment()
        .get_template("comparison.html")
        .render(
            **style_and_script(Path(__file__).parent / "templates", "comparison", "cells"),
            comparison=comparison,
            found=found,
            labelled=[task for task in found if task.mcnemar],
            widest=max((_reach(task) for task in found if task.mcnemar), default=0),
            num_patients=len(set(comparison.patients)),
            facts=facts,
            how=HOW,
            points=points,
            research_only=RESEARCH_ONLY,
        )
    )
    write_atomically(folder / PAGE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder / PAGE


def _reach(task: TaskComparison) -> float:
    """How far from 0 the difference of accuracies may be."""
    difference = task.metrics["mean_per_class_accuracy"].difference
    return float(np.nanmax(np.abs([difference.value, difference.low, difference.high, 0.01])))
