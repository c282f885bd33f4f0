"""`python -m data_prep`: make, verify and look at data sets.

Exit status: 0 done; 2 the user can fix it (the message says how); 130 interrupted; 1 a fault of ours.
"""

import json
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from data_prep.anatomy.discs import PREPROCESSING
from data_prep.dataset.build import build
from data_prep.dataset.folds import write_fold
from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms, load_or_make_key
from data_prep.look.contact_sheet import contact_sheet
from data_prep.look.grade_table import grade_table
from data_prep.look.overlay import overlay_sheet
from data_prep.read.series import Found, find_series
from data_prep.sources.labels import Labels, read_labels, read_tasks
from data_prep.sources.phantoms import phantom_jobs, write_phantoms
from data_prep.sources.scan_files import Cutting, scan_jobs
from data_prep.sources.spider import SPIDER_TASKS, spider_jobs
from spinejax.data.dataset import DataSet, verify
from spinejax.data.shards import SPLITS
from spinejax.errors import SpinejaxError, needs, status_of
from spinejax.files.atomic import write_atomically
from spinejax.tasks import PAPER_TASKS

_PROGRESS = Console(stderr=True)
_DataFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="Folder of the data set.")]


# Commands that write data sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """Options of every command that writes a data set."""

    out: Path
    """Folder of the data set."""
    shards: int = 8
    """Number of files."""
    workers: int = 1
    """Number of processes. The files do not depend on it."""
    scheduler: str | None = None
    """Address of a Dask scheduler (`tcp://…`) whose workers do the work. All must see the same files."""
    seed: int = 0
    """Seed of the split into train, validation and test."""
    overwrite: bool = False
    """Replace a data set that is in the folder already."""
    strict: bool = False
    """Stop at the first scan that fails, instead of naming it at the end."""

    def build(self, jobs: list[Job], *, found: Found | None = None, **settings) -> int:
        """Build the data set, report what was done, left out or failed, and return the exit status."""
        found = found or Found()
        if self.strict and found.failures:
            raise SpinejaxError(next(iter(found.failures.values())))
        outcome = build(
            jobs,
            self.out,
            num_shards=self.shards,
            num_workers=self.workers,
            scheduler=self.scheduler,
            overwrite=self.overwrite,
            strict=self.strict,
            console=_PROGRESS,
            **settings,
        )
        _print_notes([*(f"left out: {line}" for line in found.left_out), *found.notes, *outcome.notes])
        _print_failures(found.failures | outcome.failures)
        if outcome.resumed:
            _print_notes([f"{outcome.resumed} scans were finished by an interrupted run."])
        num_failed = len(found.failures | outcome.failures) - len(found.unreadable)
        num_scans = len(jobs) + len(found.failures) - len(found.unreadable)
        counts = ", ".join(f"{split} {outcome.discs[split]}" for split in SPLITS)
        print(f"{self.out}: {outcome.discs.total()} discs ({counts}) of {num_scans - num_failed} scans")
        if num_failed:
            print(f"{num_failed} of {num_scans} scans failed; their reasons are above.", file=sys.stderr)
        if found.unreadable:
            print(f"{len(found.unreadable)} files or folders cannot be read; see above.", file=sys.stderr)
        return 2 if found.failures or outcome.failures else 0


@dataclass(frozen=True, kw_only=True)
class Phantom(_Writing):
    """Draw synthetic lumbar scans with known grades and lesions, and make a data set of them."""

    patients: int
    """Number of patients, with one scan of six discs each."""
    as_: Annotated[Literal["discs", "scans"], tyro.conf.arg(name="as")] = "discs"
    """Write a data set of discs; or scans with masks and labels, as files for `scans` or `spider` to read."""
    format: Literal["mha", "nifti", "dicom"] = "mha"
    """Format of the scans. MetaImage comes in SPIDER's layout."""

    def run(self) -> int:
        if self.as_ == "scans":
            write_phantoms(self.out, self.patients, seed=self.seed, file_format=self.format, overwrite=self.overwrite)
            print(f"{self.out}: {self.patients} scans as {self.format}")
            return 0
        jobs = phantom_jobs(self.patients, seed=self.seed)
        preprocessing = PREPROCESSING | {"source": "phantom", "seed": self.seed}
        return self.build(jobs, tasks=PAPER_TASKS, masks=("region", "lesion"), preprocessing=preprocessing)


@dataclass(frozen=True, kw_only=True)
class _OfPatients(_Writing):
    """Options of the commands that make a data set of real patients."""

    key: Path | None = None
    """File with the secret key of the pseudonyms, made if there is none. Keep it. Default: <out>.key, beside `out`."""
    keep_doubtful: bool = False
    """Keep a labelled scan whose levels the detector doubts. Its discs could have their neighbours' labels."""


@dataclass(frozen=True, kw_only=True)
class Spider(_OfPatients):
    """Make a data set of SPIDER's scans, masks and gradings. Its validation patients become the test split."""

    root: tyro.conf.Positional[Path]
    """ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv."""
    series: tuple[str, ...] = ("t2_SPACE",)
    """Series to read, one or more: the scans named <patient>_<series>.mha."""
    detect_missing: bool = False
    """Detect the vertebrae of scans without a mask, instead of refusing. Scans of doubtful levels are left out."""
    subset: Literal["all", "training", "validation"] = "all"
    """Official subset of SPIDER whose patients are used."""

    def run(self) -> int:
        jobs = spider_jobs(
            self.root,
            series=self.series,
            seed=self.seed,
            pseudonyms=load_or_make_key(self.key, self.out),
            detect_missing=self.detect_missing,
            keep_doubtful=self.keep_doubtful,
            subset=self.subset,
        )
        preprocessing = PREPROCESSING | {"source": "SPIDER", "series": " ".join(self.series), "seed": self.seed}
        return self.build(jobs, tasks=SPIDER_TASKS, masks=("region",), preprocessing=preprocessing)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """Options of the commands that read any scans."""

    paths: tyro.conf.Positional[list[Path]]
    """Files and folders with scans. Whatever is no sagittal scan is named and left out."""
    masks: Path | None = None
    """Folder with a mask per scan, named after the scan, from SPIDER, TotalSpineSeg, SPINEPS or TotalSegmentator.
    Without masks and corners, the vertebrae are detected."""
    corners: Path | None = None
    """File of vertebral corners (JSON), instead of masks."""
    weighting: Literal["t2", "t1", "any"] = "t2"
    """Contrast of the series to read. Series that are known to have another one are left out."""
    patients_by: Literal["name", "folder"] = "name"
    """How to tell patients apart: by PatientID or the beginning of the file name; or by the folder of the scan."""
    convention: Literal["spider", "totalspineseg", "spineps", "totalsegmentator"] | None = None
    """Tool that made the masks. Default: recognised by its labels."""
    lowest_level: str | None = None
    """Name of each scan's lowest disc, to count the levels from it. Default: the mask's own names, or the sacrum's."""
    detect_missing: bool = False
    """Detect the vertebrae of scans without a mask or corners, instead of failing there."""
    normalise: Literal["slice", "disc"] = "slice"
    """Scale each slice by the median of its vertebral bodies, as in the paper, or a disc by one median."""

    def jobs(
        self,
        labels: Labels | None = None,
        *,
        seed: int = 0,
        pseudonyms: Pseudonyms | None = None,
        keep_doubtful: bool = False,
    ) -> tuple[list[Job], Found]:
        """One job per scan, and what was found. Without `pseudonyms`, nothing that is written may hold one."""
        exclude = [self.masks] if self.masks else []
        found = find_series(self.paths, weighting=self.weighting, patients_by=self.patients_by, exclude=exclude)
        jobs, notes = scan_jobs(
            found,
            masks=self.masks,
            corners=self.corners,
            labels=labels,
            cutting=Cutting(
                convention=self.convention,
                lowest_level=self.lowest_level,
                per_disc=self.normalise == "disc",
                detect_missing=self.detect_missing,
                keep_doubtful=keep_doubtful,
            ),
            seed=seed,
            pseudonyms=pseudonyms or Pseudonyms(secrets.token_bytes(32)),
        )
        found.notes += notes
        return jobs, found


@dataclass(frozen=True, kw_only=True)
class Scans(_Reading, _OfPatients):
    """Make a data set of any scans: DICOM, NIfTI or MetaImage, single files or whole trees."""

    labels: Path | None = None
    """Table (CSV) with the columns patient, scan, level and one per task."""
    tasks: Path | None = None
    """Task table (JSON) of the labels. Default: the paper's six tasks."""

    def run(self) -> int:
        tasks = read_tasks(self.tasks)
        labels = read_labels(self.labels, tasks) if self.labels else None
        pseudonyms = load_or_make_key(self.key, self.out)
        jobs, found = self.jobs(labels, seed=self.seed, pseudonyms=pseudonyms, keep_doubtful=self.keep_doubtful)
        return self.build(
            jobs,
            found=found,
            tasks=labels.tasks if labels else tasks,
            masks=("region",) if self.masks else (),
            preprocessing=PREPROCESSING | {"source": "scans", "normalise": self.normalise, "seed": self.seed},
        )


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Split a data set's patients anew, for one fold of a cross-validation: test is the fold, validation an eighth of
    the rest. Over all folds every patient is in test once. A test split that must stay unseen has to be left out first.
    """

    data: _DataFolder
    out: Path
    """Folder of the new data set, with copies of the discs."""
    fold: str
    """Number of the fold, and of all folds: 1/5, 2/5, …"""
    seed: int = 0
    """Seed of the split, the same for all folds."""

    def run(self) -> int:
        counts = write_fold(DataSet(self.data), self.out, self.fold, seed=self.seed)
        print(f"{self.out}: fold {self.fold}, discs: {', '.join(f'{split} {n}' for split, n in counts.items())}")
        return 0


# Commands that look at scans and data sets ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Overlay(_Reading):
    """Draw a page of whole scans with the vertebral corners and the boxes that discs are cut out of."""

    out: Path
    """File of the page (PNG)."""
    scans: int = 20
    """Number of scans, chosen at random."""
    seed: int = 0
    """Seed of the choice."""

    def run(self) -> int:
        jobs, found = self.jobs(seed=self.seed)
        _print_notes([*found.left_out, *found.notes, *found.failures.values()])
        for line in overlay_sheet(jobs, self.out, num_scans=self.scans, seed=self.seed):
            print(line)
        return 0


@dataclass(frozen=True)
class Verify:
    """Read a whole data set and list every fault."""

    data: _DataFolder

    def run(self) -> int:
        faults = verify(self.data)
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"{self.data}: " + (f"{len(faults)} faults" if faults else f"{len(DataSet(self.data))} discs, no fault"))
        return 2 if faults else 0


@dataclass(frozen=True)
class Stats:
    """Count the discs of a data set by grade and split, as in the paper's Table 1."""

    data: _DataFolder

    def run(self) -> int:
        Console().print(grade_table(DataSet(self.data)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Draw a page of discs with the outlines of their regions and lesions, their levels and grades."""

    data: _DataFolder
    out: Path
    """File of the page (PNG)."""
    discs: int = 20
    """Number of discs, chosen at random."""
    seed: int = 0
    """Seed of the choice."""

    def run(self) -> int:
        contact_sheet(DataSet(self.data), self.out, num_discs=self.discs, seed=self.seed)
        print(self.out)
        return 0


# Results, and the detector -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Results:
    """Write an evaluation's grades and hotspots as DICOM, for the archive of the series that they are of."""

    evaluation: tyro.conf.Positional[Path]
    """Folder that `evaluate.py` wrote."""
    source: list[Path]
    """DICOM series that the data set was made of: files and folders."""
    key: Path
    """File with the secret key of the data set's pseudonyms, by which scans are found again."""
    out: Path
    """Folder for the DICOM files. They carry patients' names, so others cannot read it."""

    def run(self) -> int:
        with needs("Writing DICOM results needs highdicom", "scans"):
            from data_prep.output.dicom_results import results_as_dicom
        if not self.key.is_file():
            raise SpinejaxError(f"--key {self.key}: no such file. It was written when the data set was made.")
        returned = results_as_dicom(self.evaluation, self.source, load_or_make_key(self.key, self.out), self.out)
        _print_notes(returned.notes)
        _print_failures(returned.failures)
        print(f"{self.out}: {returned.scans} structured reports, {returned.maps} parametric maps")
        return 2 if returned.failures else 0


@dataclass(frozen=True, kw_only=True)
class TrainDetector:
    """Train the network that finds vertebral bodies, on SPIDER's scans with masks and on phantoms."""

    out: Path
    """File of the weights (.npz). An interrupted run continues."""
    spider: Path | None = None
    """ROOT: the folder with SPIDER's images/ and masks/. Without it, the network trains on phantoms alone."""
    series: str = "t2_SPACE"
    """Series to read: the scans named <patient>_<series>.mha."""
    begin: Path | None = None
    """File of weights (.npz) to start from. Default: random weights."""
    steps: int = 12000
    """Number of steps of the optimiser."""
    learning_rate: float = 3e-3
    """Highest learning rate, reached after 15 % of the steps."""
    phantoms: int = 120
    """Number of phantoms."""
    seed: int = 0
    """Seed of weights, phantoms and crops."""

    def run(self) -> int:
        from data_prep.detector.training.run import Recipe, train_detector
        from spinejax.parallel import runtime

        runtime.set_up()
        recipe = Recipe(steps=self.steps, learning_rate=self.learning_rate, phantoms=self.phantoms, seed=self.seed)
        train_detector(self.spider, self.out, recipe, begin=self.begin, series=self.series, tell=_PROGRESS.print)
        print(self.out)
        return 0


@dataclass(frozen=True, kw_only=True)
class DetectEval(_Reading):
    """Detect vertebral bodies in scans that have masks, and measure how well."""

    out: Path
    """File of the metrics (JSON)."""
    development: bool = False
    """Measure on six patients only, which never train: those with masks whose ids have the smallest SHA-256."""
    weights: Path | None = None
    """File of weights (.npz) of `train-detector`. Default: those that come with the package."""

    def run(self) -> int:
        from data_prep.detector.training.truth import development_patients
        from data_prep.detector.weights import SHIPPED
        from data_prep.look.detector_accuracy import measure, table

        if self.masks is None:
            raise SpinejaxError("detect-eval compares with masks: give --masks DIR.")
        weights = self.weights or SHIPPED
        if self.out.resolve() == weights.with_suffix(".json").resolve():
            raise SpinejaxError(f"--out {self.out}: that file belongs to the weights. Give another.")
        jobs, found = self.jobs()
        pairs = zip(jobs, found.series, strict=True)
        masked = [(job, series.patient) for job, series in pairs if len(job.sources) > len(series.files)]
        _print_notes([*found.left_out, *found.notes, *found.failures.values()])
        print(f"{len(masked)} of {len(jobs)} scans have a mask", file=sys.stderr)
        chosen = development_patients(patient for _, patient in masked)
        jobs = [job for job, patient in masked if patient in chosen or not self.development]
        metrics = measure(jobs, weights=weights, report=lambda line: print(line, file=sys.stderr))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, lambda part: part.write_text(json.dumps(metrics, indent=1) + "\n"))
        Console(width=None if sys.stdout.isatty() else 120).print(table(metrics["summary"]))
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    command = tyro.cli(
        Phantom | Spider | Scans | Overlay | Results | TrainDetector | DetectEval | Fold | Verify | Stats | Inspect,
        args=arguments,
        prog="python -m data_prep",
        description="Make, verify and look at data sets of intervertebral discs.",
    )
    return status_of(command.run)


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _print_failures(failures: dict[str, str]) -> None:
    for name, reason in failures.items():
        print(f"failed: {reason}" if reason.startswith(name) else f"failed: {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
