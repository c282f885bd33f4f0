"""Options: the paper's values, their JSON, and what is refused."""

import dataclasses
import json

import pytest

from spinejax import config
from spinejax.config import PRESETS, Config, ViewRanges
from spinejax.errors import SpinejaxError


def test_the_paper_preset_is_the_papers_section_4():
    _, paper = PRESETS["paper"]
    assert (paper.batch_size, paper.momentum, paper.weight_decay, paper.learning_rate) == (256, 0.9, 5e-4, 1e-3)
    assert (paper.plateau_factor, paper.epochs, paper.initialiser, paper.dropout) == (0.1, 1000, "glorot", 0.5)
    assert (paper.width, paper.branch_point, paper.task_weights) == (1.0, "conv5", ())
    ranges = dataclasses.astuple(paper.views)
    assert ranges == (15, 24, 32, 2, 0.1, 0.1, 0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_options_come_back_from_json(tmp_path, name):
    options = dataclasses.replace(PRESETS[name][1], task_weights=(("pfirrmann", 2.0),), tasks=("pfirrmann",))
    config.save(options, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == options
    hash(options)  # a static argument of jit


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": "many"}, "batch_size"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"surprise": 1}, "surprise"),
        ({"views": {"angle_deg": 200}}, "--angle-deg is 200"),
        ({"branch_point": "conv9"}, "branch_point"),
    ],
)
def test_damaged_options_are_refused_and_named(tmp_path, changes, fault):
    path = tmp_path / "config.json"
    config.save(Config(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(SpinejaxError, match=fault):
        config.load(path)


def test_a_missing_or_broken_file_is_said_so(tmp_path):
    with pytest.raises(SpinejaxError, match="not a run"):
        config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpinejaxError, match=r"config\.json"):
        config.load(tmp_path / "config.json")


@pytest.mark.parametrize("changes", [{"width": 0.0}, {"epochs": 0}, {"plateau_factor": 1.0}, {"seed": -1}])
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(SpinejaxError, match="expected"):
        Config(**changes)
    with pytest.raises(SpinejaxError, match="spare slices"):
        ViewRanges(shift_slices=4)


def test_a_run_goes_on_with_its_own_options_only(tmp_path):
    config.settle(Config(), tmp_path)
    config.settle(Config(epochs=2000, workers=3), tmp_path)  # neither changes what a step computes
    with pytest.raises(SpinejaxError, match=r"width was 1.0, now 0.5"):
        config.settle(Config(width=0.5), tmp_path)
