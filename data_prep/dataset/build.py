"""From jobs to a data set: each scan is cut into discs, and each process owns whole shards.

Which patient goes to which shard depends on the patients alone, so the bytes do not depend on the number of processes.
No process holds more than one scan at a time. A run that was interrupted goes on with the scans it had not finished.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

import spinejax
from data_prep.dataset import resuming
from data_prep.dataset.finished import ScanResult, ShardResult, drop_scans, keep_scan, keep_shard, kept_scan, kept_shard
from data_prep.dataset.job import Job
from data_prep.dataset.workers import run_all
from data_prep.read.scan import NotSagittalError
from spinejax.data.manifest import MANIFEST, write_manifest
from spinejax.data.shards import MASK_DTYPES, SCHEMA_VERSION, Disc, ShardSummary, shard_name, write_shard
from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.tasks import Task


@dataclass
class Outcome:
    """What a run did: discs by split, scans that failed and why, what was left out of the others, and how many scans
    an interrupted run had finished already (they count, and are told of, as all others).
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
        new = resuming.beside(out)
        settings: dict[str, Any] = {
            "tasks": tasks,
            "masks": masks,
            "preprocessing": preprocessing,
            "num_shards": num_shards,
        }
        settings |= {"num_workers": num_workers, "scheduler": scheduler, "strict": strict, "console": console}
        with resuming.only_writer(out):
            outcome = build(jobs, new, overwrite=True, **settings)
            resuming.replace(out, new)
        return outcome
    out.mkdir(parents=True, exist_ok=True)
    shards = _deal(jobs, num_shards)
    made = repr((SCHEMA_VERSION, list(tasks), list(masks), preprocessing))
    plan = resuming.digest(made, [[(job.patient, job.scan, job.split) for job in shard] for shard in shards])
    with resuming.only_writer(out):
        resuming.begin(out, plan, overwrite=overwrite)
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
            resuming.end(out)
            told = [*(f"{name}: {reason}" for name, reason in outcome.failures.items()), *outcome.notes]
            reasons = "".join(f"\n  {line}" for line in told)
            raise SpinejaxError(f"{error}{reasons}") from error
        resuming.end(out)
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
    rest = resuming.rest_of(path.parent)
    done = kept_shard(rest, path)
    if done and done.scans == [_row_digest(job, _cut_digest(job), made) for job in jobs]:
        if strict and done.failures:
            raise SpinejaxError(next(iter(done.failures.values())))
        return done.summary, Outcome(failures=dict(done.failures), notes=list(done.notes), resumed=len(jobs))
    outcome = Outcome()
    cut_digests: list[str | None] = []
    try:
        summary = write_shard(path, _discs(jobs, rest, outcome, cut_digests, strict, masks), tasks, masks)
        for_good = [digest for digest in cut_digests if digest]
        if len(for_good) == len(jobs):
            digests = [_row_digest(job, digest, made) for job, digest in zip(jobs, for_good, strict=True)]
            keep_shard(rest, ShardResult(digests, summary, outcome.notes, outcome.failures))
            drop_scans(rest, for_good)
    except OSError as error:
        raise SpinejaxError(
            f"{path}: cannot be written ({error.strerror or error}). Is the disk full? Make room and run the same "
            "command again: it goes on where it stopped."
        ) from error
    return summary, outcome


def _cut_digest(job: Job) -> str:
    """A digest of all that a scan's discs, and what is said of it, depend on."""
    how = (job.name, job.recipe, job.per_disc, job.refuse_doubtful)
    return resuming.digest(spinejax.__version__, how, *map(str, job.sources), *job.sources)


def _row_digest(job: Job, cut_digest: str, made: str) -> str:
    """A digest of all that a scan's rows in its shard depend on."""
    labels = sorted((level, sorted(of_level.items())) for level, of_level in job.labels.items())
    return resuming.digest(made, cut_digest, job.patient, job.scan, job.split, labels)


def _discs(
    jobs: Iterable[Job], rest: Path, outcome: Outcome, cut_digests: list[str | None], strict: bool, masks: Sequence[str]
) -> Iterator[Disc]:
    """The discs of one scan after the other. `outcome` and `cut_digests` are filled on the way.

    Among scans with masks, one without has empty ones: no pixel of it is known to be of any part.
    """
    unknown = {name: np.zeros(VOLUME_SHAPE, MASK_DTYPES[name]) for name in masks}
    for job in jobs:
        digest = _cut_digest(job)
        result, for_good = kept_scan(rest, digest), True
        if result is not None:
            outcome.resumed += 1
        else:
            result, for_good = _cut(job)
            if for_good:
                keep_scan(rest, digest, result)
        if result.failure is not None:
            if strict:
                raise SpinejaxError(result.failure)
            outcome.failures[job.name] = result.failure
        cut_digests.append(digest if for_good else None)
        outcome.notes += result.notes
        not_found = sorted(set(job.labels) - {volume.level for volume in result.discs})
        if not_found and result.discs:
            outcome.notes.append(f"{job.name}: graded, but not found in the scan: {', '.join(not_found)}.")
        for volume in result.discs:
            yield Disc(
                volume=volume.volume,
                affine=volume.affine,
                slices=volume.slices,
                labels=dict(job.labels.get(volume.level, {})),
                level=volume.level,
                patient=job.patient,
                scan=job.scan,
                split=job.split,
                region=unknown.get("region") if volume.region is None else volume.region,
                lesion=unknown.get("lesion") if volume.lesion is None else volume.lesion,
            )


def _cut(job: Job) -> tuple[ScanResult, bool]:
    """What becomes of a scan, and whether for good: one that cannot be read just now is tried again by the next run."""
    try:
        discs, notes = job.cut()
        return ScanResult(discs, notes), True
    except NotSagittalError as error:
        return ScanResult(notes=[f"left out: {error}"]), True
    except NotInstalledError as error:
        return ScanResult(failure=str(error)), False
    except SpinejaxError as error:
        return ScanResult(failure=str(error)), True
    except OSError as error:
        return ScanResult(failure=f"{job.name}: cannot be read ({error})."), False
    except MemoryError:
        return ScanResult(failure=f"{job.name}: does not fit into memory. Run with fewer --workers."), False
