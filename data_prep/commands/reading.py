"""Options of the commands that read scans, and the jobs that they give."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.commands.printing import PROGRESS
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.read.found import Found
from data_prep.read.header_cache import HeaderCache
from data_prep.read.inventory import (
    choose,
    describe_volumes,
    headers_beside,
)
from data_prep.read.series import doubt_again
from data_prep.read.series_rule import one_of_each_patient
from data_prep.sources.labels import Labels
from data_prep.sources.scan_files import Cutting, scan_jobs
from data_prep.sources.search import search
from spinejax.files.addresses import Folder

DataFolder = Annotated[
    tyro.conf.Positional[Folder],
    tyro.conf.arg(help="Folder of the data set, also in a bucket (s3://…, gs://…; extra cloud)."),
]
CacheFolder = Annotated[
    Path | None,
    tyro.conf.arg(help="Folder for copies of what is in a bucket. Default: ~/.cache/spinejax.", name="cache-dir"),
]


@dataclass(frozen=True, kw_only=True)
class Reading:
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
            console=PROGRESS,
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
            doubt_again(found, choose(found, inventory, cache.changed), self.paths, self.patients_by)
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
