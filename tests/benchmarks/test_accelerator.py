"""The script for an accelerator, in its tiny form on CPUs, where only JAX, Flax, Optax and jaxtyping are installed."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import accelerator
from tests.running import ROOT, environment

ABSENT = ("grain", "tyro", "pydantic", "h5py")
ALONE = f"""
import runpy, sys
sys.modules |= dict.fromkeys({ABSENT})  # importing one of them fails
runpy.run_module("benchmarks.accelerator", run_name="__main__")
"""
ROWS = {
    ("train", 2),
    ("train, views included", 2),
    ("train", 1),
    ("train, views included", 1),
    ("54 views", 1),
    ("hotspots, gradients alone", 1),
    ("hotspots", 1),
    ("views by gather", 2),
    ("views by matrix", 2),
}


def test_the_network_half_needs_nothing_of_files_and_data_sets():
    code = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); import benchmarks.accelerator"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(scope="module")
def found(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerator")
    command = [sys.executable, "-c", ALONE, "--tiny", "--minutes", "600", "--json", str(folder / "found.json")]
    quick = environment(compiled) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compiling takes most of the time
    subprocess.run(command, cwd=ROOT, env=quick, check=True, capture_output=True)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_every_result_is_compared_in_every_precision(found):
    names = {"forward", "loss", "gradients", "views", "54 views", "hotspots"}
    rows = {(row["name"], row["precision"]): row for row in found["agreement"]}
    assert set(rows) == {(name, precision) for name in names for precision in ("float32", "tf32", "bfloat16")}
    assert all(row["agrees"] for row in rows.values())
    assert all(rows[name, "float32"]["off"] == 0 for name in names)  # a CPU against itself
    assert all(rows[name, "bfloat16"]["off"] > 1e-5 for name in names - {"views"})


@pytest.mark.slow
def test_every_part_is_timed(found):
    timed = {(row["name"], row["batch"], row["precision"]): row for row in found["speed"]}
    assert set(timed) == {(*row, "bfloat16") for row in ROWS}
    for (_, batch, _), row in timed.items():
        assert row["discs_per_second"] == pytest.approx(1e3 * batch / row["ms"])
    assert not found["failed"]
    assert not found["left_out"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """What `main` writes, and its exit status, of made-up parts."""

    def main(parts, minutes=6.0):
        monkeypatch.setattr(accelerator, "parts", lambda size: parts)
        path = tmp_path / "found.json"
        status = accelerator.main(argparse.Namespace(tiny=True, minutes=minutes, json=path))
        return json.loads(path.read_text()) if path.exists() else None, status

    return main


def part(kind, *rows):
    return accelerator.Part(kind, f"{kind} of {len(rows)}", "float32", lambda: iter(rows))


def test_a_result_beyond_its_limit_is_an_exit_status(measured):
    agrees, differs = ({"name": "loss", "off": off, "agrees": off < 1} for off in (0.5, 2.0))
    assert measured([part("agreement", agrees)])[1] == 0
    assert measured([part("agreement", agrees, differs)])[1] == 1


def test_a_part_that_fails_is_named_and_the_others_are_measured(measured):
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED")
        yield

    broken = accelerator.Part("speed", "hotspots", "float32", fail)
    found, status = measured([broken, part("speed", {"name": "train", "precision": "tf32", "batch": 4, "ms": 1.0})])
    assert found["failed"] == ["hotspots: RuntimeError: RESOURCE_EXHAUSTED"]
    assert [row["name"] for row in found["speed"]] == ["train"]
    assert status == 1


def test_a_part_for_which_no_time_is_left_is_named(measured, capsys):
    measured([part("speed"), part("speed", {})], minutes=0)
    assert capsys.readouterr().out.splitlines()[1:] == ["left out: speed of 0", "left out: speed of 1"]


def test_the_faster_way_of_pytorch_counts():
    row = {"name": "train", "precision": "bfloat16", "batch": 4}
    theirs = [row | {"ms": 6.0, "way": "eager"}, row | {"ms": 3.0, "way": "compiled"}, row | {"batch": 2, "ms": 1.0}]
    assert accelerator.ratios([row | {"ms": 2.0}, row | {"name": "views", "ms": 1.0}], theirs) == [
        row | {"times_as_fast": 1.5}
    ]


def test_the_difference_is_of_all_numbers_together():
    theirs = {"a": np.float32([3]), "b": np.float32([0, 4])}
    ours = {"a": np.float32([3]), "b": np.float32([0.5, 4])}
    assert float(accelerator.difference(ours, theirs)) == pytest.approx(0.1)
