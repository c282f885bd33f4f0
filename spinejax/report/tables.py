"""The results of an evaluation as tables on the terminal."""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from spinejax import paper
from spinejax.metrics.calibration import Doubt, Kept
from spinejax.metrics.grading import Estimate, TaskResult
from spinejax.metrics.pointing import Pointing
from spinejax.report.results import Findings

OTHER_DATA = "The paper's results are of its own data set and rater, and cannot be compared directly with these."


def new_console() -> Console:
    """The standard output, wide enough for the tables if it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(console: Console, findings: Findings) -> None:
    """Print the cautions, and each table that has content."""
    for caution in findings.cautions():
        console.print(caution, highlight=False, soft_wrap=True)
    if findings.results:
        console.print(accuracy_table(findings.results, findings.branch_point))
        console.print(_agreement_table(findings.results))
        console.print(_recall_table(findings.results))
        console.print(_doubt_table(findings.doubts))
    else:
        console.print("No rater has graded these discs: predictions only.")
    if findings.kept:
        console.print(_kept_table(findings.kept))
    if findings.calibration:
        console.print(_calibration_table(findings.calibration, findings.about.get("rater")))
    if findings.pointing:
        console.print(_pointing_table(findings.pointing))


def _table(title: str, *columns: str) -> Table:
    """A table of numbers, with a row for each task."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("task")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def accuracy_table(results: Sequence[TaskResult], branch_point: str | None) -> Table:
    """Mean per-class accuracy of each task, beside the paper's for the same branch point (its Table 2)."""
    theirs_of = published(results, branch_point)
    table = _table(
        "Mean per-class accuracy, % [95 % interval over patients]",
        "discs",
        "spinejax",
        f"paper, {branch_point or 'no'} branch",
        "paper, intra-rater",
    )
    for result in results:
        name, estimate = result.task.name, result.estimates["mean_per_class_accuracy"]
        theirs = "{:.1f} ± {:.1f}".format(*theirs_of[name]) if name in theirs_of else "–"
        rater = f"{paper.INTRA_RATER[name]:.1f}" if name in theirs_of else "–"
        table.add_row(name, str(result.n), percent(estimate), theirs, rater)
    if theirs_of:
        table.caption = OTHER_DATA
    if len(results) > 1:
        table.add_section()
        table.add_row("mean over tasks", "", f"{mean_over_tasks(results):.1f}", "", "")
    return table


def mean_over_tasks(results: Sequence[TaskResult]) -> float:
    """The mean over tasks of the mean per-class accuracy, in %."""
    return 100 * float(np.mean([result.estimates["mean_per_class_accuracy"].value for result in results]))


def published(results: Sequence[TaskResult], branch_point: str | None) -> dict[str, tuple[float, float]]:
    """Task name → the paper's mean and standard deviation in %, for tasks of its names and numbers of grades only."""
    column, tasks = paper.table_2(branch_point), [result.task for result in results]
    return {t.name: column[t.name] for t in tasks if t.num_grades == len(paper.TABLE_1.get(t.name, ()))}


def _agreement_table(results: Sequence[TaskResult]) -> Table:
    """The other statistics of each task; ±1 and normal/abnormal are the protocols of Lootus (paper, Sect. 5)."""
    table = _table("Agreement with the rater", "quadratic κ", "Matthews", "AUC", "±1, %", "normal/abnormal, %")
    for result in results:
        found = result.estimates
        numbers = [number(found[name]) for name in ("kappa", "matthews", "auc")]
        fractions = [percent(found.get(name)) for name in ("within_one", "normal_abnormal_accuracy")]
        table.add_row(result.task.name, *numbers, *fractions)
    return table


def _recall_table(results: Sequence[TaskResult]) -> Table:
    """The accuracy and number of discs of each grade."""
    table = Table("task", "grades", title="Accuracy of each grade, % (discs)", title_justify="left")
    for result in results:
        grades = zip(result.task.grades, result.recalls, result.grade_n, strict=True)
        cells = (f"{grade}: {'–' if n == 0 else f'{100 * recall.value:.0f}'} ({n})" for grade, recall, n in grades)
        table.add_row(result.task.name, "   ".join(cells))
    return table


def _doubt_table(doubts: Sequence[Doubt]) -> Table:
    """The calibration of each task, and the accuracy of what is kept when the least confident discs are referred."""
    shown = (1.0, 0.8, 0.5)  # a selection; `results.json` has all of `COVERAGES`
    title = "Confidence, and accuracy when the least confident discs are referred, %"
    table = _table(title, "calibration error", "Brier score", *(f"{100 * kept:g} % kept" for kept in shown))
    for doubt in doubts:
        accuracy = (percent(doubt.accuracy_at["confidence"][kept]) for kept in shown)
        table.add_row(doubt.task.name, f"{100 * doubt.calibration_error:.1f}", f"{doubt.brier.value:.3f}", *accuracy)
    return table


def _kept_table(found: Sequence[Kept]) -> Table:
    """The share of each task's grades that is kept, and the accuracy of these."""
    title = f"Grades with a probability of {found[0].below:g} or more; the others are referred to a rater, %"
    table = _table(title, "discs", "kept", "labelled and kept", "accuracy of the kept")
    for kept in found:
        table.add_row(kept.task.name, str(kept.n), percent(kept.share), str(kept.labelled), percent(kept.accuracy))
    return table


def _calibration_table(found: Mapping[str, Mapping[str, float]], rater: str | None) -> Table:
    """What calibration changes for each task: as a rater would grade, or at a temperature."""
    what = f"as {rater}'s raters grade" if rater else "with the temperature fitted on validation"
    title = f"Calibration, of the network as it is and {what}"
    table = _table(title, *([] if rater else ["temperature"]), "calibration error, %", "Brier score")
    for name, each in found.items():
        error = f"{100 * each['calibration_error_before']:.1f} → {100 * each['calibration_error_after']:.1f}"
        brier = f"{each['brier_before']:.3f} → {each['brier_after']:.3f}"
        table.add_row(name, *([] if rater else [f"{each['temperature']:.2f}"]), error, brier)
    return table


def _pointing_table(found: Mapping[str, Pointing]) -> Table:
    """How well each task's hotspots point at the lesions, compared with chance."""
    title = "Hotspots against lesion masks, % [95 % interval over patients]"
    table = _table(title, "lesions", "peak hits", "chance", "energy inside", "even map", "own vertebra")
    for name, pointing in found.items():
        measured = pointing.estimates
        chance, even = (f"{100 * measured[each].value:.1f}" for each in ("hit_by_chance", "lesion_share"))
        hit, energy, side = (percent(measured[each]) for each in ("hit", "energy_inside", "own_side"))
        table.add_row(name, str(pointing.n), hit, chance, energy, even, side)
    return table


def percent(estimate: Estimate | None) -> str:
    """`87.3 [81.0, 92.2]`, or – where it is not defined."""
    if estimate is None or np.isnan(estimate.value):
        return "–"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def number(estimate: Estimate) -> str:
    """`0.87`, or – where it is not defined."""
    return "–" if np.isnan(estimate.value) else f"{estimate.value:.2f}"
