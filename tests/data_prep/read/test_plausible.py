import numpy as np
import pytest

from data_prep.read.plausible import plausible
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine, sagittal_affine


@pytest.fixture
def scan():
    """A block spine in air, with some noise: intensities from 0 on."""
    spine = block_spine(num_slices=7)
    noise = np.random.default_rng(0).rayleigh(2.0, spine.scan.voxels.shape)
    voxels = np.hypot(np.where(spine.scan.voxels < 50, 0, spine.scan.voxels), noise).astype(np.float32)
    return Scan(voxels, spine.scan.affine, "blocks")


def with_voxels(scan, voxels):
    return Scan(voxels.astype(np.float32), scan.affine, scan.name)


def test_an_ordinary_scan_is_unchanged(scan):
    found, notes = plausible(scan)
    assert found is scan
    assert notes == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda voxels: (voxels - voxels.mean()) / voxels.std(), "negative"),
        (lambda voxels: (voxels.clip(*np.percentile(voxels, [0.5, 99.5])) - voxels.mean()) / voxels.std(), "negative"),
        (lambda voxels: voxels / voxels.max() * 2 - 1, "negative"),
        (lambda voxels: voxels - 1024, "negative"),
        (lambda voxels: voxels - 5000, "negative"),
        (lambda voxels: voxels + 32768, "far above 0"),
    ],
)
def test_shifted_intensities_are_shifted_back(scan, change, word):
    """Up to a scale, which normalisation removes, they are the plain scan's."""
    found, notes = plausible(with_voxels(scan, change(scan.voxels)))
    assert len(notes) == 1
    assert word in notes[0]
    assert "shifted by" in notes[0]
    scale = np.median(scan.voxels[scan.voxels > 50]) / np.median(found.voxels[scan.voxels > 50])
    inner = scan.voxels < np.percentile(scan.voxels, 99)
    np.testing.assert_allclose((found.voxels * scale)[inner], scan.voxels[inner], atol=0.02 * scan.voxels.max())


def test_a_little_below_zero_is_left_to_be_cut_off(scan):
    """As splines leave it, at edges."""
    scan.voxels[::7, ::5] -= 3
    assert plausible(scan) == (scan, [])


@pytest.mark.parametrize("fill", [np.nan, -1000.0, -32768.0])
def test_margins_without_data_become_dark(scan, fill):
    voxels = scan.voxels.copy()
    voxels[:20], voxels[:, -15:], voxels[:, :, 0] = fill, fill, fill
    found, notes = plausible(with_voxels(scan, voxels))
    assert "taken as no data" in notes[0]
    assert len(notes) == 1
    np.testing.assert_array_equal(found.voxels[20:, :-15, 1:], scan.voxels[20:, :-15, 1:])
    assert found.voxels[:20].max() < 1


def test_margins_of_a_z_scored_scan_become_as_dark_as_its_air(scan):
    voxels = (scan.voxels - scan.voxels.mean()) / scan.voxels.std()
    voxels[:20] = np.nan
    found, notes = plausible(with_voxels(scan, voxels))
    assert len(notes) == 2
    assert abs(found.voxels[:20]).max() == 0


@pytest.mark.parametrize("where", [(60, 80, 3), (slice(50, 70), slice(60, 90), slice(None)), np.s_[:, :, 3]])
def test_nan_within_the_image_is_refused(scan, where):
    scan.voxels[where] = np.nan
    with pytest.raises(SpinejaxError, match=r"blocks: .* voxels within the image are NaN"):
        plausible(scan)


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
def test_an_empty_image_is_refused(scan, value):
    with pytest.raises(SpinejaxError, match="empty image"):
        plausible(with_voxels(scan, np.full_like(scan.voxels, value)))


@pytest.mark.parametrize(("factor", "words"), [(0.1, "× 10 .*cm"), (0.001, "× 1000 .*unit m,"), (1000, "× 0.001 .*µm")])
def test_other_units_are_asked_about_with_the_factor(scan, factor, words):
    affine = sagittal_affine(np.array([0.8, 0.7, 4.0]) * factor)
    with pytest.raises(SpinejaxError, match=f"blocks: .*With spacing {words}"):
        plausible(Scan(scan.voxels, affine, scan.name))


def test_a_stack_of_pictures_without_orientation_is_refused(scan):
    """Its slices were taken for rows: 7 of them, 1 mm apart."""
    with pytest.raises(SpinejaxError, match=r"7 mm high .*orientation"):
        plausible(Scan(np.ascontiguousarray(scan.voxels.transpose(2, 0, 1)), sagittal_affine((1, 1, 1)), scan.name))
