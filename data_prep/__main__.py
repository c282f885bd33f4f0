"""`python -m data_prep`: make, verify and look at data sets.

Exit status: 0 done; 2 the user can fix it (the message says how); 130 interrupted; 1 a fault of ours.
"""

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from data_prep.anatomy.discs import PREPROCESSING, SLICES
from data_prep.dataset.build import Settings, build
from data_prep.dataset.folds import write_fold
from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms, load_or_make_key
from data_prep.look.contact_sheet import contact_sheet
from data_prep.look.corner_page import corner_pages
from data_prep.look.grade_table import grade_table
from data_prep.look.inventory_page import inventory_page
from data_prep.look.overlay import overlay_sheet
from data_prep.read import dicomweb
from data_prep.read.found import Found
from data_prep.read.header_cache import HeaderCache
from data_prep.read.inventory import (
    choose,
    describe_volumes,
    entries,
    headers_beside,
    refuse_to_replace,
    write_inventory,
)
from data_prep.read.series_rule import one_of_each_patient
from data_prep.sources.labels import Labels, read_labels, read_tasks
from data_prep.sources.phantoms import phantom_jobs, write_phantoms
from data_prep.sources.scan_files import Cutting, scan_jobs
from data_prep.sources.search import search
from data_prep.sources.spider import SPIDER_TASKS, spider_jobs
from data_prep.sources.summary import refuse_inside, summarised
from spinejax.data.dataset import DataSet
from spinejax.data.dataset import verify as faults_of
from spinejax.data.shards import SPLITS
from spinejax.errors import SpinejaxError, needs, printable, status_of
from spinejax.files.addresses import PATHS, ScanPath
from spinejax.files.atomic import write_atomically
from spinejax.tasks import PAPER_TASKS, Task

_PROGRESS = Console(stderr=True)
_DataFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="Folder of the data set.")]


# Commands that write data sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """Options of every command that writes a data set."""

    out: Path
    """Folder of the data set."""
    seed: int = 0
    """Seed of the split into train, validation and test."""
    log: Path | None = None
    """File for a log (JSON) of what was read, left out and failed, and why. It names source files: keep it apart from
    the data set."""
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, kw_only=True)
class _WritingPatients(_Writing):
    """Options of the commands that make a data set of real patients."""

    key: Path | None = None
    """File with the secret key of the pseudonyms, made if there is none. Keep it. Default: <out>.key, beside `out`."""
    keep_doubtful: bool = False
    """Keep labelled scans whose levels the detector doubts. Their discs could have their neighbours' labels."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """Options of the commands that read any scans."""

    paths: tyro.conf.Positional[list[Path]]
    """Files and folders with scans. Anything else than a sagittal scan is reported and left out."""
    masks: Path | None = None
    """Folder with a mask per scan, named after the scan, from SPIDER, TotalSpineSeg, SPINEPS or TotalSegmentator.
    Without masks and corners, the vertebrae are detected."""
    corners: Path | None = None
    """File of vertebral corners (JSON), instead of masks."""
    weighting: Literal["t2", "t1", "any"] = "t2"
    """Contrast of the series to read. Series that are known to have another one are left out."""
    patients_by: str = "auto"
    """How to tell patients apart. "auto": DICOM by PatientID, or where it says nothing by PatientName, study or folder;
    other files by their name up to the first "_" or "."; contradictions are refused. "name": by these alone, "name:2"
    by two parts of a file's name. "folder": by the level of folders that fits all else, "folder:1" by the first below
    PATHS. "study": by StudyInstanceUID."""
    series_rule: Literal["all", "newest", "thickest"] = "all"
    """Which series of a patient to read, if several fit: all, the newest, or the one with the thickest slices."""
    burned_in: bool = False
    """Read DICOM images whose header says that text is burned into their pixels, such as the patient's name."""
    cutting: Cutting = field(default_factory=Cutting)

    def search(self, cache: HeaderCache, *, num_workers: int, everyone: bool = False) -> Found:
        """The series of `paths`. `everyone` names the patients of series that are left out, too."""
        found = search(
            self.paths,
            cache,
            num_workers=num_workers,
            console=_PROGRESS,
            weighting=self.weighting,
            patients_by=self.patients_by,
            exclude=[self.masks] if self.masks else [],
            everyone=everyone,
            burned_in=self.burned_in,
        )
        if everyone or self.series_rule != "all":
            describe_volumes(found)
        return one_of_each_patient(found, self.series_rule)

    def jobs(
        self,
        labels: Labels | None = None,
        *,
        seed: int = 0,
        pseudonyms: Pseudonyms | None = None,
        num_workers: int = 1,
        inventory: Path | None = None,
        **options,
    ):
        """One job per scan, and what was found. Without `pseudonyms`, they are made with a key that nobody keeps."""
        cache = HeaderCache(inventory and headers_beside(inventory))
        found = self.search(cache, num_workers=num_workers, everyone=inventory is not None)
        if inventory:
            choose(found, inventory, cache.changed)
        jobs, notes = scan_jobs(
            found,
            masks=self.masks,
            corners=self.corners,
            labels=labels,
            cutting=self.cutting,
            seed=seed,
            pseudonyms=pseudonyms or Pseudonyms(secrets.token_bytes(32)),
            **options,
        )
        found.notes += notes
        return jobs, found


def phantom(
    writing: _Writing,
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
        write_phantoms(out, patients, seed=seed, file_format=file_format, overwrite=writing.settings.overwrite)
        print(f"{out}: {patients} scans as {file_format}")
        return 0
    preprocessing = {"source": "phantom", "seed": seed}
    return _build(phantom_jobs(patients, seed=seed), writing, PAPER_TASKS, ("region", "lesion"), preprocessing)


def spider(
    root: tyro.conf.Positional[Path],
    writing: _WritingPatients,
    *,
    series: tuple[str, ...] = ("t2",),
    slices: Literal["slabs", "native"] = "slabs",
    detect_missing: bool = False,
    subset: Literal["all", "training", "validation"] = "all",
) -> int:
    """Make a data set of SPIDER's scans, masks and gradings. Its validation patients become the test split.

    Args:
        root: ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv.
        series: Series to read, one or more of t2, t1 and t2_SPACE: the scans named <patient>_<series>.mha.
        slices: Average slices less than 2.5 mm apart into slabs of about 4 mm, or keep them as they are.
        detect_missing: Detect the vertebrae of scans without a mask, instead of refusing. Scans of doubtful levels are
            left out.
        subset: Official subset of SPIDER whose patients are used.
    """
    jobs, notes = spider_jobs(
        root,
        series=series,
        slices=slices,
        seed=writing.seed,
        pseudonyms=load_or_make_key(writing.key, writing.out),
        detect_missing=detect_missing,
        keep_doubtful=writing.keep_doubtful,
        subset=subset,
    )
    preprocessing = {"source": "SPIDER", "series": " ".join(series), "slices": SLICES[slices], "seed": writing.seed}
    return _build(jobs, writing, SPIDER_TASKS, ("region",), preprocessing, Found(notes=notes))


def scans(
    reading: _Reading,
    writing: _WritingPatients,
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
        pseudonyms=load_or_make_key(writing.key, writing.out),
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
    return _build(jobs, writing, table.tasks if table else known, masks, preprocessing, found)


def _build(
    jobs: list[Job],
    writing: _Writing,
    tasks: Sequence[Task],
    masks: Sequence[str],
    preprocessing: dict,
    found: Found | None = None,
) -> int:
    """Build the data set, report what was done, left out or failed, and return the exit status."""
    found = found or Found()
    if writing.log:
        refuse_inside(writing.log, writing.out)
    if writing.settings.strict and found.failures:
        raise SpinejaxError(next(iter(found.failures.values())))
    outcome = build(
        jobs,
        writing.out,
        tasks=tasks,
        masks=masks,
        preprocessing=PREPROCESSING | preprocessing,
        settings=writing.settings,
        console=_PROGRESS,
    )
    _print_notes([*(f"left out: {line}" for line in found.left_out), *found.notes, *outcome.notes])
    failures = found.failures | outcome.failures
    _print_failures(failures)
    if outcome.resumed:
        _print_notes([f"{outcome.resumed} scans were finished by an interrupted run."])
    num_failed = len(failures) - len(found.unreadable)
    num_scans = len(jobs) + len(found.failures) - len(found.unreadable)
    counts = ", ".join(f"{split} {outcome.discs[split]}" for split in SPLITS)
    print(f"{writing.out}: {outcome.discs.total()} discs ({counts}) of {num_scans - num_failed} scans")
    if num_failed:
        print(f"{num_failed} of {num_scans} scans failed; their reasons are above.", file=sys.stderr)
    if found.unreadable:
        print(f"{len(found.unreadable)} files or folders cannot be read; see above.", file=sys.stderr)
    summary = summarised(jobs, found, outcome)
    if writing.log:
        summary.write(writing.log, writing.out)
    for line in summary.lines():
        print(printable(line), file=sys.stderr)
    return 2 if failures else 0


def fold(data: _DataFolder, *, out: Path, fold: str, seed: int = 0) -> int:
    """Split a data set's patients again, for one fold of a cross-validation: test is the fold, validation an eighth of
    the rest. Over all folds every patient is in test once. A test split that must stay unseen has to be left out first.

    Args:
        out: Folder of the fold: one small file, which shares the data set's discs. If you move one folder, move both.
        fold: Number of the fold, and of all folds: 1/5, 2/5, …
        seed: Seed of the split, the same for all folds.
    """
    counts = write_fold(DataSet(data), out, fold, seed=seed)
    print(f"{out}: fold {fold}, discs: {', '.join(f'{split} {n}' for split, n in counts.items())}")
    return 0


# Commands that look at scans and data sets ---------------------------------------------------------------------------


def inventory(
    reading: _Reading, *, out: Path, html: Path | None = None, workers: int = 1, overwrite: bool = False
) -> int:
    """List every series of PATHS in a table: what it is, whether `scans` would read it, and why not. Nothing is cut.

    Edit its columns `chosen` and `patient`, and give it to `scans --inventory`.

    Args:
        out: File of the table (CSV). The headers that were read are kept beside it, for `scans`.
        html: File of a page (HTML) with the same table and the middle slice of each series.
        workers: Number of processes that read headers.
        overwrite: Replace a table that is there already.
    """
    refuse_to_replace(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = HeaderCache(headers_beside(out))
    found = reading.search(cache, num_workers=workers, everyone=True)
    listed = entries(found)
    write_inventory(out, listed)
    cache.save()
    if html:
        inventory_page(html, listed, num_workers=workers, console=_PROGRESS)
    _print_notes([*(str(one) for one in found.left_out if not one.name), *found.notes, *found.patient_notes])
    _print_notes([f"to be settled: {line}" for line in found.contradictions])
    num_chosen, num_failed = len(found.series), len(found.failed)
    print(
        f"{out}: {len(listed)} series, {num_chosen} chosen, {len(listed) - num_chosen - num_failed} left out, "
        f"{num_failed} failed"
    )
    return 0


def overlay(
    reading: _Reading,
    *,
    out: Path,
    scans: int | None = None,
    seed: int = 0,
    scans_per_page: int = 200,
    workers: int = 1,
    inventory: Path | None = None,
) -> int:
    """Show whole scans with the vertebral corners and the boxes that discs are cut out of: some as one picture, or all
    on HTML pages, where corners and levels can be corrected and saved for --corners.

    Args:
        out: File of the picture (.png), or of the first page (.html), or a folder for the pages.
        scans: Number of scans, chosen at random. Default: 20 for a picture, all for pages.
        seed: Seed of the choice.
        scans_per_page: Number of scans on a page (HTML).
        workers: Number of processes (HTML).
        inventory: Table of `inventory`, in which series may have been chosen. Give the same PATHS.
    """
    jobs, found = reading.jobs(seed=seed, num_workers=workers, inventory=inventory)
    _print_notes([*map(str, found.left_out), *found.notes, *found.failures.values()])
    if out.suffix == ".html" or out.is_dir() or not out.suffix:
        pages, counts = corner_pages(
            jobs,
            found,
            out,
            scans_per_page=scans_per_page,
            num_scans=scans,
            seed=seed,
            num_workers=workers,
            console=_PROGRESS,
        )
        print("\n".join(map(str, pages)))
        print(f"{sum(counts.values())} scans: " + ", ".join(f"{count} {group}" for group, count in counts.items()))
        return 0
    for line in overlay_sheet(jobs, out, num_scans=20 if scans is None else scans, seed=seed):
        print(printable(line))
    return 0


def verify(data: _DataFolder) -> int:
    """Read a whole data set and list every fault."""
    faults = faults_of(data)
    for fault in faults:
        print(printable(fault), file=sys.stderr)
    print(f"{data}: " + (f"{len(faults)} faults" if faults else f"{len(DataSet(data))} discs, no fault"))
    return 2 if faults else 0


def stats(data: _DataFolder) -> int:
    """Count the discs of a data set by grade and split, as in the paper's Table 1."""
    Console().print(grade_table(DataSet(data)))
    return 0


def inspect(data: _DataFolder, *, out: Path, discs: int = 20, seed: int = 0) -> int:
    """Draw a page of discs with the outlines of their regions and lesions, their levels and grades.

    Args:
        out: File of the page (PNG).
        discs: Number of discs, chosen at random.
        seed: Seed of the choice.
    """
    contact_sheet(DataSet(data), out, num_discs=discs, seed=seed)
    print(out)
    return 0


# Results, and the detector -------------------------------------------------------------------------------------------


def results(
    evaluation: tyro.conf.Positional[Path],
    *,
    source: list[ScanPath],
    key: Path,
    out: Path,
    masks: Path | None = None,
    corners: Path | None = None,
    convention: Literal["spider", "totalspineseg", "spineps", "totalsegmentator"] | None = None,
    lowest_level: str | None = None,
    stow: str | None = None,
) -> int:
    """Write an evaluation's grades and hotspots as DICOM, for the archive of the series that they are of.

    Args:
        evaluation: Folder that `evaluate.py` wrote.
        source: DICOM series that the data set was made of: files and folders, or a study or series of a DICOMweb server
            (dicomweb://HOST/PATH/studies/UID; dicomwebs:// by TLS).
        key: File with the secret key of the data set's pseudonyms, by which scans are found again.
        out: Folder for the DICOM files. They carry patients' names, so others cannot read it.
        masks: Folder with the masks that the data set was made with, for the segmentation of vertebrae and discs.
        corners: File with the corners that the data set was made with (JSON), instead of masks. Without masks and
            corners, the vertebrae are detected.
        convention: Tool that made the masks. Default: recognised by its labels.
        lowest_level: Name of each scan's lowest disc, if the data set was made with it.
        stow: Address of a DICOMweb server (http:// or https://) that the files are sent to. It takes name and password
            from DICOMWEB_USER and DICOMWEB_PASSWORD, a token from DICOMWEB_TOKEN, or else ~/.netrc.
    """
    with needs("Writing DICOM results needs highdicom", "scans"):
        from data_prep.output.dicom_results import results_as_dicom
    if not key.is_file():
        raise SpinejaxError(f"--key {key}: no such file. It was written when the data set was made.")
    cutting = Cutting(convention=convention, lowest_level=lowest_level)
    if stow:
        dicomweb.check_server(stow)
    with dicomweb.fetched(source) as sources:
        returned = results_as_dicom(
            evaluation, sources, load_or_make_key(key, out), out, masks=masks, corners=corners, cutting=cutting
        )
    _print_notes(returned.notes)
    _print_failures(returned.failures)
    print(
        f"{out}: {returned.scans} structured reports, {returned.maps} parametric maps, {returned.pictures} pictures, "
        f"{returned.segmentations} segmentations"
    )
    refused: dict[str, str] = {}
    if stow:
        sent, refused = dicomweb.store(stow, returned.files)
        _print_failures(refused)
        print(f"{stow}: {sent} of {len(returned.files)} objects stored")
    return 2 if returned.failures or refused else 0


def train_detector(
    *,
    out: Path,
    spider: Path | None = None,
    series: str = "t2_SPACE",
    begin: Path | None = None,
    steps: int = 12000,
    learning_rate: float = 3e-3,
    phantoms: int = 120,
    seed: int = 0,
) -> int:
    """Train the network that finds vertebral bodies, on SPIDER's scans with masks and on phantoms.

    Args:
        out: File of the weights (.npz). An interrupted run continues.
        spider: ROOT: the folder with SPIDER's images/ and masks/. Without it, the network trains on phantoms alone.
        series: Series to read: the scans named <patient>_<series>.mha.
        begin: File of weights (.npz) to start from. Default: random weights.
        steps: Number of steps of the optimiser.
        learning_rate: Highest learning rate, reached after 15 % of the steps.
        phantoms: Number of phantoms.
        seed: Seed of weights, phantoms and crops.
    """
    from data_prep.detector.training import run
    from spinejax.parallel import runtime

    runtime.set_up()
    recipe = run.Recipe(steps=steps, learning_rate=learning_rate, phantoms=phantoms, seed=seed)
    run.train_detector(spider, out, recipe, begin=begin, series=series, tell=_PROGRESS.print)
    print(out)
    return 0


def detect_eval(reading: _Reading, *, out: Path, development: bool = False, weights: Path | None = None) -> int:
    """Detect vertebral bodies in scans that have masks, and measure how well.

    Args:
        out: File of the metrics (JSON).
        development: Measure on six patients only, which never train: those with masks whose ids have the smallest
            SHA-256.
        weights: File of weights (.npz) of `train-detector`. Default: those that come with the package.
    """
    from data_prep.detector.training.truth import development_patients
    from data_prep.detector.weights import SHIPPED
    from data_prep.look.detector_accuracy import measure, table

    if reading.masks is None:
        raise SpinejaxError("detect-eval compares with masks: give --masks DIR.")
    weights = weights or SHIPPED
    if out.resolve() == weights.with_suffix(".json").resolve():
        raise SpinejaxError(f"--out {out}: that file belongs to the weights. Give another.")
    jobs, found = reading.jobs()
    pairs = zip(jobs, found.series, strict=True)
    masked = [(job, series.patient) for job, series in pairs if len(job.sources) > len(series.files)]
    _print_notes([*map(str, found.left_out), *found.notes, *found.failures.values()])
    print(f"{len(masked)} of {len(jobs)} scans have a mask", file=sys.stderr)
    chosen = development_patients(patient for _, patient in masked)
    jobs = [job for job, patient in masked if patient in chosen or not development]
    metrics = measure(jobs, weights=weights, report=lambda line: print(printable(line), file=sys.stderr))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda part: part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n"))
    Console(width=None if sys.stdout.isatty() else 120).print(table(metrics["summary"]))
    return 0


_COMMANDS = (
    *(phantom, spider, scans, inventory, overlay, results, train_detector, detect_eval, fold, verify, stats, inspect),
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return status_of(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {command.__name__.replace("_", "-"): command for command in _COMMANDS},
            args=arguments,
            prog="spinejax-prep" if Path(sys.argv[0]).stem == "spinejax-prep" else "python -m data_prep",
            description="Make, verify and look at data sets of intervertebral discs.",
            config=(tyro.conf.OmitArgPrefixes,),
            registry=PATHS,
        )
    )


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _print_failures(failures: dict[str, str]) -> None:
    for name, reason in failures.items():
        line = reason if reason.startswith(name) else f"{name}: {reason}"
        print(f"failed: {printable(line)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
