"""How a command ends: what the user can fix is one line and status 2, and only our own faults show a traceback."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from spinejax.errors import NotInstalledError, SpinejaxError, status_of

ROOT = Path(__file__).parents[1]


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 2, 2, ""),
        (raising(SpinejaxError("shard.h5: truncated.")), 2, "error: shard.h5: truncated.\n"),
        (raising(OSError(28, "No space left on device", "out/x")), 2, "error: out/x: No space left on device\n"),
        (lambda: Path("README.md/x").read_text(), 2, "error: README.md/x: Not a directory\n"),
        (raising(KeyboardInterrupt()), 130, "Interrupted. No file is half-written.\n"),
    ],
)
def test_status_and_message(command, status, said, capsys):
    assert status_of(command) == status
    assert capsys.readouterr().err == said


def test_a_missing_library_has_the_same_message_from_a_worker():
    error = NotInstalledError("Reading NIfTI files needs nibabel", "scans")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "`pip install -e '.[scans]'`" in str(error)


@pytest.mark.parametrize("command", [["train.py"], ["evaluate.py"], ["-m", "data_prep"]], ids=" ".join)
def test_a_python_without_any_library_says_how_to_get_them(command):
    """So a newcomer meets it who has not activated the environment of `make demo`. -S hides what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare = [sys.executable, "-S", *command]
    ended = subprocess.run(bare, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: No module named ")
    assert "`. .venv/bin/activate`" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_our_own_faults_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        status_of(lambda: 1 // 0)


def test_text_that_the_output_cannot_encode_is_replaced(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert status_of(lambda: print("112 \u00d7 224")) == 0  # noqa: T201
    assert written.getvalue() == b"112 ? 224\n"
