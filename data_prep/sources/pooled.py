"""SPIDER and Sudirman's data set as one: the union of their tasks, and splits that never change.

A patient's fold is a property of his id (`cross_fitting`), and so is whether he chooses the best epoch. So any subset
of the patients, on any machine, has the same folds, and they are also those of the detectors.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.read.csv_tables import some
from data_prep.sources import spider, sudirman
from data_prep.sources.scan_files import Cutting
from spinejax.errors import SpinejaxError

POOLED_TASKS = (*spider.SPIDER_TASKS, *(task for task in sudirman.SUDIRMAN_TASKS if task not in spider.SPIDER_TASKS))
ONE_IN = 8
"""One patient in so many outside the test fold chooses the best epoch."""


class Patient(NamedTuple):
    """A patient by the source's own number."""

    source: str
    number: str

    @classmethod
    def parse(cls, name: str) -> "Patient":
        """Read `spider/7`. Raises SpinejaxError for another form."""
        source, _, number = name.partition("/")
        if source not in (spider.SOURCE, sudirman.SOURCE) or not number:
            raise SpinejaxError(f"patient {name!r}: expected {spider.SOURCE}/NUMBER or {sudirman.SOURCE}/NUMBER.")
        return cls(source, number)


def pooled_jobs(
    spider_root: Path,
    sudirman_root: Path,
    *,
    series: Sequence[str],
    held_out: Collection[Patient],
    pseudonyms: Pseudonyms,
    cutting: Cutting,
) -> tuple[list[Job], list[str]]:
    """The jobs of both sources, and notes. SPIDER's official validation patients are left out: they are a final test.

    The test split has the patients held out. Of the others, one in eight is in validation, all others are in train.

    Args:
        spider_root, sudirman_root: the folders of the data sets.
        series: of SPIDER, as for `spider_jobs`.
        held_out: patients that no network is to see.
        pseudonyms, cutting: as for `spider_jobs`.

    Raises:
        SpinejaxError: as `spider_jobs` and `sudirman_jobs`; nobody has the number of a patient held out.
    """
    jobs, notes = spider.spider_jobs(
        spider_root,
        series=series,
        seed=0,
        pseudonyms=pseudonyms,
        slices=cutting.slices,
        detect_missing=True,
        max_doubt=cutting.max_doubt,
        subset="training",
    )
    jobs += sudirman.sudirman_jobs(sudirman_root, pseudonyms=pseudonyms, cutting=cutting)
    patients = patients_of(spider_root, sudirman_root, pseudonyms)
    if unknown := sorted("/".join(patient) for patient in set(held_out) - set(patients.values())):
        raise SpinejaxError(f"--held-out {some(unknown)}: no such patient in the data sets.")
    splits = splits_of(patients, held_out=held_out)
    return [replace(job, split=splits[job.patient]) for job in jobs], notes


def patients_of(spider_root: Path, sudirman_root: Path, pseudonyms: Pseudonyms) -> dict[str, Patient]:
    """Pseudonym → the patient, for everybody with an image or a box in either data set."""
    images = spider_root.glob("images/*_*.mha")
    numbers = {path.name.partition("_")[0] for path in images if path.name[0] != "."}
    found = {pseudonyms.patient(number): Patient(spider.SOURCE, number) for number in sorted(numbers)}
    numbers = {patient for patient, _ in sudirman.read_sudirman(sudirman_root).values()}
    names = (Patient(sudirman.SOURCE, number) for number in sorted(numbers))
    return found | {pseudonyms.patient("/".join(name)): name for name in names}


def splits_of(
    patients: Mapping[str, Patient], *, fold: int | None = None, held_out: Collection[Patient] = ()
) -> dict[str, str]:
    """Pseudonym → split.

    Args:
        patients: pseudonym → patient.
        fold: whose patients are the test split, in [0, `NUM_FOLDS`); None for the patients held out alone.
        held_out: patients who are in no other split than test.
    """

    def split(patient: Patient) -> str:
        if patient in held_out or fold_of(*patient) == fold:
            return "test"
        digest = hashlib.sha256(f"validation/{'/'.join(patient)}".encode()).digest()
        return "validation" if int.from_bytes(digest[:8], "big") % ONE_IN == 0 else "train"

    return {pseudonym: split(patient) for pseudonym, patient in patients.items()}
