import numpy as np
import pytest
import shapely

from data_prep.anatomy.mask_labels import CONVENTIONS, to_spider
from data_prep.anatomy.vertebrae import SACRUM, SPIDER_VERTEBRAE, bodies_from_spider_mask
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine

SPINE = block_spine(tilt_deg=8, spacing_mm=(0.8, 0.8, 4.0))
NAMES = {label: name for name, label in SPIDER_VERTEBRAE.items()}


def mask_of(convention, *, sacrum=True, spine=SPINE):
    """The spine's mask as a tool would label it, its sacrum with it if the tool labels one."""
    tool, labels = CONVENTIONS[convention], spine.mask.voxels
    voxels = np.zeros_like(labels)
    if tool.canal:
        voxels[labels == 100] = tool.canal[-1]
    for name, label in tool.vertebrae.items():
        if name in SPIDER_VERTEBRAE:
            voxels[labels == SPIDER_VERTEBRAE[name]] = label
            voxels[labels == 200 + SPIDER_VERTEBRAE[name]] = tool.discs.get(name, 0)
    if tool.sacrum and sacrum:
        inside = shapely.intersects_xy(shapely.Polygon(spine.corners["S1"]), *np.indices(labels.shape[:2]))
        voxels[inside[:, :, None] & labels.any((0, 1))] = tool.sacrum
    return Scan(voxels, spine.mask.affine, "mask")


@pytest.mark.parametrize("named", [True, False], ids=["named", "recognised"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_tools_mask_gives_the_true_corners(convention, named):
    relabelled, notes = to_spider(mask_of(convention), convention if named else None, None)
    bodies, left_out = bodies_from_spider_mask(relabelled)
    assert [body.name for body in bodies] == ["L2", "L3", "L4", "L5", "S1"]
    assert notes == left_out == []
    for body in bodies:
        apart_mm = np.linalg.norm((body.corners - SPINE.corners[body.name]) * 0.8, axis=1)
        # The sacrum of blocks has no posterior elements, so the canal behind it is a guess from above.
        assert np.nanmax(apart_mm) < (3.0 if body.name == "S1" else 1.5), body.name
        assert np.isfinite(apart_mm[:2]).all()


def test_sacrum_reaches_the_regions():
    relabelled, _ = to_spider(mask_of("totalspineseg"), None, None)
    assert (relabelled.voxels == SACRUM).any()


@pytest.mark.parametrize(("tool", "label"), [("totalspineseg", 46), ("spineps", 25)])
def test_a_sixth_lumbar_vertebra_is_flagged_and_its_levels_are_left_out(tool, label):
    mask = mask_of(tool)
    below = mask.voxels == CONVENTIONS[tool].sacrum
    relabelled, notes = to_spider(
        Scan(np.where(below, label, mask.voxels).astype(np.uint8), mask.affine, "mask"), tool, None
    )
    bodies, _ = bodies_from_spider_mask(relabelled)
    assert [body.name for body in bodies] == ["L2", "L3", "L4", "L5"]
    assert "has L6, so the numbering is doubtful" in notes[0]


def test_a_gap_in_the_numbering_is_flagged():
    mask = mask_of("totalspineseg")
    _, notes = to_spider(Scan(np.where(mask.voxels == 43, 0, mask.voxels), mask.affine, "mask"), None, None)
    assert "a vertebra is missing between" in notes[0]


@pytest.mark.parametrize("lowest", ["L5-S1", "L4-L5", "L2-L3"])
def test_levels_are_counted_from_the_lowest(lowest):
    relabelled, _ = to_spider(SPINE.mask, "spider", lowest)
    bodies, _ = bodies_from_spider_mask(relabelled)
    assert bodies[-1].name == lowest.split("-")[1]
    assert bodies[-2].name == lowest.split("-")[0]
    assert len(bodies) == 5


def test_a_labelled_sacrum_speaks_against_another_lowest_level():
    with pytest.raises(SpinejaxError, match="labels a sacrum, so its lowest disc is L5-S1, not --lowest-level L4-L5"):
        to_spider(mask_of("totalspineseg"), None, "L4-L5")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({5, 6, 7, 105, 106}, "fits none of spider, totalspineseg, spineps, totalsegmentator. Name its tool"),
        ({250}, "its labels 250 it fits none"),
        (set(), "its labels none at all it fits none"),
        ({100, 5}, "1 vertebrae from T9 down by spider's labels, expected two or more"),
    ],
)
def test_masks_of_unknown_tools_are_refused(labels, message):
    voxels = np.zeros((30, 30, 3), np.uint8)
    for place, label in enumerate(sorted(labels)):
        voxels[3 * place : 3 * place + 3] = label
    with pytest.raises(SpinejaxError, match=message):
        to_spider(Scan(voxels, SPINE.mask.affine, "mask"), None, None)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_no_label_means_two_things(convention):
    tool = CONVENTIONS[convention]
    named = [*tool.vertebrae.values(), *tool.discs.values(), *tool.canal, *([tool.sacrum] if tool.sacrum else [])]
    assert len(set(named)) == len(named)
    assert max(tool.labels) < 256
