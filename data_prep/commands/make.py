"""The commands that make data sets: `phantom`, `spider`, `scans` and `fold`."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.anatomy.discs import PREPROCESSING, SLICES
from data_prep.commands.printing import PROGRESS, print_failures, print_notes
from data_prep.commands.reading import CacheFolder, DataFolder, Reading
from data_prep.dataset.build import NoDataSetError, Settings, build
from data_prep.dataset.folds import write_fold
from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms, load_or_make_key
from data_prep.dataset.resuming import SHARDS
from data_prep.detector.doubt import MAX_DOUBT
from data_prep.read.found import Found
from data_prep.sources.labels import read_labels, read_tasks
from data_prep.sources.phantoms import phantom_jobs, write_phantoms
from data_prep.sources.pooled import POOLED_TASKS, Patient, pooled_jobs
from data_prep.sources.scan_files import Cutting
from data_prep.sources.spider import SPIDER_TASKS, spider_jobs
from data_prep.sources.summary import Summary, check_log, summarised
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import MANIFEST
from spinejax.data.shards import SPLITS
from spinejax.errors import SpinejaxError, printable
from spinejax.files.addresses import Folder
from spinejax.files.lease import leased
from spinejax.files.mirror import Mirror, held, mirror_of
from spinejax.files.stores import Address, cache_folder
from spinejax.tasks import PAPER_TASKS, Task


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Options of every command that writes a data set."""

    out: Folder
    """Folder of the data set, also in a bucket (s3://…, gs://…; extra cloud)."""
    seed: int = 0
    """Seed of the split into train, validation and test."""
    log: Path | None = None
    """File for a log (JSON) of what was read, left out and failed, and why. It names source files: keep it apart from
    the data set."""
    settings: Settings = field(default_factory=Settings)
    cache_dir: CacheFolder = None

    def folder(self) -> contextlib.AbstractContextManager[Path]:
        """The folder on this machine. If `out` is in a bucket, it is held while the block runs, and copied there."""
        return _held(self.out, self.cache_dir)


@dataclass(frozen=True, kw_only=True)
class WritingPatients(Writing):
    """Options of the commands that make a data set of real patients."""

    key: Path | None = None
    """File with the secret key of the pseudonyms, made if there is none. Keep it. Default: <out>.key, beside `out`."""
    keep_doubtful: bool = False
    """Keep labelled scans whose levels the detector doubts. Their discs could have their neighbours' labels."""

    def pseudonyms(self) -> Pseudonyms:
        """Made by the key, which is never in a bucket. Raises SpinejaxError if it would be."""
        if isinstance(self.out, Path):
            return load_or_make_key(self.key, self.out)
        if self.key is None:
            raise SpinejaxError(
                f"--out {self.out} is in a bucket: give --key FILE, too. The key of the pseudonyms stays on this "
                "machine: whoever has it can tell the patients."
            )
        with leased(self.out, "Wait for it, or give another --out."):
            pass  # a bucket that cannot be written to is found now, and not when all scans are cut
        return load_or_make_key(self.key, _mirror(self.out, self.cache_dir).folder)


def phantom(
    writing: Writing,
    *,
    patients: int,
    as_: Annotated[Literal["discs", "scans"], tyro.conf.arg(name="as")] = "discs",
    file_format: Annotated[Literal["mha", "nifti", "dicom"], tyro.conf.arg(name="format")] = "mha",
) -> int:
    """Draw synthetic lumbar scans with known grades and lesions, and make a data set of them.

    Args:
        patients: Number of patients, with one scan of six discs each.
        as_: Write a data set of discs; or scans with masks and labels, as files for `scans` or `spider` to read.
        file_format: Format of the scans. MetaImage comes in SPIDER's layout.
    """
    out, seed = writing.out, writing.seed
    if as_ == "scans":
        if isinstance(out, Address):
            raise SpinejaxError(f"--out {out}: scans are written to a folder of this machine alone.")
        write_phantoms(out, patients, seed=seed, file_format=file_format, overwrite=writing.settings.overwrite)
        print(f"{out}: {patients} scans as {file_format}")
        return 0
    preprocessing = {"source": "phantom", "seed": seed}
    return _build(phantom_jobs(patients, seed=seed), writing, PAPER_TASKS, ("region", "lesion"), preprocessing)


def spider(
    root: tyro.conf.Positional[Path],
    writing: WritingPatients,
    *,
    series: tuple[str, ...] = ("t2",),
    slices: Literal["slabs", "native"] = "slabs",
    detect_missing: bool = False,
    max_doubt: float = MAX_DOUBT,
    subset: Literal["all", "training", "validation"] = "all",
) -> int:
    """Make a data set of SPIDER's scans, masks and gradings. Its validation patients become the test split.

    Args:
        root: ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv.
        series: Series to read, one or more of t2, t1 and t2_SPACE: the scans named <patient>_<series>.mha.
        slices: Average slices less than 2.5 mm apart into slabs of about 4 mm, or keep them as they are.
        detect_missing: Detect the vertebrae of scans without a mask, instead of refusing. Scans of doubtful levels are
            left out.
        max_doubt: Greatest probability of wrong levels that is accepted of detected vertebrae.
        subset: Official subset of SPIDER whose patients are used.
    """
    jobs, notes = spider_jobs(
        root,
        series=series,
        slices=slices,
        seed=writing.seed,
        pseudonyms=writing.pseudonyms(),
        detect_missing=detect_missing,
        keep_doubtful=writing.keep_doubtful,
        max_doubt=max_doubt,
        subset=subset,
    )
    preprocessing = {"source": "SPIDER", "series": " ".join(series), "slices": SLICES[slices], "seed": writing.seed}
    return _build(jobs, writing, SPIDER_TASKS, ("region",), preprocessing, Found(notes=notes), compare_labels=True)


def pooled(
    writing: WritingPatients,
    *,
    spider: Path,
    sudirman: Path,
    series: tuple[str, ...] = ("t2", "t1", "t2_SPACE"),
    held_out: tuple[str, ...] = (),
    max_doubt: float = MAX_DOUBT,
) -> int:
    """Make one data set of SPIDER's training patients and of Sudirman's patients, with the tasks of both.

    One patient in eight, chosen by a hash of the number, is in validation; the others are in train.

    Args:
        spider: ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv of SPIDER.
        sudirman: ROOT: the folder with images/, labels.csv and boxes.csv of the Lumbar Spine MRI Dataset.
        series: Series of SPIDER to read: the scans named <patient>_<series>.mha.
        held_out: Patients of the test split, such as spider/7.
        max_doubt: Greatest probability of wrong levels that is accepted of detected vertebrae.
    """
    jobs, notes = pooled_jobs(
        spider,
        sudirman,
        series=series,
        held_out=[Patient.parse(name) for name in held_out],
        pseudonyms=writing.pseudonyms(),
        cutting=Cutting(convention="spider", max_doubt=max_doubt),
    )
    preprocessing = {"source": "SPIDER and Sudirman", "series": " ".join(series), "slices": SLICES["slabs"]}
    return _build(jobs, writing, POOLED_TASKS, ("region",), preprocessing, Found(notes=notes), compare_labels=True)


def scans(
    reading: Reading,
    writing: WritingPatients,
    *,
    labels: Path | None = None,
    tasks: Path | None = None,
    inventory: Path | None = None,
) -> int:
    """Make a data set of any scans: DICOM, NIfTI, MetaImage or NRRD, single files or whole trees.

    Args:
        labels: Table (CSV) with the columns patient, level, one per task, and if you like scan and split.
        tasks: Task table (JSON) of the labels. Default: the paper's six tasks.
        inventory: Table of `inventory`, in which series may have been chosen and patients named. Give the same PATHS.
    """
    known = read_tasks(tasks)
    table = read_labels(labels, known) if labels else None
    jobs, found = reading.jobs(
        table,
        seed=writing.seed,
        pseudonyms=writing.pseudonyms(),
        keep_doubtful=writing.keep_doubtful,
        num_workers=writing.settings.workers,
        inventory=inventory,
    )
    if found.contradictions:
        way_on = "Or write an `inventory`, name the patients in it, and give it with --inventory."
        raise SpinejaxError("\n  ".join(["Who is the patient?", *found.contradictions[:20], way_on]))
    found.notes += found.patient_notes
    preprocessing = {"source": "scans", "normalise": reading.cutting.normalise, "seed": writing.seed}
    preprocessing["slices"] = SLICES[reading.cutting.slices]
    masks = ("region",) if reading.masks else ()
    known = table.tasks if table else known
    return _build(jobs, writing, known, masks, preprocessing, found, compare_labels=True)


def fold(data: DataFolder, *, out: Folder, fold: str, seed: int = 0, cache_dir: CacheFolder = None) -> int:
    """Split a data set's patients again, for one fold of a cross-validation: test is the fold, validation an eighth of
    the rest. Over all folds every patient is in test once. A test split that must stay unseen has to be left out first.

    Args:
        out: Folder of the fold: one small file, which shares the data set's discs. If you move one folder, move both.
            In a bucket, if the data set is in it.
        fold: Number of the fold, and of all folds: 1/5, 2/5, …
        seed: Seed of the split, the same for all folds.
    """
    with _held(out, cache_dir) as here:
        counts = write_fold(DataSet(data, cache_dir=cache_dir), here, fold, seed=seed, home=out)
    print(f"{out}: fold {fold}, discs: {', '.join(f'{split} {n}' for split, n in counts.items())}")
    return 0


@contextlib.contextmanager
def _held(out: Path | Address, cache_dir: Path | None) -> Iterator[Path]:
    if isinstance(out, Path):
        yield out
        return
    mirror = _mirror(out, cache_dir)
    advice = "Wait for it, or give another --out."
    with held(mirror, wanted=lambda name: name == MANIFEST, advice=advice, tell=PROGRESS.print):
        yield mirror.folder


def _mirror(out: Address, cache_dir: Path | None) -> Mirror:
    return mirror_of(out, cache_folder(cache_dir), "work", replaces=(SHARDS, MANIFEST))


def _build(
    jobs: list[Job],
    writing: Writing,
    tasks: Sequence[Task],
    masks: Sequence[str],
    preprocessing: dict,
    found: Found | None = None,
    *,
    compare_labels: bool = False,
) -> int:
    """Build the data set, report what was done, left out or failed, and return the exit status."""
    found = found or Found()
    if writing.settings.strict and found.failures:
        raise SpinejaxError(next(iter(found.failures.values())))
    try:
        with writing.folder() as out:
            if writing.log:
                check_log(writing.log, out)
            outcome = build(
                jobs,
                out,
                tasks=tasks,
                masks=masks,
                preprocessing=PREPROCESSING | preprocessing,
                compare_labels=compare_labels,
                settings=writing.settings,
                console=PROGRESS,
            )
    except NoDataSetError as error:
        _summarise(summarised(jobs, found, error.outcome), writing.log)
        raise
    print_notes([*(f"left out: {line}" for line in found.left_out), *found.notes, *outcome.notes])
    failures = found.failures | outcome.failures
    print_failures(failures)
    if outcome.resumed:
        print_notes([f"{outcome.resumed} scans were finished by an interrupted run."])
    num_failed = len(failures) - len(found.unreadable)
    num_scans = len(jobs) + len(found.failures) - len(found.unreadable)
    counts = ", ".join(f"{split} {outcome.discs[split]}" for split in SPLITS)
    print(f"{writing.out}: {outcome.discs.total()} discs ({counts}) of {num_scans - num_failed} scans")
    if num_failed:
        print(f"{num_failed} of {num_scans} scans failed; their reasons are above.", file=sys.stderr)
    if found.unreadable:
        print(f"{len(found.unreadable)} files or folders cannot be read; see above.", file=sys.stderr)
    _summarise(summarised(jobs, found, outcome), writing.log)
    return 2 if failures else 0


def _summarise(summary: Summary, log: Path | None) -> None:
    for line in summary.lines():
        print(printable(line), file=sys.stderr)
    if log:
        summary.write(log)
