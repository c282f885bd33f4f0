"""How far a probability can be trusted: its calibration, and what improves it: a temperature, or a rater's habits.

A network trained to the end is overconfident. Dividing its scores by one number, fitted on the validation split,
changes no grade and calibrates the probabilities (Guo et al., 2017). But a network that is trained as if all grades
were equally frequent (paper, Sect. 2) gives a rare grade too high a probability, at any temperature; and raters differ
in how often they give a grade. So where there are enough discs, what is fitted is a `Rater`.

The use of doubt is measured too: if the most doubtful discs, or those below a probability, are referred to a rater, how
often are the grades of the others right?
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired

import numpy as np
import pydantic
from jaxtyping import Bool, Float, Int, Num, Shaped
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax
from typing_extensions import TypedDict

from spinejax.metrics.grading import Estimate, mean_over_patients
from spinejax.tasks import UNLABELLED, Task

NUM_BINS = 15
COVERAGES = (1.0, 0.9, 0.8, 0.5)
"""Fractions of the discs that are kept, at which accuracy is reported."""

_TEMPERATURES = (0.05, 20.0)
_PRIOR_PRECISION = 20
"""Of each shift: the belief that a rater has no habits but the frequencies. Chosen on two of the five folds."""
_LEAST = 1e-6
"""Probabilities below are not told apart: tables have six digits."""

_Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class Rater(TypedDict):
    """How one rater grades a task, given a network that was trained as if all grades were equally frequent.

    The probability of grade c is proportional to f_c · exp(b_c) · p_c^(1/T), of the network's p_c.

    Args:
        temperature: T.
        shifts: b, one for each grade. Where a grade's is high, the rater gives it where the network would not yet.
        frequencies: f, the share of each grade among this rater's.
        borrowed: fitted to other raters' grades, because this one has not graded the task on scans of the contrast.
    """

    temperature: _Positive
    shifts: list[Annotated[float, pydantic.Field(allow_inf_nan=False)]]
    frequencies: list[_Positive]
    borrowed: bool


class Fit(TypedDict):
    """The temperatures of one way of grading: a number of views, and what is averaged over them."""

    num_views: Annotated[int, pydantic.Field(ge=1)]
    average: Literal["probabilities", "logits"]
    data: str  # digest of the data set whose validation discs it was fitted on
    discs: dict[str, int]  # labelled discs of each task there; without any, the temperature is 1
    temperatures: dict[str, _Positive]
    raters: NotRequired[dict[str, dict[str, dict[str, Rater]]]]  # rater's name → contrast, "t1" or "t2" → task's name


def fit_temperature(probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> float:
    """The temperature of least log-loss; above 1 where the network is overconfident, and 1 if there is no disc.

    A standard normal prior on its logarithm weighs as much as one disc or two. Without it, a validation set without a
    mistake would make the network certain of everything. All discs are labelled.
    """
    if not len(labels):
        return 1.0

    def loss(log_temperature):
        log_probability = log_softmax(_log(probabilities) / np.exp(log_temperature), axis=1)
        return log_temperature**2 / 2 - log_probability[np.arange(len(labels)), labels].sum()

    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def at_temperature(probabilities: Float[np.ndarray, "N C"], temperature: float) -> Float[np.ndarray, "N C"]:
    """The probabilities with their logarithms divided by the temperature."""
    return np.exp(log_softmax(_log(probabilities) / temperature, axis=1))


def fit_rater(probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> Rater:
    """The rater of least log-loss. All discs are labelled, and there is at least one.

    The priors are standard normal on the temperature's logarithm, as for `fit_temperature`, and normal on each shift
    with a variance of 1/20: a grade with few discs keeps the network's view of it. Frequencies are counted with one
    disc more of each grade, so that none is impossible.
    """
    num_grades = probabilities.shape[1]
    counts = np.bincount(labels, minlength=num_grades) + 1
    frequencies = counts / counts.sum()
    logs, is_label = _log(probabilities, _LEAST), np.eye(num_grades)[labels]

    def loss(parameters):
        log_temperature, shifts = parameters[0], parameters[1:]
        log_probability = log_softmax(logs / np.exp(log_temperature) + shifts + np.log(frequencies), axis=1)
        excess = np.exp(log_probability) - is_label
        by_temperature = log_temperature - (excess * logs).sum() / np.exp(log_temperature)
        prior = (log_temperature**2 + _PRIOR_PRECISION * (shifts**2).sum()) / 2
        gradient = np.append(by_temperature, excess.sum(0) + _PRIOR_PRECISION * shifts)
        return prior - (is_label * log_probability).sum(), gradient

    bounds = [tuple(np.log(_TEMPERATURES)), *[(None, None)] * num_grades]
    found = minimize(loss, np.zeros(1 + num_grades), jac=True, method="L-BFGS-B", bounds=bounds).x
    temperature, shifts = float(np.exp(found[0])), found[1:].tolist()
    return Rater(temperature=temperature, shifts=shifts, frequencies=frequencies.tolist(), borrowed=False)


def as_rater(probabilities: Float[np.ndarray, "N C"], rater: Rater) -> Float[np.ndarray, "N C"]:
    """The network's probabilities, turned into those of the rater's grades.

    Example:
        >>> seldom = Rater(temperature=1.0, shifts=[0.0, 0.0], frequencies=[0.9, 0.1], borrowed=False)
        >>> as_rater(np.array([[0.5, 0.5], [0.1, 0.9]]), seldom)
        array([[0.9, 0.1],
               [0.5, 0.5]])
    """
    scores = _log(probabilities, _LEAST) / rater["temperature"] + np.asarray(rater["shifts"])
    return np.exp(log_softmax(scores + np.log(rater["frequencies"]), axis=1))


def brier(probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Each disc's squared distance from certainty of the true grade, summed over grades (Brier, 1950)."""
    return np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(1)


def expected_calibration_error(
    probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"], num_bins: int = NUM_BINS
) -> float:
    """The distance of confidence from accuracy, averaged over bins weighted by their discs (Naeini et al., 2015).

    The bins are of equal width, of confidence from 0 to 1. All discs are labelled, and there is at least one.
    """
    confidence, accuracy, count = reliability(probabilities, labels, num_bins)
    filled = count > 0
    return float((count * np.abs(confidence - accuracy))[filled].sum() / count.sum())


def before_and_after(
    before: Float[np.ndarray, "N C"], after: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]
) -> dict[str, float]:
    """The calibration error and the mean Brier score of the probabilities before and after a change."""
    found = {}
    for when, each in (("before", before), ("after", after)):
        found[f"calibration_error_{when}"] = expected_calibration_error(each, labels)
        found[f"brier_{when}"] = float(brier(each, labels).mean())
    return found


def reliability(
    probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"], num_bins: int = NUM_BINS
) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"], Int[np.ndarray, "B"]]:
    """Mean confidence, accuracy and number of discs in each bin of confidence; NaN where a bin is empty."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    mean_confidence, accuracy = (
        np.divide(np.bincount(place, each, num_bins), count, out=np.full(num_bins, np.nan), where=count > 0)
        for each in (confidence, right)
    )
    return mean_confidence, accuracy, count


def accuracy_when_referring(doubt: Num[np.ndarray, "N"], right: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """At position k, the accuracy of the k + 1 least doubtful discs, if the others are referred to a rater."""
    order = np.argsort(doubt, kind="stable")
    return np.cumsum(right[order]) / np.arange(1, len(right) + 1)


@dataclass(frozen=True, eq=False)
class Doubt:
    """How far one task's probabilities can be trusted.

    The measures of doubt are "confidence", one minus the given grade's probability, and "spread", over the views.
    """

    task: Task
    n: int
    """Number of labelled discs."""
    calibration_error: float
    brier: Estimate
    bins: tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"], Int[np.ndarray, "B"]]
    """From `reliability`."""
    kept: Mapping[str, Float[np.ndarray, "N"]]
    """Measure of doubt → `accuracy_when_referring`."""
    accuracy_at: Mapping[str, Mapping[float, Estimate]]
    """Measure of doubt → fraction of the discs kept → their accuracy."""

    def curve(self, measure: str, num_points: int = 100) -> Float[np.ndarray, "P 2"]:
        """Fraction of the discs that is kept, and their accuracy, at `num_points` points or fewer."""
        counts = np.unique(np.linspace(1, self.n, min(self.n, num_points)).round().astype(int))
        return np.stack([counts / self.n, self.kept[measure][counts - 1]], axis=1)

    def to_json(self) -> dict:
        """The entry of one task in `results.json`; fractions in [0, 1]."""
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


def doubt(
    task: Task,
    labels: Int[np.ndarray, "N"],
    probabilities: Float[np.ndarray, "N C"],
    spread: Float[np.ndarray, "N"],
    patients: Shaped[np.ndarray, "N"],
    grades: Int[np.ndarray, "N"] | None = None,
) -> Doubt:
    """How far one task's probabilities can be trusted, with intervals over patients.

    All discs are labelled, and there is at least one. `spread` is over the views, and is not used if it is zero
    throughout, as for a single view. `grades` are those that the discs are given; default: the most probable ones.
    """
    given = probabilities.argmax(1) if grades is None else grades
    right = given == labels
    measures = {"confidence": 1 - _of(given, probabilities)}
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


@dataclass(frozen=True)
class Kept:
    """The grades of one task that are kept, if those with a probability below `below` are referred to a rater."""

    task: Task
    below: float
    n: int
    """Number of discs, with a label or without."""
    share: Estimate
    """Fraction of them that is kept."""
    labelled: int
    """Number of kept discs that have a label."""
    accuracy: Estimate
    """Fraction of these whose grade is right; NaN if there is none."""

    def to_json(self) -> dict:
        """The entry of one task in `results.json`; fractions in [0, 1]."""
        return {
            "below": self.below,
            "n": self.n,
            "share_kept": self.share.to_json(),
            "labelled_kept": self.labelled,
            "accuracy_of_kept": self.accuracy.to_json(),
        }


def refers(
    probabilities: Float[np.ndarray, "N C"], grades: Int[np.ndarray, "N"], below: float
) -> Bool[np.ndarray, "N"]:
    """Which discs are referred to a rater: those whose grade has a probability below `below`."""
    return _of(grades, probabilities) < below


def kept(
    task: Task,
    labels: Int[np.ndarray, "N"],
    probabilities: Float[np.ndarray, "N C"],
    grades: Int[np.ndarray, "N"],
    patients: Shaped[np.ndarray, "N"],
    below: float,
) -> Kept:
    """How many grades of a task `refers` keeps, and how often they are right, with intervals over patients.

    There is at least one disc; its label may be `UNLABELLED`. `grades` is what each disc is given.
    """
    stays = ~refers(probabilities, grades, below)
    counts = stays & (labels != UNLABELLED)
    right = grades == labels
    return Kept(
        task=task,
        below=below,
        n=len(labels),
        share=mean_over_patients(stays.astype(np.float64), patients),
        labelled=int(counts.sum()),
        accuracy=mean_over_patients(right[counts].astype(np.float64), patients[counts]),
    )


def _of(grades: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The probability of each disc's grade."""
    return np.take_along_axis(probabilities, grades[:, None], axis=1)[:, 0]


def _log(probabilities: np.ndarray, least: float = float(np.finfo(np.float32).tiny)) -> np.ndarray:
    return np.log(np.maximum(probabilities, least))
