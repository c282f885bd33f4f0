"""From jobs to a data set: each scan is cut into discs, and each process owns whole shards.

Which patient goes to which shard depends on the patients alone, so the bytes do not depend on the number of processes.
No process holds more than one scan at a time. A run that was interrupted goes on with the shards it had not finished.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import spinejax
from data_prep import resume
from data_prep.discs import DiscVolume
from data_prep.executors import run_all
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
        sources: the files that `cut` reads.
        recipe: whatever else the discs depend on. With the contents of `sources` it tells whether a shard that an
            interrupted run left is still up to date.
    """

    name: str
    patient: str
    scan: str
    split: str
    labels: Mapping[str, Mapping[str, int]]
    cut: Callable[[], tuple[list[DiscVolume], list[str]]]
    sources: tuple[Path, ...] = ()
    recipe: str = ""


@dataclass
class Outcome:
    """What a run did: discs by split, scans that failed and why, what was left out of the others, and how many shards
    an interrupted run had finished already (its notes were told then).
    """

    discs: Counter = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    resumed: int = 0


def build(
    jobs: Sequence[Job],
    out: Path,
    *,
    tasks: Sequence[Task],
    masks: Sequence[str] = (),
    preprocessing: dict,
    num_shards: int = 8,
    num_workers: int = 1,
    scheduler: str | None = None,
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
        scheduler: address of a Dask scheduler, whose workers see the same files; goes before `num_workers`.
        overwrite: replace a data set that is there already.
        strict: stop at the first scan that fails.
        console: where progress goes.

    Returns:
        What was done. A scan that failed is named there and the others are written all the same.

    Raises:
        SpinejaxError: `out` holds a data set already, or another run writes there; an option is out of range; a shard
            cannot be written; no disc came out at all; with `strict`, the first scan's failure.
    """
    if num_shards < 1 or num_workers < 1:
        raise SpinejaxError(f"--shards {num_shards}, --workers {num_workers}: expected 1 or more of each.")
    if out.exists() and not out.is_dir():
        raise SpinejaxError(f"--out {out}: is a file; expected a folder.")
    if overwrite and (out / MANIFEST).exists():
        # The old set stays whole until the new one is: a run that fails must not take the old with it.
        new = resume.beside(out)
        settings: dict[str, Any] = {
            "tasks": tasks,
            "masks": masks,
            "preprocessing": preprocessing,
            "num_shards": num_shards,
        }
        settings |= {"num_workers": num_workers, "scheduler": scheduler, "strict": strict, "console": console}
        outcome = build(jobs, new, overwrite=True, **settings)
        resume.replace(out, new)
        return outcome
    out.mkdir(parents=True, exist_ok=True)
    shards = _deal(jobs, num_shards)
    made = repr((list(tasks), list(masks), preprocessing))
    plan = resume.digest(made, [[(job.patient, job.scan, job.split) for job in shard] for shard in shards])
    with resume.only_writer(out):
        resume.begin(out, plan, overwrite=overwrite)
        work = partial(_build_shard, made=made, tasks=tasks, masks=masks, strict=strict)
        outcome, summaries = Outcome(), []
        paths = [out / shard_name(index, len(shards)) for index in range(len(shards))]
        results = run_all(work, paths, shards, num_workers=num_workers, scheduler=scheduler)
        for summary, part in _with_progress(results, shards, console):
            if not (out / summary.file).is_file():
                raise SpinejaxError(
                    f"--out {out}: workers wrote {summary.file} elsewhere. Give a folder that all share."
                )
            summaries.append(summary)
            outcome.failures |= part.failures
            outcome.notes += part.notes
            outcome.resumed += part.resumed
        outcome.discs = sum((summary.discs for summary in summaries), Counter())
        try:
            write_manifest(out, summaries, tasks, preprocessing, masks)
        except SpinejaxError as error:
            for path in paths:  # no disc at all, or one that must not be there: nothing to go on from
                path.unlink(missing_ok=True)
            resume.end(out)
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in outcome.failures.items())
            raise SpinejaxError(f"{error}{reasons}") from error
        resume.end(out)
    return outcome


def _with_progress(results: Iterator, shards: Sequence[list[Job]], console: Console) -> Iterator:
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scans", total=sum(map(len, shards)))
        for (summary, part), shard in zip(results, shards, strict=True):
            yield summary, part
            progress.advance(bar, len(shard))
            if not console.is_terminal:
                console.print(f"{summary.file}: {summary.num_discs} discs of {len(shard)} scans", highlight=False)


def _deal(jobs: Sequence[Job], num_shards: int) -> list[list[Job]]:
    """Patients, sorted, dealt round to the shards like cards; a patient's scans stay together."""
    by_patient = itertools.groupby(sorted(jobs, key=lambda job: (job.patient, job.scan)), key=lambda job: job.patient)
    hands = [list(scans) for _, scans in by_patient]
    num_shards = max(1, min(num_shards, len(hands)))
    return [list(itertools.chain.from_iterable(hands[index::num_shards])) for index in range(num_shards)]


def _build_shard(
    path: Path, jobs: list[Job], *, made: str, tasks: Sequence[Task], masks: Sequence[str], strict: bool
) -> tuple[ShardSummary, Outcome]:
    sources = _sources(jobs, made)
    if summary := resume.finished(path, sources):
        return summary, Outcome(resumed=1)
    outcome = Outcome()
    try:
        summary = write_shard(path, _discs(jobs, outcome, strict), tasks, masks)
        if not outcome.failures:  # a scan that failed is tried again by the next run
            resume.note_finished(path, sources, summary)
    except OSError as error:
        raise SpinejaxError(
            f"{path}: cannot be written ({error.strerror or error}). Is the disk full? Make room and run the same "
            "command again: it goes on where it stopped."
        ) from error
    return summary, outcome


def _sources(jobs: list[Job], made: str) -> str:
    """A digest of all that a shard's bytes depend on."""
    told = [
        (job.patient, job.scan, job.split, sorted((k, sorted(v.items())) for k, v in job.labels.items()))
        for job in jobs
    ]
    return resume.digest(spinejax.__version__, made, told, *itertools.chain.from_iterable(_parts(job) for job in jobs))


def _parts(job: Job) -> list:
    # A file that cannot be read is told by the job itself, when its turn comes.
    return [job.recipe, *(path if os.access(path, os.R_OK) else "unreadable" for path in job.sources)]


def _discs(jobs: Iterable[Job], outcome: Outcome, strict: bool) -> Iterator[Disc]:
    for job in jobs:
        try:
            volumes, notes = _cut(job)
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


def _cut(job: Job) -> tuple[list[DiscVolume], list[str]]:
    try:
        return job.cut()
    except OSError as error:
        raise SpinejaxError(f"{job.name}: cannot be read ({error}).") from error
    except MemoryError as error:
        raise SpinejaxError(f"{job.name}: does not fit into memory. Run with fewer --workers.") from error
