"""The table of branch points: its networks, their test splits, and continuing after an interruption."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import branch_points, running
from spinejax.network.views import ViewRanges

ACCURACY = {"validation": 0.7, "test": 0.9}


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run. They are replaced by functions that make the folders they would leave."""
    seen = []

    def pretend(*command):
        script, *options = map(str, command)
        seen.append((script, options))
        if script == "train.py":
            (Path(options[options.index("--workdir") + 1]) / "export").mkdir(parents=True)
            return
        out = Path(options[options.index("--out") + 1])
        accuracy = ACCURACY[options[options.index("--split") + 1]] + (0.02 if "--tta" in options else 0)
        out.mkdir(parents=True)
        figures = {"tasks": {name: {"mean_per_class_accuracy": {"value": accuracy}} for name in ("one", "two")}}
        (out / "results.json").write_text(json.dumps(figures))

    monkeypatch.setattr(branch_points, "run_script", pretend)
    return seen


def arguments(tmp_path, **options):
    return branch_points.Arguments(tmp_path / "discs", tmp_path / "runs", branch_points=("conv5", "none"), **options)


def test_each_branch_point_is_trained_twice_and_tested_on_the_other_split(tmp_path, commands):
    branch_points.main(arguments(tmp_path, every="--distributed --start-seconds 600", options=("--width", "1")))
    trainings = [options for script, options in commands if script == "train.py"]
    assert len(trainings) == 2 * 2 * 2
    for script, options in commands:
        assert options[options.index("--distributed") + 1 :][:2] == ["--start-seconds", "600"]
        assert ("--width" in options) == (script == "train.py")
    decided = {o[o.index("--workdir") + 1]: o[o.index("--validation-split") + 1] for o in trainings}
    for script, options in commands:
        if script == "evaluate.py":
            judged = options[options.index("--split") + 1]
            assert {judged, decided[options[options.index("--checkpoint") + 1]]} == {"validation", "test"}


def test_a_stopped_training_is_not_graded(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(branch_points, "run_script", lambda *command: commands.append(command))
    with pytest.raises(SystemExit, match="stopped before its end"):
        branch_points.main(arguments(tmp_path))
    assert [script for script, *_ in commands] == ["train.py"]


def test_commands_run_in_the_repository_with_the_callers_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(running.subprocess, "run", lambda words, **options: seen.append((words, options["cwd"])))
    running.run_script("train.py", "--data", Path("discs"), "--epochs", 3)
    assert seen == [([sys.executable, "train.py", "--data", str(tmp_path / "discs"), "--epochs", "3"], running.ROOT)]


def test_finished_parts_are_not_run_again(tmp_path, commands):
    branch_points.main(arguments(tmp_path))
    first = len(commands)
    (tmp_path / "runs" / "none-views-1" / "judged-54" / "results.json").unlink()
    (tmp_path / "runs" / "none-views-1" / "judged-54").rmdir()
    branch_points.main(arguments(tmp_path))
    assert [script for script, _ in commands[first:]] == ["evaluate.py"]


def test_the_table_holds_mean_and_standard_deviation_of_the_two(tmp_path, commands):
    branch_points.main(arguments(tmp_path))
    rows = json.loads((tmp_path / "runs" / "table.json").read_text())
    assert [(r["branch_point"], r["augmented"], r["num_views"]) for r in rows[:2]] == [
        ("conv5", True, 1),
        ("conv5", True, 54),
    ]
    for row in rows:
        values = np.array([70, 90]) + (2 if row["num_views"] == 54 else 0)
        for cell in (*row["tasks"].values(), row["mean"]):
            assert cell == pytest.approx({"mean": values.mean(), "std": values.std(ddof=1)})
    table = (tmp_path / "runs" / "table.md").read_text()
    assert "| conv5 | yes | 54 views | 82.0 ± 14.1 | 82.0 ± 14.1 | 82.0 ± 14.1 |" in table
    assert (tmp_path / "runs" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_views_every_range_is_zero():
    options = branch_points.no_views()
    names = [name.removeprefix("--views.").replace("-", "_") for name in options[::2]]
    assert ViewRanges(**dict.fromkeys(names, 0)) == ViewRanges(0, 0, 0, 0, 0, 0, 0)
    assert set(options[1::2]) == {"0"}
