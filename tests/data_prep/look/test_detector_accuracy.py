import json

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.dataset.job import Located
from data_prep.detector import detect as detecting
from data_prep.look.detector_accuracy import compare, overlap, summary
from tests.block_spine import block_spine


def test_overlap_of_boxes():
    square = np.array([[0.0, 0.0], [0.0, 4.0], [4.0, 4.0], [4.0, 0.0]])
    assert overlap(square, square) == pytest.approx(1)
    assert overlap(square, square + np.array([0, 2])) == pytest.approx(1 / 3)
    assert overlap(square, square + 9) == 0
    turned = (square - 2) @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2) + 2
    octagon = 16 * (2 * np.sqrt(2) - 2)
    assert overlap(square, turned) == pytest.approx(octagon / (32 - octagon))


def test_measuring_finds_shifts_wrong_levels_and_false_bodies():
    drawn = block_spine(num_bodies=6)
    bodies, _ = bodies_from_spider_mask(drawn.mask)
    truth = Located(drawn.scan, bodies, regions=drawn.mask)
    exact = compare(truth, detecting.Detection(bodies, {}, []), 1)
    assert (exact.bodies, exact.found, exact.false, exact.levels_right, exact.sacra_found) == (6, 6, 0, 6, 1)
    assert max(exact.corner_mm) == 0
    assert min(exact.box_iou) > 0.999

    moved = [type(one)(one.name, one.corners + np.array([2 / 0.8, 0]), one.slices) for one in bodies]
    assert np.median(compare(truth, detecting.Detection(moved, {}, []), 1).corner_mm) == pytest.approx(2)

    names = [one.name for one in bodies]
    renamed = [type(one)(name, one.corners, one.slices) for name, one in zip(["T11", *names[:-1]], bodies, strict=True)]
    assert compare(truth, detecting.Detection(renamed, {}, []), 1).levels_right == 0

    false = [type(one)(one.name, one.corners - np.array([0, 60 / 0.7]), one.slices) for one in bodies]
    wrong = compare(truth, detecting.Detection(false, {}, []), 1)
    assert (wrong.found, wrong.false, wrong.sacra_found) == (0, 6, 0)

    named = detecting.Detection(bodies, {}, [f"{truth.scan.name}: T12 was barely seen."])
    assert compare(truth, named, 1).notes == ["T12 was barely seen."]  # results hold no names
    refused = compare(truth, f"{truth.scan.name}: no", 2)
    assert refused.refused == "no"
    assert refused.box_iou == [0.0] * len(exact.box_iou) != []
    found = summary([exact, refused])
    assert found["bodies_found"]["value"] == 0.5
    assert found["scans_refused"]["value"] == 0.5
    assert json.loads(json.dumps(found)) == found
