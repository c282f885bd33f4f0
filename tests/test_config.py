"""Options: the paper's values, their JSON, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from spinejax import config
from spinejax.config import PRESETS, Config
from spinejax.errors import SpinejaxError
from spinejax.network.views import ViewRanges


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
        ({"batch_size": 0}, "config.json: Option --batch-size is 0"),
        ({"batch_size": "many"}, "batch_size"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"surprise": 1}, "surprise"),
        ({"views": {"angle_deg": 200}}, "config.json: Option --views.angle-deg is 200"),
        ({"branch_point": "conv9"}, "branch_point"),
    ],
)
def test_damaged_options_are_refused_and_named(tmp_path, changes, fault):
    path = tmp_path / "config.json"
    config.save(Config(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(SpinejaxError, match=fault):
        config.load(path)


def test_a_missing_or_broken_file_is_one_message(tmp_path):
    with pytest.raises(SpinejaxError, match="not a run"):
        config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpinejaxError, match=r"config\.json"):
        config.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0.0},
        {"width": 100000.0},
        {"epochs": 0},
        {"plateau_factor": 1.0},
        {"seed": -1},
        {"seed": 2**32},
        {"task_weights": (("side", float("nan")),)},
        {"task_weights": (("side", -1.0),)},
    ],
)
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(SpinejaxError, match="expected"):
        Config(**changes)


@pytest.mark.parametrize(
    "ranges", [{"shift_slices": 4}, {"scale": 0.9}, {"shift_rows_px": float("inf")}, {"angle_deg": 60}]
)
def test_views_that_would_leave_the_volume_are_refused(ranges):
    with pytest.raises(SpinejaxError, match="--views"):
        ViewRanges(**ranges)


def test_first_weights_are_a_path_or_an_address_and_come_back_as_the_same(tmp_path):
    for given, kept in (("run", Path("run")), (Path("run"), Path("run")), ("s3://spines/run", "s3://spines/run")):
        options = Config(init_from=given)
        assert options.init_from == kept
        config.save(options, tmp_path / "config.json")
        assert config.load(tmp_path / "config.json") == options
