"""The picture of a whole scan is the scan, where it lies in the patient, with its bodies; however large the scan is."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.dataset.job import Located
from data_prep.look.scan_picture import MAX_PX, MAX_SLICES, picture_of
from data_prep.read.scan import Scan
from tests.block_spine import block_spine, sagittal_affine

SPINE = block_spine(spacing_mm=(1.1, 0.7, 4.0), angles_deg=(6.0, -4.0))


def slice_of(picture, number):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["slices"][number]))).convert("L")).astype(float)


def to_patient(affine, place):
    return (np.array(affine) @ [*place, 1])[:3]


def test_the_slices_are_the_scans_and_neither_mirrored_nor_out_of_order():
    picture = picture_of(Located.by_mask(SPINE.scan, SPINE.mask))
    assert picture["shape"] == SPINE.scan.voxels.shape[:2]
    assert len(picture["slices"]) == SPINE.scan.voxels.shape[2]
    np.testing.assert_array_equal(picture["affine"], SPINE.scan.affine)
    black, white = np.percentile(SPINE.scan.voxels, (0.5, 99.7))
    for number in (0, 6, 12):
        expected = 255 * ((SPINE.scan.voxels[:, :, number] - black) / (white - black)).clip(0, 1)
        assert np.abs(slice_of(picture, number) - expected).mean() < 4


@pytest.mark.parametrize(("shape", "spacing_mm"), [((1400, 700, 3), (0.2, 0.4, 4.0)), ((60, 50, 75), (3.0, 3.0, 0.9))])
def test_large_scans_are_shown_smaller_and_in_their_place(shape, spacing_mm):
    """A bright plate is where the picture's affine says."""
    voxels = np.zeros(shape, np.float32)
    place = np.array(shape) // 2
    plate = tuple(
        slice(each - reach, each + reach + 1)
        for each, reach in zip(place, (shape[0] // 5, shape[1] // 5, 0), strict=True)
    )
    voxels[plate] = 100
    affine = sagittal_affine(spacing_mm, (7.0, -9.0))
    picture = picture_of(Located(Scan(voxels, affine, ""), []))
    assert max(picture["shape"]) <= MAX_PX
    assert len(picture["slices"]) <= MAX_SLICES
    brightest = int(np.argmax([slice_of(picture, number).max() for number in range(len(picture["slices"]))]))
    grey = slice_of(picture, brightest) * (slice_of(picture, brightest) > 20)
    found = np.tensordot(np.indices(grey.shape), grey) / grey.sum()
    apart_mm = to_patient(picture["affine"], [*found, brightest]) - to_patient(affine, place)
    assert np.linalg.norm(apart_mm) < 0.3


def test_bodies_lie_on_their_pixels_in_the_smaller_picture():
    spine = block_spine(spacing_mm=(0.25, 0.25, 4.0))
    found = Located(spine.scan, bodies_from_spider_mask(spine.mask)[0], confidence={"L4": 0.31234})
    picture = picture_of(found)
    assert max(picture["shape"]) < max(spine.scan.voxels.shape)
    for body in picture["bodies"]:
        true = spine.corners[body["name"]]
        for corner, expected in zip(body["corners"], true, strict=True):
            if corner is not None:
                row, column = corner
                middle = (body["slices"][0] + body["slices"][1] - 1) / 2
                apart = to_patient(picture["affine"], [row, column, middle]) - to_patient(
                    spine.scan.affine, [*expected, middle]
                )
                assert np.linalg.norm(apart) < 2
    by_name = {body["name"]: body for body in picture["bodies"]}
    assert by_name["L4"]["confidence"] == 0.312
    assert by_name["L5"]["confidence"] is None
    assert by_name["S1"]["corners"][2:] == [None, None]  # of the sacrum only the upper edge is known


def test_voxels_that_are_not_numbers_are_black():
    voxels = SPINE.scan.voxels.copy()
    voxels[:20] = np.nan
    picture = picture_of(Located(Scan(voxels, SPINE.scan.affine, ""), []))
    assert slice_of(picture, 6)[:10].max() < 12
    assert slice_of(picture, 6)[30:].max() > 200
