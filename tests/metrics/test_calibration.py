"""Calibration on probabilities whose faults are known."""

import numpy as np
import pytest
import scipy.optimize
from scipy.special import softmax

from spinejax.metrics import calibration, grading
from spinejax.tasks import UNLABELLED, Task

TASK = Task("narrowing", ("no", "yes"))


def calibrated(n=20000, grades=4, seed=0):
    """Probabilities, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    probabilities = softmax(rng.normal(size=(n, grades)) * 2, axis=1)
    labels = (rng.random((n, 1)) > probabilities.cumsum(1)).sum(1)
    return probabilities, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_fitted_temperature_undoes_a_known_one(temperature):
    probabilities, labels = calibrated()
    sharpened = calibration.at_temperature(probabilities, 1 / temperature)
    assert calibration.fit_temperature(sharpened, labels) == pytest.approx(temperature, rel=0.03)
    np.testing.assert_allclose(calibration.at_temperature(sharpened, temperature), probabilities, rtol=1e-6)


def test_fitting_improves_the_calibration_and_changes_no_grade():
    probabilities, labels = calibrated()
    overconfident = calibration.at_temperature(probabilities, 0.3)
    fitted = calibration.at_temperature(overconfident, calibration.fit_temperature(overconfident, labels))
    for measure in (calibration.expected_calibration_error, lambda p, l: calibration.brier(p, l).mean()):
        assert measure(fitted, labels) < measure(overconfident, labels)
    assert calibration.expected_calibration_error(overconfident, labels) > 0.1
    assert calibration.expected_calibration_error(fitted, labels) < 0.015
    np.testing.assert_array_equal(fitted.argmax(1), overconfident.argmax(1))


HABITS = calibration.Rater(
    temperature=1.6, shifts=[0.8, 0.0, -0.3, -0.5], frequencies=[0.5, 0.3, 0.15, 0.05], borrowed=False
)


def graded_by(rater, n=20000):
    """The probabilities of a network that was trained as if all grades were equally frequent, and a rater's labels."""
    probabilities, _ = calibrated(n)
    labels = (np.random.default_rng(1).random((n, 1)) > calibration.as_rater(probabilities, rater).cumsum(1)).sum(1)
    return probabilities, labels


def test_a_raters_habits_are_found_out():
    """But for the frequencies, which are those of the labels: what a network sees of the discs moves them too."""
    probabilities, labels = graded_by(HABITS)
    found = calibration.fit_rater(probabilities, labels)
    np.testing.assert_allclose(found["frequencies"], np.bincount(labels, minlength=4) / len(labels), atol=1e-3)
    assert found["temperature"] == pytest.approx(HABITS["temperature"], rel=0.05)
    truly, fitted = (calibration.as_rater(probabilities, rater) for rater in (HABITS, found))
    np.testing.assert_allclose(fitted, truly, atol=0.02)
    assert calibration.expected_calibration_error(probabilities, labels) > 0.1
    assert calibration.expected_calibration_error(fitted, labels) < 0.015


def test_the_rater_is_the_one_of_least_penalised_loss():
    """The optimum of the loss as it is defined, found by another algorithm that knows no gradient."""
    probabilities, labels = graded_by(HABITS, 60)
    found = calibration.fit_rater(probabilities, labels)

    def loss(parameters):
        rater = found | {"temperature": np.exp(parameters[0]), "shifts": parameters[1:]}
        log_loss = -np.log(calibration.as_rater(probabilities, rater)[np.arange(60), labels]).sum()
        return log_loss + parameters[0] ** 2 / 2 + 10 * (parameters[1:] ** 2).sum()

    expected = scipy.optimize.minimize(
        loss, np.zeros(5), method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-6}
    )
    parameters = np.array([np.log(found["temperature"]), *found["shifts"]])
    np.testing.assert_allclose(parameters, expected.x, atol=1e-3)


def test_a_rater_with_few_discs_differs_by_his_frequencies_alone():
    probabilities, _ = calibrated(3)
    found = calibration.fit_rater(probabilities, np.array([2, 2, 2]))
    np.testing.assert_allclose(found["frequencies"], np.array([1, 1, 4, 1]) / 7)
    assert np.abs(found["shifts"]).max() < 0.1
    alone = found | {"temperature": 1.0, "shifts": [0.0] * 4}
    grades = grading.decide(calibration.as_rater(probabilities, alone), frequencies=np.array(found["frequencies"]))
    np.testing.assert_array_equal(grades, probabilities.argmax(1))


def test_a_grade_is_referred_by_its_own_probability():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4]])
    np.testing.assert_array_equal(calibration.refers(probabilities, np.array([1, 0]), 0.5), [True, False])
    doubt = calibration.doubt(
        Task("narrowing", ("absent", "present")),
        np.array([1, 1]),
        probabilities,
        np.zeros(2),
        np.array(["a", "b"]),
        np.array([1, 0]),
    )
    # The first disc's grade, 1, is right, and more doubtful than the second's, 0, which is wrong.
    np.testing.assert_allclose(doubt.kept["confidence"], [0, 0.5])


def test_calibration_of_a_small_example():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1])
    np.testing.assert_allclose(calibration.brier(probabilities, labels), [0.02, 1.28, 0.18, 0])
    # Two bins: everything is in the upper one, mean confidence 0.85, accuracy 0.75.
    assert calibration.expected_calibration_error(probabilities, labels, num_bins=2) == pytest.approx(0.1)
    confidence, accuracy, count = calibration.reliability(probabilities, labels, num_bins=2)
    np.testing.assert_array_equal(count, [0, 4])
    assert np.isnan(confidence[0])
    assert np.isnan(accuracy[0])
    assert calibration.fit_temperature(probabilities[:0], labels[:0]) == 1


def test_certainty_has_a_finite_loss():
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert calibration.fit_temperature(probabilities, np.array([0, 1, 1])) > 5


def test_a_set_without_a_mistake_does_not_make_the_network_certain():
    probabilities = np.tile([[0.98, 0.02], [0.03, 0.97]], (60, 1))
    temperature = calibration.fit_temperature(probabilities, np.tile([0, 1], 60))
    assert 0.3 < temperature < 1


def test_accuracy_when_the_doubtful_are_referred():
    doubt, right = np.array([0.9, 0.1, 0.5, 0.2]), np.array([False, True, False, True])
    np.testing.assert_allclose(calibration.accuracy_when_referring(doubt, right), [1, 1, 2 / 3, 1 / 2])


@pytest.mark.parametrize("grades", [2, 4])
def test_reliability_and_brier_equal_scikit_learn(grades):
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    probabilities, labels = calibrated(n=3000, grades=grades, seed=1)
    confidence, accuracy, count = calibration.reliability(probabilities, labels)
    right = probabilities.argmax(1) == labels
    theirs = calibration_curve(right, probabilities.max(1), n_bins=calibration.NUM_BINS)
    np.testing.assert_allclose(accuracy[count > 0], theirs[0])
    np.testing.assert_allclose(confidence[count > 0], theirs[1])
    brier = calibration.brier(probabilities, labels).mean()
    assert brier == pytest.approx(brier_score_loss(labels, probabilities, scale_by_half=False, labels=range(grades)))


def test_doubt_of_a_small_example():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    labels, patients = np.array([0, 1, 1, 0]), np.array(["a", "a", "b", "b"])
    spread = np.array([0.2, 0.1, 0.3, 0.0])
    found = calibration.doubt(TASK, labels, probabilities, spread, patients)
    assert found.n == 4
    assert found.calibration_error == pytest.approx((0.1 + 0.2 + 0.6 + 0.7) / 4)
    assert found.brier.value == pytest.approx((0.02 + 0.08 + 0.72 + 0.98) / 4)
    np.testing.assert_allclose(found.kept["confidence"], [1, 1, 2 / 3, 1 / 2])  # 0.9, 0.8, 0.7, 0.6
    np.testing.assert_allclose(found.kept["spread"], [0, 1 / 2, 2 / 3, 1 / 2])
    assert found.accuracy_at["confidence"][0.5].value == 1
    assert found.accuracy_at["spread"][0.5].value == 0.5
    at_all = found.accuracy_at["spread"][1.0]
    assert (at_all.value, at_all.low, at_all.high) == (0.5, 0, 1)  # patient a is all right, b all wrong
    referring = found.to_json()["referring"]
    assert referring["confidence"]["curve"] == [[0.25, 1], [0.5, 1], [0.75, 0.666667], [1, 0.5]]
    assert referring["confidence"]["accuracy_at_coverage"]["0.5"]["value"] == 1


def test_what_is_kept_of_a_small_example():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    labels, patients = np.array([0, UNLABELLED, 0, 0]), np.array(["a", "a", "b", "b"])
    grades = np.array([0, 1, 0, 1])
    found = calibration.kept(TASK, labels, probabilities, grades, patients, 0.7)  # 0.7 itself is not below
    assert (found.n, found.labelled) == (4, 2)
    assert (found.share.value, found.share.low, found.share.high) == (0.75, 0.5, 1)
    assert (found.accuracy.value, found.accuracy.low, found.accuracy.high) == (0.5, 0, 1)  # a is right, b wrong
    nothing = calibration.kept(TASK, labels, probabilities, grades, patients, 1.0)
    assert (nothing.share.value, nothing.labelled) == (0, 0)
    assert nothing.to_json()["accuracy_of_kept"] == {"value": None, "low": None, "high": None}
    assert calibration.kept(TASK, labels, probabilities, grades, patients, 0.0).share.value == 1


def test_a_single_view_has_no_doubt_by_spread():
    probabilities, patients = np.array([[0.9, 0.1]]), np.array(["a"])
    assert set(calibration.doubt(TASK, np.array([0]), probabilities, np.zeros(1), patients).kept) == {"confidence"}


def test_the_curve_of_many_discs_is_thinned_and_keeps_its_ends():
    probabilities, labels = calibrated(n=5000, grades=2)
    found = calibration.doubt(TASK, labels, probabilities, np.zeros(5000), np.arange(5000).astype(str))
    curve = found.curve("confidence")
    assert curve.shape == (100, 2)
    assert curve[0, 0] == 1 / 5000
    assert tuple(curve[-1]) == (1, found.kept["confidence"][-1])
