import json
from dataclasses import asdict

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.dataset.job import Located
from data_prep.detector import detect as detecting
from data_prep.look.detector_accuracy import compare, overlap, summary, table
from tests.block_spine import block_spine


def test_overlap_of_boxes():
    square = np.array([[0.0, 0.0], [0.0, 4.0], [4.0, 4.0], [4.0, 0.0]])
    assert overlap(square, square) == pytest.approx(1)
    assert overlap(square, square + np.array([0, 2])) == pytest.approx(1 / 3)
    assert overlap(square, square + 9) == 0
    turned = (square - 2) @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2) + 2
    octagon = 16 * (2 * np.sqrt(2) - 2)
    assert overlap(square, turned) == pytest.approx(octagon / (32 - octagon))


def detection(bodies, **fields):
    return detecting.Detection(bodies, {}, [], **fields)


def test_measuring_finds_shifts_wrong_levels_and_false_bodies():
    drawn = block_spine(num_bodies=6)
    bodies, _ = bodies_from_spider_mask(drawn.mask)
    truth = Located(drawn.scan, bodies, regions=drawn.mask)
    exact = compare(truth, detection(bodies))
    assert (exact.bodies, exact.found, exact.false, exact.levels_right, exact.sacra_found) == (6, 6, 0, 6, 1)
    assert exact.right
    assert max(exact.corner_mm) == 0
    assert min(exact.box_iou) > 0.999

    moved = [type(one)(one.name, one.corners + np.array([2 / 0.8, 0]), one.slices) for one in bodies]
    assert np.median(compare(truth, detection(moved)).corner_mm) == pytest.approx(2)

    names = [one.name for one in bodies]
    renamed = [type(one)(name, one.corners, one.slices) for name, one in zip(["T11", *names[:-1]], bodies, strict=True)]
    off_by_one = compare(truth, detection(renamed))
    assert (off_by_one.levels_right, off_by_one.right) == (0, False)

    false = [type(one)(one.name, one.corners - np.array([0, 60 / 0.7]), one.slices) for one in bodies]
    wrong = compare(truth, detection(false))
    assert (wrong.found, wrong.false, wrong.sacra_found, wrong.right) == (0, 6, 0, False)

    named = detecting.Detection(bodies, {}, [f"{truth.scan.name}: T12 was barely seen."])
    assert compare(truth, named).notes == ["T12 was barely seen."]  # results hold no names
    refused = compare(truth, f"{truth.scan.name}: no")
    assert (refused.refused, refused.doubt, refused.right) == ("no", None, False)
    assert refused.box_iou == [0.0] * len(exact.box_iou) != []
    found = summary(["a", "b"], [exact, refused])
    assert found["bodies_found"]["value"] == 0.5
    assert found["scans_refused"]["value"] == 0.5
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_body_beyond_the_masks_field_is_not_false():
    drawn = block_spine(num_bodies=6)
    bodies, _ = bodies_from_spider_mask(drawn.mask)
    top = next(one for one in bodies if one.name == "T12")
    above = type(top)("T11", top.corners - (40 / 0.8, 0), top.slices)
    beside = type(top)("T11", top.corners - (0, 60 / 0.7), top.slices)
    for regions in (drawn.mask, None):  # a mask, or corners alone
        truth = Located(drawn.scan, bodies, regions=regions)
        beyond = compare(truth, detection([above, *bodies]))
        assert beyond.false == 0
        assert json.dumps(asdict(beyond), allow_nan=False)
        assert compare(truth, detection([beside, *bodies])).false == 1


def test_a_body_of_which_only_one_endplate_is_known_is_where_its_middle_is():
    """The image cuts the topmost body: the middle of its lower endplate may be in the disc below."""
    drawn = block_spine(num_bodies=6)
    bodies, _ = bodies_from_spider_mask(drawn.mask)
    truth = Located(drawn.scan, bodies, regions=drawn.mask)
    top = next(one for one in bodies if one.name == "T12")
    lower = np.where(np.arange(4)[:, None] < 2, np.nan, top.corners + np.array([1 / 0.8, 0]))
    cut = type(top)("T12", lower, top.slices)
    found = compare(truth, detection([cut, *(one for one in bodies if one.name != "T12")]))
    assert (found.found, found.false, found.levels_right) == (6, 0, 6)


def test_stated_uncertainties_are_compared_with_errors():
    drawn = block_spine(num_bodies=6)
    bodies, _ = bodies_from_spider_mask(drawn.mask)
    truth = Located(drawn.scan, bodies, regions=drawn.mask)
    moved = [type(one)(one.name, one.corners + np.array([2 / 0.8, 0]), one.slices) for one in bodies]
    measured = compare(truth, detection(moved, corner_mm={"L1": 1.1, "L2": 0.9}))  # off by 2 mm, of 2.2 and 1.8
    assert (measured.corners_stated, measured.corners_within) == (8, 4)
    assert summary(["a"], [measured])["corners_within_twice_stated"]["value"] == 0.5


def test_levels_of_unflagged_scans_are_counted_apart():
    drawn = block_spine(num_bodies=6)
    bodies, _ = bodies_from_spider_mask(drawn.mask)
    truth = Located(drawn.scan, bodies, regions=drawn.mask)
    names = [one.name for one in bodies]
    renamed = [type(one)(name, one.corners, one.slices) for name, one in zip(["T11", *names[:-1]], bodies, strict=True)]
    doubted = compare(truth, detection(renamed, doubt=0.7, doubtful_levels=True))
    measured = [compare(truth, detection(bodies, doubt=0.01)), doubted, compare(truth, "no")]
    metrics = summary(["a", "b", "c"], measured)
    assert doubted.doubt == 0.7
    assert metrics["scans_flagged"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert metrics["scans_levels_right"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert metrics["unflagged_scans_levels_right"] == {"value": 1.0, "low": 0.025, "high": 1.0, "n": 1}


def test_the_table_has_a_column_for_each_set():
    metrics = {"n_scans": 3, "bodies_found": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}}
    other = {"n_scans": 4, "mark_mm_median": {"value": None, "low": None, "high": None, "n": 0}}
    page = table("some", {"stacks": metrics, "t2": other})
    cells = [list(column.cells) for column in page.columns]
    assert cells[0] == ["n_scans", "bodies_found", "mark_mm_median"]
    assert cells[1] == ["3", "0.500 [0.250, 0.750] of 8", ""]
    assert cells[2] == ["4", "", ""]
