"""`make demo`: a real scan in, grades, hotspots and a page out, with the network that ships."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spinejax.training import shipped

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_demo_grades_every_disc_of_its_scan(tmp_path):
    for name in ("Makefile", "evaluate.py", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    # `.venv/installed` counts as made: this environment has all that it would install.
    demo = ["make", "--old-file=.venv/installed", f"BIN={sys.prefix}/bin", "demo"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ended = subprocess.run(demo, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "The page is runs/demo/report/index.html." in ended.stdout
    out = tmp_path / "runs" / "demo" / "evaluation"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["level"] for row in rows] == ["T11-T12", "T12-L1", "L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1"]
    network = json.loads((out / "results.json").read_text())["network"]
    assert network["weights"] == shipped.about()["sha256"]
    tasks = shipped.about()["record"]["tasks"]
    assert len(list((out / "hotspots" / "nifti").iterdir())) == len(rows) * len(tasks)
    page = (tmp_path / "runs" / "demo" / "report" / "index.html").read_text()
    assert f"maps-{len(rows) - 1}" in page
    assert "Research use only" in page
