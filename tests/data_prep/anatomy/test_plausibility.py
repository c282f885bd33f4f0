"""What is noted, or left out, where a mask lacks a part of a vertebra, a whole one, or has two under one label."""

import numpy as np
import pytest

from data_prep.anatomy.discs import extract_discs
from data_prep.anatomy.mask_labels import to_spider
from data_prep.anatomy.plausibility import doubts_of
from data_prep.anatomy.vertebrae import VertebralBody, bodies_from_spider_mask, body_labels
from data_prep.phantom.phantom import phantom
from data_prep.read.scan import Scan
from tests.block_spine import BODY_MM, DEPTH_MM, DISC_MM, block_spine
from tests.data_prep.anatomy.test_mask_labels import mask_of

SPINE = block_spine(tilt_deg=12, num_bodies=6)


def along(spine, name):
    """mm along the spine from a body's upper endplate."""
    corners, spacing = spine.corners[name], spine.mask.spacing_mm[:2]
    down = (corners[3] - corners[0]) * spacing / BODY_MM
    return (np.stack(np.indices(spine.mask.voxels.shape[:2]), -1) - corners[0]) * spacing @ down


def doubts(mask):
    bodies, _ = bodies_from_spider_mask(mask)
    return doubts_of(bodies, mask.spacing_mm, Scan(body_labels(mask), mask.affine, "regions"))


def without(mask, label, part):
    """The mask without a part of a label."""
    return Scan(np.where((mask.voxels == label) & part[:, :, None], 0, mask.voxels), mask.affine, mask.name)


@pytest.mark.parametrize("missing_mm", [10, 14, 22, 30])
def test_a_sacrum_without_its_upper_part_is_noted_or_its_disc_left_out(missing_mm):
    """TotalSegmentator issue 482: S1 is in no label."""
    mask = mask_of("totalsegmentator", spine=SPINE)
    short = without(mask, 1, along(SPINE, "S1") < missing_mm)
    # Below its end the sacrum of blocks goes on, as a real one does.
    down = along(SPINE, "S1")
    below = ((down >= BODY_MM) & (down < BODY_MM + 30))[:, :, None] & np.isin(
        np.roll(mask.voxels, round(BODY_MM / 0.8), axis=0), 1
    )
    short = Scan(np.where(below, 1, short.voxels).astype(np.uint8), mask.affine, "mask")
    relabelled, _ = to_spider(short, "totalsegmentator", None)
    bodies, _ = bodies_from_spider_mask(relabelled)
    found = doubts_of(bodies, mask.spacing_mm)
    assert len(found) == 1
    assert "L5-S1 is doubtful: L5 and S1 are" in found[0]
    assert "the upper part of S1, or the lower part of L5, may be missing" in found[0]
    notes = []
    levels = [disc.level for disc in extract_discs(SPINE.scan, bodies, notes=notes)]
    assert ("L5-S1" in levels) == (missing_mm < 17)
    assert set(levels) | {"L5-S1"} == {"T12-L1", "L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1"}


@pytest.mark.parametrize(
    ("body", "missing", "level", "lacks"),
    [
        ("L3", lambda down: down < 8, "L2-L3", "the upper part of L3"),
        ("L3", lambda down: down > BODY_MM - 8, "L3-L4", "the lower part of L3"),
        ("L5", lambda down: down > BODY_MM - 8, "L5-S1", "the lower part of L5"),
    ],
)
def test_a_body_without_a_part_is_noted_beside_its_discs_mask(body, missing, level, lacks):
    label = {"L3": 3, "L5": 1}[body]
    found = doubts(without(SPINE.mask, label, missing(along(SPINE, body))))
    assert len(found) == 1
    assert f"{level} is doubtful: the middle between its bodies is 4 mm" in found[0]
    assert lacks in found[0]


def test_a_body_without_half_of_it_is_noted_where_discs_have_no_label():
    mask = mask_of("totalsegmentator", spine=SPINE)
    relabelled, _ = to_spider(without(mask, 4, along(SPINE, "L3") < 13), None, None)
    found = doubts_of(bodies_from_spider_mask(relabelled)[0], mask.spacing_mm)
    assert "L2-L3 is doubtful: L2 and L3 are 22 mm apart, the others are up to 9 mm" in found[0]
    assert "L3 is doubtful: it is 13 mm high, 26 mm is typical" in found[1]


def test_a_missing_vertebra_in_masks_that_only_count_is_noted():
    """Vertebrae numbered 1, 2, 3 … from the bottom, as SPIDER does: names above the missing one are wrong by one."""
    voxels = SPINE.mask.voxels.copy()
    voxels[np.isin(voxels, (3, 203))] = 0
    for label in (4, 5, 6):
        voxels[voxels == label] = label - 1
        voxels[voxels == 200 + label] = 199 + label
    mask = Scan(voxels, SPINE.mask.affine, "mask")
    bodies, _ = bodies_from_spider_mask(mask)
    assert any(
        "L3-L4 is doubtful: L3 and L4 are 44 mm apart" in doubt and "a vertebra may be missing between them" in doubt
        for doubt in doubts(mask)
    )
    notes = []
    assert "L3-L4" not in [disc.level for disc in extract_discs(SPINE.scan, bodies, notes=notes)]
    assert "L3-L4" in notes[0]


def test_two_vertebrae_under_one_label_are_noted():
    """SPIDER's numbers without a gap: L3 and L4 are both 2, and so is the disc between them."""
    voxels = SPINE.mask.voxels.copy()
    voxels[np.isin(voxels, (3, 203))] = 2
    for label in (4, 5, 6):
        voxels[voxels == label] = label - 1
        voxels[voxels == 200 + label] = 199 + label
    bodies, notes = bodies_from_spider_mask(Scan(voxels, SPINE.mask.affine, "mask"))
    assert "L4" not in [body.name for body in bodies]
    assert any("L4 was left out: its walls would be 61" in note and "two vertebrae" in note for note in notes)


def test_a_body_far_higher_than_the_others_is_noted():
    corners = np.array([[0, 0], [0, DEPTH_MM], [BODY_MM, DEPTH_MM], [BODY_MM, 0]], float)
    bodies = []
    top = 0.0
    for name in ("L1", "L2", "L3", "L4", "L5"):
        height = 48.0 if name == "L3" else BODY_MM
        bodies.append(VertebralBody(name, corners * (height / BODY_MM, 1) + (top, 0), (0, 9)))
        top += height + DISC_MM
    found = doubts_of(bodies, np.ones(3))
    assert found == ["L3 is doubtful: it is 48 mm high, 26 mm is typical of this scan: two vertebrae under one name."]


@pytest.mark.parametrize(("slip_mm", "noted", "left_out"), [(12, False, False), (20, True, False), (40, True, True)])
def test_a_body_far_behind_the_others_is_noted_or_its_discs_left_out(slip_mm, noted, left_out):
    """As where a spinous process is taken for the body: grade II of a slip is up to half of the endplate."""
    bodies, _ = bodies_from_spider_mask(SPINE.mask)
    slipped = [
        VertebralBody(body.name, body.corners + np.array([0, slip_mm / 0.7 * (body.name == "L3")]), body.slices)
        for body in bodies
    ]
    found = doubts_of(slipped, SPINE.mask.spacing_mm)
    assert any("L3 is" in doubt and "mm behind L2" in doubt for doubt in found) == noted
    levels = [disc.level for disc in extract_discs(SPINE.scan, slipped, notes=[])]
    assert ("L2-L3" not in levels) == left_out


@pytest.mark.parametrize(("front_mm", "noted"), [(20, False), (12, True)])
def test_a_wedge_is_noted(front_mm, noted):
    corners = np.array([[0, 0], [0, DEPTH_MM], [BODY_MM, DEPTH_MM], [BODY_MM, 0]], float)
    bodies = [
        VertebralBody(name, corners + np.array([place * (BODY_MM + DISC_MM), 0]), (0, 9))
        for place, name in enumerate(("L2", "L3", "L4", "L5"))
    ]
    bodies[1].corners[0, 0] += BODY_MM - front_mm
    assert any("L3 is doubtful: it is" in doubt for doubt in doubts_of(bodies, np.ones(3))) == noted


@pytest.mark.parametrize("hidden", [False, True], ids=["spider", "no canal, no discs"])
def test_ordinary_spines_are_not_noted(hidden):
    for mask in (block_spine(tilt_deg=30).mask, SPINE.mask, phantom(3, 0).mask, phantom(1, 7).mask):
        if hidden:
            vertebrae = np.where((mask.voxels > 0) & (mask.voxels < 26), mask.voxels + 1, 0).astype(np.uint8)
            mask, _ = to_spider(Scan(vertebrae, mask.affine, "mask"), "totalsegmentator", None)
        assert doubts(mask) == []
