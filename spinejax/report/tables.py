"""What an evaluation says: the tables on the terminal, and `results.json`."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from spinejax import paper
from spinejax.files.json_files import write_json
from spinejax.metrics.calibration import Doubt
from spinejax.metrics.grading import Estimate, TaskResult
from spinejax.metrics.pointing import Pointing
from spinejax.report import figures

RESEARCH_ONLY = "Research use only: not a medical device, not for diagnosis."
BESIDE_NOT_AGAINST = "The paper's figures are of its own data set and rater: beside these, not against them."


@dataclass(frozen=True)
class Findings:
    """All that an evaluation found, but for the single discs.

    Args:
        about: what was evaluated and how: `split`, `num_views` and more, JSON values.
        branch_point: the network's.
        results: the figures of the tasks that have labels.
        doubts: how far their probabilities can be trusted.
        calibration: task name → `calibration.before_and_after`; empty if no temperature was put to use.
        pointing: task name → how well its hotspots point; empty without hotspots, or without masks to tell.
    """

    about: Mapping[str, Any]
    branch_point: str | None
    results: Sequence[TaskResult]
    doubts: Sequence[Doubt] = ()
    calibration: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pointing: Mapping[str, Pointing] = field(default_factory=dict)


def show(console: Console, findings: Findings) -> None:
    """Print the cautions, and each table that has content."""
    for caution in cautions(findings.about):
        console.print(caution, highlight=False, soft_wrap=True)
    if findings.results:
        console.print(accuracy_table(findings.results, findings.branch_point))
        console.print(agreement_table(findings.results))
        console.print(recall_table(findings.results))
        console.print(doubt_table(findings.doubts))
    else:
        console.print("No disc of this split has a label for the network's tasks: predictions only.")
    if findings.calibration:
        console.print(calibration_table(findings.calibration))
    if findings.pointing:
        console.print(pointing_table(findings.pointing))


def cautions(about: Mapping[str, Any]) -> list[str]:
    """What a reader must know about the network and the split before reading the metrics."""
    found = []
    if not about["trained_on_this_data"]:
        found.append("The network was trained on another data set: its splits say nothing about this one's patients.")
    elif about["split"] == "train":
        found.append("The network was trained on the discs of this split: expect lower metrics on other discs.")
    if about["split_chose_the_step"]:
        found.append(
            f"The {about['split']} split decided this network's learning rate and which step was kept: expect lower "
            "metrics on other discs."
        )
    return found


def accuracy_table(results: Sequence[TaskResult], branch_point: str | None) -> Table:
    """Mean per-class accuracy of each task, beside what the paper published for the same branch point (its Table 2).

    The published figures stand beside tasks of the paper's names and numbers of grades only.
    """
    theirs_of = published(results, branch_point)
    table = Table(title="Mean per-class accuracy, % [95 % interval over patients]", title_justify="left")
    table.add_column("task")
    for name in ("discs", "spinejax", f"paper, {branch_point or 'no'} branch", "paper, intra-rater"):
        table.add_column(name, justify="right")
    for result in results:
        name, estimate = result.task.name, result.estimates["mean_per_class_accuracy"]
        theirs = "{:.1f} ± {:.1f}".format(*theirs_of[name]) if name in theirs_of else "–"
        rater = f"{paper.INTRA_RATER[name]:.1f}" if name in theirs_of else "–"
        table.add_row(name, str(result.n), percent(estimate), theirs, rater)
    if theirs_of:
        table.caption = BESIDE_NOT_AGAINST
        table.caption_justify = "left"
    if len(results) > 1:
        mean = np.mean([result.estimates["mean_per_class_accuracy"].value for result in results])
        table.add_section()
        table.add_row("mean over tasks", "", f"{100 * mean:.1f}", "", "")
    return table


def published(results: Sequence[TaskResult], branch_point: str | None) -> dict[str, tuple[float, float]]:
    """Task name → the paper's mean and standard deviation in %, for tasks of its names and numbers of grades only."""
    return {
        name: figures
        for name, figures in paper.table_2(branch_point).items()
        for result in results
        if (result.task.name, result.task.num_grades) == (name, len(paper.TABLE_1[name]))
    }


def agreement_table(results: Sequence[TaskResult]) -> Table:
    """The other statistics of each task; ±1 and normal/abnormal are the protocols of Lootus (paper, Sect. 5)."""
    table = Table(title="Agreement with the rater", title_justify="left")
    table.add_column("task")
    for name in ("quadratic κ", "Matthews", "AUC", "±1, %", "normal/abnormal, %"):
        table.add_column(name, justify="right")
    for result in results:
        found = result.estimates
        table.add_row(
            result.task.name,
            *(number(found[name]) for name in ("kappa", "matthews", "auc")),
            *(percent(found[name]) if name in found else "–" for name in ("within_one", "normal_abnormal_accuracy")),
        )
    return table


def recall_table(results: Sequence[TaskResult]) -> Table:
    """Each grade's accuracy and number of discs."""
    table = Table(title="Accuracy of each grade, % (discs)", title_justify="left")
    table.add_column("task")
    table.add_column("grades")
    for result in results:
        grades = zip(result.task.grades, result.recalls, result.grade_n, strict=True)
        cells = (f"{grade}: {'–' if n == 0 else f'{100 * recall.value:.0f}'} ({n})" for grade, recall, n in grades)
        table.add_row(result.task.name, "   ".join(cells))
    return table


_SHOWN = (1.0, 0.8, 0.5)  # of `COVERAGES`: `results.json` has them all


def doubt_table(doubts: Sequence[Doubt]) -> Table:
    """Each task's calibration, and the accuracy of what is kept when the least confident discs are referred."""
    table = Table(title="Confidence, and accuracy when the least confident discs are referred, %", title_justify="left")
    table.add_column("task")
    for name in ("calibration error", "Brier score", *(f"{100 * kept:g} % kept" for kept in _SHOWN)):
        table.add_column(name, justify="right")
    for doubt in doubts:
        accuracy = (percent(doubt.accuracy_at["confidence"][kept]) for kept in _SHOWN)
        table.add_row(doubt.task.name, f"{100 * doubt.calibration_error:.1f}", f"{doubt.brier.value:.3f}", *accuracy)
    return table


def calibration_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """Each task's temperature, and what it changes: task name → `calibration.before_and_after`."""
    table = Table(title="Calibration, without and with the temperature fitted on validation", title_justify="left")
    table.add_column("task")
    for name in ("temperature", "calibration error, %", "Brier score"):
        table.add_column(name, justify="right")
    for name, each in found.items():
        error = "{:.1f} → {:.1f}".format(*(100 * each[f"calibration_error_{when}"] for when in ("before", "after")))
        brier = "{:.3f} → {:.3f}".format(*(each[f"brier_{when}"] for when in ("before", "after")))
        table.add_row(name, f"{each['temperature']:.2f}", error, brier)
    return table


def pointing_table(found: Mapping[str, Pointing]) -> Table:
    """How well each task's hotspots point at the lesions, beside what chance would give."""
    table = Table(title="Hotspots against lesion masks, % [95 % interval over patients]", title_justify="left")
    table.add_column("task")
    table.add_column("lesions", justify="right")
    for name in ("peak hits", "chance", "energy inside", "even map", "own vertebra"):
        table.add_column(name, justify="right")
    for name, pointing in found.items():
        measured = pointing.estimates
        chance, even = (f"{100 * measured[each].value:.1f}" for each in ("hit_by_chance", "lesion_share"))
        hit, energy, side = (percent(measured[each]) for each in ("hit", "energy_inside", "own_side"))
        table.add_row(name, str(pointing.n), hit, chance, energy, even, side)
    return table


def percent(estimate: Estimate) -> str:
    """`87.3 [81.0, 92.2]`, or – where it is not defined."""
    if np.isnan(estimate.value):
        return "–"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def number(estimate: Estimate) -> str:
    """`0.87`, or – where it is not defined."""
    return "–" if np.isnan(estimate.value) else f"{estimate.value:.2f}"


def write_results(out: Path, findings: Findings) -> None:
    """Write `results.json` and the figures of the metrics; fractions in [0, 1], null where a metric is not defined."""
    content = {
        **findings.about,
        "tasks": {result.task.name: result.to_json() for result in findings.results},
        "doubt": {doubt.task.name: doubt.to_json() for doubt in findings.doubts},
        "note": RESEARCH_ONLY,
    }
    if findings.calibration:
        content["calibration"] = findings.calibration
    if findings.pointing:
        content["hotspots"] = {name: found.to_json() for name, found in findings.pointing.items()}
    write_json(out / "results.json", content)
    if findings.results:
        figures.confusion_matrices(findings.results, out / "confusion.png")
        figures.trust(findings.doubts, out / "trust.png")


def remove_earlier(out: Path) -> None:
    """Remove the results of an earlier evaluation, so that none is mistaken for one of this network."""
    shutil.rmtree(out / "hotspots", ignore_errors=True)
    for name in ("predictions.csv", "results.json", "confusion.png", "trust.png"):
        (out / name).unlink(missing_ok=True)
