"""How well grades are predicted: the paper's measure and its usual companions, with intervals over patients.

Everything but the area under the ROC curve is a function of a confusion matrix, labels by rows and predictions by
columns, so a set of discs is summed up by one count matrix per patient. Counts merge by addition. A 95 % interval comes
from drawing patients, not discs, with replacement: discs of one spine resemble each other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spinejax.tasks import UNLABELLED, Task

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The three numbers, None for NaN, which JSON does not have."""
        fields = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if np.isnan(number) else float(number) for name, number in fields.items()}


@dataclass(frozen=True, eq=False)
class TaskResult:
    """One task's figures.

    Args:
        task: the task.
        n: labelled discs.
        estimates: statistic's name → estimate. `mean_per_class_accuracy`, `kappa`, `matthews`, `auc`,
            `normal_abnormal_accuracy`; for more than two grades also `within_one`.
        recalls: a grade's accuracy, one Estimate a grade.
        grade_n: labelled discs of each grade.
        confusion: int64[C, C].
    """

    task: Task
    n: int
    estimates: dict[str, Estimate]
    recalls: list[Estimate]
    grade_n: list[int]
    confusion: np.ndarray

    def to_json(self) -> dict:
        """The `results.json` entry of one task; fractions in [0, 1]."""
        per_grade = zip(self.task.grades, self.recalls, self.grade_n, strict=True)
        return {
            "n": self.n,
            **{name: estimate.to_json() for name, estimate in self.estimates.items()},
            "per_class": {grade: {"n": n, "recall": recall.to_json()} for grade, recall, n in per_grade},
            "grades": list(self.task.grades),
            "confusion": self.confusion.tolist(),
        }


# Confusion counts ----------------------------------------------------------------------------------------------------


def patient_confusions(labels: np.ndarray, grades: np.ndarray, patients: np.ndarray, num_grades: int) -> np.ndarray:
    """Confusion counts of each patient, int64[P, C, C], patients in sorted order. Every disc must be labelled."""
    names, patient = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(names), num_grades, num_grades), np.int64)
    np.add.at(counts, (patient, labels, grades), 1)
    return counts


# Statistics of confusion counts [..., C, C]; each gives one number per matrix -----------------------------------------


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Each grade's accuracy, [..., C]; NaN for a grade that has no disc."""
    return _ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))


def mean_per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The mean of `recalls` over the grades that occur: the paper's measure (Sect. 5)."""
    each = recalls(confusion)
    occurs = ~np.isnan(each)
    return _ratio(np.where(occurs, each, 0).sum(-1), occurs.sum(-1))


def kappa(confusion: np.ndarray) -> np.ndarray:
    """Cohen's κ with quadratic weights, as `sklearn.metrics.cohen_kappa_score(weights="quadratic")`."""
    grade = np.arange(confusion.shape[-1])
    penalty = (grade[:, None] - grade) ** 2
    observed = (penalty * confusion).sum((-2, -1))
    chance = confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :]
    return 1 - _ratio(observed * confusion.sum((-2, -1)), (penalty * chance).sum((-2, -1)))


def matthews(confusion: np.ndarray) -> np.ndarray:
    """Matthews' correlation for any number of grades (Gorodkin, 2004), as `sklearn.metrics.matthews_corrcoef`."""
    confusion = np.asarray(confusion, np.float64)  # products of four counts pass 2⁶³ from some 50,000 discs on
    labelled, predicted = confusion.sum(-1), confusion.sum(-2)
    total = confusion.sum((-2, -1))
    right = np.trace(confusion, axis1=-2, axis2=-1)
    covariance = right * total - (labelled * predicted).sum(-1)
    spread = (total**2 - (labelled**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    return _ratio(covariance, np.sqrt(spread))


def within_one(confusion: np.ndarray) -> np.ndarray:
    """The fraction of discs graded within ±1: the protocol of Lootus for Pfirrmann (paper, Sect. 5)."""
    grade = np.arange(confusion.shape[-1])
    near = np.abs(grade[:, None] - grade) <= 1
    return _ratio((near * confusion).sum((-2, -1)), confusion.sum((-2, -1)))


def normal_abnormal_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The fraction of discs whose grade is rightly the first or not: the protocol of Lootus for narrowing."""
    both_normal = confusion[..., 0, 0]
    both_abnormal = confusion[..., 1:, 1:].sum((-2, -1))
    return _ratio(both_normal + both_abnormal, confusion.sum((-2, -1)))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    denominator = np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


# Area under the ROC curve ---------------------------------------------------------------------------------------------


def auc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: each grade against the rest, averaged over the grades that occur (for two: the second).

    Args:
        labels: int[N], all labelled.
        probabilities: float[N, C].
        weights: float[R, N]. How often each disc counts, in each of R resamples.

    Returns:
        float64[R]; `sklearn.metrics.roc_auc_score(…, sample_weight=…)` of each.
    """
    grades = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    each = np.stack([_binary_auc(labels == grade, probabilities[:, grade], weights) for grade in grades])
    occurs = ~np.isnan(each)
    return _ratio(np.where(occurs, each, 0).sum(0), occurs.sum(0))


def _binary_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that a positive outscores a negative, ties counting half (Mann and Whitney)."""
    _, tie = np.unique(score, return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.diff(tie[order], prepend=-1))
    sorted_weights = weights[:, order]
    positives = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    return _ratio((positives * (below + negatives / 2)).sum(1), positives.sum(1) * negatives.sum(1))


# Putting it together --------------------------------------------------------------------------------------------------


def evaluate_task(
    task: Task,
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> TaskResult | None:
    """All figures of one task; a disc's predicted grade is the most probable one.

    Args:
        task: the task.
        labels: int[N]. Grade or `UNLABELLED`; discs without a label are left out.
        probabilities: float[N, C].
        patients: str[N]. Whose disc it is.
        num_resamples: draws behind each 95 % interval (percentile bootstrap over patients).
        seed: of the draws.

    Returns:
        The figures, or None if no disc is labelled.
    """
    labelled = labels != UNLABELLED
    if not labelled.any():
        return None
    labels, probabilities, patients = labels[labelled], probabilities[labelled], patients[labelled]
    by_patient = patient_confusions(labels, probabilities.argmax(1), patients, task.num_grades)
    draws = _draws(len(by_patient), num_resamples, seed)
    confusions = np.einsum("rp,pij->rij", draws, by_patient)

    statistics: dict[str, Callable] = {
        "mean_per_class_accuracy": mean_per_class_accuracy,
        "kappa": kappa,
        "matthews": matthews,
        "normal_abnormal_accuracy": normal_abnormal_accuracy,
    }
    if task.num_grades > 2:
        statistics["within_one"] = within_one
    estimates = {name: _estimate(statistic(confusions)) for name, statistic in statistics.items()}
    patient_of_disc = np.unique(patients, return_inverse=True)[1]
    chunks = np.array_split(draws, max(1, draws.shape[0] * len(labels) // 10_000_000))  # bounds the memory
    estimates["auc"] = _estimate(
        np.concatenate([auc(labels, probabilities, chunk[:, patient_of_disc]) for chunk in chunks])
    )
    return TaskResult(
        task=task,
        n=len(labels),
        estimates=estimates,
        recalls=[_estimate(column) for column in recalls(confusions).T],
        grade_n=confusions[0].sum(1).tolist(),
        confusion=confusions[0],
    )


def mean_over_patients(
    values: np.ndarray, patients: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of one number a disc, with a 95 % interval over patients.

    Args:
        values: float[N]. NaN where a disc has none; such discs are left out.
        patients: str[N]. Whose disc it is.
        num_resamples, seed: as for `evaluate_task`.
    """
    has_one = ~np.isnan(values)
    if not has_one.any():
        return Estimate(np.nan, np.nan, np.nan)
    names, patient = np.unique(patients[has_one], return_inverse=True)
    draws = _draws(len(names), num_resamples, seed)
    sums = np.bincount(patient, values[has_one], minlength=len(names))
    return _estimate((draws @ sums) / (draws @ np.bincount(patient, minlength=len(names))))


def _draws(num_patients: int, num_resamples: int, seed: int) -> np.ndarray:
    """int[1 + R, P]: how often each patient counts in each resample; the first "resample" is the set itself.

    So every statistic is computed once, for the value and for the interval.
    """
    draws = np.random.default_rng(seed).multinomial(num_patients, [1 / num_patients] * num_patients, num_resamples)
    return np.concatenate([np.ones((1, num_patients), draws.dtype), draws])


def _estimate(values: np.ndarray) -> Estimate:
    value, resampled = values[0], values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
