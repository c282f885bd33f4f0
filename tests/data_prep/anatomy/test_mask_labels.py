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
    mask, names = numbered(["L5", "L4", "L3", "L2"])
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


# Masks that only count, and classes ----------------------------------------------------------------------------------

COUNTED = {name: number for number, name in enumerate(("L5", "L4", "L3", "L2"), start=1)}


def counted(from_the_top=False, discs=True, endplates=True, begin=1):
    """SPINEPS's seg-vert without its labelling model: vertebrae in order, discs at 100 and endplates at 200 more."""
    labels, voxels = SPINE.mask.voxels, np.zeros_like(SPINE.mask.voxels)
    for number in COUNTED.values():
        label = begin - 1 + (5 - number if from_the_top else number)
        voxels[labels == number] = label
        if discs:
            voxels[labels == 200 + number] = 100 + label
        if endplates:
            below = np.roll(voxels == label, 1, axis=0) & (labels == 200 + number)
            voxels[below] = 200 + label
    return Scan(voxels, SPINE.mask.affine, "mask")


@pytest.mark.parametrize("from_the_top", [False, True])
@pytest.mark.parametrize("discs", [False, True])
def test_numbers_that_only_count_are_refused(from_the_top, discs):
    with pytest.raises(SpinejaxError, match=r"fits none of .*(only count|labelling model)"):
        to_spider(counted(from_the_top, discs, endplates=discs), None, None)


@pytest.mark.parametrize("from_the_top", [False, True])
@pytest.mark.parametrize("discs", [False, True])
@pytest.mark.parametrize("lowest", ["L5-S1", "L3-L4"])
def test_numbers_that_only_count_are_levels_with_the_lowest(from_the_top, discs, lowest):
    if not discs and lowest == "L5-S1":
        lowest = "L4-L5"  # without discs, the lowest is that between the two lowest vertebrae
    bodies, _ = bodies_from_spider_mask(to_spider(counted(from_the_top, discs, endplates=discs), None, lowest)[0])
    upper, lower = lowest.split("-")
    assert [body.name for body in bodies][-2:] == [upper, lower]
    true = SPINE.corners["L5" if discs else "L4"]
    assert np.nanmax(np.linalg.norm((bodies[-2].corners - true) * 0.8, axis=1)) < 1.5


def test_a_long_column_counted_from_the_top_is_not_taken_for_its_last_numbers():
    """SPINEPS issue 59: without the labelling model, 17 vertebrae are 1 to 17 from the top, whatever the lowest is."""
    voxels = counted(from_the_top=True, begin=14, endplates=False).voxels
    for label in range(1, 14):
        voxels[label, :3] = label
    with pytest.raises(SpinejaxError, match="without its labelling model counts from the top"):
        to_spider(Scan(voxels, SPINE.mask.affine, "mask"), None, None)


def test_spiders_discs_are_not_taken_for_the_endplates_of_spineps():
    """Without its canal, SPIDER's mask has 1, 2, … and 201, 202, …, as SPINEPS without its discs would."""
    spider = Scan(np.where(SPINE.mask.voxels == 100, 0, SPINE.mask.voxels), SPINE.mask.affine, "mask")
    with pytest.raises(SpinejaxError, match="fits none of"):
        to_spider(spider, None, "L5-S1")
    bodies, _ = bodies_from_spider_mask(to_spider(spider, "spider", "L5-S1")[0])
    assert [body.name for body in bodies] == ["L2", "L3", "L4", "L5", "S1"]


def test_verse_labels_are_read_as_those_of_spineps():
    mask = mask_of("spineps")
    verse = Scan(np.where(mask.voxels > 28, 0, mask.voxels), mask.affine, "mask")
    bodies, _ = bodies_from_spider_mask(to_spider(verse, None, None)[0])
    assert [body.name for body in bodies] == ["L2", "L3", "L4", "L5", "S1"]


def test_whole_spines_of_two_tools_with_the_same_labels_are_told_apart_by_their_order():
    """Labels 1 to 24: the sacrum to C2 upwards by TotalSegmentator, C1 to L5 downwards by VerSe."""
    rows = np.repeat(np.arange(26), [16, 16, *[8] * 24])[:, None, None]  # what is 1 is larger
    voxels = np.where((rows > 0) & (rows < 25), rows, 0) * np.ones((1, 40, 5), int)
    down, up = (Scan(each.astype(np.uint8), SPINE.mask.affine, "mask") for each in (voxels, voxels[::-1]))
    assert (to_spider(down, None, None)[0].voxels == 1).any(2).any(1)[24 * 8 + 20]  # L5 is VerSe's 24
    assert (to_spider(up, None, None)[0].voxels == SACRUM).any()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"vertebrae": 1}, "Is it a binary mask"),
        ({"vertebrae": 1, "discs": 2, "canal": 3}, "label 1 is in|Is it classes of structures"),
        ({"discs": 1, "vertebrae": 2, "canal": 3}, "would be below|is in [0-9]+ pieces"),
        ({"vertebrae": 6, "discs": 1, "lowest disc": 5, "canal": 8}, "Is it TotalSpineSeg's step 1.*its step2_output"),
        ({"vertebrae": 49, "discs": 100, "canal": 61, "sacrum": 26}, "Is it SPINEPS's seg-spine.* Give its seg-vert"),
    ],
)
def test_classes_of_structures_are_refused_by_name(classes, message):
    labels, voxels = SPINE.mask.voxels, np.zeros_like(SPINE.mask.voxels)
    for name, where in (
        ("vertebrae", (labels > 0) & (labels < 26)),
        ("discs", labels > 200),
        ("canal", labels == 100),
        ("lowest disc", labels == 201),
        ("sacrum", mask_of("spineps").voxels == 26),
    ):
        voxels[where] = classes.get(name, 0) or voxels[where]
    with pytest.raises(SpinejaxError, match=message):
        to_spider(Scan(voxels, SPINE.mask.affine, "mask"), None, None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([18, 19, 20, 21, 92, 200, 201, 202, 203], "Is it TotalSpineSeg's of 2024"),
        ([25, 26, 27, 28, 29, 30, 31, 32], "Is it TotalSegmentator's for CT.*vertebrae_mr"),
    ],
)
def test_labels_of_other_tools_are_refused_by_name(labels, message):
    voxels = np.zeros((100, 40, 3), np.uint8)
    for place, label in enumerate(labels):
        voxels[90 - 9 * place : 97 - 9 * place] = label
    with pytest.raises(SpinejaxError, match=message):
        to_spider(Scan(voxels, SPINE.mask.affine, "mask"), None, None)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_mask_that_is_upside_down_is_refused(convention):
    mask = mask_of(convention)
    turned = Scan(np.ascontiguousarray(mask.voxels[::-1]), mask.affine, "mask")
    for named in (convention, None):
        with pytest.raises(SpinejaxError, match=r"would be below .*upside down, or numbered from the other end"):
            to_spider(turned, named, None)
