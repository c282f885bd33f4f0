"""The table of ways to make hotspots, for a network with random weights and one lesion."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import pointing
from data_prep.__main__ import main
from spinejax.config import PRESETS
from spinejax.errors import SpinejaxError
from spinejax.network.spinenet import SpineNet
from spinejax.tasks import PAPER_TASKS

pytestmark = pytest.mark.slow


def test_ways_of_making_maps_are_measured(tmp_path, monkeypatch):
    assert main(["phantom", "--patients", "3", "--out", str(tmp_path / "discs")]) == 0
    model = SpineNet(PAPER_TASKS, width=0.02)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
    monkeypatch.setattr(pointing.runtime, "set_up", lambda **_: None)
    other = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 112, 224, 9)))
    networks = {"run": (model, jax.device_get(variables)), "other": (model, jax.device_get(other))}
    monkeypatch.setattr(pointing.checkpoint, "load", lambda run: networks[run.name])
    monkeypatch.setattr(pointing.config, "load", lambda path: PRESETS["quickstart"][1])
    monkeypatch.setattr(pointing, "NUM_VIEWS", 4)
    monkeypatch.setattr(pointing, "AT_ONCE", 2)
    few = {
        name: dataclasses.replace(pointing.WAYS[name], num_views=(1, 4) if name == pointing.FULL else (4,))
        for name in (pointing.FULL, "SmoothGrad, noise of 0.1", "abnormal less normal score", "weights shuffled")
    }
    monkeypatch.setattr(pointing, "WAYS", few)
    path = tmp_path / "pointing.json"
    runs = tmp_path / "run", tmp_path / "other"
    with pytest.raises(SpinejaxError, match="--checkpoints is run run: expected folders with names of their own"):
        pointing.main(pointing.Arguments((*runs[:1], tmp_path / "more" / "run"), tmp_path / "discs"))
    pointing.main(pointing.Arguments(runs, tmp_path / "discs", ways=tuple(few), num_lesions=3, json=path))
    content = json.loads(path.read_text())
    assert set(content) == {"run", "other", "mean of 2 networks"}
    found = content["run"]
    assert set(found) == {f"1 {pointing.FULL}", f"4 {pointing.FULL}", *few} - {pointing.FULL}
    assert all(row["all"]["n"] == 3 for row in found.values())
    assert 0 <= found["weights shuffled"]["all"]["deletion"]["value"] <= 1
    precision = [content[run][f"4 {pointing.FULL}"]["all"]["average_precision"] for run in content]
    assert precision[0]["value"] != precision[1]["value"]
    assert precision[2]["value"] == pytest.approx((precision[0]["value"] + precision[1]["value"]) / 2)


def test_the_mean_of_networks_is_of_each_lesion():
    def network(first, second):
        return {"way": [dict(zip(("task", "row", "hit", "right"), each, strict=True)) for each in (first, second)]}

    mean = pointing.mean_of_networks(
        [network(("a", 3, 1.0, True), ("b", 5, 0.0, True)), network(("a", 3, 0.0, False), ("b", 5, 0.0, True))]
    )
    assert mean == network(("a", 3, 0.5, 0.5), ("b", 5, 0.0, 1.0))
