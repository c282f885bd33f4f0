"""The budget of an epoch: the command's own loop, saves included, around a device that only sleeps."""

import json
import subprocess
import sys

import pytest

from tests.running import ROOT, environment


@pytest.mark.slow
def test_an_epoch_is_its_steps_and_what_is_beside_them(compiled, tmp_path):
    words = ("--width", "0.02", "--epochs", "6", "--step-ms", "2", "--json", str(tmp_path / "figures.json"))
    command = [sys.executable, "-m", "benchmarks.epoch", *words]
    subprocess.run(command, cwd=ROOT, env=environment(compiled), check=True, capture_output=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["steps"] == 37
    steps = figures["steps"] * figures["step_ms"] / 1e3
    assert figures["epoch_seconds"] >= steps
    assert figures["overhead_share"] == pytest.approx(1 - steps / figures["epoch_seconds"])
    parts = {"input", "transfer", "dispatch of steps", "waiting for the device", "evaluation", "log", "save"}
    assert set(figures["main_thread_ms"]) == parts
    assert all(spent > 0 for spent in figures["main_thread_ms"].values())
