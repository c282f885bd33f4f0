import numpy as np
import pytest

from data_prep.look.intervals import percentile, rate, ratio


def test_a_rate_of_0_or_1_has_the_exact_interval_of_clopper_and_pearson():
    patients = [str(number) for number in range(20)]
    none = rate(patients, [0] * 20, [1] * 20)
    assert (none["value"], none["low"], none["n"]) == (0.0, 0.0, 20)
    assert none["high"] == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-4)
    every = rate(patients, [5] * 20, [5] * 20)
    assert (every["value"], every["high"], every["n"]) == (1.0, 1.0, 100)
    assert every["low"] == pytest.approx(0.025 ** (1 / 100), abs=1e-4)


def test_other_rates_are_bootstrapped_over_patients_not_over_scans():
    two = rate(["a", "b"], [1, 0], [1, 1])
    assert (two["value"], two["low"], two["high"]) == (0.5, 0.0, 1.0)
    assert rate(["a", "b"] * 50, [1, 0] * 50, [1, 1] * 50) == {**two, "n": 100}  # more scans, but not more patients
    many = rate([str(number) for number in range(100)], [1, 0] * 50, [1, 1] * 50)
    assert many["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert many["high"] == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


def test_several_false_bodies_in_one_scan_are_no_rate_of_1():
    several = rate(["a", "b", "c"], [3, 0, 0], [1, 1, 1])
    assert (several["value"], several["low"], several["high"]) == (1.0, 0.0, 3.0)


def test_percentiles_take_all_values_of_the_drawn_patients():
    one = percentile(["a", "a", "b"], [[1.0], [2.0, 3.0], [10.0]], 50.0)
    assert one == {"value": 2.5, "low": 2.0, "high": 10.0, "n": 4}


def test_ratios_compare_the_same_patients():
    patients = [str(number) for number in range(40)]
    half = ratio(patients, [1, 0] * 20, [1] * 40, [1] * 40, [1] * 40)
    assert (half["value"], half["n"]) == (0.5, 40)
    assert half["low"] < 0.5 < half["high"]
    same = ratio(patients, [1, 0] * 20, [1, 0] * 20, [1] * 40, [1] * 40)
    assert (same["value"], same["low"], same["high"]) == (1.0, 1.0, 1.0)  # each draw has the same patients in both


def test_nothing_measured_is_no_number():
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert rate([], [], []) == nothing
    assert rate(["a"], [0], [0]) == nothing
    assert percentile(["a"], [[]], 50.0) == nothing
    assert percentile([], [], 50.0) == nothing
    assert ratio(["a"], [1], [0], [1], [1])["value"] is None
    assert np.isfinite([value for value in rate(["a", "b"], [1, 0], [1, 0]).values() if value is not None]).all()
