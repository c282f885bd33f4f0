"""Hard phantoms: each change does what it says, and the mask stays the truth that the detector learns from."""

import numpy as np
import pytest

from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE, bodies_from_spider_mask
from data_prep.detector.training.truth import BODY, SACRUM, slices_with_truth
from data_prep.phantom import deformities
from data_prep.phantom.hard_phantom import CHANGES, cropped, hard_phantom
from data_prep.phantom.spine import stack_spine


@pytest.fixture(scope="module")
def spines():
    return [stack_spine(np.random.default_rng(seed), np.zeros(6, int)) for seed in range(5)]


def named(bodies, name):
    return next(body for body in bodies if body.name == name)


def walls_mm(body):
    """The lengths of the front and the back wall."""
    upper_front, upper_back, lower_back, lower_front = body.corners
    return np.array([np.linalg.norm(upper_front - lower_front), np.linalg.norm(upper_back - lower_back)])


def gap_mm(bodies, name):
    """Between a body and the one below it: from corner to corner, in front and at the back."""
    k = [body.name for body in bodies].index(name)
    return np.linalg.norm(bodies[k].corners[[3, 2]] - bodies[k + 1].corners[[0, 1]], axis=1)


# Deformities ---------------------------------------------------------------------------------------------------------


def test_scoliosis_leads_the_column_aside(spines):
    for bodies in spines:
        bent = deformities.bent(bodies, 20.0, 350.0, 1.0)
        aside = [new.centre[2] - old.centre[2] for old, new in zip(bodies, bent, strict=True)]
        assert [max(aside), min(aside)] == pytest.approx([20, -20])
        assert all(np.array_equal(old.corners, new.corners) for old, new in zip(bodies, bent, strict=True))


def test_a_slip_is_forward_and_takes_along_what_is_above(spines):
    for bodies in spines:
        slid = deformities.slipped(bodies, "L4", 9.0)
        steps = np.array([new.centre - old.centre for old, new in zip(bodies, slid, strict=True)])
        num_above = [body.name for body in bodies].index("L4") + 1
        assert np.linalg.norm(steps[:num_above], axis=1) == pytest.approx(9)
        assert np.all(steps[:num_above, 1] < -7.5)  # to the front; a lordotic L4 also goes up or down
        assert not steps[num_above:].any()


def test_a_wedge_fracture_shortens_the_front_wall_only(spines):
    for bodies in spines:
        broken = deformities.wedged(bodies, "L1", 0.4)
        ratio = walls_mm(named(broken, "L1")) / walls_mm(named(bodies, "L1"))
        assert ratio == pytest.approx([0.6, 1.0], abs=0.02)
        for disc in ("T12", "L1"):  # the neighbours keep their places at its back, and the disc below is unchanged
            assert gap_mm(broken, disc)[1] == pytest.approx(gap_mm(bodies, disc)[1], abs=0.3)
        assert gap_mm(broken, "L1") == pytest.approx(gap_mm(bodies, "L1"), abs=0.5)
        kyphosis_deg = named(broken, "T12").angle_deg - named(bodies, "T12").angle_deg
        assert 10 < kyphosis_deg < 30  # about 11 of 27 mm over a depth of 32 mm


def test_a_biconcave_fracture_leaves_the_corners(spines):
    body, broken = named(spines[0], "L2"), named(deformities.sunken(spines[0], "L2", 6.0), "L2")
    assert np.array_equal(body.corners, broken.corners)
    middle, rim = (0.0, 0.0, 0.0), (0.999 * np.mean(body.half_depth), 0.0, 0.0)
    assert np.subtract(body.depths(*middle), broken.depths(*middle))[:2] == pytest.approx(6.0)
    assert np.subtract(body.depths(*rim), broken.depths(*rim))[:2] == pytest.approx(0, abs=0.1)


def test_a_narrow_disc_is_low_in_front_and_behind(spines):
    for bodies in spines:
        assert gap_mm(deformities.narrowed(bodies, "L3", 2.0), "L3") == pytest.approx(2, abs=0.6)


def test_variants_of_number_change_how_many_bodies_are_mobile(spines):
    for bodies in spines:
        extra = deformities.with_extra_body(bodies)
        assert [body.name for body in extra] == ["T10", *(body.name for body in bodies)]
        assert gap_mm(extra, "L5") == pytest.approx(gap_mm(bodies, "L5"))
        s1, squarer = named(bodies, "S1"), named(deformities.sacralised(bodies, 3.0), "S1")
        assert squarer.half_depth[1] / squarer.half_depth[0] > 1.2 * s1.half_depth[1] / s1.half_depth[0]
        lowest = deformities.lumbarised(bodies, 5.0)
        assert gap_mm(lowest, "L5") == pytest.approx(5, abs=2.5)  # the endplates differ in length
        taper = np.divide(*named(lowest, "L5").half_depth[::-1])
        assert taper < np.divide(*named(bodies, "L5").half_depth[::-1])


# Whole phantoms ------------------------------------------------------------------------------------------------------


def test_is_a_pure_function_of_seed_and_patient():
    first, again, other = hard_phantom(3, 6), hard_phantom(3, 6), hard_phantom(3, 7)
    assert np.array_equal(first.scan.voxels, again.scan.voxels)
    assert np.array_equal(first.mask.voxels, again.mask.voxels)
    assert np.array_equal(first.scan.affine, again.scan.affine)
    assert not np.array_equal(first.scan.affine, other.scan.affine)


@pytest.mark.parametrize("change", [*CHANGES, "none"])
def test_corners_read_from_the_mask_are_those_drawn(change):
    """Within 2 mm at the median and 4.5 mm at most; a body that is cut has no false corner."""
    drawn = hard_phantom(5, 2, {change} & CHANGES.keys())
    read = {body.name: body for body in bodies_from_spider_mask(drawn.mask)[0]}
    assert {name for name, corners in drawn.bodies.items() if np.isfinite(corners).all()} <= read.keys()
    errors_mm = []
    for name, body in read.items():
        true = drawn.bodies[name]
        cut = np.isnan(true[:2]).any()
        assert not cut or np.isnan(body.corners[:2]).all()
        errors_mm += [*np.linalg.norm((body.corners - true) * drawn.scan.spacing_mm[:2], axis=1)]
    assert np.nanmedian(errors_mm) < 2
    assert np.nanmax(errors_mm) < 4.5


@pytest.mark.parametrize(("change", "num_bodies"), [("extra", 7), ("lumbarised", 7), ("sacralised", 6), ("slip", 6)])
def test_labels_count_from_the_lowest_body_with_a_true_disc(change, num_bodies):
    drawn = hard_phantom(5, 3, {change})
    vertebrae = set(range(1, num_bodies + 1))
    assert {*np.unique(drawn.mask.voxels)} == {0, 100} | vertebrae | {200 + label for label in vertebrae}
    assert {SPIDER_VERTEBRAE.get(name, 0) for name in drawn.bodies} == {0} | vertebrae


def test_the_detector_gets_the_bodies_of_a_slice():
    drawn = hard_phantom(5, 4, {"extra"})
    (plane,) = slices_with_truth(drawn.scan, drawn.mask, [round(drawn.mid_slice["L3"])])
    assert [(plane.kinds == kind).sum() for kind in (BODY, SACRUM)] == [7, 1]


def signal(drawn, labels):
    return float(np.median(drawn.scan.voxels[np.isin(drawn.mask.voxels, labels)]))


def test_contrasts():
    marrow, discs, canal = range(1, 7), range(201, 207), [100]
    t2, t1, stir, fat = (hard_phantom(5, 5, changes) for changes in (set(), {"t1"}, {"stir"}, {"fat"}))
    assert signal(t2, canal) > 1.5 * signal(t2, marrow)
    assert signal(t1, marrow) > signal(t1, discs) > signal(t1, canal)
    assert signal(stir, canal) > 3 * signal(stir, marrow)
    assert signal(fat, marrow) > 3 * max(signal(fat, discs), signal(fat, canal))


def test_implants_hide_signal_and_not_the_truth():
    plain, metal = (hard_phantom(5, 6, changes) for changes in (set(), {"implants"}))
    assert np.array_equal(plain.mask.voxels, metal.mask.voxels)
    dark = [
        [np.mean(p.scan.voxels[p.mask.voxels == label] < 0.4 * signal(p, label)) for label in (1, 2, 3, 4, 5)]
        for p in (plain, metal)
    ]
    darker = np.subtract(*dark[::-1])
    assert max(darker) > darker[4] + 0.03  # L1 is never beside the metal


def test_a_crop_keeps_truth_in_place():
    whole = hard_phantom(5, 7, set())
    top, left = int(whole.bodies["L1"].mean(0)[0]), 20
    height, width, _ = whole.scan.voxels.shape
    part = cropped(whole, slice(top, height), slice(left, width - 10))
    assert np.array_equal(part.mask.voxels, whole.mask.voxels[top:, left:-10])
    assert np.allclose(part.scan.affine @ [5, 6, 2, 1], whole.scan.affine @ [5 + top, 6 + left, 2, 1])
    assert "T12" not in part.bodies
    assert np.isnan(part.bodies["L1"][:2]).all()
    assert np.allclose(part.bodies["L3"] + [top, left], whole.bodies["L3"])


def test_fields_of_view_end_anywhere():
    drawn = [hard_phantom(5, patient, {"field"}) for patient in range(12)]
    tops = {next(iter(p.bodies)) for p in drawn}
    bottoms = {list(p.bodies)[-1] for p in drawn}
    assert len(tops) > 1
    assert len(bottoms) > 1
    for p in drawn:
        for corners in p.bodies.values():
            inside = np.isnan(corners) | ((corners >= -0.5) & (corners <= np.array(p.scan.voxels.shape[:2]) - 0.5))
            assert inside.all()
