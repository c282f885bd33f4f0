"""The measures of pointing, on maps and lesions whose figures are known."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.metrics import pointing

AFFINE = np.diag([0.3, 0.3, 4.0, 1.0])
ALL = np.array([0, 15])


@pytest.fixture
def lesion():
    mask = np.zeros(WINDOW_SHAPE, bool)
    mask[20:30, 100:120, 4:6] = True
    return mask


def dot(*place):
    map = np.full(WINDOW_SHAPE, 1e-3, np.float32)
    map[place] = 1
    return map


def hit(map, lesion, **options):
    return pointing.point(map, lesion, AFFINE, ALL, **options)["hit"]


def test_a_peak_hits_within_the_tolerance_in_millimetres(lesion):
    assert hit(dot(25, 110, 4), lesion) == 1
    assert hit(dot(29 + 10, 110, 4), lesion) == 1  # 10 rows of 0.3 mm: just at the tolerance
    assert hit(dot(29 + 11, 110, 4), lesion) == 0
    assert hit(dot(25, 110, 6), lesion) == 0  # the next slice is 4 mm away
    assert hit(dot(25, 110, 6), lesion, tolerance_mm=4.0) == 1
    assert hit(dot(30, 110, 4), lesion, tolerance_mm=0.0) == 0


def test_chance_is_what_random_peaks_do(lesion):
    rng = np.random.default_rng(0)
    chance = pointing.point(dot(0, 0, 0), lesion, AFFINE, ALL)["hit_by_chance"]
    hits = [hit(dot(*(rng.integers(size) for size in WINDOW_SHAPE)), lesion) for _ in range(300)]
    assert abs(np.mean(hits) - chance) < 3 * np.sqrt(chance / 300)
    few_slices = pointing.point(dot(0, 0, 4), lesion, AFFINE, np.array([6, 9]))
    assert few_slices["hit_by_chance"] == pytest.approx(3 * chance)


def test_energy_of_an_even_map_is_the_lesions_share(lesion):
    even = pointing.point(np.ones(WINDOW_SHAPE, np.float32), lesion, AFFINE, ALL)
    assert even["energy_inside"] == pytest.approx(lesion.mean())
    assert even["lesion_share"] == pytest.approx(lesion.mean())
    assert even["average_precision"] == pytest.approx(lesion.mean())
    own = pointing.point(lesion.astype(np.float32), lesion, AFFINE, ALL)
    assert (own["energy_inside"], own["average_precision"]) == (1, 1)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_scikit_learn(ties):
    rng = np.random.default_rng(1)
    lesion = rng.random((12, 14, 3)) < 0.2
    map = rng.random(lesion.shape) + 0.3 * lesion
    map = np.round(map, 1) if ties else map
    expected = average_precision_score(lesion.ravel(), map.ravel())
    assert pointing.average_precision(map, lesion) == pytest.approx(expected)


def test_measures_are_nan_without_a_lesion_or_a_map(lesion):
    for map, mask in ((dot(1, 1, 1), np.zeros_like(lesion)), (np.zeros(WINDOW_SHAPE), lesion)):
        assert np.isnan(list(pointing.point(map, mask, AFFINE, ALL).values())).all()


def test_own_side():
    region = np.zeros(WINDOW_SHAPE, np.uint8)
    region[:40], region[40:70], region[70:] = 1, 2, 3
    map = np.zeros(WINDOW_SHAPE)
    map[10, 0, 0], map[50, 0, 0], map[100, 0, 0] = 3, 10, 1
    assert pointing.own_side("upper_endplate", map, region) == 0.75
    assert pointing.own_side("lower_marrow", map, region) == 0.25
    assert np.isnan(pointing.own_side("pfirrmann", map, region))
    assert np.isnan(pointing.own_side("upper_endplate", np.zeros(WINDOW_SHAPE), region))


def test_a_tasks_lesion_is_its_bit_in_the_central_window():
    mask = np.zeros(VOLUME_SHAPE, np.uint16)
    mask[40 + 5, 48 + 6, 3 + 7] = 0b101000
    mask[0, 0, 0] = 0b1000
    np.testing.assert_array_equal(np.argwhere(pointing.lesion_of(mask, 3)), [[5, 6, 7]])
    assert not pointing.lesion_of(mask, 4).any()


def test_a_summary_counts_discs_with_lesions(lesion):
    measures = [pointing.point(dot(25, 110, 4), mask, AFFINE, ALL) for mask in (lesion, lesion, np.zeros_like(lesion))]
    measures[1]["hit"] = 0.0
    summary = pointing.summarise(measures, ["a", "b", "b"])
    assert summary.n == 2
    assert summary.estimates["hit"].value == 0.5
    assert (summary.estimates["hit"].low, summary.estimates["hit"].high) == (0, 1)
    assert pointing.summarise([], []).to_json() == {"n": 0}
