"""Metrics over patients, each with a 95 % interval and the number of things that it is of.

Scans of one patient are alike, so intervals come from 2,000 bootstrap draws of patients. For a rate of 0 or 1 every
draw is the same. There the interval is the exact one of Clopper and Pearson, as if all trials were independent.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

NUM_DRAWS = 2000

Metric = dict[str, float | int | None]  # value, low, high, n; None where nothing was measured


def rate(patients: Sequence[str], successes: Sequence[int], trials: Sequence[int]) -> Metric:
    """Successes per trial.

    Args:
        patients: of each scan.
        successes: of each scan. A scan may have more than trials, such as false bodies in one scan.
        trials: of each scan.
    """
    count, total = int(np.sum(successes)), int(np.sum(trials))
    if total and (not np.any(successes) or np.array_equal(successes, trials)):
        exact = binomtest(count, total).proportion_ci(confidence_level=0.95, method="exact")
        return _metric(count / total, exact.low, exact.high, total)
    draws = _draws(patients)
    ones, of = _sums(patients, successes)[draws].sum(1), _sums(patients, trials)[draws].sum(1)
    return _bootstrapped(_quotient(count, total), _quotient(ones, of), total)


def ratio(
    patients: Sequence[str],
    first: Sequence[int],
    second: Sequence[int],
    first_of: Sequence[int],
    second_of: Sequence[int],
) -> Metric:
    """One rate divided by another of the same patients. `n` is the number of patients.

    Args:
        patients: of each pair of scans.
        first: the successes in each pair's first scan.
        second: the successes in each pair's second scan.
        first_of: the trials in each pair's first scan.
        second_of: the trials in each pair's second scan.
    """
    sums = [_sums(patients, counts) for counts in (first, second, first_of, second_of)]

    def of(one, other, trials, other_trials):
        return _quotient(_quotient(one, trials), _quotient(other, other_trials))

    draws = _draws(patients)
    value = of(*(each.sum() for each in sums))
    return _bootstrapped(value, of(*(each[draws].sum(1) for each in sums)), len(set(patients)))


def percentile(patients: Sequence[str], values: Sequence[Sequence[float]], percent: float) -> Metric:
    """A percentile of the values of all scans. `values` are those of each scan."""
    by_patient: dict[str, list[float]] = {patient: [] for patient in patients}
    for patient, some in zip(patients, values, strict=True):
        by_patient[patient] += some
    groups = [np.array(some) for some in by_patient.values()]

    def of(chosen: Sequence[np.ndarray]) -> float:
        together = np.concatenate(chosen) if chosen else np.zeros(0)
        return float(np.percentile(together, percent)) if len(together) else np.nan

    drawn = np.array([of([groups[index] for index in draw]) for draw in _draws(patients)])
    return _bootstrapped(of(groups), drawn, sum(map(len, groups)))


def _draws(patients: Sequence[str]) -> np.ndarray:
    """Which patients each draw takes, int[`NUM_DRAWS`, P], in the order in which they first appear."""
    count = len(set(patients))
    return np.random.default_rng(0).integers(max(count, 1), size=(NUM_DRAWS, count))


def _sums(patients: Sequence[str], counts: Sequence[int]) -> Float[np.ndarray, "P"]:
    """The sum over each patient's scans, in the order in which patients first appear."""
    places = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
    index = np.array([places[patient] for patient in patients], int)
    return np.bincount(index, np.array(counts, float), len(places)).astype(float)


def _quotient(numerator, denominator):
    """Their quotient; NaN where the denominator is 0."""
    nothing = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nothing, where=np.not_equal(denominator, 0))


def _bootstrapped(value, drawn: np.ndarray, n: int) -> Metric:
    known = drawn[~np.isnan(drawn)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return _metric(float(value), low, high, n)


def _metric(value: float, low: float, high: float, n: int) -> Metric:
    numbers = {"value": value, "low": low, "high": high}
    return {name: None if np.isnan(number) else round(float(number), 4) for name, number in numbers.items()} | {"n": n}
