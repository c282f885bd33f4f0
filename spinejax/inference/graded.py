"""Graded discs: what tables, reports and maps are made of."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.metrics import calibration, grading
from spinejax.metrics.calibration import Doubt, Kept
from spinejax.metrics.grading import Rule, TaskResult
from spinejax.tasks import UNLABELLED, Task


class Labelled(NamedTuple):
    """The discs that have a label for one task, in the order of `Graded.rows`; the columns are as in `Graded`."""

    labels: Int[np.ndarray, "N"]
    probabilities: Float[np.ndarray, "N C"]
    spread: Float[np.ndarray, "N"]
    patients: Shaped[np.ndarray, "N"]


@dataclass(frozen=True, eq=False)
class Graded:
    """Some rows of a data set, graded by a network; for each of its tasks the labels, from `labels_of`, and grades."""

    data: DataSet
    rows: Int[np.ndarray, "M"]
    tasks: Sequence[Task]
    labels: Mapping[str, Int[np.ndarray, "M"]]
    probabilities: Mapping[str, Float[np.ndarray, "M _"]]
    spread: Mapping[str, Float[np.ndarray, "M"]]
    """How far the views disagree, from `predict.predict_step`; 0 for a single view."""
    refer_below: float | None = None
    """Grades with a lower probability are referred to a rater; None refers none, and tells of none."""
    decide_by: Rule = "balance"
    """How a grade follows from probabilities, as for `grading.decide`."""
    rater: str | None = None
    """Whose grades the probabilities are of; None if they are the network's own, or at a temperature."""
    frequencies: Mapping[str, Float[np.ndarray, "M _"]] | None = None
    """How often the rater gives each grade, on scans of the disc's contrast."""
    borrowed: Sequence[str] = ()
    """Tasks that the rater has not graded, on scans of such contrasts: their probabilities are other raters'."""
    distance: Float[np.ndarray, "M"] | None = None
    """How far each disc is from those that the network learned from: above 1 it is unusual. None: not known."""

    @property
    def patients(self) -> Shaped[np.ndarray, "M"]:
        """The patient of each disc, by pseudonym."""
        return self.data.patient[self.rows]

    @property
    def scans(self) -> Shaped[np.ndarray, "M"]:
        """The scan of each disc, by pseudonym."""
        return self.data.scan[self.rows]

    @property
    def grades(self) -> dict[str, Int[np.ndarray, "M"]]:
        """Task name → the grade that each disc is given."""
        frequencies = self.frequencies or {}
        return {
            name: grading.decide(each, self.decide_by, frequencies.get(name))
            for name, each in self.probabilities.items()
        }

    def leads(self) -> dict[str, Float[np.ndarray, "M"]]:
        """Task name → how far the grade of each disc is ahead of the next one, as by `grading.lead`."""
        frequencies, grades = self.frequencies or {}, self.grades
        return {
            name: grading.lead(each, grades[name], self.decide_by, frequencies.get(name))
            for name, each in self.probabilities.items()
        }

    def labelled(self, task: Task) -> "Labelled":
        """The discs that have a label for a task."""
        has_one = self.labels[task.name] != UNLABELLED
        columns = (self.labels[task.name], self.probabilities[task.name], self.spread[task.name], self.patients)
        return Labelled(*(column[has_one] for column in columns))

    def results(self) -> list[TaskResult]:
        """The metrics of each task that has a label."""
        grades = self.grades
        found = (
            grading.evaluate_task(
                task,
                self.labels[task.name],
                self.probabilities[task.name],
                self.patients,
                grades=grades[task.name],
            )
            for task in self.tasks
        )
        return [result for result in found if result]

    def doubts(self) -> list[Doubt]:
        """How far the probabilities of each task that has a label can be trusted."""
        grades = self.grades
        found = []
        for task in self.tasks:
            discs = self.labelled(task)
            if len(discs.labels):
                given = grades[task.name][self.labels[task.name] != UNLABELLED]
                found.append(calibration.doubt(task, *discs, given))
        return found

    @property
    def unusual(self) -> Bool[np.ndarray, "M"]:
        """Which discs are unlike those that the network learned from; none if that is not known."""
        return np.zeros(len(self.rows), bool) if self.distance is None else self.distance > 1

    def kept(self) -> list[Kept]:
        """What is kept of each task's grades; nothing without `refer_below`."""
        if self.refer_below is None:
            return []
        below, grades = self.refer_below, self.grades
        return [
            calibration.kept(
                task,
                self.labels[task.name],
                self.probabilities[task.name],
                grades[task.name],
                self.patients,
                below,
            )
            for task in self.tasks
        ]

    def write(self, path: Path, *, network: str = "") -> None:
        """Write `predictions.csv`, one row for each disc.

        Columns: patient, scan, level, and for each task `<task>_label` (empty where missing), `<task>_grade`,
        the probability `<task>_p_<grade>` of each grade, `<task>_spread`, and with `refer_below` `<task>_refer`, yes
        or no; then `unusual`, yes or no, and `distance`, if they are known; and `network`, if it is given.
        """
        columns = [(name, getattr(self.data, name)[self.rows].tolist()) for name in ("patient", "scan", "level")]
        grades = self.grades
        for task in self.tasks:
            probabilities = self.probabilities[task.name]
            labels = ["" if label == UNLABELLED else task.grades[label] for label in self.labels[task.name]]
            columns += [(f"{task.name}_label", labels)]
            columns += [(f"{task.name}_grade", [task.grades[grade] for grade in grades[task.name]])]
            numbers = [*probabilities.T, self.spread[task.name]]
            for name, column in zip([*(f"p_{grade}" for grade in task.grades), "spread"], numbers, strict=True):
                columns += [(f"{task.name}_{name}", [f"{number:.6f}" for number in column])]
            if self.refer_below is not None:
                referred = calibration.refers(probabilities, grades[task.name], self.refer_below)
                columns += [(f"{task.name}_refer", np.where(referred, "yes", "no").tolist())]
        if self.distance is not None:
            columns += [("unusual", np.where(self.unusual, "yes", "no").tolist())]
            columns += [("distance", [f"{number:.4f}" for number in self.distance])]
        if network:
            columns += [("network", [network] * len(self.rows))]

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="") as file:
                table = csv.writer(file)
                table.writerow([name for name, _ in columns])
                table.writerows(zip(*(column for _, column in columns), strict=True))

        write_atomically(path, write)


def labels_of(data: DataSet, rows: Int[np.ndarray, "M"], tasks: Sequence[Task]) -> dict[str, Int[np.ndarray, "M"]]:
    """Task name → the data set's labels; `UNLABELLED` where missing, and for a task that the data set lacks.

    Raises:
        SpinejaxError: a disc has a label of a task of the same name with different grades.
    """
    columns = {task.name: column for column, task in enumerate(data.tasks)}
    labels = {}
    for task in tasks:
        if task.name not in columns:
            labels[task.name] = np.full(len(rows), UNLABELLED)
            continue
        stored = data.tasks[columns[task.name]]
        labels[task.name] = data.labels[rows, columns[task.name]].astype(np.int64)
        if stored != task and (labels[task.name] != UNLABELLED).any():
            raise SpinejaxError(
                f"{data.folder}: task {task.name} has the grades {', '.join(stored.grades)}; the network learned "
                f"{', '.join(task.grades)}."
            )
    return labels
