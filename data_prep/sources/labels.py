"""Label tables: a row per disc, a column per task."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.read.csv_tables import read_table, refuse, write_table
from spinejax import tasks as task_tables
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS, PAPER_TASKS, UNLABELLED, Task

_KEYS = ("patient", "scan", "level")


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

    def of(self, patient: str, scan: str) -> dict[str, dict[str, int]]:
        """A scan's labels by level. A row for the scan overrides one for all of the patient's scans."""
        return {**self.rows.get((patient, ""), {}), **self.rows.get((patient, scan), {})}

    def without_scan(self, scans: Sequence[tuple[str, str]]) -> list[str]:
        """The table's (patient, scan) that match none of these."""
        known = {*scans, *((patient, "") for patient, _ in scans)}
        return [" ".join(key).strip() for key in self.rows if key not in known]


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
    """Read a label table with the columns patient, scan, level and one or more tasks.

    A cell holds the name of a grade, or is empty where the disc was not graded. An empty `scan` means all of the
    patient's scans.

    Raises:
        SpinejaxError: the table is missing or has faults: columns, levels, grades, a row twice. All are listed.
    """
    table = read_table(path, _KEYS)
    columns = {
        task.name: Column(task, {grade: label for label, grade in enumerate(task.grades)})
        for task in tasks
        if task.name in table.columns
    }
    known = f"{', '.join(task.name for task in tasks)} (--tasks names others)"
    unknown = [name for name in table.columns if name not in columns and name not in _KEYS]
    faults = [f"unknown column {name!r}, expected a task: {known}" for name in unknown]
    if not columns:
        faults.append(f"no column of a task: {known}")
    rows: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for line, row in table.rows:
        if not row["patient"]:
            faults.append(f"line {line}: no patient")
        if row["level"] not in LEVELS:
            faults.append(f"line {line}: level {row['level']!r}, expected one of {', '.join(LEVELS)}")
        of_scan = rows.setdefault((row["patient"], row["scan"]), {})
        if row["level"] in of_scan:
            faults.append(f"line {line}: {' '.join(row[key] for key in _KEYS if row[key])} occurs twice")
        of_scan[row["level"]] = labels_of_row(row, columns, line, faults)
    refuse(path, faults)
    return Labels(tuple(column.task for column in columns.values()), rows)


def labels_of_row(
    row: Mapping[str, str], columns: Mapping[str, Column], line: int, faults: list[str]
) -> dict[str, int]:
    """Task → label of one row; an empty cell is a disc that was not graded. Unknown values are added to `faults`."""
    labels = {}
    for name, column in columns.items():
        if row[name] in column.label_of_value:
            labels[column.task.name] = column.label_of_value[row[name]]
        elif row[name]:
            faults.append(f"line {line}: {name} {row[name]!r}, expected {', '.join(column.label_of_value)}")
    return labels


def write_labels(path: Path, rows: Iterable[tuple[str, str, str, Mapping[str, int]]], tasks: Sequence[Task]) -> None:
    """Write (patient, scan, level, task → label) as a table that `read_labels` reads. An unlabelled cell is empty."""
    cells = [
        [*keys, *(task.grades[labels[task.name]] if labels.get(task.name, UNLABELLED) >= 0 else "" for task in tasks)]
        for *keys, labels in rows
    ]
    write_table(path, [*_KEYS, *(task.name for task in tasks)], cells)
