"""`train.py finetune`: from the network that ships to a network of one's own grades."""

import dataclasses

import flax.traverse_util
import numpy as np
import pytest

from spinejax.commands import train
from spinejax.config import PRESETS
from spinejax.errors import SpinejaxError
from spinejax.parallel import runtime
from spinejax.training import checkpoint, shipped
from spinejax.training.log import read_log
from tests.training.test_shipped import PROVENANCE, VIEWS, make_run


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A small network in the place of the one that ships, and its weights by name."""
    folder = shipped.write(make_run(tmp_path / "first"), tmp_path / "package", provenance=PROVENANCE, contrasts=["t2"])
    monkeypatch.setattr(shipped, "FOLDER", folder)
    return flax.traverse_util.flatten_dict(shipped.read(folder)[1]["params"], sep="/")


def arguments(data, run, **changes):
    options = train.like_shipped(PRESETS["finetune"][1])
    return train.Arguments(data, run, dataclasses.replace(options, epochs=2, eval_epochs=1, **changes))


def test_a_batch_may_be_larger_than_the_data_and_layers_may_be_frozen(network, tiny, tmp_path, capsys):
    """24 discs, in batches of 64: every step sees some of them twice or more."""
    run = tmp_path / "run"
    given = arguments(tiny, run, batch_size=64, freeze=("trunk", "head_side/fc6"))
    assert (given.options.width, given.options.views) == (0.02, VIEWS)  # those of the network
    train.main(given)
    printed = capsys.readouterr().out
    assert "From shipped: head_brightness/fc6, head_brightness/fc7, head_brightness/fc8, head_side/fc6" in printed
    assert [entry["step"] for entry in read_log(run / "log.jsonl")] == [1, 2]
    tuned = flax.traverse_util.flatten_dict(checkpoint.load(run)[1]["params"], sep="/")
    for name, leaf in network.items():
        if name.startswith(("trunk/", "head_side/fc6/")):
            np.testing.assert_array_equal(tuned[name], leaf)
        elif name.endswith("kernel"):
            assert 0 < np.abs(tuned[name] - leaf).max() < 0.1


def test_what_does_not_fit_is_one_line(network, tiny, tmp_path):
    with pytest.raises(SpinejaxError, match="none of that run's weights fits this network"):
        train.main(arguments(tiny, tmp_path / "narrow", width=0.005))
    with pytest.raises(SpinejaxError, match="--freeze conv1: no such layer"):
        train.main(arguments(tiny, tmp_path / "frozen", freeze=("conv1",)))
    (shipped.FOLDER / shipped.ABOUT).unlink()
    with pytest.raises(SpinejaxError, match=r"spinenet.json: cannot be read .* Install spinejax again\."):
        arguments(tiny, tmp_path / "run")
