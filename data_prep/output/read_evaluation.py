"""The results of `evaluate.py`, read back: grades from `predictions.csv`, maps from `hotspots/hotspots.h5`.

An evaluation may come from another machine: its files are not trusted, and links to other files are refused.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float

from data_prep.read.csv_tables import read_table
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import MANIFEST
from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE, window_affine
from spinejax.tasks import LEVELS, Task, from_json

PREDICTIONS, RESULTS, MAPS = "predictions.csv", "results.json", Path("hotspots", "hotspots.h5")


@dataclass(frozen=True)
class GradedDisc:
    """One row of `predictions.csv`: a disc by its pseudonyms, task → its grade, and task → grade → probability."""

    patient: str
    scan: str
    level: str
    grades: dict[str, str]
    probabilities: dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class DiscMaps:
    """A disc's hotspots: per task the grade that was explained, and its map.

    `affine` takes (row, column, slice, 1) of a map to patient space, LPS, mm.
    """

    tasks: tuple[Task, ...]
    grades: tuple[str, ...]
    maps: Float[np.ndarray, "T 112 224 9"]
    affine: Float[np.ndarray, "4 4"]


def read_predictions(folder: Path) -> list[GradedDisc]:
    """Every disc of an evaluation. Raises SpinejaxError if `predictions.csv` is missing or damaged."""
    path = folder / PREDICTIONS
    table = read_table(path, ("patient", "scan", "level"))
    columns: dict[str, dict[str, str]] = {}  # task → grade → the column of its probability, somewhere after TASK_grade
    task = ""
    for name in table.columns:
        if name.endswith("_grade"):
            task = name.removesuffix("_grade")
            columns[task] = {}
        elif task and name.startswith(f"{task}_p_"):
            columns[task][name.removeprefix(f"{task}_p_")] = name
    if not columns or not all(columns.values()):
        raise SpinejaxError(f"{path}: has no task with its grades' probabilities.")
    discs = []
    for line, row in table.rows:
        try:
            chances = {
                task: {grade: float(row[name]) for grade, name in each.items()} for task, each in columns.items()
            }
            if row["level"] not in LEVELS or not all(0 <= p <= 1 for each in chances.values() for p in each.values()):
                raise ValueError("no such level, or a probability out of range")
            grades = {task: row[f"{task}_grade"] for task in columns}
            if unknown := next((task for task in columns if grades[task] not in columns[task]), None):
                raise ValueError(f"{unknown} {grades[unknown]!r} has no probability")
        except ValueError as error:
            raise SpinejaxError(f"{path}, line {line}: {error}. Evaluate again.") from error
        discs.append(GradedDisc(row["patient"], row["scan"], row["level"], grades, chances))
    return discs


def provenance_of(folder: Path) -> list[str]:
    """What a reader of the grades must know: checkpoint, views and averaging, the rater, and a digest of the grades.

    Raises:
        SpinejaxError: `results.json` is missing or damaged.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_bytes())
        known = [f"{name} {results[name]}" for name in ("step", "num_views", "average")]
        known += [f"{name} {results[name]}" for name in ("decided_by", "rater") if results.get(name)]
        return [*known, f"grades {hashlib.sha256((folder / PREDICTIONS).read_bytes()).hexdigest()[:16]}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpinejaxError(f"{path}: missing or damaged ({error}). Evaluate again.") from error


def read_places(folder: Path) -> dict[tuple[str, str], Float[np.ndarray, "4 4"]]:
    """(scan, level) → affine of the network's window, as `DiscMaps.affine`, of an evaluation that has its discs.

    Only one of `evaluate.py --scan` has them; of others nothing is returned. Raises SpinejaxError: they are damaged.
    """
    if not (folder / "discs" / MANIFEST).is_file():
        return {}
    data = DataSet(folder / "discs")
    discs = zip(data.scan.tolist(), data.level.tolist(), data.affine, strict=True)
    return {(scan, level): window_affine(affine) for scan, level, affine in discs}


def read_maps(folder: Path) -> Iterator[tuple[str, str, DiscMaps]]:
    """Scan, level and maps of every disc, one at a time; nothing if the evaluation made no hotspots.

    Raises:
        SpinejaxError: the file is damaged, or not of `evaluate.py --hotspots`.
    """
    path = folder / MAPS
    if not path.is_file():
        return
    try:
        with h5py.File(path, "r") as file:
            tasks = from_json(json.loads(file.attrs["tasks"]))
            _check_layout(file, path, len(tasks))
            for row in range(len(file["map"])):
                grades = [task.grades[grade] for task, grade in zip(tasks, file["grade"][row], strict=True)]
                maps = file["map"][row].astype(np.float32) * file["step"][row][:, None, None, None]
                scan, level = (file[name][row].decode("ascii") for name in ("scan", "level"))
                yield scan, level, DiscMaps(tasks, tuple(grades), maps, file["affine"][row])
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise SpinejaxError(f"{path}: damaged ({str(error).splitlines()[0]}). Evaluate again.") from error


def _check_layout(file: h5py.File, path: Path, num_tasks: int) -> None:
    shapes = {"map": (num_tasks, *WINDOW_SHAPE), "step": (num_tasks,), "grade": (num_tasks,), "affine": (4, 4)}
    for name in (*shapes, "scan", "level"):
        column = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(column, h5py.Dataset) or column.is_virtual or column.external:
            raise SpinejaxError(f"{path}: {name} is missing, or keeps its data in other files. Refused.")
        if column.shape != (len(file["map"]), *shapes.get(name, ())):
            raise SpinejaxError(f"{path}: {name} is {list(column.shape)}. Evaluate again with --hotspots.")
