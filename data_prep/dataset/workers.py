"""Who does the work: this process, other processes of this machine, or a Dask cluster; one interface for all."""

import contextlib
import ctypes
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from spinejax.errors import NotInstalledError, SpinejaxError

_CONNECT_SECONDS = 10
_LOOK_SECONDS = 10  # how often the cluster is asked whether it still has workers
_WORKERLESS_SECONDS = 300  # nannies restart workers in seconds, batch systems in minutes


@contextlib.contextmanager
def workers(num_workers: int, scheduler: str | None) -> Iterator[Callable[..., Iterator]]:
    """Give a function that works like `map`: results come in order, wherever the work is done.

    Args:
        num_workers: number of processes of this machine; 1 works in this one.
        scheduler: address of a Dask scheduler, used instead of `num_workers`.

    Raises:
        SpinejaxError: the cluster cannot be reached, or has no workers for five minutes; a worker died. What the work
            itself raises passes through.
    """
    if scheduler is None and num_workers == 1:
        yield map
    elif scheduler is None:
        # Processes are spawned, not forked: a fork would copy HDF5's and numpy's threads in an unknown state.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_end_with_parent)
        try:
            yield partial(_run, pool.submit, Future.result, (BrokenProcessPool,))
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        with _dask_client(scheduler) as client:
            from distributed import CancelledError, KilledWorker
            from distributed.comm import CommClosedError

            # Not `client.get_executor()`: its futures never end if a result is lost with its worker.
            submit, result = partial(client.submit, pure=False), partial(_dask_result, client)
            yield partial(_run, submit, result, (KilledWorker, CancelledError, CommClosedError))


def _end_with_parent() -> None:
    """Let Linux end this process when its parent is killed. It would stay otherwise, waiting for work, for ever."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _run(submit: Callable, result: Callable, lost: tuple[type[Exception], ...], work: Callable, *arguments: Sequence):
    futures = [submit(work, *each) for each in zip(*arguments, strict=True)]
    try:
        for future in futures:
            yield result(future)
    except lost as error:
        raise SpinejaxError(
            "A worker process died, perhaps because memory ran out. Run the same command again with fewer --workers: "
            "it continues where it stopped."
        ) from error


def _dask_client(scheduler: str):
    try:
        from distributed import Client
    except ImportError as error:
        raise NotInstalledError("--scheduler needs Dask", "cluster") from error
    try:
        return Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise SpinejaxError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error}).") from error


def _dask_result(client, future):
    """The result of a Dask future. Raises SpinejaxError if there is no worker for `_WORKERLESS_SECONDS`.

    Dask computes again what was lost with a worker, but waits forever if no worker is left.
    """
    last_seen = time.monotonic()
    while True:
        try:
            return future.result(timeout=_LOOK_SECONDS)
        except TimeoutError:
            if future.status == "error":  # the work raised TimeoutError, or failed just after the wait had ended
                return future.result()
            if client.nthreads():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > _WORKERLESS_SECONDS:
                raise SpinejaxError(
                    f"The Dask cluster has had no worker for {_WORKERLESS_SECONDS} s. Start workers, and run the same "
                    "command again: it continues where it stopped."
                ) from None
