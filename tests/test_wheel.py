"""The wheel is whole: built from the source archive, installed elsewhere, it does all that a checkout does."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, cwd, status=0):
    """The standard output of a command that sees nothing of the checkout, and the standard error."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    ended = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive, which so is whole too."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs of a fresh environment that has the wheel and its core dependencies, in the versions tested here."""
    folder = tmp_path_factory.mktemp("installed")
    versions = {each.name: each.version for each in importlib.metadata.distributions() if each.name != "spinejax"}
    (folder / "versions.txt").write_text("\n".join(f"{name}=={version}" for name, version in versions.items()))
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    install(folder / "venv" / "bin", wheel)
    return folder / "venv" / "bin"


def install(programs, what):
    versions = programs.parents[1] / "versions.txt"
    run(programs / "pip", "install", "--quiet", "--no-compile", "--constraint", versions, what, cwd=programs)


def test_a_wheel_prepares_trains_grades_and_reports(wheel, installed, tmp_path):
    run(installed / "spinejax-prep", "phantom", "--patients", 10, "--out", "discs", cwd=tmp_path)
    small = ("--width", 0.02, "--batch-size", 8, "--epochs", 1)
    train = (installed / "spinejax-train", "quickstart", "--data", "discs", "--workdir", "run", *small)
    assert "run is finished" in run(*train, cwd=tmp_path)

    evaluate = (installed / "spinejax-evaluate", "--checkpoint", "run", "--data", "discs", "--tta")
    missing = run(*evaluate, "--report", "page", cwd=tmp_path, status=2)
    assert missing == "error: Option --report needs Jinja2. Run `pip install 'spinejax[report]'`.\n"
    install(installed, f"{wheel}[report]")
    run(*evaluate, "--hotspots", "--hotspot.num-views", 2, "--report", "page", cwd=tmp_path)
    assert {"results.json", "predictions.csv", "hotspots"} <= {
        path.name for path in (tmp_path / "run" / "evaluation-test-54-views").iterdir()
    }
    assert "Pfirrmann" in (tmp_path / "page" / "index.html").read_text()

    code = (
        "import importlib.util, pathlib, spinejax\n"
        "assert spinejax.load()[0].tasks\n"
        "model, variables = spinejax.load('run')\n"
        "print(len(model.apply(variables, __import__('numpy').zeros((1, 112, 224, 9), 'float32'))))\n"
        "assert (pathlib.Path(spinejax.__file__).parent / 'py.typed').is_file()\n"
        "assert pathlib.Path(spinejax.__file__).is_relative_to(__import__('sys').prefix)\n"
        "assert not any(map(importlib.util.find_spec, ('tests', 'benchmarks', 'train', 'evaluate')))\n"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "6\n"


@pytest.mark.parametrize(
    ("script", "here"),
    [("spinejax-train", "train.py"), ("spinejax-evaluate", "evaluate.py"), ("spinejax-prep", "-m data_prep")],
)
def test_both_ways_to_start_a_command_give_the_same_help(script, here, installed):
    name = "python -m data_prep" if here == "-m data_prep" else here
    assert f"usage: {script} " in (of_wheel := run(installed / script, "--help", cwd=installed))
    of_checkout = run(sys.executable, *here.split(), "--help", cwd=ROOT)
    assert of_wheel.replace(script, name).split() == of_checkout.split()
