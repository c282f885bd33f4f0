"""What is found in files and folders: scans, and what is no scan, and why."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.read.patient_tags import Evidence
from data_prep.read.scan import Scan
from data_prep.read.tree import unreadable
from spinejax.errors import SpinejaxError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What headers and names say of a series; an empty field is not known."""

    plane: str = ""  # "sagittal", "axial", "coronal"
    contrast: str = ""  # as of `data_prep.read.contrast`
    description: str = ""
    date: str = ""  # YYYYMMDD
    time: str = ""  # HHMMSS
    num_slices: int = 0
    spacing_mm: tuple[float, ...] = ()  # between rows, columns, slices


@dataclass(frozen=True)
class Series:
    """A scan that was found.

    Masks, corners and label tables name it by its `key`: its SeriesInstanceUID, or its file's name without the suffix,
    after names of its folders where it takes them (`data_prep.read.patients`).
    """

    name: str  # for messages: its file, or its DICOM folder
    key: str
    patient: str  # the patient's own identifier, which enters no data set
    files: tuple[Path, ...]
    read: Callable[[], tuple[Scan, list[str]]]  # the scan, and notes on what is doubtful; picklable
    facts: Facts = Facts()
    evidence: Evidence | None = None  # of its patient; None if the patient is known
    alias: str = ""  # the SeriesInstanceUID, if this is the only part of its series that is read
    look: Callable[[], np.ndarray] | None = None  # reads its middle slice alone, where that is quicker; picklable


@dataclass(frozen=True)
class LeftOut:
    """A series, or some files, that are not read."""

    name: str  # for messages; empty if the reason says it all
    reason: str
    files: tuple[Path, ...] = ()
    facts: Facts = Facts()
    series: Series | None = None  # what could be read if the user chose it

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.name else self.reason


@dataclass
class Found:
    """The scans of some paths, and notes on what was left out or is doubtful."""

    series: list[Series] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    failed: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    patient_notes: list[str] = field(default_factory=list)  # what was assumed of the patients
    contradictions: list[str] = field(default_factory=list)  # to be settled before patients are dealt to splits
    unreadable: set[str] = field(default_factory=set)  # failed files and folders that may or may not be scans

    @property
    def failures(self) -> dict[str, str]:
        """The reasons of what has failed, by name."""
        return {one.name: one.reason for one in self.failed}

    def cannot_read(self, path: str | Path, error: SpinejaxError | OSError) -> None:
        """Record a file or folder that cannot be read."""
        self.failed.append(LeftOut(str(path), unreadable(path, error), (Path(path),)))
        self.unreadable.add(str(path))
