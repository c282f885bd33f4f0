"""Label tables: a row a disc, a column a task."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.read.tables import read_rows, refuse
from spinejax import tasks as task_tables
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS, PAPER_TASKS, Task

_KEYS = ("patient", "scan", "level")


@dataclass(frozen=True)
class Labels:
    """What a label table says: the tasks that are its columns, and (patient, scan) → level → task → label."""

    tasks: tuple[Task, ...]
    rows: Mapping[tuple[str, str], dict[str, dict[str, int]]]

    def of(self, patient: str, scan: str) -> dict[str, dict[str, int]]:
        """A scan's labels by level. A row that names the scan goes before one for all of the patient's scans."""
        return {**self.rows.get((patient, ""), {}), **self.rows.get((patient, scan), {})}

    def without_scan(self, scans: Sequence[tuple[str, str]]) -> list[str]:
        """The table's (patient, scan) that fit none of these."""
        known = {*scans, *((patient, "") for patient, _ in scans)}
        return [" ".join(key).strip() for key in self.rows if key not in known]


def read_tasks(path: Path | None) -> tuple[Task, ...]:
    """A task table, as JSON: `[{"name": "pfirrmann", "grades": ["1", "2", "3", "4", "5"]}, …]`. None: the paper's.

    Raises:
        SpinejaxError: the file is missing or no task table.
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
    """Read a label table with the columns patient, scan, level and one or more tasks.

    A cell holds the name of a grade, or nothing where the disc was not graded. An empty `scan` is for all of the
    patient's scans.

    Raises:
        SpinejaxError: the table is missing or has faults: columns, levels, grades, a row twice. All are listed.
    """
    names = {task.name: task for task in tasks}
    columns = _columns(path)
    unknown = [name for name in columns if name not in names and name not in _KEYS]
    known = f"{', '.join(names)} (--tasks names others)"
    faults = [f"unknown column {name!r}, expected a task: {known}" for name in unknown]
    if not set(columns) & set(names):
        faults.append(f"no column of a task: {known}")
    rows: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for line, row in read_rows(path, set(_KEYS), exact=False):
        if not row["patient"]:
            faults.append(f"line {line}: no patient")
        if row["level"] not in LEVELS:
            faults.append(f"line {line}: level {row['level']!r}, expected one of {', '.join(LEVELS)}")
        labels = {}
        for name in columns:
            if name in names and row[name]:
                if row[name] in names[name].grades:
                    labels[name] = names[name].grades.index(row[name])
                else:
                    faults.append(f"line {line}: {name} {row[name]!r}, expected {', '.join(names[name].grades)}")
        of_scan = rows.setdefault((row["patient"], row["scan"]), {})
        if row["level"] in of_scan:
            faults.append(
                f"line {line}: {row['patient']} {row['scan']} {row['level']} is there twice".replace("  ", " ")
            )
        of_scan[row["level"]] = labels
    refuse(path, faults)
    return Labels(tuple(task for task in tasks if task.name in columns), rows)


def write_labels(path: Path, rows: Sequence[tuple[str, str, str, Mapping[str, int]]], tasks: Sequence[Task]) -> None:
    """Write (patient, scan, level, task → label) as a table that `read_labels` reads; an unlabelled cell is empty."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*_KEYS, *(task.name for task in tasks)])
        for patient, scan, level, labels in rows:
            cells = [labels.get(task.name, task_tables.UNLABELLED) for task in tasks]
            graded = (task.grades[cell] if cell >= 0 else "" for task, cell in zip(tasks, cells, strict=True))
            table.writerow([patient, scan, level, *graded])


def _columns(path: Path) -> list[str]:
    if not path.is_file():
        raise SpinejaxError(f"--labels {path}: no such file.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            columns = [name.strip() for name in next(csv.reader(file, strict=True), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpinejaxError(f"{path}: not a comma-separated UTF-8 table ({error}).") from error
    refuse(path, [f"column {name!r} is there twice" for name in dict.fromkeys(columns) if columns.count(name) > 1])
    return columns
