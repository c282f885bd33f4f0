"""Worker processes end with the command that started them."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, time
from data_prep.dataset.workers import workers

if __name__ == "__main__":
    with workers(2, None) as run_all:
        print(*run_all(eval, ["__import__('os').getpid()"] * 8), flush=True)
        time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"  # dead, and only not yet waited for


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends them")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_a_killed_command_do_not_stay(how, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, tmp_path / "program.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        found = {int(word) for word in parent.stdout.readline().split()}
        assert found
        assert all(map(is_running, found))
        parent.send_signal(how)
    until = time.monotonic() + 20
    while any(map(is_running, found)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [process for process in found if is_running(process)]
