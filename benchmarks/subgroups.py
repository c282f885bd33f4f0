"""The grades of a cross-validation by level, sex, scanner and field strength, as far as SPIDER's overview tells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.graded_folds import Pool
from benchmarks.tables import show, table
from data_prep.read.csv_tables import read_table
from data_prep.sources.pooled import Patient
from spinejax.data.dataset import DataSet
from spinejax.metrics import grading

_COLUMNS = {"sex": "sex", "scanner": "Manufacturer", "field strength, T": "MagneticFieldStrength"}
_DISCS = "SPIDER T2"
_FEWEST = 40  # discs; the interval of fewer says nothing
_TASKS = ("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic")


def by_subgroup(pool: Pool, data: DataSet, patients: Mapping[str, Patient], overview: Path) -> dict[str, Any]:
    """Property → value → task → n and mean per-class accuracy, of the discs of SPIDER's T2 scans.

    Args:
        pool: the graded discs.
        data: their data set.
        patients: pseudonym → patient.
        overview: SPIDER's `overview.csv`.
    """
    rows = {row["new_file_name"]: row for _, row in read_table(overview, {"new_file_name", *_COLUMNS.values()}).rows}
    of_disc = [rows.get(f"{patients[str(name)].number}_t2", {}) for name in pool.patients]
    values = {"level": data.level[pool.rows].astype(str)}
    values |= {
        words: np.array([each.get(column, "").strip() for each in of_disc]) for words, column in _COLUMNS.items()
    }
    chosen = pool.groups == _DISCS
    return {
        words: {
            value: found
            for value in sorted(set(column[chosen]) - {""})
            if (inside := chosen & (column == value)).sum() >= _FEWEST and (found := _of(pool, inside))
        }
        for words, column in values.items()
    }


def _of(pool: Pool, inside: np.ndarray) -> dict[str, Any]:
    found = {}
    for task in pool.tasks:
        probabilities, labels, patients = pool.labelled(task, inside)
        if task.name in _TASKS and len(set(labels)) > 1:
            result = grading.evaluate_task(task, labels, probabilities, patients)
            assert result is not None
            found[task.name] = {"n": result.n, **result.estimates["mean_per_class_accuracy"].to_json()}
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """A table: mean per-class accuracy in %, a row for each value of a property, a column for each task."""
    rows = []
    for words, values in found.items():
        for value, tasks in values.items():
            cells = (
                show({name: tasks[task][name] for name in ("value", "low", "high")}) if task in tasks else "–"
                for task in _TASKS
            )
            rows.append((f"{words}: {value}", max(each["n"] for each in tasks.values()), *cells))
    return table((_DISCS, "discs", *_TASKS), rows)
