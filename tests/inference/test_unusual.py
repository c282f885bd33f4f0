"""What is usual for a network, and which discs are not."""

import numpy as np
import pytest

from spinejax.data.dataset import DataSet
from spinejax.geometry import VOLUME_SHAPE
from spinejax.inference import unusual


@pytest.fixture(scope="module")
def data(tiny):
    return DataSet(tiny)


def plain(value, slices=slice(2, 13)):
    volume = np.zeros(VOLUME_SHAPE, np.uint16)
    volume[:, :, slices] = value
    return volume


def test_a_plain_disc_is_its_brightness_and_no_detail():
    found = unusual.features_of(plain(32768))
    np.testing.assert_allclose(found[:16], np.log(0.02 + 0.5), rtol=1e-4)
    np.testing.assert_allclose(found[16:], np.log(1e-6), rtol=1e-4)


def test_slices_outside_the_scan_change_nothing():
    rng = np.random.default_rng(0)
    one = plain(0)
    one[:, :, 7] = rng.integers(0, 65535, VOLUME_SHAPE[:2])
    several = plain(0)
    several[:, :, 5:10] = one[:, :, 7:8]
    np.testing.assert_allclose(unusual.features_of(one), unusual.features_of(several), rtol=1e-5)
    assert np.isfinite(unusual.features_of(plain(0))).all()  # nothing but margin


def test_brightness_and_detail_are_told_by_their_place():
    volume = plain(10000)
    volume[40:68, 48:104] = 60000  # the part above on the left
    volume[96:152, 216:272:2] = 0  # the part below on the right, in fine stripes
    found = unusual.features_of(volume)
    brightness, finest = found[:16].reshape(4, 4), found[16:24].reshape(2, 4)
    assert brightness.argmax() == 0
    assert finest.argmax() == 7


def test_unseen_discs_are_usual_and_others_are_not(data):
    usual = unusual.fit(data)
    unseen = usual.distance(unusual.features(data, data.rows("validation")))
    assert np.quantile(unseen, unusual.USUAL_SHARE) == pytest.approx(usual.threshold)
    volume = data.volume(data.rows("test")[0])
    negative = np.where(volume > 0, 65535 - volume, 0).astype(np.uint16)
    odd = np.stack([unusual.features_of(each) for each in (negative, volume // 3, plain(0), plain(30000))])
    assert (usual.distance(odd) > usual.threshold).all()


def test_the_discs_to_fit_to_can_be_chosen(data):
    rows = data.rows("train")
    assert np.allclose(unusual.fit(data, rows, data.rows("validation")).mean, unusual.fit(data).mean)
    some = unusual.fit(data, rows[:12], rows)
    np.testing.assert_allclose(some.mean, unusual.features(data, rows[:12]).mean(0))
