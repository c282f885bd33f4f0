import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.detector.detect import Detection
from data_prep.detector.training.marked import SPIDER, SUDIRMAN, MarkedSlice, middle_mm
from data_prep.look.marked_accuracy import beside, compare_marks, marked_summary
from tests.block_spine import block_spine

NAMES = ["T12", "L1", "L2", "L3", "L4", "L5", "S1"]
MARKED = ["L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1"]


@pytest.fixture(scope="module")
def drawn():
    return block_spine(num_bodies=6, num_slices=1)


def bodies_of(drawn, names=NAMES, moved_mm=(0.0, 0.0)):
    """The bodies where they were drawn, from the top down, under these names."""
    found = []
    for name, true in zip(names, NAMES, strict=False):
        corners = drawn.corners[true] + np.array(moved_mm) / drawn.scan.spacing_mm[:2]
        if true == "S1":
            corners[2:] = np.nan
        found.append(VertebralBody(name, corners, (0, 1)))
    return found


def points_of(drawn, levels=MARKED, moved_mm=(0.0, 0.0)):
    """SPIDER's kind of marks: points at the posterior margins."""
    places = {}
    for above, below in pairwise(NAMES):
        middle = (drawn.corners[above][2] + drawn.corners[below][1]) / 2 * drawn.scan.spacing_mm[:2]
        places[f"{above}-{below}"] = middle - middle_mm(drawn.scan) + moved_mm
    return {level: places[level] for level in levels}


def marked_by(points, *, exact=True):
    return MarkedSlice(SPIDER, "1", Path("1_t2.mha"), points, posterior=True, exact=exact, boxes={})


def test_discs_are_found_and_named(drawn):
    right = compare_marks(marked_by(points_of(drawn)), drawn.scan, Detection(bodies_of(drawn), {}, [], doubt=0.25))
    assert [mark.level for mark in right.marks] == [mark.found_as for mark in right.marks] == MARKED
    assert (right.found, right.levels_right, right.false, right.right, right.doubt) == (5, 5, 0, True, 0.25)
    assert max(mark.distance_mm for mark in right.marks) < 0.01


def test_levels_off_by_one_are_wrong(drawn):
    renamed = bodies_of(drawn, ["T11", "T12", "L1", "L2", "L3", "L4", "L5"])
    wrong = compare_marks(marked_by(points_of(drawn)), drawn.scan, Detection(renamed, {}, []))
    assert (wrong.found, wrong.levels_right, wrong.right) == (5, 0, False)
    assert wrong.marks[-1].found_as == "L4-L5"


def test_a_disc_far_from_its_mark_is_missed(drawn):
    points = points_of(drawn)
    points["L3-L4"] = points["L3-L4"] + (0.0, 13.0)
    missed = compare_marks(marked_by(points), drawn.scan, Detection(bodies_of(drawn), {}, []))
    assert [mark.level for mark in missed.marks if mark.found_as is None] == ["L3-L4"]
    assert (missed.found, missed.levels_right, missed.right) == (4, 4, True)  # what was found is named right


def test_bodies_above_the_topmost_mark_are_not_false_and_others_are(drawn):
    bodies = bodies_of(drawn)
    marked = marked_by(points_of(drawn, ["L3-L4", "L4-L5", "L5-S1"]))
    assert compare_marks(marked, drawn.scan, Detection(bodies, {}, [])).false == 0  # T12 to L2 are above

    aside = VertebralBody("L4", bodies[4].corners - (0, 80 / 0.7), (0, 1))
    beside_the_column = compare_marks(marked, drawn.scan, Detection([*bodies[:4], aside, *bodies[5:]], {}, []))
    assert (beside_the_column.false, beside_the_column.found) == (1, 1)  # only L5-S1 is left
    assert json.dumps(asdict(beside_the_column), allow_nan=False)

    gap = marked_by(points_of(drawn, ["T12-L1", "L5-S1"]))
    assert compare_marks(gap, drawn.scan, Detection(bodies, {}, [])).false == 0  # nobody marked what is between


def test_points_of_another_image_are_shifted_and_not_those_of_this_one(drawn):
    points = points_of(drawn, moved_mm=(-14.0, 9.0))
    found = Detection(bodies_of(drawn), {}, [])
    shifted = compare_marks(marked_by(points, exact=False), drawn.scan, found)
    assert (shifted.found, shifted.right) == (5, True)
    assert shifted.shift_mm == (14.0, -9.0)
    assert max(mark.distance_mm for mark in shifted.marks) < 0.01
    assert compare_marks(marked_by(points), drawn.scan, found).found == 0

    off_by_one = Detection(bodies_of(drawn, ["T11", "T12", "L1", "L2", "L3", "L4", "L5"]), {}, [])
    assert not compare_marks(marked_by(points, exact=False), drawn.scan, off_by_one).right  # no shift spans a level


def test_a_box_must_contain_the_middle_of_the_disc(drawn):
    boxes = {}
    for level in MARKED:
        above, below = level.split("-")
        facing = np.concatenate([drawn.corners[above][2:], drawn.corners[below][:2]]) * drawn.scan.spacing_mm[:2]
        middle = facing.mean(0) - middle_mm(drawn.scan)
        boxes[level] = middle + np.array([(-5.0, -18.0), (5.0, 18.0)])
    points = {level: box.mean(0) for level, box in boxes.items()}
    marked = MarkedSlice(SUDIRMAN, "4", Path("4_t2.mha"), points, posterior=False, exact=True, boxes=boxes)
    right = compare_marks(marked, drawn.scan, Detection(bodies_of(drawn), {}, []))
    assert (right.found, right.right) == (5, True)
    lower = Detection(bodies_of(drawn, moved_mm=(6.0, 0.0)), {}, [])
    assert compare_marks(marked, drawn.scan, lower).found == 0
    behind = Detection(bodies_of(drawn, moved_mm=(0.0, 17.0)), {}, [])
    assert compare_marks(marked, drawn.scan, behind).found == 5  # 17 mm away, but in the boxes


def test_a_body_cut_by_the_image_leaves_its_disc_unknown(drawn):
    bodies = bodies_of(drawn)
    bodies[1].corners[2:] = np.nan
    cut = compare_marks(marked_by(points_of(drawn)), drawn.scan, Detection(bodies, {}, []))
    assert [mark.level for mark in cut.marks if mark.found_as is None] == ["L1-L2"]


def test_metrics_count_refused_and_flagged_slices(drawn):
    marked = marked_by(points_of(drawn))
    right = compare_marks(marked, drawn.scan, Detection(bodies_of(drawn), {}, []))
    refused = compare_marks(marked, drawn.scan, f"{drawn.scan.name}: no column of vertebral bodies was found.")
    assert (refused.refused, refused.found, len(refused.marks)) == ("no column of vertebral bodies was found.", 0, 5)
    flagged = compare_marks(marked, drawn.scan, Detection(bodies_of(drawn), {}, [], 0.4, doubtful_levels=True))
    metrics = marked_summary(["1", "2", "3", "4"], [right, right, refused, flagged])
    assert (metrics["discs_found"]["value"], metrics["discs_found"]["n"]) == (0.75, 20)
    assert (metrics["levels_right"]["value"], metrics["levels_right"]["n"]) == (1.0, 15)
    assert metrics["scans_refused"]["value"] == metrics["scans_flagged"]["value"] == 0.25
    assert metrics["scans_levels_right"]["value"] == 0.75
    assert metrics["unflagged_scans_levels_right"]["n"] == 2
    ratios = beside(["1", "2"], [right, refused], [right, right])
    assert ratios["discs_found"]["value"] == ratios["scans_levels_right"]["value"] == 0.5
