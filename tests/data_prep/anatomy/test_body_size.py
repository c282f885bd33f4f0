import numpy as np
import pytest

from data_prep.anatomy.body_size import implausible_mask, implausible_size
from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.dataset.job import Located
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine, sagittal_affine

SPINE = block_spine(num_slices=15)  # bodies 34 mm deep, in 11 slices of 4 mm
BODIES = [VertebralBody(name, corners, (2, 13)) for name, corners in SPINE.corners.items()]


def sized(spacing_mm, bodies=BODIES):
    """What is said of the same voxels with another spacing."""
    return implausible_size(Scan(SPINE.scan.voxels, sagittal_affine(spacing_mm), "blocks"), bodies)


def test_true_spacings_are_plausible():
    assert sized((0.8, 0.7, 4.0)) == ""
    unknown = [VertebralBody("S1", np.full((4, 2), np.nan), (2, 13)), *BODIES[1:]]
    assert sized((0.8, 0.7, 4.0), unknown) == ""


def test_pixels_of_1_mm_give_the_factor_of_their_size():
    """Its pixels of 0.8 × 0.7 mm would be square, and bodies half as large again."""
    assert "blocks: vertebral bodies are 48.3 mm from front to back; with pixel spacings × 0.68 " in sized((1, 1, 5.7))


@pytest.mark.parametrize(("spacing_mm", "factor"), [((0.8, 0.7, 1.0), "3.9"), ((0.8, 0.7, 20.0), "0.19")])
def test_slices_of_a_wrong_spacing_are_told_by_the_width(spacing_mm, factor):
    assert f"with a slice spacing × {factor} they would be 4" in sized(spacing_mm)
    cut = [VertebralBody(body.name, body.corners, (0, 13)) for body in BODIES]  # a flank is not seen: no width is known
    assert sized(spacing_mm, cut) == ""


def test_a_mask_of_bodies_too_large_to_be_found_gives_the_factor():
    assert implausible_mask(SPINE.mask) == ""
    large = Scan(SPINE.mask.voxels, sagittal_affine((2.4, 2.1, 4.0)), "mask")
    with pytest.raises(SpinejaxError, match=r"mask: 0 usable .* vertebrae are 10\d mm apart; with spacings × 0\.33"):
        Located.by_mask(SPINE.scan, large)
