"""From jobs to a data set: each scan is cut into discs, and each process owns whole shards.

Which patient goes to which shard depends on the patients alone, so the bytes do not depend on the number of processes.
No process holds more than one scan at a time.
"""

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from data_prep.discs import DiscVolume
from data_prep.scan import NotSagittalError
from spinejax.errors import SpinejaxError
from spinejax.shards import MANIFEST, Disc, ShardSummary, shard_name, write_manifest, write_shard
from spinejax.tasks import Task


@dataclass(frozen=True)
class Job:
    """One scan to be cut into discs.

    Args:
        name: what the run's messages call the scan; it enters no file.
        patient, scan: pseudonyms.
        split: "train", "validation" or "test".
        labels: level → task → label. A level that is missing is unlabelled.
        cut: gives the scan's disc volumes and notes on what was left out; raises SpinejaxError if it cannot. Picklable.
    """

    name: str
    patient: str
    scan: str
    split: str
    labels: Mapping[str, Mapping[str, int]]
    cut: Callable[[], tuple[list[DiscVolume], list[str]]]


@dataclass
class Outcome:
    """What a run did: discs by split, scans that failed and why, and what was left out of the others."""

    discs: Counter = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(
    jobs: Sequence[Job],
    out: Path,
    *,
    tasks: Sequence[Task],
    masks: Sequence[str] = (),
    preprocessing: dict,
    num_shards: int = 8,
    num_workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    console: Console,
) -> Outcome:
    """Cut every job's scan into discs and write them as a data set.

    Args:
        jobs: in any order.
        out: the data set's folder.
        tasks: the task table.
        masks: which of "region" and "lesion" the discs have.
        preprocessing: settings for the manifest, JSON values.
        num_shards: files; no more than there are patients are made.
        num_workers: processes; 1 works in this one.
        overwrite: replace a data set that is there already.
        strict: stop at the first scan that fails.
        console: where progress goes.

    Returns:
        What was done. A scan that failed is named there and the others are written all the same.

    Raises:
        SpinejaxError: `out` holds a data set already; an option is out of range; no disc came out at all; with
            `strict`, the first scan's failure.
    """
    if num_shards < 1 or num_workers < 1:
        raise SpinejaxError(f"--shards {num_shards}, --workers {num_workers}: expected 1 or more of each.")
    _prepare(out, overwrite)
    shards = _deal(jobs, num_shards)
    paths = [out / shard_name(index, len(shards)) for index in range(len(shards))]
    work = partial(_build_shard, tasks=tasks, masks=masks, strict=strict)
    outcome, summaries = Outcome(), []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scans", total=len(jobs))
        for (summary, part), shard in zip(_map(work, paths, shards, num_workers), shards, strict=True):
            summaries.append(summary)
            outcome.failures |= part.failures
            outcome.notes += part.notes
            progress.advance(bar, len(shard))
            if not console.is_terminal:
                console.print(f"{summary.file}: {summary.num_discs} discs of {len(shard)} scans", highlight=False)
    outcome.discs = sum((summary.discs for summary in summaries), Counter())
    try:
        write_manifest(out, summaries, tasks, preprocessing, masks)
    except SpinejaxError as error:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in outcome.failures.items())
        raise SpinejaxError(f"{error}{reasons}") from error
    return outcome


def _prepare(out: Path, overwrite: bool) -> None:
    """Make the folder. An old data set goes manifest first, so that no reader ever finds a mixture of two."""
    if out.exists() and not out.is_dir():
        raise SpinejaxError(f"--out {out}: is a file; expected a folder.")
    out.mkdir(parents=True, exist_ok=True)
    old = [path for path in (out / MANIFEST, *sorted(out.glob("discs-?????-of-?????.h5*"))) if path.exists()]
    if old and not overwrite:
        raise SpinejaxError(f"--out {out}: holds {old[0].name} of another run. Give --overwrite, or another folder.")
    for path in old:
        path.unlink()


def _deal(jobs: Sequence[Job], num_shards: int) -> list[list[Job]]:
    """Patients, sorted, dealt round to the shards like cards; a patient's scans stay together."""
    by_patient = itertools.groupby(sorted(jobs, key=lambda job: (job.patient, job.scan)), key=lambda job: job.patient)
    hands = [list(scans) for _, scans in by_patient]
    num_shards = max(1, min(num_shards, len(hands)))
    return [list(itertools.chain.from_iterable(hands[index::num_shards])) for index in range(num_shards)]


def _map(work: Callable, paths: Sequence[Path], shards: Sequence[list[Job]], num_workers: int) -> Iterator:
    if num_workers == 1:
        yield from map(work, paths, shards)
        return
    # Processes are spawned, not forked: a fork would copy HDF5's and numpy's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(shards)), mp_context=context) as pool:
        yield from pool.map(work, paths, shards)


def _build_shard(
    path: Path, jobs: list[Job], *, tasks: Sequence[Task], masks: Sequence[str], strict: bool
) -> tuple[ShardSummary, Outcome]:
    outcome = Outcome()
    return write_shard(path, _discs(jobs, outcome, strict), tasks, masks), outcome


def _discs(jobs: Iterable[Job], outcome: Outcome, strict: bool) -> Iterator[Disc]:
    for job in jobs:
        try:
            volumes, notes = job.cut()
        except NotSagittalError as error:
            outcome.notes.append(f"left out: {error}")
            continue
        except SpinejaxError as error:
            if strict:
                raise
            outcome.failures[job.name] = str(error)
            continue
        outcome.notes += notes
        not_found = sorted(set(job.labels) - {volume.level for volume in volumes})
        if not_found:
            outcome.notes.append(f"{job.name}: graded, but not found in the scan: {', '.join(not_found)}.")
        for volume in volumes:
            yield Disc(
                volume=volume.volume,
                affine=volume.affine,
                slices=volume.slices,
                labels=dict(job.labels.get(volume.level, {})),
                level=volume.level,
                patient=job.patient,
                scan=job.scan,
                split=job.split,
                region=volume.region,
                lesion=volume.lesion,
            )
