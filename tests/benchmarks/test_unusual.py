"""Faults that are made up do what they say, and the table counts what is told."""

import json

import numpy as np
import pytest

from benchmarks import unusual
from benchmarks.unusual import DISC_PX, FAULTS, UNSEEN, Scores, changed
from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.parallel import runtime
from spinejax.training import checkpoint
from tests.training.test_shipped import make_run


@pytest.fixture
def volume():
    made = np.random.default_rng(0).integers(5000, 60000, VOLUME_SHAPE, dtype=np.uint16)
    made[:, :, :4] = made[:, :, 9:] = 0
    return made


def with_fault(volume, name):
    return changed(volume, FAULTS[name], np.random.default_rng(0))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_the_slices_inside_the_scan_alone(volume, name):
    found = with_fault(volume, name)
    assert (found.dtype, found.shape) == (volume.dtype, volume.shape)
    assert not found[:, :, :4].any()
    assert not found[:, :, 9:].any()
    assert (found[:, :, 4:9] != volume[:, :, 4:9]).any((0, 1)).all()


@pytest.mark.parametrize("name", ["upside down", "front and back mirrored"])
def test_what_is_turned_twice_is_as_before(volume, name):
    np.testing.assert_array_equal(with_fault(with_fault(volume, name), name), volume)


def test_a_disc_cut_too_high_lies_lower(volume):
    rows = round(1.5 * DISC_PX)
    np.testing.assert_array_equal(with_fault(volume, "cut 1.5 disc heights too high")[rows:], volume[:-rows])


def test_magnifying_leaves_the_centre_in_place():
    ramp = np.broadcast_to(np.linspace(0, 1, 192, dtype=np.float32)[:, None, None], (192, 320, 1))
    found = unusual.stretched(ramp, 2, 1)
    np.testing.assert_allclose(found[:, 160, 0], np.linspace(0.25, 0.75, 192), atol=2e-3)


def test_the_table_counts_what_is_told():
    def scores(distance):
        return Scores(np.array(distance), *[np.zeros(len(distance))] * 3)

    found = unusual.table({UNSEEN: scores([0.5, 0.9, 1.0, 1.1]), "upside down": scores([0.95, 2.0])})
    assert (found[UNSEEN]["n"], found[UNSEEN]["told"], found[UNSEEN]["share"]) == (4, 1, 0.25)
    # Clopper and Pearson (1934) for one of four.
    assert (found[UNSEEN]["low"], found[UNSEEN]["high"]) == pytest.approx((0.00631, 0.80588), abs=1e-5)
    assert "auc" not in found[UNSEEN]
    assert found["upside down"]["auc"]["distance"] == (2 + 4) / 8
    assert found["upside down"]["auc"]["trunk"] == 0.5


def test_finished_folds_are_measured(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)
    for number in range(2):
        (tmp_path / f"fold-{number}").mkdir()
        (tmp_path / f"fold-{number}" / "discs").symlink_to(tiny)
    with pytest.raises(SpinejaxError, match="no fold whose training has ended"):
        unusual.main(unusual.Arguments(tmp_path))
    checkpoint.export(make_run(tmp_path / "fold-1" / "run"))
    unusual.main(unusual.Arguments(tmp_path, tmp_path / "out", discs=2))
    found = json.loads((tmp_path / "out" / "unusual.json").read_text())
    assert found["folds"] == ["fold-1"]
    assert set(found["kinds"]) == {UNSEEN, f"{UNSEEN}, unknown", *FAULTS}
    assert {row["n"] for row in found["kinds"].values()} == {2}
    assert found["kinds"]["noise, σ two fifths of it"]["share"] == 1
    assert (tmp_path / "out" / "unusual.md").read_text() in capsys.readouterr().out
