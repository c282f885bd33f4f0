"""Every benchmark starts the same way, and says in one line which library it lacks."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from spinejax.errors import NotInstalledError

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """Each benchmark is loaded anew; `pod` sets variables of libtpu, which other tests must not see."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [*NAMES, "torch_twin"]:
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)


def ended(name, capsys, monkeypatch, *options):
    """What `python -m benchmarks.NAME` prints and its exit status."""
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *options])
    with pytest.raises(SystemExit) as ending:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return capsys.readouterr(), ending.value.code


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_shows_its_help(name, capsys, monkeypatch):
    printed, status = ended(name, capsys, monkeypatch, "--help")
    if status == 2:  # the libraries that it compares with are not installed
        assert "needs torch" in printed.err
    else:
        assert printed.out.startswith(f"usage: python -m benchmarks.{name} ")
        assert not status


@pytest.mark.parametrize(("name", "options"), [("peers", ["--help"]), ("input", ["--data", "nowhere"])])
def test_a_missing_library_is_one_line(name, options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    printed, status = ended(name, capsys, monkeypatch, *options)
    assert printed.err == f"error: {NotInstalledError('This benchmark needs torch', 'bench')}\n"
    assert status == 2


def test_no_benchmark_starts_itself_as_a_file():
    assert not [path.name for path in FOLDER.glob("*.py") if "sys.executable, __file__" in path.read_text()]
