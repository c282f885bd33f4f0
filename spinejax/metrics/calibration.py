"""How far a probability can be trusted: its calibration, and one temperature per task that mends it.

A network trained to the end is too sure of itself. Dividing its scores by one number, fitted on the validation split,
changes no grade and makes the probabilities honest (Guo et al., 2017). And what doubt is good for: if the most doubtful
discs are referred to a rater, how often are the grades of the others right?
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from spinejax.metrics.grading import Estimate, mean_over_patients
from spinejax.tasks import Task

NUM_BINS = 15
COVERAGES = (1.0, 0.9, 0.8, 0.5)
"""Fractions of the discs that are kept, at which accuracy is told."""

_TEMPERATURES = (0.05, 20.0)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least log-loss, held to 1 as far as one disc or two would hold it.

    Without that hold (a standard normal prior on its logarithm), a validation set without a mistake would make the
    network certain of everything.

    Args:
        probabilities: float[N, C]; averages over views too.
        labels: int[N], all labelled.

    Returns:
        Above 1 where the network is too sure; 1 if there is no disc to fit it on.
    """
    if not len(labels):
        return 1.0

    def loss(log_temperature):
        log_probability = log_softmax(_log(probabilities) / np.exp(log_temperature), axis=1)
        return log_temperature**2 / 2 - log_probability[np.arange(len(labels)), labels].sum()

    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """float[N, C]. The probabilities with their logarithms divided by the temperature."""
    return np.exp(log_softmax(_log(probabilities) / temperature, axis=1))


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float[N]. Each disc's squared distance from certainty of the true grade, summed over grades (Brier, 1950)."""
    return np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(1)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """How far confidence is from accuracy, over bins of equal width, weighed by their discs (Naeini et al., 2015).

    Args:
        probabilities: float[N, C].
        labels: int[N], all labelled, at least one.
        num_bins: bins of confidence from 0 to 1.
    """
    confidence, accuracy, count = reliability(probabilities, labels, num_bins)
    filled = count > 0
    return float((count * np.abs(confidence - accuracy))[filled].sum() / count.sum())


def before_and_after(probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    """The temperature, and the calibration error and mean Brier score without and with it."""
    mended = at_temperature(probabilities, temperature)
    return {
        "temperature": temperature,
        "calibration_error_before": expected_calibration_error(probabilities, labels),
        "calibration_error_after": expected_calibration_error(mended, labels),
        "brier_before": float(brier(probabilities, labels).mean()),
        "brier_after": float(brier(mended, labels).mean()),
    }


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and number of discs in each bin of confidence; NaN where a bin is empty."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    empty = np.full(num_bins, np.nan)
    means = (
        np.divide(np.bincount(place, values, num_bins), count, out=empty.copy(), where=count > 0)
        for values in (confidence, right)
    )
    return *means, count


def accuracy_when_referring(doubt: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float[N]. Accuracy of the discs that are kept if the most doubtful are referred to a rater.

    Args:
        doubt: float[N]. Any measure of it, such as the spread of a grade's probability over views.
        right: bool[N].

    Returns:
        At place k, the accuracy of the k + 1 least doubtful discs.
    """
    order = np.argsort(doubt, kind="stable")
    return np.cumsum(right[order]) / np.arange(1, len(right) + 1)


@dataclass(frozen=True, eq=False)
class Doubt:
    """How far one task's probabilities can be trusted.

    Args:
        task: the task.
        n: labelled discs.
        calibration_error: as `expected_calibration_error`.
        brier: mean Brier score.
        bins: confidence, accuracy and number of discs in each bin, as `reliability`.
        kept: measure of doubt ("confidence": one minus the grade's probability; "spread": over the views) → float[N],
            as `accuracy_when_referring`.
        accuracy_at: measure of doubt → fraction of the discs kept → their accuracy.
    """

    task: Task
    n: int
    calibration_error: float
    brier: Estimate
    bins: tuple[np.ndarray, np.ndarray, np.ndarray]
    kept: Mapping[str, np.ndarray]
    accuracy_at: Mapping[str, Mapping[float, Estimate]]

    def curve(self, measure: str, num_points: int = 100) -> np.ndarray:
        """float[P, 2]. Fraction of the discs that is kept, and their accuracy, at no more than so many points."""
        counts = np.unique(np.linspace(1, self.n, min(self.n, num_points)).round().astype(int))
        return np.stack([counts / self.n, self.kept[measure][counts - 1]], axis=1)

    def to_json(self) -> dict:
        """The `results.json` entry of one task; fractions in [0, 1]."""
        return {
            "n": self.n,
            "calibration_error": self.calibration_error,
            "brier": self.brier.to_json(),
            "referring": {
                measure: {
                    "accuracy_at_coverage": {f"{kept:g}": found.to_json() for kept, found in accuracy.items()},
                    "mean_accuracy": float(self.kept[measure].mean()),
                    "curve": self.curve(measure).round(6).tolist(),
                }
                for measure, accuracy in self.accuracy_at.items()
            },
        }


def doubt(task: Task, labels: np.ndarray, probabilities: np.ndarray, spread: np.ndarray, patients: np.ndarray) -> Doubt:
    """All that tells how far to trust one task's probabilities.

    Args:
        task: the task.
        labels: int[N], all labelled, at least one.
        probabilities: float[N, C].
        spread: float[N]. Over the views; a single view has none, all zeros, and refers nothing.
        patients: str[N]. Whose disc it is.

    Returns:
        The metrics, with intervals over patients.
    """
    right = probabilities.argmax(1) == labels
    measures = {"confidence": 1 - probabilities.max(1)}
    if spread.any():
        measures["spread"] = spread

    def accuracy_at(measure: np.ndarray, coverage: float) -> Estimate:
        kept = np.argsort(measure, kind="stable")[: max(1, round(coverage * len(right)))]
        return mean_over_patients(right[kept].astype(np.float64), patients[kept])

    return Doubt(
        task=task,
        n=len(labels),
        calibration_error=expected_calibration_error(probabilities, labels),
        brier=mean_over_patients(brier(probabilities, labels), patients),
        bins=reliability(probabilities, labels),
        kept={name: accuracy_when_referring(measure, right) for name, measure in measures.items()},
        accuracy_at={
            name: {coverage: accuracy_at(measure, coverage) for coverage in COVERAGES}
            for name, measure in measures.items()
        },
    )


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
