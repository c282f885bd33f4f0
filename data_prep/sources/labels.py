"""Label tables: a row per disc, a column per task."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.read.csv_tables import read_table, refuse, some, write_table
from data_prep.read.patient_tags import alike
from spinejax import tasks as task_tables
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS, PAPER_TASKS, UNLABELLED, Task

_KEYS = ("patient", "scan", "level")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Column:
    """A column of grades: the task it is for, and the label that each of its values stands for."""

    task: Task
    label_of_value: Mapping[str, int]


@dataclass(frozen=True)
class Labels:
    """A label table: the tasks that are its columns, and (patient, scan) → level → task → label."""

    tasks: tuple[Task, ...]
    rows: Mapping[tuple[str, str], dict[str, dict[str, int]]]
    splits: Mapping[str, str] = field(default_factory=dict)  # patient → split, where the table says
    notes: Sequence[str] = ()

    def of_scans(self, scans: Sequence[tuple[str, str]]) -> tuple[list[dict[str, dict[str, int]]], list[str]]:
        """Each scan's labels by level, and the table's patients and scans that match none.

        A row for the scan overrides one for all of the patient's scans. A row may name a scan by the end of its key:
        patient P1 and scan T2 stand for `P1/T2`; or a part of a DICOM series by the series' UID.

        Args:
            scans: patient and key of each.

        Raises:
            SpinejaxError: a row could be of two scans, or a scan is named in two ways.
        """
        of_patient: dict[str, list[str]] = {}
        for patient, key in scans:
            of_patient.setdefault(patient, []).append(key)
        labels: dict[str, dict[str, dict[str, int]]] = {key: {} for _, key in scans}
        unused, rows_of = [], dict[str, str]()
        for (patient, scan), levels in sorted(self.rows.items()):  # rows for all scans come first
            keys = of_patient.get(patient, [])
            named = [key for key in keys if key == scan] or [
                key for key in keys if key.endswith(f"/{scan}") or ("." in scan and key.startswith(f"{scan}/"))
            ]
            if scan and len(named) > 1:
                raise SpinejaxError(
                    f"--labels: scan {scan!r} of patient {patient!r} could be {some(named)}. Write which."
                )
            for key in named if scan else keys:
                if scan and scan != rows_of.setdefault(key, scan):
                    raise SpinejaxError(
                        f"--labels: scan {key!r} has rows as {rows_of[key]!r} and as {scan!r}. Write one."
                    )
                labels[key].update(levels)
            if not (named if scan else keys):
                unused.append(f"{patient} {scan}".strip())
        return [labels[key] for _, key in scans], unused

    def misspelt(self, patients: Iterable[str]) -> list[str]:
        """Patients of the table that differ from one of these by case, blanks or leading zeros alone, in words."""
        known = {alike(patient): patient for patient in patients}
        named = dict.fromkeys(patient for patient, _ in self.rows)
        found = ((name, known.get(alike(name))) for name in named if name not in known.values())
        return [f"{patient} for {name}" for name, patient in found if patient]


def read_tasks(path: Path | None) -> tuple[Task, ...]:
    """A task table, as JSON: `[{"name": "pfirrmann", "grades": ["1", "2", "3", "4", "5"]}, …]`. None: the paper's.

    Raises:
        SpinejaxError: the file is missing or not a task table.
    """
    if path is None:
        return PAPER_TASKS
    try:
        return task_tables.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise SpinejaxError(f"--tasks {path}: not a readable JSON file ({error}).") from error
    except SpinejaxError as error:
        raise SpinejaxError(f"--tasks {path}: {error}") from error


def read_labels(path: Path, tasks: Sequence[Task]) -> Labels:
    """Read a label table with the columns patient, level and one or more tasks; and, if given, scan and split.

    A cell holds the name of a grade, or is empty where the disc was not graded. An empty `scan` means all of the
    patient's scans. `split` is train, validation or test, the same for all rows of a patient that have one; a row with
    neither level nor grade names the split of a patient without grades.

    Raises:
        SpinejaxError: the table is missing or has faults: columns, levels, grades, a row twice, a patient in two
            splits. All are listed.
    """
    table = read_table(path, ("patient", "level"), ("scan", "split", *(task.name for task in tasks)))
    columns = {
        task.name: Column(task, {grade: label for label, grade in enumerate(task.grades)})
        for task in tasks
        if task.name in table.columns
    }
    known = f"{', '.join(task.name for task in tasks)} (--tasks names others)"
    unknown = [name for name in table.columns if name not in columns and name not in (*_KEYS, "split")]
    faults = [f"unknown column {name!r}, expected a task: {known}" for name in unknown]
    if not columns:
        faults.append(f"no column of a task: {known}")
    if not table.rows:
        faults.append("no row")
    rows: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    splits: dict[str, str] = {}
    for line, row in table.rows:
        patient, scan = row["patient"], row.get("scan", "")
        level = level_named(row["level"])
        if not patient:
            faults.append(f"line {line}: no patient")
        names_split_only = row.get("split") and not any(row[name] for name in ("level", *columns))
        if level is None and not names_split_only:
            faults.append(f"line {line}: level {row['level']!r}, expected one of {', '.join(LEVELS)}")
        elif level is not None:
            of_scan = rows.setdefault((patient, scan), {})
            if level in of_scan:
                faults.append(f"line {line}: {' '.join(filter(None, (patient, scan, level)))} occurs twice")
            of_scan[level] = labels_of_row(row, columns, line, faults)
        if written := row.get("split"):
            split = _SPLITS.get(written.lower())
            if split is None:
                faults.append(f"line {line}: split {written!r}, expected train, validation or test")
            elif splits.setdefault(patient, split) != split:
                faults.append(f"line {line}: patient {patient} is in {splits[patient]} and in {split}")
    refuse(path, faults)
    return Labels(tuple(column.task for column in columns.values()), rows, splits, table.notes)


def level_named(text: str) -> str | None:
    """A level however it is written: `L4-L5`, `l4/5`, `L4_L5`, `L5-S`, `Th12–L1`; None if it is none of `LEVELS`."""
    match = re.fullmatch(r"(TH?|L)(\d{1,2})[\s\-‐‑‒–—−/_]*(TH?|L|S)?(\d{0,2})", text.upper())
    if not match:
        return None
    above, number, below, next_number = match.groups()
    level = f"{above[0]}{number}-{(below or above)[0]}{next_number or ('1' if below == 'S' else '')}"
    return level if level in LEVELS else None


def labels_of_row(
    row: Mapping[str, str], columns: Mapping[str, Column], line: int, faults: list[str]
) -> dict[str, int]:
    """Task → label of one row; an empty cell is a disc that was not graded. Unknown values are added to `faults`."""
    labels = {}
    for name, column in columns.items():
        value = re.sub(r"(?<=\d)[.,]0+$", "", row[name])  # spreadsheets write 2.0, or 2,0, for 2
        value = row[name] if row[name] in column.label_of_value else value
        if value in column.label_of_value:
            labels[column.task.name] = column.label_of_value[value]
        elif value:
            faults.append(f"line {line}: {name} {row[name]!r}, expected {', '.join(column.label_of_value)}")
    return labels


def write_labels(path: Path, rows: Iterable[tuple[str, str, str, Mapping[str, int]]], tasks: Sequence[Task]) -> None:
    """Write (patient, scan, level, task → label) as a table that `read_labels` reads. An unlabelled cell is empty."""
    cells = [
        [*keys, *(task.grades[labels[task.name]] if labels.get(task.name, UNLABELLED) >= 0 else "" for task in tasks)]
        for *keys, labels in rows
    ]
    write_table(path, [*_KEYS, *(task.name for task in tasks)], cells)
