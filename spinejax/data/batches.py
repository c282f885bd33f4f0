"""From shards to batches: which discs a step sees is a function of (seed, step) alone.

Training order is an endless sequence of reshuffled passes over the split, cut into global batches; each host reads its
own part of every batch. So the discs of a batch and their order do not depend on hosts, workers or restarts.
Evaluation order is the split's own, padded to whole batches with discs marked as not valid, so that every host takes
the same number of steps.
"""

import contextlib
import ctypes
import functools
import math
import os
import signal
from collections.abc import Callable, Generator, Sequence

import absl.flags
import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.tasks import UNLABELLED, Task

Batch = dict[str, np.ndarray]
"""volume uint16[B, 192, 320, 15], labels int32[B, T], source int32[B] (as in `DataSet`), row int32[B] (index in the
data set), valid bool[B]."""

NUM_BATCHES_AHEAD = 2  # read at once, so that threads that are done with one have another
MAX_THREADS = 16  # by default; together they reach what a memory or a local disk gives
_PADDING = -1
_ENDLESS = 2**62  # steps


def num_steps(num_discs: int, batch_size: int) -> int:
    """Steps in an epoch of training: whole batches, at least one."""
    return max(1, num_discs // batch_size)


def refuse_unlabelled(data: DataSet, chosen: Sequence[Task], splits: Sequence[str]) -> None:
    """Raises SpinejaxError if a split has no label for a task, which then cannot be learned or validated."""
    for split in splits:
        labels = data.labels[data.rows(split)]
        for task in chosen:
            if (labels[:, data.tasks.index(task)] == UNLABELLED).all():
                raise SpinejaxError(
                    f"{data.folder}: no disc of split {split!r} has a label for {task.name}. Leave it out with --tasks."
                )


def train_batches(
    data: DataSet,
    columns: list[int],
    *,
    batch_size: int,
    seed: int,
    step: int = 0,
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
    read_threads: int = 0,
    volumes: bool = True,
) -> Generator[Batch]:
    """This host's part of every global batch of training discs from `step` on, without end.

    Args:
        columns: the columns of the task table that become `labels`, in this order.
        batch_size: discs in a global batch.
        step: the first batch to give. To resume a run takes no other state.
        workers: processes that read ahead; 0 reads in threads of this one.
        read_threads: threads that read a batch's discs together; 0 takes one for each core, at most 16.
        volumes: if false, batches lack `volume`, as `device_cache` needs them.

    Raises:
        SpinejaxError: there is no training disc, or the batch does not divide by the hosts.
    """
    rows = data.rows("train")
    order = grain.MapDataset.range(_ENDLESS).map(functools.partial(_positions, len(rows), batch_size, seed))
    read = _reader(data, rows, columns, host, num_hosts, batch_size, volumes, read_threads)
    return _read(order.map(read)[step:], workers)


def eval_batches(
    data: DataSet,
    rows: Int[np.ndarray, "M"],
    columns: list[int],
    *,
    batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    read_threads: int = 0,
    volumes: bool = True,
) -> Generator[Batch]:
    """This host's part of the given rows in order, each once, padded with discs that are not `valid`.

    The other arguments are those of `train_batches`.
    """
    padded = _padded(rows, batch_size)
    order = grain.MapDataset.range(len(padded)).batch(batch_size)
    read = _reader(data, padded, columns, host, num_hosts, batch_size, volumes, read_threads)
    return _read(order.map(read), workers=0)


def eval_rows(
    rows: Int[np.ndarray, "M"], *, batch_size: int, host: int = 0, num_hosts: int = 1
) -> Int[np.ndarray, "L"]:
    """The rows that `eval_batches` reads on this host."""
    batches = _padded(rows, batch_size).reshape(-1, batch_size)
    return np.unique(_stored(batches[:, _part(batch_size, host, num_hosts)]))


def _padded(rows: Int[np.ndarray, "M"], batch_size: int) -> Int[np.ndarray, "P"]:
    padded = np.full(math.ceil(len(rows) / batch_size) * batch_size, _PADDING)
    padded[: len(rows)] = rows
    return padded


def _stored(rows: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Padding repeats the data set's first disc, so that the network sees a real one."""
    return np.where(rows == _PADDING, 0, rows)


def _part(batch_size: int, host: int, num_hosts: int) -> slice:
    """A host's part of a global batch. Raises SpinejaxError if the batch does not divide by the hosts."""
    if batch_size % num_hosts:
        raise SpinejaxError(f"Batch size {batch_size}: expected a multiple of the {num_hosts} hosts.")
    share = batch_size // num_hosts
    return slice(host * share, (host + 1) * share)


def _positions(num_discs: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Positions in the split of a step's discs: those of Grain's `range(num_discs).shuffle(seed).repeat().batch(…)`.

    Its own classes take some 10 µs a disc, and Python's lock, which the training loop needs as well.
    """
    places = (divmod(place, num_discs) for place in range(step * batch_size, (step + 1) * batch_size))
    last, rounds = num_discs - 1, 4
    shuffled = [index_shuffle(place, last, (seed + number) % 2**32, rounds) for number, place in places]
    return np.array(shuffled)


def _reader(
    data: DataSet,
    rows: np.ndarray,
    columns: list[int],
    host: int,
    num_hosts: int,
    batch_size: int,
    volumes: bool,
    read_threads: int,
) -> Callable[[np.ndarray], Batch]:
    """Reads a host's part of a global batch: positions in `rows` → the discs there."""
    threads = read_threads or min(MAX_THREADS, os.cpu_count() or 1)
    return functools.partial(_discs, data, rows, columns, _part(batch_size, host, num_hosts), volumes, threads)


def _discs(
    data: DataSet,
    rows: np.ndarray,
    columns: list[int],
    part: slice,
    volumes: bool,
    threads: int,
    positions: np.ndarray,
) -> Batch:
    rows = rows[positions[part]]
    valid, stored = rows != _PADDING, _stored(rows)
    batch = {"volume": data.volumes(stored, threads=threads)} if volumes else {}
    labels = data.labels[stored][:, columns].astype(np.int32)
    return batch | {"labels": labels, "source": data.source[stored], "row": rows.astype(np.int32), "valid": valid}


def _read(batches: grain.MapDataset, workers: int) -> Generator[Batch]:
    options = grain.ReadOptions(num_threads=NUM_BATCHES_AHEAD, prefetch_buffer_size=NUM_BATCHES_AHEAD)
    ahead = batches.to_iter_dataset(options)
    if workers:
        absl.flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which this program does not parse
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_live_with_parent)
    with contextlib.closing(iter(ahead)) as batches_ahead:  # ends threads and processes with the generator
        yield from batches_ahead


def _live_with_parent(worker: int, num_workers: int) -> None:
    """Let this worker end with the trainer, and not before it.

    Schedulers send SIGTERM, and terminals SIGINT, to all processes of a job, but the trainer still needs batches until
    its next save. Linux ends the worker when the trainer dies, even by SIGKILL; elsewhere it may outlive the trainer.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    try:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux
        return
