"""Islands, labels in two places, and masks that are flipped against their scan."""

import re

import numpy as np
import pytest

from data_prep.anatomy.mask_checks import flipped
from data_prep.anatomy.mask_labels import to_spider
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.phantom.phantom import phantom
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine
from tests.data_prep.anatomy.test_mask_labels import mask_of

SPINE = block_spine(tilt_deg=8, spacing_mm=(0.8, 0.8, 4.0))


def changed(change):
    voxels = SPINE.mask.voxels.copy()
    change(voxels)
    return Scan(voxels, SPINE.mask.affine, "mask")


@pytest.mark.parametrize(
    ("label", "place"),
    [
        (3, np.s_[2, 2, 0]),  # a voxel in the corner of the first slice
        (3, np.s_[:4, :6, 5:7]),  # at the edge of the image, which would cut the body
        (2, np.s_[-5:, 100:104, 6]),
        (100, np.s_[80:120, 3:6, 4:8]),  # a vessel that was taken for the canal: all behind it would be arches
        (203, np.s_[0:3, 170:175, 6]),
    ],
)
def test_islands_are_left_out_and_noted(label, place):
    mask, notes = to_spider(changed(lambda voxels: voxels.__setitem__(place, label)), None, None)
    assert len(notes) == 1
    assert re.search(rf"voxels of label {label}\b.* far from its others were left out", notes[0])
    bodies, left_out = bodies_from_spider_mask(mask)
    assert left_out == []
    for body, true in zip(bodies, bodies_from_spider_mask(SPINE.mask)[0], strict=True):
        np.testing.assert_array_equal(body.corners, true.corners)


def test_posterior_elements_are_no_islands():
    mask, notes = to_spider(SPINE.mask, None, None)
    assert notes == []
    np.testing.assert_array_equal(mask.voxels, SPINE.mask.voxels)


def test_a_label_that_is_used_twice_is_left_out():
    """TotalSpineSeg issue 67: one label for two vertebrae that are not neighbours, another is missing."""
    mask = mask_of("totalspineseg", spine=SPINE)
    twice = Scan(np.where(mask.voxels == 42, 44, mask.voxels).astype(np.uint8), mask.affine, "mask")
    relabelled, notes = to_spider(twice, None, None)
    assert any("label 44 (L4) was left out: it is in two places, more than 36 mm apart" in note for note in notes)
    assert "L4" not in [body.name for body in bodies_from_spider_mask(relabelled)[0]]


@pytest.mark.parametrize(("axis", "how"), [(0, "upside down"), (1, "back to front"), (2, "from right to left")])
@pytest.mark.parametrize("patient", [0, 2, 4])
def test_a_mask_that_is_flipped_is_told(axis, how, patient):
    drawn = phantom(1, patient)
    assert flipped(drawn.scan, drawn.mask) == ""
    turned = Scan(np.ascontiguousarray(np.flip(drawn.mask.voxels, axis)), drawn.mask.affine, "mask")
    assert flipped(drawn.scan, turned) == how


@pytest.mark.parametrize("tool", ["spineps", "totalsegmentator"])
def test_a_mask_without_a_canal_that_is_flipped_back_to_front_is_refused(tool):
    mask = mask_of(tool, spine=SPINE)
    turned = Scan(np.ascontiguousarray(mask.voxels[:, ::-1]), mask.affine, "mask")
    with pytest.raises(SpinejaxError, match="arches in front: it is flipped back to front"):
        to_spider(turned, None, None)


@pytest.mark.parametrize("spacing_mm", [(0.8, 0.8, 4.0), (0.6, 0.6, 1.5)])
def test_a_scan_without_contrast_says_nothing_of_flips(spacing_mm):
    spine = block_spine(spacing_mm=spacing_mm)
    flat = Scan(np.full_like(spine.scan.voxels, 5.0), spine.scan.affine, "scan")
    assert flipped(flat, spine.mask) == ""
