"""The Lumbar Spine MRI Dataset (Sudirman et al., doi:10.17632/k57fr854j2) with the grades and boxes of LSMA-PQR
(doi:10.17632/p3r4xd2488.1), as jobs.

ROOT holds `images/`, one-slice T2 volumes named `<patient>_t2.mha` or, for a patient's further scans,
`<patient>_t2_2.mha`; `labels.csv`, the Pfirrmann grades of the three lowest discs; and `boxes.csv`, a loose upright box
for each disc and finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.detector.weights import member_without
from data_prep.read.csv_tables import read_table, refuse
from data_prep.read.found import Facts, Series
from data_prep.read.volume_files import read_volume
from data_prep.sources.labels import Column, labels_of_row, level_named
from data_prep.sources.scan_files import Cutting, job_of
from data_prep.sources.spider import COLUMNS
from spinejax.tasks import Task

SOURCE = "sudirman"

_TASKS = {column.task.name: column.task for column in COLUMNS.values()}
DEGENERATED = Task("degenerated", ("absent", "present"))
STENOSIS = Task("stenosis", ("absent", "present"))
SUDIRMAN_TASKS = (_TASKS["pfirrmann"], _TASKS["bulging"], _TASKS["spondylolisthesis"], DEGENERATED, STENOSIS)
"""The first three are SPIDER's own tasks, graded by other readers."""

_DISC, _CANAL = "disc", "canal"
_FINDINGS = {
    "Normal IVD": (_DISC, {"bulging": 0, "degenerated": 0}),
    # The box of a bulge does not say whether its disc is degenerated, nor the reverse.
    "Degenerative Disc Disease (DDD)": (_DISC, {"degenerated": 1}),
    "Lumbar Disc Bulge (LDB)": (_DISC, {"bulging": 1}),
    "Thoracic Disc Bulge (TDB)": (_DISC, {"bulging": 1}),
    "Spondylolisthesis": (_CANAL, {"spondylolisthesis": 1}),
    "Spinal Stenosis (SS)": (_CANAL, {"stenosis": 1}),
}
"""Class of a box → what it encloses, and the labels of that disc."""

_EDGES = ("row_min", "row_max", "col_min", "col_max")


@dataclass(frozen=True)
class _Box:
    finding: str
    level: str | None
    rows: tuple[float, float]


def sudirman_jobs(root: Path, *, pseudonyms: Pseudonyms, cutting: Cutting) -> list[Job]:
    """One job for each scan that has boxes, all in the split train.

    The vertebrae are detected, by the network that has not seen the patient. Scans whose levels it doubts are left out.

    Args:
        root: the folder of the dataset.
        pseudonyms: for patients, as `sudirman/<patient>`, and scans.
        cutting: how discs are found and cut out.

    Raises:
        SpinejaxError: a table is missing or has faults.
    """
    scans = read_sudirman(root)
    jobs = []
    for name, (patient, labels) in scans.items():
        path = root / "images" / f"{name}.mha"
        key = f"{SOURCE}/{name}"
        series = Series(
            path.name, key, f"{SOURCE}/{patient}", (path,), partial(read_volume, path), Facts(contrast="t2")
        )
        jobs.append(
            job_of(
                series,
                None,
                cutting,
                labels=labels,
                split="train",
                pseudonyms=pseudonyms,
                refuse_doubtful=True,
                member=member_without(SOURCE, patient),
                source=SOURCE,
            )
        )
    return jobs


def read_sudirman(root: Path) -> dict[str, tuple[str, dict[str, dict[str, int]]]]:
    """Scan → its patient, and level → task → label, of every scan with boxes.

    A disc with a box of its own counts as free of stenosis and of slipping unless a box says otherwise. A box of the
    canal belongs to the disc whose rows are nearest.

    Raises:
        SpinejaxError: a table is missing or has faults; all are listed.
    """
    table, faults = root / "boxes.csv", list[str]()
    boxes: dict[str, list[_Box]] = {}
    patients: dict[str, str] = {}
    for line, row in read_table(table, ("patient", "scan", "class", "level", *_EDGES)).rows:
        if row["class"] not in _FINDINGS:
            faults.append(f"line {line}: class {row['class']!r}, expected one of {', '.join(_FINDINGS)}")
            continue
        try:
            rows = float(row["row_min"]), float(row["row_max"])
        except ValueError as error:
            faults.append(f"line {line}: {error}, expected numbers")
            continue
        boxes.setdefault(row["scan"], []).append(_Box(row["class"], level_named(row["level"]), rows))
        if patients.setdefault(row["scan"], row["patient"]) != row["patient"]:
            faults.append(f"line {line}: scan {row['scan']} has two patients")
    refuse(table, faults)
    grades = _pfirrmann(root / "labels.csv")
    return {
        scan: (patients[scan], _with_grades(_labels_of(mine), grades.get(scan, {}))) for scan, mine in boxes.items()
    }


def _labels_of(boxes: Sequence[_Box]) -> dict[str, dict[str, int]]:
    """Level → task → label, from the boxes of one scan."""
    labels: dict[str, dict[str, int]] = {}
    for box in boxes:
        if box.level and _FINDINGS[box.finding][0] == _DISC:
            labels.setdefault(box.level, {"stenosis": 0, "spondylolisthesis": 0}).update(_FINDINGS[box.finding][1])
    named = [box for box in boxes if box.level in labels]
    middles = np.array([np.mean(box.rows) for box in named])
    for box in boxes:
        if named and (box.level is None or _FINDINGS[box.finding][0] == _CANAL):
            level = box.level if box.level in labels else named[_nearest(middles, box)].level
            labels[str(level)].update(_FINDINGS[box.finding][1])
    return labels


def _nearest(middles: Float[np.ndarray, " N"], box: _Box) -> int:
    return int(np.abs(middles - np.mean(box.rows)).argmin())


def _pfirrmann(table: Path) -> dict[str, dict[str, int]]:
    """Scan → level → Pfirrmann label."""
    task = _TASKS["pfirrmann"]
    column = {task.name: Column(task, {grade: label for label, grade in enumerate(task.grades)})}
    faults, grades = list[str](), dict[str, dict[str, int]]()
    for line, row in read_table(table, ("patient", "scan", "level", task.name)).rows:
        level = level_named(row["level"])
        if level is None:
            faults.append(f"line {line}: level {row['level']!r}, expected a level such as L4-L5")
        elif level in grades.setdefault(row["scan"], {}):
            faults.append(f"line {line}: {row['scan']} {level} occurs twice")
        else:
            for label in labels_of_row(row, column, line, faults).values():  # none for an empty cell
                grades[row["scan"]][level] = label
    refuse(table, faults)
    return grades


def _with_grades(labels: dict[str, dict[str, int]], grades: Mapping[str, int]) -> dict[str, dict[str, int]]:
    for level, grade in grades.items():
        labels.setdefault(level, {})["pfirrmann"] = grade
    return labels
