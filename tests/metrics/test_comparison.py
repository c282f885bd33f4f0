"""Two graders of the same discs, against scipy, counts made by hand, and each other."""

import numpy as np
import pytest
from scipy import stats

from spinejax.metrics import grading
from spinejax.metrics.comparison import compare_task, mcnemar
from spinejax.tasks import UNLABELLED, Task

TASK = Task("narrowing", ("1", "2", "3"))


@pytest.fixture(scope="module")
def discs():
    """Labels, the grades of a good and of a worse grader, and patients of three discs each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    good, worse = (np.where(rng.random(90) < wrong, rng.integers(0, 3, 90), labels) for wrong in (0.2, 0.6))
    return labels, good, worse, np.arange(90) // 3


def test_the_differences_are_those_of_the_metrics_and_change_their_sign_with_the_order(discs):
    labels, good, worse, patients = discs
    found = compare_task(TASK, labels, worse, good, patients)
    back = compare_task(TASK, labels, good, worse, patients)
    for name, paired in found.metrics.items():
        statistic = getattr(grading, name)
        counts = [grading.patient_confusions(labels, grades, patients, 3).sum(0) for grades in (worse, good)]
        assert (paired.a.value, paired.b.value) == tuple(statistic(each) for each in counts)
        assert paired.difference.value == paired.b.value - paired.a.value > 0
        assert paired.difference.low <= paired.difference.value <= paired.difference.high
        np.testing.assert_allclose(paired.difference.low, -back.metrics[name].difference.high)
    assert set(found.metrics) == {"mean_per_class_accuracy", "kappa", "within_one"}


def test_the_interval_is_of_pairs_and_over_patients(discs):
    labels, good, _, patients = discs
    same = compare_task(TASK, labels, good, good, patients).metrics["kappa"]
    assert (same.difference.low, same.difference.high) == (0, 0)
    assert same.a.low < same.a.high
    one_patient = compare_task(TASK, labels, good, 2 - good, np.zeros(90, int)).metrics["kappa"].difference
    assert one_patient.low == one_patient.high == one_patient.value


def test_mcnemar_is_the_exact_two_sided_test_of_discs_that_one_alone_has_right(discs):
    labels, good, worse, patients = discs
    found = compare_task(TASK, labels, good, worse, patients).mcnemar
    only_a = int(((good == labels) & (worse != labels)).sum())
    only_b = int(((good != labels) & (worse == labels)).sum())
    assert (found.only_a, found.only_b) == (only_a, only_b)
    fewest, total = min(only_a, only_b), only_a + only_b
    assert found.p_value == pytest.approx(min(1, 2 * stats.binom.cdf(fewest, total, 0.5)))
    assert mcnemar(good == labels, good == labels).p_value == 1


def test_without_labels_there_is_agreement_alone(discs):
    _, good, worse, patients = discs
    found = compare_task(TASK, np.full(90, UNLABELLED), good, worse, patients)
    assert (found.labelled, found.metrics, found.mcnemar) == (0, {}, None)
    assert found.same.value == np.mean(good == worse)
    assert found.changed == np.sum(good != worse)
    assert found.confusion.sum() == found.n == 90
    assert found.kappa.value == grading.kappa(grading.patient_confusions(good, worse, patients, 3).sum(0))


def test_no_disc_is_a_programming_error():
    nothing = np.zeros(0, int)
    with pytest.raises(ValueError, match="no disc to compare"):
        compare_task(TASK, nothing, nothing, nothing, nothing)
