"""`examples/tour.ipynb`: it runs from its first cell to its last, and lies in git without outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_has_no_outputs_and_no_trace_of_a_machine():
    assert cells(NOTEBOOK)
    for cell in cells(NOTEBOOK):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert set(json.loads(NOTEBOOK.read_text())["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.slow
def test_it_grades_explains_views_and_learns(tmp_path):
    pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    executed = tmp_path / "executed.ipynb"
    ours = ("XLA_FLAGS", "MPLBACKEND", "PYTEST_CURRENT_TEST")  # a user's environment has none of them
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", EXECUTE, NOTEBOOK, NOTEBOOK.parent, executed]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    outputs = [output for cell in cells(executed) for output in cell["outputs"]]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert re.findall(r"^([TL]\d+-[LTS]\d+) +[1-5] \d+% ±\d+%", printed, re.MULTILINE) == [
        "T11-T12", "T12-L1", "L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1",
    ]  # fmt: skip
    assert "discs: 30 discs (train 18, validation 6, test 6) of 5 scans" in printed  # three patients to learn from
    assert re.search(r"^narrowing +\d of 6 test discs right", printed, re.MULTILINE)
    assert "\x1b" not in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
