"""Every statistic against scikit-learn, and the intervals against what they promise."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from spinejax.metrics import grading
from spinejax.tasks import UNLABELLED, Task

GRADES = Task("pfirrmann", ("1", "2", "3", "4", "5"))
BINARY = Task("upper_endplate", ("normal", "abnormal"))


def graded(task, num_patients=40, discs=6, seed=0):
    """Labels, probabilities that follow them half of the time, patients."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, task.num_grades, num_patients * discs)
    scores = rng.normal(size=(len(labels), task.num_grades)) + 1.5 * np.eye(task.num_grades)[labels]
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return labels, probabilities, np.repeat([f"p{i:03d}" for i in range(num_patients)], discs)


@pytest.mark.parametrize("task", [GRADES, BINARY])
def test_statistics_equal_scikit_learn(task):
    labels, probabilities, patients = graded(task)
    grades = probabilities.argmax(1)
    result = grading.evaluate_task(task, labels, probabilities, patients, num_resamples=10)
    expected = {
        "mean_per_class_accuracy": sklearn_metrics.balanced_accuracy_score(labels, grades),
        "kappa": sklearn_metrics.cohen_kappa_score(labels, grades, weights="quadratic"),
        "matthews": sklearn_metrics.matthews_corrcoef(labels, grades),
        "auc": sklearn_metrics.roc_auc_score(
            labels, probabilities if task is GRADES else probabilities[:, 1], multi_class="ovr"
        ),
    }
    expected["normal_abnormal_accuracy"] = np.mean((labels == 0) == (grades == 0))
    if task is GRADES:
        expected["within_one"] = np.mean(np.abs(labels - grades) <= 1)
    assert set(result.estimates) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result.estimates[name].value, value, rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(result.confusion, sklearn_metrics.confusion_matrix(labels, grades))
    recalls = sklearn_metrics.recall_score(labels, grades, average=None)
    np.testing.assert_allclose([recall.value for recall in result.recalls], recalls)


def test_a_rare_grade_is_given_before_it_is_the_most_probable():
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.96, 0.04]])
    frequencies = np.array([[0.95, 0.05], [0.5, 0.5], [0.95, 0.05]])
    np.testing.assert_array_equal(grading.decide(probabilities, "balance", frequencies), [1, 0, 0])
    np.testing.assert_array_equal(grading.decide(probabilities, "probability", frequencies), [0, 0, 0])
    np.testing.assert_array_equal(grading.decide(probabilities), [0, 0, 0])
    # If all were equally frequent: 0.3, 0.1, 0.15 and 0.45. The median is the third grade; without, the first.
    skewed, rare = np.array([[0.6, 0.2, 0.05, 0.15]]), np.array([6, 6, 1, 1]) / 14
    assert grading.decide(skewed, "balance", rare) == 3
    assert grading.decide(skewed, "distance", rare) == 2
    assert grading.decide(skewed, "distance") == 0
    assert grading.decide(skewed, "probability", rare) == 0
    for grade, by, expected in ((3, "balance", 0.15), (2, "distance", -0.3), (0, "probability", 0.4)):
        np.testing.assert_allclose(grading.lead(skewed, np.array([grade]), by, rare), [expected])


@pytest.mark.parametrize("task", [GRADES, BINARY])
def test_the_grade_of_least_expected_distance(task):
    labels, probabilities, patients = graded(task)
    grades = range(task.num_grades)
    expected = [
        min(grades, key=lambda one: sum(chance * abs(one - other) for other, chance in enumerate(row)))
        for row in probabilities
    ]
    found = grading.decide(probabilities, "distance")
    np.testing.assert_array_equal(found, expected)
    assert (found != probabilities.argmax(1)).any() == (task.num_grades > 2), "of two grades the two rules are one"
    np.testing.assert_array_equal(grading.decide(probabilities), probabilities.argmax(1))
    result = grading.evaluate_task(task, labels, probabilities, patients, grades=found, num_resamples=10)
    np.testing.assert_array_equal(result.confusion, sklearn_metrics.confusion_matrix(labels, expected))


def test_many_discs_cause_no_overflow():
    few, many = np.array([[40, 10], [5, 45]]), np.array([[40, 10], [5, 45]]) * 1_000_000
    for statistic in (grading.matthews, grading.kappa, grading.mean_per_class_accuracy):
        np.testing.assert_allclose(statistic(many), statistic(few), rtol=1e-12)


def test_weighted_auc_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    scores = np.round(rng.random(60), 1)
    weights = rng.integers(0, 4, (5, 60))
    got = grading.auc(labels, np.stack([1 - scores, scores], 1), weights)
    expected = [sklearn_metrics.roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(got, expected)


def test_counts_of_halves_add_up_to_the_counts_of_the_whole():
    labels, probabilities, patients = graded(GRADES)
    whole = grading.patient_confusions(labels, probabilities.argmax(1), patients, 5)
    first, second = (
        grading.patient_confusions(labels[part], probabilities[part].argmax(1), patients[part], 5)
        for part in (slice(0, 120), slice(120, None))
    )
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    assert whole.sum() == len(labels)


def test_unlabelled_discs_change_nothing():
    labels, probabilities, patients = graded(GRADES)
    keep = np.random.default_rng(2).random(len(labels)) < 0.6
    masked = np.where(keep, labels, UNLABELLED)
    some = grading.evaluate_task(GRADES, masked, probabilities, patients, num_resamples=20)
    only = grading.evaluate_task(GRADES, labels[keep], probabilities[keep], patients[keep], num_resamples=20)
    assert some.to_json() == only.to_json()
    nothing = np.full_like(labels, UNLABELLED)
    assert grading.evaluate_task(GRADES, nothing, probabilities, patients) is None


def test_a_grade_that_does_not_occur_is_left_out_of_the_mean():
    confusion = np.array([[8, 2, 0], [0, 0, 0], [1, 0, 3]])
    assert grading.mean_per_class_accuracy(confusion) == pytest.approx((0.8 + 0.75) / 2)
    assert np.isnan(grading.recalls(confusion)[1])


def test_one_grade_only_gives_undefined_figures_without_a_warning():
    labels, probabilities, patients = graded(BINARY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = grading.evaluate_task(BINARY, np.zeros_like(labels), probabilities, patients, num_resamples=20)
    assert result.to_json()["auc"] == {"value": None, "low": None, "high": None}


def test_intervals_hold_the_value_and_narrow_with_more_patients():
    few = grading.evaluate_task(BINARY, *graded(BINARY, num_patients=30))
    many = grading.evaluate_task(BINARY, *graded(BINARY, num_patients=480))
    for name in few.estimates:
        widths = [r.estimates[name].high - r.estimates[name].low for r in (few, many)]
        assert few.estimates[name].low < few.estimates[name].value < few.estimates[name].high
        assert 2.5 < widths[0] / widths[1] < 6.5  # 16 times the patients: about four times narrower


def test_intervals_are_of_patients_not_of_discs():
    """Six copies of each disc in one patient say no more than one does."""
    labels, probabilities, patients = graded(BINARY, num_patients=100, discs=1)
    once = grading.evaluate_task(BINARY, labels, probabilities, patients)
    copies = grading.evaluate_task(BINARY, *(np.repeat(a, 6, axis=0) for a in (labels, probabilities, patients)))
    for name, estimate in once.estimates.items():
        same = copies.estimates[name]
        np.testing.assert_allclose(
            [estimate.value, estimate.low, estimate.high], [same.value, same.low, same.high], rtol=1e-12
        )


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """A classifier that is right 70 % of the time: its 95 % interval should hold 0.7 in most of 100 samples."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        labels = rng.integers(0, 2, 200)
        right = rng.random(200) < 0.7
        probabilities = np.eye(2)[np.where(right, labels, 1 - labels)]
        result = grading.evaluate_task(BINARY, labels, probabilities, np.arange(200), num_resamples=200, seed=seed)
        estimate = result.estimates["mean_per_class_accuracy"]
        covered += estimate.low <= 0.7 <= estimate.high
    assert covered >= 88


def test_a_mean_is_of_discs_and_its_interval_of_patients():
    values = np.array([1.0, 0.0, 0.0, np.nan, 1.0, 1.0])
    patients = np.array(["a", "a", "a", "a", "b", "b"])
    estimate = grading.mean_over_patients(values, patients)
    assert estimate.value == pytest.approx(3 / 5)
    # Two patients: a draw holds one of them twice, or both.
    assert (estimate.low, estimate.high) == (pytest.approx(1 / 3), 1)
    assert np.isnan(grading.mean_over_patients(np.full(3, np.nan), np.array(["a", "b", "c"])).value)


def test_a_paired_difference_is_narrower_than_one_of_two_sets():
    """The second grader repeats the first one's grades but for every tenth disc: what both share cancels out."""
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 5, 400), np.repeat(np.arange(80), 5)
    one = np.clip(labels + rng.integers(-1, 2, 400), 0, 4)
    other = np.where(np.arange(400) % 10, one, labels)
    counts = [grading.patient_confusions(labels, grades, patients, 5) for grades in (other, one)]
    for statistic in (grading.kappa, grading.mean_per_class_accuracy, grading.within_one):
        found = grading.difference(statistic, *counts)
        values = [float(statistic(each.sum(0))) for each in counts]
        assert found.value == pytest.approx(values[0] - values[1])
        assert found.low <= found.value <= found.high
        shuffled = grading.difference(statistic, counts[0], counts[1][rng.permutation(80)])
        assert shuffled.value == pytest.approx(found.value)
        if statistic is not grading.within_one:  # every grade is within one here
            assert found.high - found.low < 0.6 * (shuffled.high - shuffled.low)
    assert grading.difference(grading.kappa, counts[0], counts[0]) == grading.Estimate(0, 0, 0)
