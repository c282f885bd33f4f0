"""From jobs to a data set: each scan is cut into discs, then the discs are assembled into shards.

Scans are processed first, then shards are assembled. Which patient is in which shard depends on the patients alone, so
the files do not depend on the number of processes. A process holds one scan at a time. An interrupted run continues
with the scans that it had not finished.
"""

import contextlib
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.console import Console

import spinejax
from data_prep.dataset import resuming
from data_prep.dataset.job import Job
from data_prep.dataset.label_levels import LabelledScan, appearance, compare
from data_prep.dataset.progress import with_progress
from data_prep.dataset.resuming import ScanResult
from data_prep.dataset.workers import workers
from data_prep.read.scan import NotSagittalError
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import MASK_DTYPES, Disc, ShardSummary, shard_name, write_shard
from spinejax.errors import NoDeviceError, NotInstalledError, SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a data set is built; the options of the commands."""

    shards: int = 8
    """Number of files. There are never more than patients."""
    workers: int = 1
    """Number of processes. The files do not depend on it."""
    scheduler: str | None = None
    """Address of a Dask scheduler (`tcp://…`), used instead of `workers`. Its workers must see the same files."""
    overwrite: bool = False
    """Replace a data set that is in the folder already."""
    strict: bool = False
    """Stop at the first scan that fails, instead of naming it at the end."""


@dataclass
class Outcome:
    """What a run did."""

    discs: Counter = field(default_factory=Counter)  # number by split
    failures: dict[str, str] = field(default_factory=dict)  # scan → reason
    notes: list[str] = field(default_factory=list)  # what is doubtful or was left out
    resumed: int = 0  # scans that an interrupted run had finished; they are reported like all others


class NoDataSetError(SpinejaxError):
    """No disc was found, or one that a data set must not have. `outcome` is what was done until then."""

    def __init__(self, message: str, outcome: Outcome):
        super().__init__(message)
        self.outcome = outcome


def build(
    jobs: Sequence[Job],
    out: Path,
    *,
    tasks: Sequence[Task],
    masks: Sequence[str] = (),
    preprocessing: dict,
    compare_labels: bool = False,
    settings: Settings = Settings(),
    console: Console,
) -> Outcome:
    """Cut every job's scan into discs and write them as a data set.

    Args:
        jobs: in any order.
        out: the data set's folder. A data set that it holds stays whole until the new one is.
        tasks: the task table.
        masks: which of "region" and "lesion" the discs have.
        preprocessing: JSON values for the manifest.
        compare_labels: note scans whose labels would fit their discs better one level higher or lower.
        settings, console: how to build it, and where to show the progress.

    Returns:
        What was done. A scan that failed is named there; the others are written.

    Raises:
        SpinejaxError: `out` holds a data set, or another run writes there; an option is out of range; a file cannot be
            written; with `settings.strict`, a scan failed. NoDataSetError: no disc was found at all.
    """
    if min(settings.shards, settings.workers) < 1:
        raise SpinejaxError(f"--shards {settings.shards}, --workers {settings.workers}: expected 1 or more of each.")
    if out.exists() and not out.is_dir():
        raise SpinejaxError(f"--out {out}: is a file; expected a folder.")
    out.mkdir(parents=True, exist_ok=True)
    shards = _deal(jobs, settings.shards)
    num_workers = min(settings.workers, max(len(jobs), 1))  # each takes seconds to start
    with resuming.only_writer(out), workers(num_workers, settings.scheduler) as run:
        unfinished = resuming.begin(out, overwrite=settings.overwrite)
        in_order = list(itertools.chain.from_iterable(shards))
        finished = run(partial(_finish, folder=unfinished, strict=settings.strict), in_order)
        outcome, cut, labelled = Outcome(), [], []
        progress = with_progress(finished, len(in_order), "scans", console)
        for job, (file, result, resumed, looks) in zip(in_order, progress, strict=True):
            cut.append((job, file))
            labelled.append(LabelledScan(job.name, job.patient, job.labels, looks))
            outcome.notes += result.notes
            outcome.resumed += resumed
            if result.failure is not None:
                outcome.failures[job.name] = result.failure
        paths = [unfinished / shard_name(index, len(shards)) for index in range(len(shards))]
        parts = iter(cut)
        scans = [list(itertools.islice(parts, len(shard))) for shard in shards]
        summaries = list(run(partial(_assemble, tasks=tasks, masks=masks), paths, scans))
        outcome.discs = sum((summary.discs for summary in summaries), Counter())
        try:
            write_manifest(unfinished, summaries, tasks, preprocessing, masks, {"scans": _origins(jobs)})
        except SpinejaxError as error:  # no disc, or one that a data set must not have: the next run starts again
            shutil.rmtree(unfinished)
            fault = str(error).removeprefix(f"{unfinished}: ")
            failures = outcome.failures.items()
            reasons = [reason if reason.startswith(name) else f"{name}: {reason}" for name, reason in failures]
            reasons += outcome.notes
            raise NoDataSetError("\n  ".join([f"--out {out}: {fault}", *reasons]), outcome) from error
        resuming.publish(unfinished, out)
    if compare_labels:
        outcome.notes += compare(labelled, tasks)
    return outcome


def _origins(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Scan → its source, contrast and examination, as far as they are known."""
    known = {
        job.scan: {"source": job.source, "contrast": job.contrast}
        | ({"examination": job.examination.number, "days": job.examination.days} if job.examination else {})
        for job in jobs
    }
    return {scan: known[scan] for scan in sorted(known) if any(known[scan].values())}


def _deal(jobs: Sequence[Job], num_shards: int) -> list[list[Job]]:
    """Sort the patients and deal them to the shards in turn; a patient's scans stay together."""
    in_order = sorted(jobs, key=lambda job: (job.patient, job.scan))
    patients = [list(scans) for _, scans in itertools.groupby(in_order, key=lambda job: job.patient)]
    num_shards = max(1, min(num_shards, len(patients)))
    return [list(itertools.chain.from_iterable(patients[index::num_shards])) for index in range(num_shards)]


# One scan ------------------------------------------------------------------------------------------------------------


def _finish(
    job: Job, *, folder: Path, strict: bool
) -> tuple[Path | None, ScanResult, bool, dict[str, Float32[np.ndarray, "F"]]]:
    """Cut a scan and write its discs to a file, unless an earlier run did.

    Returns:
        The file, None if the scan must be tried again; the result without discs; whether an earlier run had it; and
        level → the appearance of each disc, if the scan has labels.
    """
    how = (job.name, job.recipe, job.per_disc, job.refuse_doubtful)
    name = resuming.digest(spinejax.__version__, how, *map(str, job.sources), *job.sources)
    file = folder / f"{name}.scan"
    result = resuming.load_scan(file)
    resumed = final = result is not None
    if result is None:
        result, final = _cut(job)
        if final:
            with _full_disk_named(folder):
                resuming.save_scan(file, result)
    if strict and result.failure is not None:
        raise SpinejaxError(result.failure)
    notes = list(result.notes)
    not_found = sorted(set(job.labels) - {disc.level for disc in result.discs})
    if not_found and result.discs:
        notes.append(f"{job.name}: graded, but not found in the scan: {', '.join(not_found)}.")
    looks = {disc.level: appearance(disc) for disc in result.discs} if job.labels else {}
    return file if final else None, ScanResult((), notes, result.failure), resumed, looks


def _cut(job: Job) -> tuple[ScanResult, bool]:
    """The result of a scan, and whether it is final. A scan that cannot be read at present is tried again later.

    Raises:
        NoDeviceError: the detector cannot compute; the same would hold for all scans.
    """
    try:
        return ScanResult(*job.cut()), True
    except NoDeviceError:
        raise
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


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpinejaxError(
            f"{path}: cannot be written ({error.strerror or error}). Is the disk full? Make room and run the same "
            "command again: it continues where it stopped."
        ) from error


# One shard -----------------------------------------------------------------------------------------------------------

_Scans = Sequence[tuple[Job, Path | None]]


def _assemble(path: Path, scans: _Scans, *, tasks: Sequence[Task], masks: Sequence[str]) -> ShardSummary:
    with _full_disk_named(path):
        return write_shard(path, _discs(scans, masks), tasks, masks)


def _discs(scans: _Scans, masks: Sequence[str]) -> Iterator[Disc]:
    """The discs of one scan after the other.

    In a data set with masks, the discs of a scan without a mask have empty ones: nothing is known of their pixels.
    """
    empty = {name: np.zeros(VOLUME_SHAPE, MASK_DTYPES[name]) for name in masks}
    for job, file in scans:
        if file is None:
            continue
        result = resuming.load_scan(file)
        if result is None:
            raise SpinejaxError(
                f"{file}: a finished scan is missing or damaged. Give an --out that all workers share, or run the same "
                "command again."
            )
        for disc in result.discs:
            yield Disc(
                volume=disc.volume,
                affine=disc.affine,
                slices=disc.slices,
                labels=dict(job.labels.get(disc.level, {})),
                level=disc.level,
                patient=job.patient,
                scan=job.scan,
                split=job.split,
                region=empty.get("region") if disc.region is None else disc.region,
                lesion=empty.get("lesion") if disc.lesion is None else disc.lesion,
            )
