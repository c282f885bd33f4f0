import os
import re
import subprocess
import sys

import pytest

from benchmarks.fuzz_readers import FORMATS
from tests.running import ROOT

CASES = 25  # of each format


@pytest.fixture(scope="module")
def printed():
    """What the benchmark prints, with warnings as errors, as in all tests."""
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    cases = ["--cases", str(CASES * len(FORMATS)), "--seed", "7"]
    command = [sys.executable, "-m", "benchmarks.fuzz_readers", *cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_give_a_scan_or_our_own_error(printed, name):
    """A few of the cases of `benchmarks/fuzz_readers.py`, in a child process."""
    counts = re.search(rf"^{re.escape(name)} +scan +(\d+) told +(\d+) FAULT +0$", printed, re.MULTILINE)
    assert counts, printed
    scans, told = map(int, counts.groups())
    assert scans + told == CASES
    assert told
