"""`python -m data_prep`: make, verify and look at data sets.

Exit status: 0 done; 2 the user can mend it (its message says how); 130 interrupted; 1 a fault of ours.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from data_prep.build import Job, Outcome, build
from data_prep.contact_sheet import contact_sheet
from data_prep.discs import PREPROCESSING
from data_prep.phantom_set import phantom_jobs
from data_prep.privacy import load_or_make_key
from data_prep.spider import SPIDER_TASKS, spider_jobs
from spinejax.dataset import DataSet, verify
from spinejax.errors import SpinejaxError
from spinejax.shards import SPLITS
from spinejax.tasks import PAPER_TASKS, UNLABELLED

_PROGRESS = Console(stderr=True)
_SHOWN_NOTES = 20


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """Options of every command that writes a data set."""

    out: Path
    """Folder of the data set."""
    shards: int = 8
    """Number of files."""
    workers: int = 1
    """Number of processes; the files do not depend on it."""
    seed: int = 0
    """Seed of the split into train, validation and test."""
    overwrite: bool = False
    """Replace a data set that is in the folder already."""
    strict: bool = False
    """Stop at the first scan that fails, instead of naming it at the end."""

    def build(self, jobs: list[Job], **settings) -> int:
        outcome = build(
            jobs,
            self.out,
            num_shards=self.shards,
            num_workers=self.workers,
            overwrite=self.overwrite,
            strict=self.strict,
            console=_PROGRESS,
            **settings,
        )
        return _report(outcome, len(jobs), self.out)


@dataclass(frozen=True, kw_only=True)
class Phantom(_Writing):
    """Draw synthetic lumbar scans with known grades and lesions, and make a data set of them."""

    patients: int
    """Number of patients, one scan of six discs each."""

    def run(self) -> int:
        jobs = phantom_jobs(self.patients, seed=self.seed)
        preprocessing = PREPROCESSING | {"source": "phantom", "seed": self.seed}
        return self.build(jobs, tasks=PAPER_TASKS, masks=("region", "lesion"), preprocessing=preprocessing)


@dataclass(frozen=True, kw_only=True)
class Spider(_Writing):
    """Make a data set of SPIDER's scans, masks and gradings. Its validation patients become the test split."""

    root: tyro.conf.Positional[Path]
    """ROOT: the folder with images/, masks/, radiological_gradings.csv and overview.csv."""
    series: str = "t2_SPACE"
    """Which scans: those named <patient>_<series>.mha."""
    key: Path | None = None
    """Secret key of the pseudonyms, made if it is not there. Default: <out>.key, beside the data set. Keep it."""

    def run(self) -> int:
        pseudonyms = load_or_make_key(self.key, self.out)
        jobs = spider_jobs(self.root, series=self.series, seed=self.seed, pseudonyms=pseudonyms)
        preprocessing = PREPROCESSING | {"source": "SPIDER", "series": self.series, "seed": self.seed}
        return self.build(jobs, tasks=SPIDER_TASKS, masks=("region",), preprocessing=preprocessing)


@dataclass(frozen=True)
class Verify:
    """Read a whole data set and list every fault."""

    data: tyro.conf.Positional[Path]
    """Folder of the data set."""

    def run(self) -> int:
        faults = verify(self.data)
        for fault in faults:
            print(fault, file=sys.stderr)
        print(
            f"{self.data}: {len(faults)} faults"
            if faults
            else f"{self.data}: {len(DataSet(self.data))} discs, no fault"
        )
        return 2 if faults else 0


@dataclass(frozen=True)
class Stats:
    """Count the discs of a data set by grade and split, as in the paper's Table 1."""

    data: tyro.conf.Positional[Path]
    """Folder of the data set."""

    def run(self) -> int:
        data = DataSet(self.data)
        groups = {split: data.split == split for split in SPLITS} | {"total": np.ones(len(data), bool)}
        table = Table("task", "grade", *groups, title=f"{len(data)} discs of {len(set(data.patient))} patients")
        table.add_row("patients", "", *(str(len(set(data.patient[group]))) for group in groups.values()))
        table.add_row("discs", "", *(str(group.sum()) for group in groups.values()), end_section=True)
        for task, labels in zip(data.tasks, data.labels.T, strict=True):
            for grade, name in enumerate(task.grades):
                counts = (_share(np.sum(labels[group] == grade), labels[group]) for group in groups.values())
                table.add_row("" if grade else task.name, name, *counts)
            labelled = (str(np.sum(labels[group] != UNLABELLED)) for group in groups.values())
            table.add_row("", "labelled", *labelled, end_section=True)
        Console().print(table)
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Draw a page of discs with the outlines of their regions and lesions, their levels and grades."""

    data: tyro.conf.Positional[Path]
    """Folder of the data set."""
    out: Path
    """The page, a PNG file."""
    discs: int = 20
    """Number of discs, drawn at random."""
    seed: int = 0
    """Seed of the draw."""

    def run(self) -> int:
        contact_sheet(DataSet(self.data), self.out, num_discs=self.discs, seed=self.seed)
        print(self.out)
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    command = tyro.cli(
        Annotated[Phantom, tyro.conf.subcommand("phantom")]
        | Annotated[Spider, tyro.conf.subcommand("spider")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Stats, tyro.conf.subcommand("stats")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")],
        args=arguments,
        prog="python -m data_prep",
        description="Make, verify and look at data sets of intervertebral discs.",
    )
    try:
        return command.run()
    except SpinejaxError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Nothing half-written stands under its name.", file=sys.stderr)
        return 130


def _share(count, labels: np.ndarray) -> str:
    labelled = np.sum(labels != UNLABELLED)
    return f"{count} ({count / labelled:.0%})" if labelled else "0"


def _report(outcome: Outcome, num_scans: int, out: Path) -> int:
    for note in outcome.notes[:_SHOWN_NOTES]:
        print(f"note: {note}", file=sys.stderr)
    if len(outcome.notes) > _SHOWN_NOTES:
        print(f"note: and {len(outcome.notes) - _SHOWN_NOTES} more", file=sys.stderr)
    for name, reason in outcome.failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    counts = ", ".join(f"{split} {outcome.discs[split]}" for split in SPLITS)
    print(f"{out}: {sum(outcome.discs.values())} discs ({counts}) of {num_scans - len(outcome.failures)} scans")
    if outcome.failures:
        print(f"{len(outcome.failures)} of {num_scans} scans failed; their reasons are above.", file=sys.stderr)
    return 2 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
