import numpy as np
import pytest
import shapely

from data_prep.anatomy.mask_labels import CONVENTIONS, to_spider
from data_prep.anatomy.segment_names import segments_by_name
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


# Segments with names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("L5", ("vertebra", "L5")),
        ("vertebrae_L5", ("vertebra", "L5")),
        ("L5 vertebra", ("vertebra", "L5")),
        ("T12_body", ("vertebra", "T12")),
        ("Th09", ("vertebra", "T9")),
        ("L6", ("vertebra", "L6")),
        ("L4-L5", ("disc", "L4")),
        ("disc L4/5", ("disc", "L4")),
        ("disc_L5_S1", ("disc", "L5")),
        ("L5-S", ("disc", "L5")),
        ("IVD L3", ("disc", "L3")),
        ("T12-L1", ("disc", "T12")),
        ("sacrum", ("sacrum", "S1")),
        ("S1", ("sacrum", "S1")),
        ("Spinal canal", ("canal", "")),
        ("spinal_cord", ("canal", "")),
        ("L5 posterior elements", None),
        ("nerve root L5", None),
        ("Segment_1", None),
        ("muscle", None),
        ("C7", None),
        ("", None),
    ],
)
def test_what_a_segment_is_by_its_name(name, structure):
    assert segments_by_name({7: name}) == ({} if structure is None else {structure: [7]})


def numbered(names):
    """The spine's mask with labels 1, 2, … in this order of structures, as Slicer numbers them, and their names."""
    original = {
        "L5": 1,
        "L4": 2,
        "L3": 3,
        "L2": 4,
        "canal": 100,
        "L5-S1": 201,
        "L4-L5": 202,
        "L3-L4": 203,
        "L2-L3": 204,
    }
    voxels = np.zeros_like(SPINE.mask.voxels)
    for number, name in enumerate(names, start=1):
        voxels[SPINE.mask.voxels == original[name]] = number
    return Scan(voxels, SPINE.mask.affine, "segments"), dict(enumerate(names, start=1))


def test_names_of_segments_are_used_and_their_numbers_are_not():
    """With these numbers the vertebrae would be TotalSegmentator's sacrum, L5, L4 and L3."""
    straight, _ = bodies_from_spider_mask(SPINE.mask)
    mask, names = numbered(["L2", "L3", "L4", "L5", "L5-S1", "L4-L5", "L3-L4", "L2-L3", "canal"])
    relabelled, notes = to_spider(mask, None, None, names)
    np.testing.assert_array_equal(relabelled.voxels, SPINE.mask.voxels)
    assert notes == []
    assert [body.name for body in bodies_from_spider_mask(relabelled)[0]] == [body.name for body in straight]
    alone, names = numbered(["L2", "L3", "L4", "L5"])
    bodies, _ = bodies_from_spider_mask(to_spider(alone, None, None, names | {5: "a segment without voxels"})[0])
    assert [body.name for body in bodies] == ["L2", "L3", "L4", "L5"]


def test_segments_whose_names_tell_nothing_are_asked_about():
    mask, names = numbered(["L2", "L3", "L4", "L5"])
    nothing = {label: f"Segment_{label}" for label in names}
    with pytest.raises(SpinejaxError, match=r"segments are named Segment_1, .*, which tells no vertebrae"):
        to_spider(mask, None, None, nothing)
    assert to_spider(mask, "totalsegmentator", None, nothing)[0].voxels.any()
    # SPIDER's labels cannot be mistaken, whatever the segments are called.
    assert to_spider(SPINE.mask, None, None, {label: f"Segment_{label}" for label in (1, 2, 100, 201)})[0] is not None


def test_two_segments_of_one_name_are_refused():
    mask, names = numbered(["L2", "L3", "L4", "L5"])
    with pytest.raises(SpinejaxError, match="its segments 'L4' and 'vertebra L4' are both taken for the vertebra L4"):
        to_spider(mask, None, None, names | {4: "vertebra L4"})
