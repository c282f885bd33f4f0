"""How well grades are predicted: the paper's measure and the usual ones beside it, with intervals over patients.

All statistics but the area under the ROC curve are functions of a confusion matrix. A 95 % interval is a bootstrap over
patients, not discs, because discs of one spine resemble each other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Num, Shaped
from numpy.typing import ArrayLike

from spinejax.tasks import UNLABELLED, Task

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The three numbers, with None for NaN, which JSON does not have."""
        return {name: None if np.isnan(number) else float(number) for name, number in vars(self).items()}


@dataclass(frozen=True, eq=False)
class TaskResult:
    """The metrics of one task, of which `n` discs are labelled, `grade_n` with each grade."""

    task: Task
    n: int
    estimates: dict[str, Estimate]
    """Statistic of this file → estimate; `within_one` for more than two grades only."""
    recalls: list[Estimate]
    grade_n: list[int]
    confusion: Int[np.ndarray, "C C"]
    """Labels in rows, predictions in columns."""

    def to_json(self) -> dict:
        """The entry of one task in `results.json`; fractions in [0, 1]."""
        per_grade = zip(self.task.grades, self.recalls, self.grade_n, strict=True)
        return {
            "n": self.n,
            **{name: estimate.to_json() for name, estimate in self.estimates.items()},
            "per_class": {grade: {"n": n, "recall": recall.to_json()} for grade, recall, n in per_grade},
            "grades": list(self.task.grades),
            "confusion": self.confusion.tolist(),
        }


def patient_confusions(
    labels: Int[np.ndarray, "N"], grades: Int[np.ndarray, "N"], patients: Shaped[np.ndarray, "N"], num_grades: int
) -> Int[np.ndarray, "P C C"]:
    """The confusion counts of each patient, in sorted order of the patients. Every disc must be labelled."""
    names, patient = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(names), num_grades, num_grades), np.int64)
    np.add.at(counts, (patient, labels, grades), 1)
    return counts


# Grades out of probabilities ------------------------------------------------------------------------------------------


Rule = Literal["balance", "probability", "distance"]
"""How a grade follows from probabilities: see `decide`."""


def decide(
    probabilities: Float[np.ndarray, "N C"],
    by: Rule = "balance",
    frequencies: Float[np.ndarray, "*N C"] | None = None,
) -> Int[np.ndarray, "N"]:
    """The grade of each disc.

    Args:
        by: "balance" takes the grade that is most probable relative to how frequent it is, which favours the mean of
            the grades' accuracies, the paper's measure. "probability" takes the most probable grade, which is
            right most often. "distance" takes the one that is fewest grades away from the true one on average, if all
            grades were equally frequent: it is wrong by two grades less often.
        frequencies: [N, C] or [C]. How frequent each grade is among those that the probabilities are of. Default: all
            alike, as for a network that was trained so; "balance" and "probability" are then the same.

    Example:
        >>> probabilities = np.array([[0.40, 0.15, 0.15, 0.15, 0.15]])
        >>> decide(probabilities), decide(probabilities, "distance")
        (array([0]), array([1]))
        >>> decide(np.array([[0.8, 0.2]]), frequencies=np.array([0.95, 0.05]))
        array([1])
    """
    compared = _compared(probabilities, by, frequencies)
    if by != "distance":
        return compared.argmax(1)
    grades = np.arange(probabilities.shape[1])
    return (compared @ np.abs(grades[:, None] - grades)).argmin(1)


def lead(
    probabilities: Float[np.ndarray, "N C"],
    grades: Int[np.ndarray, "N"],
    by: Rule = "balance",
    frequencies: Float[np.ndarray, "*N C"] | None = None,
) -> Float[np.ndarray, "N"]:
    """How far each disc's grade is ahead of the next one, from -1 to 1.

    For "probability" that is a difference of the probabilities; else, of what they would be if all grades were equally
    frequent. The arguments are those of `decide`, and the grades that it gave.
    """
    compared = _compared(probabilities, by, frequencies)
    is_given = np.eye(compared.shape[1], dtype=bool)[grades]
    return compared[is_given] - np.where(is_given, -np.inf, compared).max(1)


def _compared(probabilities: np.ndarray, by: Rule, frequencies: np.ndarray | None) -> np.ndarray:
    if by == "probability" or frequencies is None:
        return probabilities
    balanced = probabilities / frequencies
    return balanced / balanced.sum(1, keepdims=True)


# Statistics of confusion counts: one number for each matrix -----------------------------------------------------------


def recalls(confusion: Num[np.ndarray, "*any C C"]) -> Float[np.ndarray, "*any C"]:
    """The accuracy of each grade; NaN for a grade without discs."""
    return _ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))


def mean_per_class_accuracy(confusion: Num[np.ndarray, "*any C C"]) -> Float[np.ndarray, "*any"]:
    """The mean of `recalls` over the grades that occur: the paper's measure (Sect. 5)."""
    return _mean_where_defined(recalls(confusion), axis=-1)


def kappa(confusion: Num[np.ndarray, "*any C C"]) -> Float[np.ndarray, "*any"]:
    """Cohen's κ with quadratic weights, as `sklearn.metrics.cohen_kappa_score(weights="quadratic")`."""
    grade = np.arange(confusion.shape[-1])
    penalty = (grade[:, None] - grade) ** 2
    observed = (penalty * confusion).sum((-2, -1))
    chance = confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :]
    return np.asarray(1 - _ratio(observed * confusion.sum((-2, -1)), (penalty * chance).sum((-2, -1))))


def matthews(confusion: Num[np.ndarray, "*any C C"]) -> Float[np.ndarray, "*any"]:
    """Matthews' correlation for any number of grades (Gorodkin, 2004), as `sklearn.metrics.matthews_corrcoef`."""
    confusion = np.asarray(confusion, np.float64)  # products of four counts exceed 2⁶³ from some 50,000 discs on
    labelled, predicted = confusion.sum(-1), confusion.sum(-2)
    total = confusion.sum((-2, -1))
    right = np.trace(confusion, axis1=-2, axis2=-1)
    covariance = right * total - (labelled * predicted).sum(-1)
    spread = (total**2 - (labelled**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    return _ratio(covariance, np.sqrt(spread))


def within_one(confusion: Num[np.ndarray, "*any C C"]) -> Float[np.ndarray, "*any"]:
    """The fraction of discs graded within ±1: the protocol of Lootus for Pfirrmann (paper, Sect. 5)."""
    grade = np.arange(confusion.shape[-1])
    near = np.abs(grade[:, None] - grade) <= 1
    return _ratio((near * confusion).sum((-2, -1)), confusion.sum((-2, -1)))


def normal_abnormal_accuracy(confusion: Num[np.ndarray, "*any C C"]) -> Float[np.ndarray, "*any"]:
    """The fraction of discs rightly given the first grade or rightly not: the protocol of Lootus for narrowing."""
    right = confusion[..., 0, 0] + confusion[..., 1:, 1:].sum((-2, -1))
    return _ratio(right, confusion.sum((-2, -1)))


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    denominator = np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def _mean_where_defined(values: np.ndarray, axis: int) -> np.ndarray:
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis), defined.sum(axis))


# Area under the ROC curve ---------------------------------------------------------------------------------------------


def auc(
    labels: Int[np.ndarray, "N"], probabilities: Float[np.ndarray, "N C"], weights: Num[np.ndarray, "R N"]
) -> Float[np.ndarray, "R"]:
    """Area under the ROC curve: each grade against the rest, averaged over the grades that occur (for two: the second).

    For each of R resamples, with the number of times that each disc counts as its weight, it is
    `sklearn.metrics.roc_auc_score(…, sample_weight=…)`. All discs are labelled.
    """
    grades = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    each = np.stack([_binary_auc(labels == grade, probabilities[:, grade], weights) for grade in grades])
    return _mean_where_defined(each, axis=0)


def _binary_auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that a positive outscores a negative, with ties counting half (Mann and Whitney)."""
    _, tie = np.unique(score, return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.diff(tie[order], prepend=-1))
    sorted_weights = weights[:, order]
    positives = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    return _ratio((positives * (below + negatives / 2)).sum(1), positives.sum(1) * negatives.sum(1))


# All statistics of a task ---------------------------------------------------------------------------------------------


def evaluate_task(
    task: Task,
    labels: Int[np.ndarray, "N"],
    probabilities: Float[np.ndarray, "N C"],
    patients: Shaped[np.ndarray, "N"],
    *,
    grades: Int[np.ndarray, "N"] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> TaskResult | None:
    """The metrics of one task; None if no disc is labelled.

    Args:
        labels: grade or `UNLABELLED`; discs without a label are left out.
        grades: what each disc is given; default: its most probable grade.
        num_resamples, seed: draws for each 95 % interval (percentile bootstrap over patients), and their seed.
    """
    labelled = labels != UNLABELLED
    if not labelled.any():
        return None
    given = (decide(probabilities) if grades is None else grades)[labelled]
    labels, probabilities, patients = labels[labelled], probabilities[labelled], patients[labelled]
    by_patient = patient_confusions(labels, given, patients, task.num_grades)
    draws = _draws(len(by_patient), num_resamples, seed)
    confusions = _resampled(draws, by_patient)
    statistics = [mean_per_class_accuracy, kappa, matthews, normal_abnormal_accuracy]
    statistics += [within_one] if task.num_grades > 2 else []
    estimates = {statistic.__name__: _estimate(statistic(confusions)) for statistic in statistics}
    patient_of_disc = np.unique(patients, return_inverse=True)[1]
    chunks = np.array_split(draws, max(1, draws.shape[0] * len(labels) // 10_000_000))  # bounds the memory
    aucs = [auc(labels, probabilities, chunk[:, patient_of_disc]) for chunk in chunks]
    return TaskResult(
        task=task,
        n=len(labels),
        estimates=estimates | {"auc": _estimate(np.concatenate(aucs))},
        recalls=[_estimate(column) for column in recalls(confusions).T],
        grade_n=confusions[0].sum(1).tolist(),
        confusion=confusions[0],
    )


def estimate(
    statistic: Callable[[np.ndarray], np.ndarray],
    by_patient: Int[np.ndarray, "P C C"],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of confusion counts, such as `kappa`. `by_patient` is from `patient_confusions`; others as above."""
    draws = _draws(len(by_patient), num_resamples, seed)
    return _estimate(statistic(_resampled(draws, by_patient)))


def difference(
    statistic: Callable[[np.ndarray], np.ndarray],
    one: Int[np.ndarray, "P C C"],
    other: Int[np.ndarray, "P C C"],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How much larger a statistic is for `one` than for `other`, two graders of the same discs.

    Args:
        statistic: of confusion counts, such as `kappa`.
        one, other: from `patient_confusions` of the same discs. The interval is of paired differences: both graders
            get the same patients in each resample.
        num_resamples, seed: as for `evaluate_task`.

    Example:
        >>> right, wrong = np.array([[[4, 0], [0, 4]]] * 9), np.array([[[3, 1], [1, 3]]] * 9)
        >>> difference(mean_per_class_accuracy, right, wrong)
        Estimate(value=0.25, low=0.25, high=0.25)
    """
    draws = _draws(len(one), num_resamples, seed)
    values = [statistic(_resampled(draws, each)) for each in (one, other)]
    return _estimate(values[0] - values[1])


def mean_over_patients(
    values: Float[np.ndarray, "N"],
    patients: Shaped[np.ndarray, "N"],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of one number for each disc, with a 95 % interval over patients.

    Args:
        values: NaN where a disc has none; such discs are left out.
        patients, num_resamples, seed: as for `evaluate_task`.
    """
    has_one = ~np.isnan(values)
    if not has_one.any():
        return Estimate(np.nan, np.nan, np.nan)
    names, patient = np.unique(patients[has_one], return_inverse=True)
    draws = _draws(len(names), num_resamples, seed)
    sums = np.bincount(patient, values[has_one], minlength=len(names))
    return _estimate((draws @ sums) / (draws @ np.bincount(patient, minlength=len(names))))


@functools.lru_cache(maxsize=1)  # each statistic of some discs asks for the same ones
def _draws(num_patients: int, num_resamples: int, seed: int) -> np.ndarray:
    """int[1 + R, P]: how often each patient counts in each resample. The first row is the set itself, so that one
    call of a statistic gives both the value and the interval.
    """
    draws = np.random.default_rng(seed).multinomial(num_patients, [1 / num_patients] * num_patients, num_resamples)
    draws = np.concatenate([np.ones((1, num_patients), draws.dtype), draws])
    draws.setflags(write=False)
    return draws


def _resampled(draws: np.ndarray, by_patient: np.ndarray) -> np.ndarray:
    """int[1 + R, C, C]: the confusion counts of each resample."""
    num_grades = by_patient.shape[-1]
    counts = draws.astype(np.float64) @ by_patient.reshape(len(by_patient), -1)  # BLAS; counts are exact in float64
    return counts.astype(np.int64).reshape(-1, num_grades, num_grades)


def _estimate(values: np.ndarray) -> Estimate:
    value, resampled = values[0], values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
