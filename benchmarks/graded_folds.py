"""What the networks of a cross-validation gave their test patients, pooled; and the tables of docs/results.md.

Every disc is graded by the network whose training had none of its patient's discs. Baselines learn from the same
training patients. Discs that are labelled, but were not found or were left out, are counted in a second time, as wrong.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from benchmarks import intensity_baseline
from benchmarks.tables import show, table
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.sources.pooled import Patient
from spinejax.data.dataset import DataSet
from spinejax.metrics import calibration, grading
from spinejax.metrics.calibration import Rater
from spinejax.tasks import UNLABELLED, Task

NETWORK, REGRESSION = "spinejax", "logistic regression"
JUDGES = (0, 1)
"""Folds whose patients judge variants of the recipe (`benchmarks.recipe`), so that the other folds' figures do not."""
STATISTICS = {
    "mean per-class accuracy, %": grading.mean_per_class_accuracy,
    "within ±1, %": grading.within_one,
    "quadratic κ": grading.kappa,
}


def group(source: str, contrast: str) -> str:
    """The name of a source and a contrast in the tables."""
    return f"{source.upper() if source == 'spider' else source.capitalize()} {contrast.upper()}"


def predictions(folder: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(Scan, level) → task name → each grade's probability, for the discs that were graded in a fold's folder."""
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


@dataclass(frozen=True)
class Missed:
    """A labelled disc that is not in the data set."""

    group: str
    patient: str
    labels: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Pool:
    """The graded discs of all folds.

    Args:
        tasks: T tasks.
        rows: int[N]. Their rows in the data set.
        groups: str[N]. The source and the contrast of each disc.
        patients: str[N].
        labels: task name → int[N].
        probabilities: grader → task name → float[N, C].
        folds: int[N]. The fold of each disc's patient.
        missed: the discs that nobody graded.
    """

    tasks: Sequence[Task]
    rows: Int[np.ndarray, " N"]
    groups: np.ndarray
    patients: np.ndarray
    labels: Mapping[str, Int[np.ndarray, " N"]]
    probabilities: Mapping[str, Mapping[str, Float[np.ndarray, "N _"]]]
    folds: Int[np.ndarray, " N"]
    missed: Sequence[Missed]

    @classmethod
    def of_folds(
        cls,
        data: DataSet,
        tasks: Sequence[Task],
        folders: Sequence[Path],
        patients: Mapping[str, Patient],
        missed: Sequence[Missed],
    ) -> "Pool":
        """Read what each fold's network gave the fold's patients, and fit the baselines on its training patients.

        Args:
            data: the data set of all discs.
            tasks: its tasks.
            folders: of the folds: `graded/predictions.csv` and `discs/`, in the order of the folds.
            patients: pseudonym → patient.
            missed: the discs that are not in the data set.
        """
        fold = np.array([fold_of(*patients[str(name)]) for name in data.patient])
        origin = data.manifest["scans"]
        groups = np.array([group(origin[scan]["source"], origin[scan]["contrast"]) for scan in data.scan.tolist()])
        labels = np.stack([data.labels[:, data.tasks.index(task)].astype(np.int64) for task in tasks], axis=1)
        num_grades = {task.name: task.num_grades for task in tasks}
        features = intensity_baseline.all_features(data)
        nothing = {task.name: np.full((len(data), task.num_grades), np.nan) for task in tasks}
        given = {who: {name: each.copy() for name, each in nothing.items()} for who in (NETWORK, REGRESSION)}
        for number, folder in enumerate(folders):
            split = DataSet(folder / "discs").split
            graded = predictions(folder)
            test = fold == number
            for row in np.flatnonzero(test):
                for name, probabilities in graded[str(data.scan[row]), str(data.level[row])].items():
                    given[NETWORK][name][row] = probabilities
            for name in np.unique(groups):
                inside = groups == name
                learned = inside & (split == "train")
                regressed = intensity_baseline.probabilities(features, labels, num_grades, learned)
                for task in tasks:
                    given[REGRESSION][task.name][test & inside] = regressed[task.name][test & inside]
        by_task = {task.name: labels[:, column] for column, task in enumerate(tasks)}
        return cls(tasks, np.arange(len(data)), groups, data.patient, by_task, given, fold, missed)

    def labelled(
        self, task: Task, inside: Bool[np.ndarray, " N"], who: str = NETWORK
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A grader's probabilities, the labels and the patients of the discs that have a label."""
        has_one = inside & (self.labels[task.name] != UNLABELLED)
        return self.probabilities[who][task.name][has_one], self.labels[task.name][has_one], self.patients[has_one]

    def results(self) -> dict[str, Any]:
        """Group → task name → the measures, for every group that has labels for the task; JSON."""
        return {
            "groups": {
                name: {
                    task.name: found
                    for task in self.tasks
                    if (found := self._of_task(task, self.groups == name, name)) is not None
                }
                for name in sorted(set(self.groups))
            }
        }

    def _of_task(self, task: Task, inside: Bool[np.ndarray, " N"], name: str) -> dict[str, Any] | None:
        probabilities, labels, patients = self.labelled(task, inside)
        missed = [(each.labels[task.name], each.patient) for each in self.missed if self._counts(each, task, name)]
        if len(set(labels)) < 2:
            return None
        result = grading.evaluate_task(task, labels, probabilities, patients)
        regressed, _, _ = self.labelled(task, inside, REGRESSION)
        baseline = grading.evaluate_task(task, labels, regressed, patients)
        assert result is not None
        assert baseline is not None
        return {
            NETWORK: result.to_json(),
            REGRESSION: baseline.to_json(),
            "better than the regression by": gains(
                task, labels, probabilities.argmax(1), regressed.argmax(1), patients
            ),
            "with missed discs as wrong": _with_missed(task, labels, probabilities, patients, missed),
            "calibration": self._calibration(task, inside),
        }

    def _counts(self, missed: Missed, task: Task, name: str) -> bool:
        return missed.group == name and missed.labels.get(task.name, UNLABELLED) != UNLABELLED

    def raters(self, seen: Bool[np.ndarray, " N"]) -> dict[str, dict[str, dict[str, Rater]]]:
        """Source → contrast → task's name → the rater, fitted to those of the `seen` discs that the source graded.

        Where it graded none, the rater is borrowed: that of all graded discs of the contrast, or else of all.
        """
        names = [name.split() for name in sorted(set(self.groups))]
        contrast_of = np.array([name.split()[1] for name in self.groups])

        def rater(task: Task, source: str, contrast: str) -> Rater:
            own = seen & (self.groups == f"{source} {contrast}")
            for inside in (own, seen & (contrast_of == contrast), seen):
                probabilities, labels, _ = self.labelled(task, inside)
                if len(set(labels)) > 1 or inside is seen:
                    break
            return calibration.fit_rater(probabilities, labels) | {"borrowed": inside is not own}

        return {
            source.lower(): {
                contrast.lower(): {task.name: rater(task, source, contrast) for task in self.tasks}
                for contrast in sorted({contrast for _, contrast in names})
            }
            for source in dict.fromkeys(source for source, _ in names)
        }

    def as_rater(self, task: Task, inside: Bool[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
        """The probabilities and the grades' frequencies of the rater who is fitted to the other folds' discs."""
        has_one = inside & (self.labels[task.name] != UNLABELLED)
        given, labels, folds = self.probabilities[NETWORK][task.name][has_one], self.labels[task.name], self.folds
        at, frequencies = given.copy(), given.copy()
        for number in np.unique(folds[has_one]):
            rater = calibration.fit_rater(given[folds[has_one] != number], labels[has_one & (folds != number)])
            mine = folds[has_one] == number
            at[mine], frequencies[mine] = calibration.as_rater(given[mine], rater), rater["frequencies"]
        return at, frequencies

    def _calibration(self, task: Task, inside: Bool[np.ndarray, " N"]) -> dict[str, Any]:
        """What calibration by the other folds' discs changes.

        That is the error of the network as it is, at the temperature of all groups' discs, and as the rater of this
        group's; and what the rater's grades gain over the network's.
        """
        has_one = self.labels[task.name] != UNLABELLED
        given, labels = self.probabilities[NETWORK][task.name], self.labels[task.name]
        at = given.copy()
        for number in np.unique(self.folds):
            others, mine = has_one & (self.folds != number), self.folds == number
            temperature = calibration.fit_temperature(given[others], labels[others])
            at[mine] = calibration.at_temperature(given[mine], temperature)
        chosen = has_one & inside
        labels = labels[chosen]
        as_rater, frequencies = self.as_rater(task, inside)
        graders = {"before": given[chosen], "after": at[chosen], "as_rater": as_rater}
        everyone = graders | {"of_frequencies": frequencies}
        grades = grading.decide(as_rater, "balance", frequencies)
        return {
            **{f"error_{who}": calibration.expected_calibration_error(each, labels) for who, each in graders.items()},
            **{f"brier_{who}": float(calibration.brier(each, labels).mean()) for who, each in everyone.items()},
            "better as the rater by": gains(task, labels, grades, given[chosen].argmax(1), self.patients[chosen]),
        }


def gains(
    task: Task,
    labels: Int[np.ndarray, " N"],
    grades: Int[np.ndarray, " N"],
    others: Int[np.ndarray, " N"],
    patients: Sequence[str] | np.ndarray,
) -> dict[str, Any]:
    """How much better grades are than other ones of the same discs: statistic → difference, paired over patients; JSON.

    Within ±1 is left out of two grades, which always are.
    """
    both = [grading.patient_confusions(labels, each, patients, task.num_grades) for each in (grades, others)]
    return {
        each.__name__: grading.difference(each, *both).to_json()
        for each in STATISTICS.values()
        if task.num_grades > 2 or each is not grading.within_one
    }


def _with_missed(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, missed: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """Measures of all labelled discs, where those that nobody graded have the grade farthest from their label."""
    wrong = np.array([0 if 2 * label >= task.num_grades - 1 else task.num_grades - 1 for label, _ in missed], np.int64)
    every = grading.evaluate_task(
        task,
        np.concatenate([labels, np.array([label for label, _ in missed], np.int64)]),
        np.concatenate([probabilities, np.eye(task.num_grades)[wrong]]),
        np.concatenate([patients, np.array([patient for _, patient in missed], patients.dtype)]),
    )
    assert every is not None
    return {"missed": len(missed)} | every.to_json()


# The tables ----------------------------------------------------------------------------------------------------------


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of docs/results.md."""
    found_of = [(name, task, found) for name, tasks in content["groups"].items() for task, found in tasks.items()]
    tables = (_accuracy(found_of), _calibration(found_of), _own_side(content["own_side"]))
    return "\n".join(tables)


def _accuracy(found_of: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    rows = []
    for name, task, found in found_of:
        every = found["with missed discs as wrong"]
        for words, statistic in ((words, each.__name__) for words, each in STATISTICS.items()):
            if statistic in found["better than the regression by"]:
                graders = (found[NETWORK], found[REGRESSION], found["better than the regression by"])
                cells = (show(each[statistic], statistic) for each in graders)
                wrong = f"{show(every[statistic], statistic)}, {every['missed']} missed"
                rows.append((name, task, found[NETWORK]["n"], words, *cells, wrong))
    return table(
        ("discs", "task", "n", "measure", NETWORK, REGRESSION, "difference", "missed discs as wrong"),
        rows,
    )


def _calibration(found_of: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    rows = []
    for name, task, found in found_of:
        fits = found["calibration"]
        which = ("before", "after", "as_rater", "of_frequencies")
        errors = ", ".join(f"{100 * fits[f'error_{each}']:.1f}" for each in which[:3])
        scores = ", ".join(f"{fits[f'brier_{each}']:.3f}" for each in which)
        changes, shown = fits["better as the rater by"], [each.__name__ for each in STATISTICS.values()]
        cells = (show(changes[each], each) if each in changes else "–" for each in shown)
        rows.append((name, task, errors, scores, *cells))
    errors, scores = "calibration error, %: network, temperature, rater", "Brier score: the same, frequencies"
    return table(("discs", "task", errors, scores, *(words.removesuffix(", %") for words in STATISTICS)), rows)


def _own_side(found: Mapping[str, Any]) -> str:
    rows = [(task, each["n"], show(each["own_side"])) for task, each in found.items()]
    return table(("hotspots of", "discs graded abnormal", "energy at the own side, %"), rows)
