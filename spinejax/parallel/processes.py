"""One run on many processes: how they find each other, agree, stop together, and notice that one of them is gone.

Every process runs the same program on its own devices. Only the first one reads and writes the run's folder, and sends
the others what it found there, or that it failed. `jax.distributed` is used here alone.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spinejax.errors import SpinejaxError, message_of, status_of
from spinejax.parallel.devices import all_devices

T = TypeVar("T")

HEARTBEAT_SECONDS = 20
"""Seconds without a message after which a process counts as dead, and the others end."""

_COLLECTIVE = re.compile("Gloo|NCCL|coordination")
_LOST = re.compile(  # local faults, such as too little memory or a small /dev/shm, say none of these
    r"by peer|broken pipe|connection refused|timed? ?out|deadline|heartbeat|remote process|failed to send rpc"
    r"|tasks? .*(crashed|died|unhealthy|disconnected|preempted)|(has stopped|shut(ting)? down)",
    re.IGNORECASE,
)


@contextlib.contextmanager
def started(distributed: bool, *, start_seconds: int = 300) -> Iterator[None]:
    """Join the other processes while the block runs. Call it before anything asks for a device.

    JAX finds the other processes under SLURM, Open MPI, GKE and Cloud TPU; anywhere else set the
    variables `JAX_COORDINATOR_ADDRESS` (host:port of the first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    If the block raises, this process ends at once, without JAX's shutdown: the others wait for it in a collective
    operation, and only its end tells them.

    Args:
        distributed: if not, nothing is done, and this process is alone.
        start_seconds: how long to wait for the others.

    Raises:
        SpinejaxError: the other processes cannot be found from the environment, or JAX lacks the platform.
    """
    if not distributed:
        all_devices()
        yield
        return
    try:
        _join(start_seconds)
        all_devices()
        yield
    except BaseException as error:
        status = _status(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    jax.distributed.shutdown()


def _join(start_seconds: int) -> None:
    # Our own timer: at its timeout JAX ends the process with a stack trace that does not mention the network.
    clock = threading.Timer(start_seconds, _end_waiting, [start_seconds])
    clock.daemon = True
    clock.start()
    given = os.environ
    try:
        jax.distributed.initialize(
            num_processes=int(given["JAX_NUM_PROCESSES"]) if "JAX_NUM_PROCESSES" in given else None,
            process_id=int(given["JAX_PROCESS_ID"]) if "JAX_PROCESS_ID" in given else None,
            initialization_timeout=2 * start_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise SpinejaxError(
            f"Option --distributed: the environment does not say who takes part ({error}). Start it with srun, mpirun, "
            "on GKE or Cloud TPU; or set JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID."
        ) from error
    finally:
        clock.cancel()


def _end_waiting(seconds: int) -> None:
    where = os.environ.get("JAX_COORDINATOR_ADDRESS", "the address that the environment names")
    sys.stderr.write(
        f"error: --distributed: not all processes met within {seconds} seconds. Each must be running, and reach the "
        f"first one at {where}: check host name, port and firewalls; or give them longer with --start-seconds.\n"
    )
    sys.stderr.flush()
    os._exit(2)


def _translated(error: BaseException) -> BaseException:
    """A collective operation's error that a lost process caused, as a plain message; any other error unchanged."""
    text = str(error)
    if not isinstance(error, (ValueError, RuntimeError)) or not _COLLECTIVE.search(text) or not _LOST.search(text):
        return error
    return SpinejaxError(
        "Another process of this run ended, or cannot be reached any more; its own messages say why. What was saved "
        f"is kept: start all processes again to go on. ({text.splitlines()[0][:160]})"
    )


def _status(error: BaseException) -> int:
    """Report what went wrong, and give the exit status."""

    def again() -> None:
        raise _translated(error)

    try:
        return status_of(again)
    except Exception as fault:
        traceback.print_exception(fault)
        return 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def by_first(make: Callable[[], Any]) -> Any:
    """Call a function on the first process alone, and return its result, which JSON can hold, on every process.

    Raises:
        SpinejaxError: raised there. The other processes raise it with the same message, so each one's log has it.
    """
    if jax.process_count() == 1:
        return make()
    outcome, fault = _tried(make) if is_first() else (None, None)
    message = message_of(fault) if fault else None
    message, outcome = json.loads(_sent(json.dumps([message, outcome], allow_nan=False), is_source=is_first()))
    if message is not None:
        raise fault or SpinejaxError(message)
    return outcome


def by_each(make: Callable[[], T]) -> T:
    """Call a function on every process, each of which has its own files or its own way to a store.

    Raises:
        SpinejaxError: raised on any process: on every one, with that process's number if it was raised elsewhere.
    """
    outcome, fault = _tried(make)
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.bool_(fault is not None)))
        if len(failed):
            message = _sent(message_of(fault) if fault else "", is_source=jax.process_index() == failed[0])
            fault = fault or SpinejaxError(f"Process {failed[0]}: {message}")
    if fault:
        raise fault
    return outcome


def _tried(make: Callable[[], Any]) -> tuple[Any, SpinejaxError | OSError | None]:
    try:
        return make(), None
    except (SpinejaxError, OSError) as error:
        return None, error


def _sent(text: str, *, is_source: bool) -> str:
    """The text of the one process that is the source, on every process."""
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content)), is_source=is_source))
    buffer = content if is_source else np.zeros(length, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer, is_source=is_source)).decode()


@contextlib.contextmanager
def held_by_first(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """Enter a context on the first process alone. All go on once it has entered it, and end once it has left it.

    Raises:
        SpinejaxError: raised there, on entering or leaving it: on every process.
    """
    with contextlib.ExitStack() as held:
        by_first(lambda: held.enter_context(context))
        yield
        by_first(held.close)


def only_first(tell: Callable[[str], None]) -> Callable[[str], None]:
    """What tells the user something on the first process, and nothing on the others."""
    return tell if is_first() else lambda line: None


def all_agree(value: bool) -> bool:
    """Whether it is true on every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.bool_(value)).all())


def from_first(tree, like):
    """The first process's tree of arrays, on every process; `like` has its structure, shapes and dtypes, in numpy."""
    if jax.process_count() == 1:
        return tree
    # Leaf by leaf, so that no device holds more than one of them.
    given = jax.tree.leaves(tree) if is_first() else jax.tree.leaves(like)
    received = [multihost_utils.broadcast_one_to_all(leaf) for leaf in given]
    return jax.tree.unflatten(jax.tree.structure(like), received)


def refuse_difference(what: str, value: str) -> None:
    """Raises SpinejaxError on a process whose value is not the first one's: a stale copy of the data, other options."""
    expected = by_first(lambda: value)
    if value != expected:
        raise SpinejaxError(
            f"Process {jax.process_index()} has other {what} than the first process: {value}, not {expected}. "
            "Every process needs the same command, and the same data set."
        )


def end_on_sigterm() -> None:
    """Let SIGTERM end this process, as without others: JAX catches it, for `stop_notices` to ask for."""
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def stop_notices() -> Iterator[Callable[[int], bool]]:
    """Catch SIGTERM, which schedulers send ahead of a preemption, and give a function that says whether it came.

    Every process calls the function before each step, with the number of steps taken. All get True at the same step,
    whichever of them received the signal.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # JAX has caught SIGTERM
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python gives signals to the main thread alone
        return
    noticed = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
