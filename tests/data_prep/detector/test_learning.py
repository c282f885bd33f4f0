"""What the detectors learn from: folds of patients, slices with marks, and the corners that these are given."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.detector.candidates import BODY, SACRUM, Candidate
from data_prep.detector.detect import Detection
from data_prep.detector.doubt import Calibration, Evidence
from data_prep.detector.training import calibration, pseudo_labels
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.detector.training.marked import MarkedSlice, spider_slices, sudirman_slices
from data_prep.detector.training.pseudo_labels import keypoints
from data_prep.detector.training.truth import BODY as A_BODY
from data_prep.detector.training.truth import DOUBTFUL
from data_prep.detector.training.truth import SACRUM as THE_SACRUM
from data_prep.read.metaimage import write_mha
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import sagittal_affine

SCAN = Scan(np.zeros((301, 201, 1), np.float32), sagittal_affine((1.0, 1.0, 4.0)), "scan")
MIDDLE = np.array([150.0, 100.0])
CORNERS = np.array([[-13.0, -17.0], [-13.0, 17.0], [13.0, 17.0], [13.0, -17.0]])  # of a body 26 mm high
LEVELS = ("L5-S1", "L4-L5", "L3-L4", "L2-L3", "L1-L2")


def body(row, *, kind=BODY, score=0.9, column=100.0):
    return Candidate(kind, score, np.array([row, column]), CORNERS + np.array([row, column]))


def column_of(num_bodies=6, s1=255.0):
    """S1 and bodies 35 mm apart, so discs are 9 mm high, in mm from the first pixel."""
    return [body(s1, kind=SACRUM), *(body(s1 - 35.0 * number) for number in range(1, num_bodies + 1))]


def marked(*, posterior=True, exact=True, shift_mm=0.0, levels=LEVELS):
    """Marks at the discs of `column_of`: at their posterior margins, or at their centres."""
    points = {
        level: np.array([255.0 - 17.5 - 35.0 * number + shift_mm, 117.0 if posterior else 100.0]) - MIDDLE
        for number, level in enumerate(levels)
    }
    return MarkedSlice("spider", "1", Path("1_t2.mha"), points, posterior=posterior, exact=exact, boxes={})


# Folds -----------------------------------------------------------------------------------------------------------


def test_a_patients_fold_depends_on_source_and_id_alone():
    folds = [fold_of("spider", str(number)) for number in range(2000)]
    assert set(folds) == set(range(NUM_FOLDS))
    assert max(np.bincount(folds)) < 1.25 * min(np.bincount(folds))
    # The first bytes of the SHA-256 of "spider/1", "spider/2" and "spider/3", and the fifths that they are in.
    assert [fold_of("spider", patient) for patient in ("1", "2", "3")] == [3, 0, 4]
    others = [fold_of("sudirman", str(number)) for number in range(2000)]
    assert 0.1 < np.mean(np.equal(folds, others)) < 0.3  # two hospitals' patients of one number are two people


# Marks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spider(tmp_path):
    """A SPIDER folder with a T2 slice of 2 mm pixels, a T1 slice of another size, and two points."""
    (tmp_path / "images").mkdir()
    write_mha(
        tmp_path / "images" / "7_t2.mha", Scan(np.ones((100, 60, 1), np.uint8), sagittal_affine((2.0, 2.0, 4)), "")
    )
    write_mha(
        tmp_path / "images" / "7_t1.mha", Scan(np.ones((80, 80, 1), np.uint8), sagittal_affine((1.0, 1.0, 4)), "")
    )
    rows = [("7", "7_t2.mha", "L5-S1", 0.75, 0.5), ("7", "7_t2.mha", "L4-L5", 0.5, 0.5)]
    with open(tmp_path / "level_points.csv", "w", newline="") as file:
        csv.writer(file).writerows([("patient", "file", "level", "relative_row", "relative_col"), *rows])
    return tmp_path


def test_level_points_are_in_mm_from_the_middle_and_serve_the_t1_slice_too(spider):
    t2, t1 = spider_slices(spider)
    assert (t2.path.name, t2.exact, t1.path.name, t1.exact) == ("7_t2.mha", True, "7_t1.mha", False)
    for one in (t2, t1):
        np.testing.assert_allclose(one.points["L4-L5"], (0, 0), atol=1e-9)
        np.testing.assert_allclose(one.points["L5-S1"], (0.25 * 99 * 2.0, 0))
    scan, index = t1.read()
    assert (scan.voxels.shape, index) == ((80, 80, 1), 0)


def test_without_level_points_no_slice_is_marked(tmp_path):
    assert spider_slices(tmp_path) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [(("7", "7_t2.mha", "L5-S2", 0.5, 0.5), "line 2: level 'L5-S2'"), (("7", "7_t2.mha", "L5-S1", "x", 0.5), "line 2")],
)
def test_a_wrong_table_is_refused_by_its_line(spider, row, message):
    with open(spider / "level_points.csv", "w", newline="") as file:
        csv.writer(file).writerows([("patient", "file", "level", "relative_row", "relative_col"), row])
    with pytest.raises(SpinejaxError, match=message):
        spider_slices(spider)


def test_boxes_mark_the_centres_of_discs_and_a_second_finding_marks_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    write_mha(
        tmp_path / "images" / "4_t2.mha", Scan(np.ones((101, 101, 1), np.uint8), sagittal_affine((0.5, 0.5, 4)), "")
    )
    with open(tmp_path / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("patient", "scan", "class", "row_min", "row_max", "col_min", "col_max", "level"),
                ("4", "4_t2", "Normal IVD", 60, 80, 40, 60, "L5-S1"),
                ("4", "4_t2", "Spinal Stenosis (SS)", 10, 20, 40, 60, ""),
            ]
        )
    (one,) = sudirman_slices(tmp_path)
    assert one.points.keys() == {"L5-S1"}
    np.testing.assert_allclose(one.points["L5-S1"], (0.5 * (70 - 50), 0.5 * (50 - 50)))
    np.testing.assert_allclose(one.boxes["L5-S1"], [(5, -5), (15, 5)])
    assert not one.posterior


# Corners for marked slices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", [True, False])
def test_marks_decide_which_candidate_is_which_body(posterior):
    points = keypoints(marked(posterior=posterior), MIDDLE, column_of(6))
    assert [kind for kind, _, _ in points] == [THE_SACRUM, *[A_BODY] * 6, DOUBTFUL, DOUBTFUL]
    for (_, _, corners), one in zip(points[1:7], column_of(6)[1:], strict=True):
        np.testing.assert_allclose(corners, one.corners)
    assert np.isnan(points[0][2][2:]).all()  # S1's lower corners are not known


def test_s1_that_looks_like_a_vertebra_is_taught_as_s1_and_s2_as_nothing():
    candidates = [body(255.0), body(290.0, kind=SACRUM), *column_of(5)[1:]]
    points = keypoints(marked(), MIDDLE, candidates)
    assert points[0][0] == THE_SACRUM
    np.testing.assert_allclose(points[0][2][:2], body(255.0).corners[:2])
    assert all(abs(centre[0] - 290.0) > 13 for _, centre, _ in points)


def test_what_the_marks_expect_but_nobody_saw_is_left_open():
    candidates = [one for one in column_of(5) if one.centre[0] not in (255.0, 185.0)]  # neither S1 nor L4
    points = keypoints(marked(), MIDDLE, candidates)
    assert [kind for kind, _, _ in points[:6]] == [DOUBTFUL, A_BODY, DOUBTFUL, A_BODY, A_BODY, A_BODY]
    np.testing.assert_allclose(points[2][1][0], 185.0)


def test_points_of_another_image_are_shifted_but_not_by_a_level():
    for shift_mm in (-10.0, 0.0, 9.0):
        points = keypoints(marked(exact=False, shift_mm=shift_mm), MIDDLE, column_of(6))
        np.testing.assert_allclose(next(centre[0] for kind, centre, _ in points if kind == A_BODY), 220.0)


def test_a_slice_with_too_few_confirmed_bodies_teaches_nothing(spider, monkeypatch):
    (one, _) = spider_slices(spider)
    monkeypatch.setattr(pseudo_labels, "see", lambda members, scan, indices: [[body(120.0)]])
    assert pseudo_labels.pseudo_labelled({}, [one]) == []


# Doubt ---------------------------------------------------------------------------------------------------------------


def found(*names, s1=255.0, spread_mm=1.0, evidence=None):
    """A detection of bodies 35 mm apart from S1's place up, with these names from the top down."""
    bodies = [
        VertebralBody(name, CORNERS + np.array([s1 - 35.0 * number, 100.0]), (0, 1))
        for number, name in enumerate(reversed(names))
    ]
    spread = dict.fromkeys(names, spread_mm)
    return Detection(bodies[::-1], {}, [], spread_mm=spread, evidence=evidence or Evidence(5.0, 0.9, 0.0))


RIGHT, OFF_BY_ONE = ("L1", "L2", "L3", "L4", "L5", "S1"), ("T12", "L1", "L2", "L3", "L4", "L5")


def test_the_calibration_is_fitted_with_the_detector_that_has_not_seen_the_patient(monkeypatch):
    """Slices with a small margin are wrong half of the time, the others never."""
    rng, slices, members = np.random.default_rng(0), [], []
    for number in range(200):
        one = marked()
        slices.append(MarkedSlice("spider", str(number), one.path, one.points, posterior=True, exact=True, boxes={}))
    monkeypatch.setattr(MarkedSlice, "read", lambda self: (Scan(SCAN.voxels, SCAN.affine, self.patient), 0))

    def detect(scan, *, weights, member):
        members.append((scan.name, member))
        weak = int(scan.name) % 4 == 0
        names = OFF_BY_ONE if weak and rng.random() < 0.5 else RIGHT
        return found(*names, evidence=Evidence(0.5 if weak else 9.0, 0.4 if weak else 0.9, 0.0))

    monkeypatch.setattr(calibration, "detect", detect)
    fitted, each = calibration.calibrated(Path("w.npz"), slices, [], lambda line: None)
    assert len({one.level_bias for one in [fitted, *each]}) == 1 + NUM_FOLDS  # each is fitted to other patients
    assert fitted.corner_slope == Calibration().corner_slope  # there was no mask to fit it to
    assert members == [(str(number), fold_of("spider", str(number))) for number in range(200)]
    assert fitted.level_doubt(Evidence(0.5, 0.4, 0.0)) == pytest.approx(0.5, abs=0.15)
    assert fitted.level_doubt(Evidence(9.0, 0.9, 0.0)) < 0.05


def test_nine_corners_in_ten_are_within_twice_their_uncertainty():
    rng = np.random.default_rng(1)
    spreads = rng.uniform(0.5, 3.0, 4000)
    errors = abs(rng.normal(0, 0.4 + 0.8 * spreads))
    fitted = Calibration(**calibration.fit_corners(spreads, errors))
    limits = 2 * np.array([fitted.corner_mm(spread) for spread in spreads])
    for chosen in (spreads < 1.3, spreads > 2.2):  # in the easy ones and in the hard ones
        assert np.mean(errors[chosen] < limits[chosen]) == pytest.approx(0.9, abs=0.02)


def test_a_calibration_is_read_from_the_provenance_and_no_sacrum_is_doubtful():
    together, alone = ({"level_weights": [weight, 0.0, 0.0], "level_bias": 0.0} for weight in (-1.0, -2.0))
    stored = {"calibrations": {"all": together, "members": [{}, alone]}}
    fitted = Calibration.of(stored)
    assert fitted.level_doubt(Evidence(0.0, 0.5, 0.0)) == pytest.approx(0.5)
    assert fitted.level_doubt(Evidence(12.0, 0.5, 0.0)) == pytest.approx(1 / (1 + np.e))
    assert Calibration.of(stored, 1).level_weights == (-2.0, 0.0, 0.0)
    assert fitted.level_doubt(None) == 0.5
    assert Calibration.of({}) == Calibration.of({}, 3) == Calibration.of(stored, 0) == Calibration()
