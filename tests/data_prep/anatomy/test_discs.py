import numpy as np
import pytest

from data_prep.anatomy.discs import BODY_INTENSITY, extract_discs, slices_per_slab
from data_prep.anatomy.vertebrae import VertebralBody, bodies_from_spider_mask, body_labels
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE
from tests.block_spine import DEPTH_MM, DISC, MARROW, block_spine

CENTRE = (95.5, 159.5, 7, 1)


def true_bodies(spine):
    """The spine's bodies with their exact corners; S1 as extraction meets it, without its lower ones."""
    slices = bodies_from_spider_mask(spine.mask)[0][0].slices
    corners = {name: value.copy() for name, value in spine.corners.items()}
    corners["S1"][2:] = np.nan
    return [VertebralBody(name, value, slices) for name, value in corners.items()]


@pytest.fixture(scope="module")
def spine():
    return block_spine(angles_deg=(10.0, -8.0))


@pytest.fixture(scope="module")
def discs(spine):
    regions = Scan(body_labels(spine.mask), spine.mask.affine, "regions")
    lesions = Scan((spine.mask.voxels == 203) * np.uint16(1 << 9), spine.mask.affine, "lesions")
    return extract_discs(spine.scan, true_bodies(spine), regions=regions, lesions=lesions)


def test_a_disc_for_every_pair(discs):
    assert [disc.level for disc in discs] == ["L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    for disc in discs:
        assert disc.volume.shape == disc.region.shape == disc.lesion.shape == VOLUME_SHAPE
        assert (disc.volume.dtype, disc.region.dtype, disc.lesion.dtype) == (np.uint16, np.uint8, np.uint16)


def test_missing_body_makes_no_pair(spine):
    bodies = [body for body in true_bodies(spine) if body.name != "L4"]
    assert [disc.level for disc in extract_discs(spine.scan, bodies)] == ["L2-L3", "L5-S1"]


def test_disc_is_centred_horizontal_and_half_the_window_wide(discs):
    for disc in discs:
        inside = disc.region[:, :, 7] == 2
        rows, columns = np.nonzero(inside)
        assert abs(rows.mean() - 95.5) < 1
        assert abs(columns.mean() - 159.5) < 1
        assert abs(np.polyfit(columns, rows, 1)[0]) < 0.01
        assert abs((columns.max() - columns.min() + 1) - 112) <= 4  # a mask's pixel is 2.3 of ours
        height = 9 / DEPTH_MM * 112
        assert abs(inside.sum(0)[159] - height) <= 4


def test_width_is_exact_in_mm(spine, discs):
    pixel_mm = np.linalg.norm(discs[0].affine[:3, :2], axis=0)
    np.testing.assert_allclose(pixel_mm, 2 * DEPTH_MM / 224)


def test_upper_body_is_above_and_front_is_left(discs):
    region = discs[0].region[:, :, 7]
    assert np.nonzero(region == 1)[0].mean() < 95 < np.nonzero(region == 3)[0].mean()
    canal = discs[0].volume[:, :, 7] == INTENSITY_ONE  # the fluid, twice as bright as marrow, is clipped
    assert np.nonzero(canal)[1].mean() > 159.5


def test_sacrum_has_no_region(discs):
    assert set(np.unique(discs[-1].region)) == {0, 1, 2}
    assert set(np.unique(discs[0].region)) == {0, 1, 2, 3}


def test_lesion_bits_survive(discs):
    for disc in discs:
        found = set(np.unique(disc.lesion))
        assert found <= {0, 1 << 9}
    np.testing.assert_array_equal(discs[1].lesion > 0, discs[1].region == 2)


def test_intensities_are_relative_to_the_bodies_median(discs):
    for disc in discs:
        for slot in range(*disc.slices):
            body = disc.volume[:, :, slot][disc.region[:, :, slot] == 1]
            if len(body):
                assert abs(np.median(body) / INTENSITY_ONE - BODY_INTENSITY) < 1e-4
        middle = disc.volume[:, :, 7][disc.region[:, :, 7] == 2]
        assert abs(np.median(middle) / INTENSITY_ONE - BODY_INTENSITY * DISC / MARROW) < 1e-3


def test_each_slice_has_its_own_scale_and_outer_ones_the_nearest(spine):
    disc = extract_discs(spine.scan, true_bodies(spine))[0]
    first, stop = true_bodies(spine)[0].slices
    corner = disc.volume[96, 40].astype(float) / INTENSITY_ONE  # fat, in every slice of the scan
    fat = np.array(
        [BODY_INTENSITY * 20 / MARROW * (1 + 0.1 * k) / (1 + 0.1 * np.clip(k, first, stop - 1)) for k in range(13)]
    )
    np.testing.assert_allclose(corner[1:14], fat, atol=2e-5)


def test_slices_outside_the_scan_are_zero():
    spine = block_spine(num_slices=5)
    for disc in extract_discs(spine.scan, true_bodies(spine)):
        assert disc.slices == (5, 10)
        assert not disc.volume[:, :, :5].any()
        assert not disc.volume[:, :, 10:].any()
        assert disc.volume[:, :, 5:10].any(axis=(0, 1)).all()


def test_more_slices_than_slots():
    spine = block_spine(spacing_mm=(0.8, 0.8, 1.5), num_slices=31)
    disc = extract_discs(spine.scan, true_bodies(spine), native_slices=True)[0]
    assert disc.slices == (0, 15)
    np.testing.assert_allclose((np.linalg.inv(spine.scan.affine) @ disc.affine @ CENTRE)[2], 15)


def test_one_slice_scan():
    spine = block_spine(num_slices=1)
    for disc in extract_discs(spine.scan, true_bodies(spine)):
        assert disc.slices == (7, 8)
        assert disc.volume[:, :, 7].any()
        assert not np.delete(disc.volume, 7, axis=2).any()


def test_outside_the_scan_in_plane_is_zero():
    spine = block_spine(tilt_deg=0)
    rows = int(spine.corners["L2"][3, 0] - 5 / 0.8)  # cut 5 mm above the uppermost disc
    scan = Scan(np.ascontiguousarray(spine.scan.voxels[rows:]), spine.scan.affine, "cut")
    bodies = [VertebralBody(b.name, b.corners - (rows, 0), b.slices) for b in true_bodies(spine)]
    disc = extract_discs(scan, bodies)[0]
    assert not disc.volume[:60].any()
    assert disc.volume[85, 159, 7] > 0


@pytest.mark.parametrize("spacing_mm", [(0.8, 0.8, 4.0), (0.5, 0.9, 3.3), (1.1, 0.6, 5.0)])
@pytest.mark.parametrize("angles_deg", [(0, 0), (20, -15)])
@pytest.mark.parametrize("tilt_deg", [0, 30])
def test_a_point_keeps_its_place_in_the_patient(spacing_mm, angles_deg, tilt_deg):
    """The disc's voxel and the scan's voxel of one point of the patient hold the same intensity and mask."""
    spine = block_spine(spacing_mm=spacing_mm, angles_deg=angles_deg, tilt_deg=tilt_deg)
    shape = spine.scan.voxels.shape
    ramps = np.stack(np.mgrid[: shape[0], : shape[1], : shape[2]]).astype(np.float32)
    for disc, axis in ((0, 0), (1, 1), (2, 0)):
        # An image that is its own coordinate, but for a scale that normalisation takes out: read it where it is known.
        ramp = Scan(1 + ramps[axis], spine.scan.affine, "ramp")
        volume = extract_discs(ramp, true_bodies(spine))[disc]
        points = np.random.default_rng(0).uniform((60, 90, 7, 1), (130, 230, 7, 1), (50, 4))
        points[:, :2] = np.round(points[:, :2])
        in_scan = points @ (np.linalg.inv(spine.scan.affine) @ volume.affine).T
        back = in_scan @ (np.linalg.inv(volume.affine) @ spine.scan.affine).T
        np.testing.assert_allclose(back, points, atol=1e-6)
        values = volume.volume[points[:, 0].astype(int), points[:, 1].astype(int), 7].astype(float)
        expected = 1 + in_scan[:, axis]
        unclipped = values < INTENSITY_ONE
        scale = np.median(values[unclipped] / expected[unclipped])
        error_mm = (values[unclipped] / scale - expected[unclipped]) * spine.scan.spacing_mm[axis]
        assert unclipped.sum() > 10
        assert abs(error_mm).max() < 0.1


def test_centre_of_the_volume_is_the_mean_of_the_four_corners(spine, discs):
    corners = np.concatenate([spine.corners["L3"][2:], spine.corners["L4"][:2]]).mean(0)
    expected = spine.scan.affine @ [*corners, 6, 1]
    np.testing.assert_allclose(discs[1].affine @ CENTRE, expected, atol=1e-9)


def test_same_disc_from_a_scan_in_another_grid():
    """Unequal spacing changes the sampling, not the disc."""
    coarse = block_spine(spacing_mm=(0.6, 0.6, 4.0), tilt_deg=20)
    other = block_spine(spacing_mm=(0.4, 0.8, 4.0), tilt_deg=20)
    for a, b in zip(
        extract_discs(coarse.scan, true_bodies(coarse)), extract_discs(other.scan, true_bodies(other)), strict=True
    ):
        np.testing.assert_allclose(a.affine, b.affine, atol=1e-6)
        assert np.mean(abs(a.volume.astype(int) - b.volume) > 0.2 * INTENSITY_ONE) < 0.03


def test_fine_scan_is_smoothed_before_it_is_thinned_out():
    spine = block_spine(spacing_mm=(0.1, 0.1, 4.0), num_slices=1, num_bodies=2)
    row, column = np.indices(spine.scan.voxels.shape[:2])
    stripes = Scan(np.float32(100) * (1 + ((row + column) % 2))[:, :, None], spine.scan.affine, "stripes")
    window = extract_discs(stripes, true_bodies(spine))[0].volume[60:130, 60:260, 7]
    assert window.std() < 0.12 * window.mean()  # unsmoothed it is 0.27


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda bodies, scan: bodies.append(bodies[0]), "have the same name"),
        (lambda bodies, scan: bodies[0].corners.fill(np.nan), "a corner beside the disc is not known"),
        (lambda bodies, scan: np.multiply(bodies[1].corners, 3, out=bodies[1].corners), "its corners span"),
        (lambda bodies, scan: scan.voxels[:, :, 6].fill(0), "slice 6 the median of the vertebral bodies is 0"),
    ],
)
def test_nonsense_is_refused(spoil, message):
    spine = block_spine()
    bodies = true_bodies(spine)
    spoil(bodies, spine.scan)
    with pytest.raises(SpinejaxError, match=f"blocks.*{message}"):
        extract_discs(spine.scan, bodies)


def test_bodies_without_a_common_slice_are_refused():
    spine = block_spine()
    bodies = [VertebralBody(b.name, b.corners, (0, 5) if b.name == "L3" else (6, 12)) for b in true_bodies(spine)]
    with pytest.raises(SpinejaxError, match="no slice of the scan in common"):
        extract_discs(spine.scan, bodies)


def test_mirrored_front_and_back_is_refused():
    spine = block_spine()
    bodies = [VertebralBody(b.name, b.corners[[1, 0, 3, 2]], b.slices) for b in true_bodies(spine)]
    with pytest.raises(SpinejaxError, match="top to bottom"):
        extract_discs(spine.scan, bodies)


def test_a_disc_that_cannot_be_cut_does_not_affect_the_others():
    spine = block_spine()
    bodies = true_bodies(spine)
    levels = [disc.level for disc in extract_discs(spine.scan, bodies)]
    bodies[0].corners.fill(np.nan)
    notes = []
    assert [disc.level for disc in extract_discs(spine.scan, bodies, notes=notes)] == levels[1:]
    assert len(notes) == 1
    assert levels[0] in notes[0]
    spine.scan.voxels.fill(0)
    with pytest.raises(SpinejaxError, match="too dark"):
        extract_discs(spine.scan, bodies[1:], notes=notes)


# Thin slices ----------------------------------------------------------------------------------------------------------


def test_ordinary_slices_stay_and_nine_slabs_of_thin_ones_span_what_the_papers_did():
    for slice_mm, number in ((6.0, 1), (2.5, 1), (2.499, 1), (2.4, 2), (1.8, 2), (1.0, 4), (0.9, 4), (0.5, 8)):
        assert slices_per_slab(block_spine(spacing_mm=(2, 2, slice_mm)).scan) == min(number, 13)
    for slice_mm in np.arange(0.3, 2.49, 0.01):
        scan = Scan(np.zeros((2, 2, 100), np.float32), np.diag([1, 1, slice_mm, 1]), "thin")
        assert 27 < 9 * slice_mm * slices_per_slab(scan) < 46


def thin_spine(**options):
    """45 slices of 1 mm: every 4 make a slab. The bodies' middle is slice 22."""
    return block_spine(**({"spacing_mm": (0.8, 0.7, 1.0), "num_slices": 45, "angles_deg": (10.0, -8.0)} | options))


def test_affine_of_slabs_by_hand():
    """Slot 7 averages slices 21 to 24, whose middle is 22.5; slot 8 slices 25 to 28, whose middle is 26.5."""
    spine = thin_spine()
    disc = extract_discs(spine.scan, true_bodies(spine))[1]
    to_scan = np.linalg.inv(spine.scan.affine) @ disc.affine
    corners = np.concatenate([spine.corners["L3"][2:], spine.corners["L4"][:2]]).mean(0)
    np.testing.assert_allclose(to_scan @ CENTRE, [*corners, 22.5, 1], atol=1e-9)
    np.testing.assert_allclose(to_scan @ [95.5, 159.5, 8, 1], [*corners, 26.5, 1], atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(disc.affine[:3, 2]), 4.0)
    # Slot 2 has slices 1 to 4; slot 1 would have -3 to 0, of which the scan has one; slot 12 has 41 to 44.
    assert disc.slices == (2, 13)


def test_a_slab_is_the_mean_of_its_slices_and_has_a_scale_of_its_own():
    spine = thin_spine()
    gain = 1 + np.arange(45) % 4  # a mean of 2.5 over any four slices
    scan = Scan((spine.scan.voxels / (1 + 0.1 * np.arange(45)) * gain).astype(np.float32), spine.scan.affine, "gain")
    disc = extract_discs(scan, true_bodies(spine))[1]
    whole = extract_discs(
        Scan((spine.scan.voxels / (1 + 0.1 * np.arange(45))).astype(np.float32), scan.affine, ""), true_bodies(spine)
    )[1]
    inner = slice(4, 11)  # slabs of which every slice shows the bodies
    np.testing.assert_allclose(disc.volume[:, :, inner].astype(int), whole.volume[:, :, inner], atol=2)


@pytest.mark.parametrize("slice_mm", [0.9, 1.0, 1.4, 2.4])
def test_a_landmark_keeps_its_place_in_the_patient_through_slabs(slice_mm):
    """A point of the scan that is marked in all three, scan, regions and lesions, is found where the affine puts it."""
    spine = thin_spine(spacing_mm=(0.8, 0.7, slice_mm), num_slices=round(45 / slice_mm))
    per_slab = slices_per_slab(spine.scan)
    voxel = np.array([*np.rint(spine.corners["L4"][0] + (-4, 12)), round(18 / slice_mm)]).astype(int)
    voxels, lesions = np.full(spine.scan.voxels.shape, 10, np.float32), np.zeros(spine.scan.voxels.shape, np.uint16)
    marked = (
        *voxel[:2],
        slice(voxel[2], voxel[2] + per_slab),
    )  # wherever the slabs begin, one of them shows most of it
    voxels[marked], lesions[marked] = 19, 1
    regions = Scan((lesions * 203).astype(np.uint8), spine.scan.affine, "regions")
    marks = {"regions": regions, "lesions": Scan(lesions, spine.scan.affine, "lesions")}
    disc = extract_discs(Scan(voxels, spine.scan.affine, "point"), true_bodies(spine), **marks)[1]
    expected = spine.scan.affine @ [*voxel[:2], voxel[2] + (per_slab - 1) / 2, 1]
    for found in (disc.volume == disc.volume.max(), disc.region == 2, disc.lesion == 1):
        place = disc.affine @ [*np.argwhere(found).mean(0), 1]
        apart = np.linalg.inv(spine.scan.affine) @ (place - expected)
        assert abs(apart[:2]).max() < 0.6
        assert abs(apart[2]) <= per_slab / 2


def test_each_disc_is_centred_on_its_own_middle():
    spine = thin_spine()
    first = {"L2": (2, 40), "L3": (2, 40), "L4": (10, 40), "L5": (10, 40), "S1": (10, 40)}
    bodies = [VertebralBody(body.name, body.corners, first[body.name]) for body in true_bodies(spine)]
    for disc, middle in zip(extract_discs(spine.scan, bodies), (20.5, 22.5, 24.5, 24.5), strict=True):
        assert abs((np.linalg.inv(spine.scan.affine) @ disc.affine @ CENTRE)[2] - middle) <= 0.5


def test_thin_slices_are_kept_if_asked_for():
    spine = thin_spine()
    disc = extract_discs(spine.scan, true_bodies(spine), native_slices=True)[1]
    assert disc.slices == (0, 15)
    np.testing.assert_allclose((np.linalg.inv(spine.scan.affine) @ disc.affine @ CENTRE)[2], 22)


@pytest.mark.parametrize("num_slices", [1, 2, 3, 5])
def test_a_thin_stack_of_few_slices_has_its_middle_slab(num_slices):
    spine = thin_spine(num_slices=num_slices)
    for disc in extract_discs(spine.scan, true_bodies(spine)):
        assert disc.volume[:, :, 7].any()
        assert disc.slices[0] <= 7 < disc.slices[1]
