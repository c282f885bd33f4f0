"""Who does the work: this process, other processes of this machine, or a Dask cluster; one interface for all."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from spinejax.errors import NotInstalledError, SpinejaxError

_CONNECT_SECONDS = 10
_LOOK_SECONDS = 10  # how often it is looked whether a result can still come
_WORKERLESS_SECONDS = 300  # nannies restart workers in seconds, batch systems in minutes


def run_all(work: Callable, *arguments: Sequence, num_workers: int, scheduler: str | None) -> Iterator:
    """`map(work, *arguments)`, its results in order, wherever the work is done.

    Args:
        work: picklable.
        arguments: of equal lengths.
        num_workers: processes of this machine; 1 works in this one.
        scheduler: address of a Dask scheduler, which goes before `num_workers`.

    Raises:
        SpinejaxError: the cluster cannot be reached, or has no workers for five minutes; a worker died; whatever
            `work` raises.
    """
    if scheduler is None and num_workers == 1:
        yield from map(work, *arguments)
        return
    with _submitting(min(num_workers, max(len(arguments[0]), 1)), scheduler) as (submit, result):
        futures = [submit(work, *each) for each in zip(*arguments, strict=True)]
        try:
            for future in futures:
                yield result(future)
        except _lost_workers(scheduler) as error:
            raise SpinejaxError(
                "A worker process died, perhaps for want of memory. Run the same command again with fewer --workers: "
                "it goes on where it stopped."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _lost_workers(scheduler: str | None) -> tuple[type[Exception], ...]:
    """What is raised when a process is gone; of Dask, once a task has taken several with it, or the scheduler is."""
    if scheduler is None:
        return (BrokenProcessPool,)
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    return KilledWorker, CancelledError, CommClosedError


@contextlib.contextmanager
def _submitting(num_workers: int, scheduler: str | None) -> Iterator[tuple[Callable, Callable]]:
    """`submit(work, *arguments)` of an executor, which gives a future, and `result(future)`."""
    if scheduler is None:
        # Processes are spawned, not forked: a fork would copy HDF5's and numpy's threads in whatever state they are.
        with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool.submit, Future.result
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise NotInstalledError("--scheduler needs Dask", "cluster") from error
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise SpinejaxError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error}).") from error
    with client:
        # Not `client.get_executor()`: its futures never end if a result is lost with its worker.
        yield partial(client.submit, pure=False), partial(_dask_result, client)


def _dask_result(client, future):
    """A Dask future's result, waited for as long as there is somebody to make it.

    Dask itself computes again what was lost with a worker; but it waits for ever if no worker is left.

    Raises:
        SpinejaxError: there has been no worker for `_WORKERLESS_SECONDS`.
    """
    last_seen = time.monotonic()
    while True:
        try:
            return future.result(timeout=_LOOK_SECONDS)
        except TimeoutError:
            if future.status == "error":  # the work's own; or it failed just after the waiting had ended
                return future.result()
            if client.nthreads():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > _WORKERLESS_SECONDS:
                raise SpinejaxError(
                    f"The Dask cluster has had no worker for {_WORKERLESS_SECONDS} s. Start workers, and run the same "
                    "command again: it goes on where it stopped."
                ) from None
