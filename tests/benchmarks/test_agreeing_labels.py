"""Labels that are made to agree, and two small trainings with them."""

import json

import numpy as np
import pytest

from benchmarks import agreeing_labels
from benchmarks.agreeing_labels import AGREEING, ENDPLATES, TRUE, agreeing
from data_prep.__main__ import main as data_prep
from spinejax.data.dataset import DataSet


@pytest.mark.parametrize("both", [0.1, 0.5, 0.83, 1])
def test_as_many_discs_as_asked_for_have_two_damaged_endplates(both):
    labels = (np.random.default_rng(0).random((500, 2)) < 0.2).astype(np.int8)
    made = agreeing(labels, both)
    damaged = labels.any(1)
    np.testing.assert_array_equal(made.any(1), damaged)
    share = made.all(1)[damaged].mean()
    assert share == pytest.approx(max(both, labels.all(1)[damaged].mean()), abs=1 / damaged.sum())
    assert (made >= labels).all()


def test_each_network_learns_from_its_labels(tmp_path, monkeypatch):
    for name, seed in (("data", "0"), ("unseen", "1")):
        assert data_prep(["phantom", "--out", str(tmp_path / name), "--patients", "10", "--seed", seed]) == 0
    learned = {}

    def run(config, data, folder, stops):
        assert (config.epochs, config.plateau_patience) == (3, 3)
        learned[folder.parent.name] = data.labels
        (folder / "export").mkdir(parents=True)

    shares = [{"task": ENDPLATES[0], "patient": str(patient), "own_side": 0.6} for patient in range(4)]
    monkeypatch.setattr(agreeing_labels.train, "run", run)
    monkeypatch.setattr(agreeing_labels, "require_trained", lambda folder: None)
    monkeypatch.setattr(agreeing_labels, "run_script", lambda *words: None)
    monkeypatch.setattr(
        agreeing_labels,
        "point_in_stacks",
        lambda data, folder: (folder / "own_side.json").write_text(json.dumps(shares)),
    )
    options = {"data": tmp_path / "data", "unseen": tmp_path / "unseen", "out": tmp_path / "out", "epochs": 3}
    agreeing_labels.main(agreeing_labels.Arguments(**options))
    true = DataSet(tmp_path / "data").labels
    np.testing.assert_array_equal(learned["true-labels"], true)
    changed = (learned["labels-that-agree"] != true).any(0)
    names = [task.name for task in DataSet(tmp_path / "data").tasks]
    assert {name for name, each in zip(names, changed, strict=True) if each} == set(ENDPLATES)
    found = json.loads((tmp_path / "out" / "agreeing.json").read_text())
    assert found[TRUE][ENDPLATES[0]]["own_side"]["value"] == found[AGREEING][ENDPLATES[0]]["own_side"]["value"] == 0.6
