"""Starting `train.py` and `evaluate.py` as their users do, as one process or as several that work together."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.traverse_util

from spinejax.training import saved_step
from spinejax.training.log import read_log

ROOT = Path(__file__).parent.parent
START_SECONDS = 600  # until a process has imported everything, on a machine with other things to do
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""For several processes, of which each compiles what it runs."""
SMALL = ("--width", "0.02", "--batch-size", "8", "--eval-epochs", "1", "--save-minutes", "0")


def train_command(data, run, *options):
    """Training of a tiny network on the tiny data set: an epoch is three steps, and each is saved."""
    return ["train.py", "quickstart", "--data", str(data), "--workdir", str(run), *SMALL, *options]


def environment(cache):
    """One device a process, and a folder that keeps what they compile."""
    fixed = {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | fixed | {"PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def free_address():
    """An address of this machine that is for the block alone: it is held, and shared with a gRPC server of this user's.

    Nobody answers there until there is one.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def read_line(pipe, seconds=START_SECONDS):
    """The next line of a process that writes one at a time. Raises AssertionError if the time is up."""
    assert select.select([pipe], [], [], seconds)[0], f"nothing was said in {seconds} seconds"
    return pipe.readline()


class Launcher:
    """Starts commands as forks of a process that has imported everything (`tests.forking`).

    Their output is kept in `folder`, and what they compile in `compiled`.
    """

    def __init__(self, folder, compiled):
        self._folder, self._number = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forking"],
            cwd=ROOT,
            env=environment(compiled),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, command, *, limit=None, folder=ROOT, **env):
        """Start a command in a folder; `limit` bytes is how large its files may grow."""
        self._number += 1
        out = self._folder / f"out-{self._number}"
        order = {"command": [str(word) for word in command], "env": env, "out": str(out), "limit": limit}
        order["folder"] = str(folder)
        return Started(self, self.ask(order), out)

    def run(self, command, **options):
        """Start a command and wait for its end."""
        return self.start(command, **options).end()

    @contextlib.contextmanager
    def together(self, *commands, folders=None, **env):
        """Start one process a command, as processes 0, 1, … of one run, each in its folder. None outlives the block."""
        with free_address() as address:
            shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
            shared |= {"XLA_FLAGS": QUICKLY, **env}
            started = [
                self.start([*command, "--distributed"], folder=folder, JAX_PROCESS_ID=str(place), **shared)
                for place, (command, folder) in enumerate(zip(commands, folders or [ROOT] * len(commands), strict=True))
            ]
            try:
                yield started
            finally:
                for process in started:
                    process.kill()

    def ask(self, order):
        """Give an order, and its answer."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        try:
            return json.loads(read_line(self._process.stdout, order.get("seconds", 0) + START_SECONDS))
        except AssertionError:
            self._process.kill()
            raise

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@dataclasses.dataclass
class Ended:
    """How a process ended: its exit status, or minus the signal; what it wrote, and of that what was its own."""

    status: int
    stdout: str
    stderr: str

    @property
    def printed(self):
        """Lines on the standard output, without Gloo's greeting."""
        return [line for line in self.stdout.splitlines() if not line.startswith("[Gloo]")]

    @property
    def said(self):
        """Lines on the standard error, without the libraries' log."""
        return [line for line in self.stderr.splitlines() if line and not re.match(r"[IWEF]\d{4} ", line)]


class Started:
    """A process that a launcher started."""

    def __init__(self, launcher, pid, out):
        self._launcher, self.pid, self._out, self._status = launcher, pid, out, None

    def is_running(self):
        if self._status is None:
            self._status = self._launcher.ask({"wait": self.pid, "seconds": 0.001})
        return self._status is None

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self._status is None:  # its end was not asked for, so its id is still its own
            self.send(signal.SIGKILL)
        return self.end()

    def errors(self):
        """What it has written to its standard error."""
        return Path(f"{self._out}.err").read_text()

    def end(self, seconds=900):
        """Wait for its end; a process that takes longer is killed, and that is its status."""
        if self._status is None:
            self._status = self._launcher.ask({"wait": self.pid, "seconds": seconds})
        if self._status is None:
            self.send(signal.SIGKILL)
            self._status = self._launcher.ask({"wait": self.pid, "seconds": 60})
        return Ended(self._status, self._out.read_text(), self.errors())

    def wait_until(self, condition, seconds=900):
        """Wait until something is so. Raises AssertionError if the process ended before, or the time is up."""
        deadline = time.monotonic() + seconds
        checked = 0.0
        while not condition():
            now = time.monotonic()
            if now - checked > 0.5:
                assert self.is_running(), self.end()
                checked = now
            assert now < deadline
            time.sleep(0.001)


def figures(run):
    """The log without what a clock decides; empty before there is one."""
    clock = ("discs_per_second", "waiting_for_data")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in read_log(Path(run) / "log.jsonl")]


def digests(run, step):
    """Path of each array in a saved step → its sha256."""
    _, items = saved_step.read(Path(run) / "checkpoints" / str(step), "variables", "optimiser")
    arrays = flax.traverse_util.flatten_dict(items, sep="/")
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
