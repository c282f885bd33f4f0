"""Bodies without their posterior elements, in a mask without a canal."""

import numpy as np
import pytest

from data_prep.anatomy.mask_labels import to_spider
from data_prep.anatomy.posterior_wall import posterior_elements
from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE, bodies_from_spider_mask, body_labels
from data_prep.phantom.phantom import phantom
from data_prep.read.scan import Scan
from tests.block_spine import BODY_MM, DEPTH_MM, block_spine

NUMBERS = list(SPIDER_VERTEBRAE.values())


def without_canal(spine, pedicles=()):
    """The spine's mask as TotalSegmentator has it: vertebrae alone. Pedicles close the canal in some slices."""
    relabelled = spine.mask.voxels.copy()
    rows, columns = np.indices(relabelled.shape[:2])
    for name, number in SPIDER_VERTEBRAE.items():
        if name in spine.corners:
            upper_anterior, upper_posterior, _, lower_anterior = spine.corners[name]
            back = (upper_posterior - upper_anterior) * spine.mask.spacing_mm[:2] / DEPTH_MM
            down = (lower_anterior - upper_anterior) * spine.mask.spacing_mm[:2] / BODY_MM
            place = np.stack([rows - upper_anterior[0], columns - upper_anterior[1]], -1) * spine.mask.spacing_mm[:2]
            depth, height = place @ back, place @ down
            pedicle = (depth > DEPTH_MM - 1) & (depth < DEPTH_MM + 24) & (height > 1) & (height < 0.55 * BODY_MM)
            for index in pedicles:
                relabelled[:, :, index][pedicle] = number
    voxels = np.where(np.isin(relabelled, NUMBERS), relabelled + 1, 0).astype(np.uint8)
    return Scan(voxels, spine.mask.affine, "mask")


def worst_mm(spine, mask):
    relabelled, notes = to_spider(mask, "totalsegmentator", None)
    bodies, left_out = bodies_from_spider_mask(relabelled)
    assert notes == left_out == []
    spacing = spine.mask.spacing_mm[:2]
    return {
        body.name: np.nanmax(np.linalg.norm((body.corners - spine.corners[body.name]) * spacing, axis=1))
        for body in bodies
    }


@pytest.mark.parametrize("tilt_deg", [-20, 0, 12, 35])
@pytest.mark.parametrize("pedicles", [(), (2, 3, 9, 10), (1, 2, 3, 4, 5, 6, 7, 8, 9, 11)], ids=["none", "few", "most"])
def test_corners_without_a_canal(tilt_deg, pedicles):
    spine = block_spine(tilt_deg=tilt_deg)
    worst = worst_mm(spine, without_canal(spine, pedicles))
    assert list(worst) == ["L2", "L3", "L4", "L5"]
    assert max(worst.values()) < 1.0, worst


@pytest.mark.parametrize("tilt_deg", [0, 12])
def test_corners_where_every_slice_shows_a_pedicle(tilt_deg):
    spine = block_spine(tilt_deg=tilt_deg)
    worst = worst_mm(spine, without_canal(spine, range(13)))
    assert max(worst.values()) < 3.0, worst


def test_only_posterior_elements_are_found():
    spine = block_spine()
    relabelled = np.where(np.isin(spine.mask.voxels, NUMBERS), spine.mask.voxels, 0)
    behind = posterior_elements(relabelled, spine.mask.spacing_mm)
    body = body_labels(spine.mask)
    assert behind.any()
    np.testing.assert_array_equal(behind, (relabelled > 0) & (body == 0))


def test_phantoms_keep_their_corners_when_the_canal_is_hidden():
    drawn = phantom(3, 0)
    voxels = np.where(np.isin(drawn.mask.voxels, NUMBERS), drawn.mask.voxels + 1, 0).astype(np.uint8)
    relabelled, _ = to_spider(Scan(voxels, drawn.mask.affine, "mask"), "totalsegmentator", None)
    seen = {body.name: body for body in bodies_from_spider_mask(drawn.mask)[0]}
    hidden = bodies_from_spider_mask(relabelled)[0]
    assert {body.name for body in hidden} >= set(seen) - {"S1"}
    for body in hidden:
        apart = (body.corners - seen[body.name].corners) * drawn.mask.spacing_mm[:2]
        assert np.nanmax(np.linalg.norm(apart, axis=1)) < 1.5, body.name
