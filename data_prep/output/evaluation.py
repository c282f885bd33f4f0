"""What `evaluate.py` left, read back: grades from `predictions.csv`, maps from `hotspots/hotspots.h5`.

An evaluation may come from another machine: nothing in its files is trusted, and links to other files are refused.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import LEVELS, Task, from_json

PREDICTIONS, RESULTS, MAPS = "predictions.csv", "results.json", Path("hotspots", "hotspots.h5")


@dataclass(frozen=True)
class GradedDisc:
    """One row of `predictions.csv`: a disc by its pseudonyms, and task → grade → probability."""

    patient: str
    scan: str
    level: str
    probabilities: dict[str, dict[str, float]]

    def grade(self, task: str) -> str:
        """The most probable grade."""
        return max(self.probabilities[task], key=self.probabilities[task].__getitem__)


@dataclass(frozen=True, eq=False)
class DiscMaps:
    """A disc's hotspots: its tasks, whose grade each traces back, maps float32[T, 112, 224, 9], and their place.

    `affine` is float64[4, 4]: (row, column, slice, 1) of a map → patient space, LPS, mm.
    """

    tasks: tuple[Task, ...]
    grades: tuple[str, ...]
    maps: np.ndarray
    affine: np.ndarray


def read_predictions(folder: Path) -> list[GradedDisc]:
    """Every disc of an evaluation.

    Raises:
        SpinejaxError: there is no `predictions.csv`, or it is not one.
    """
    path = folder / PREDICTIONS
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            columns = _columns(next(table, []), path)
            return [_disc(line, columns, path, number) for number, line in enumerate(table, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpinejaxError(
            f"{path}: cannot be read ({error}). Give the folder that `evaluate.py` wrote to with --out."
        ) from error


def _columns(header: list[str], path: Path) -> dict[str, dict[str, int]]:
    """Task → grade → the column of its probability. A task's columns stand together, its grade's name before them."""
    if header[:3] != ["patient", "scan", "level"]:
        raise SpinejaxError(
            f"{path}: begins with {header[:3]}; expected patient, scan, level, as evaluate.py writes it."
        )
    columns: dict[str, dict[str, int]] = {}
    for place, name in enumerate(header):
        if name.endswith("_grade"):
            columns[name.removesuffix("_grade")] = {}
        elif columns and name.startswith(prefix := f"{list(columns)[-1]}_p_"):
            columns[list(columns)[-1]][name.removeprefix(prefix)] = place
    if not columns or not all(columns.values()):
        raise SpinejaxError(f"{path}: has no task with its grades' probabilities.")
    return columns


def _disc(line: list[str], columns: dict[str, dict[str, int]], path: Path, number: int) -> GradedDisc:
    try:
        probabilities = {
            task: {grade: float(line[place]) for grade, place in grades.items()} for task, grades in columns.items()
        }
        if line[2] not in LEVELS or not all(0 <= p <= 1 for each in probabilities.values() for p in each.values()):
            raise ValueError("no such level, or a probability out of range")
    except (ValueError, IndexError) as error:
        raise SpinejaxError(f"{path}, line {number}: {error}. Evaluate again.") from error
    return GradedDisc(line[0], line[1], line[2], probabilities)


def how_it_was_made(folder: Path) -> list[str]:
    """What a reader of the grades must know of the network: a few short lines, and a digest of the grades.

    Raises:
        SpinejaxError: `results.json` is missing or damaged.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_bytes())
        known = [f"{name} {results[name]}" for name in ("step", "num_views", "average")]
        return [*known, f"grades {hashlib.sha256((folder / PREDICTIONS).read_bytes()).hexdigest()[:16]}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpinejaxError(f"{path}: missing or damaged ({error}). Evaluate again.") from error


def read_maps(folder: Path) -> Iterator[tuple[str, str, DiscMaps]]:
    """Scan, level and maps of every disc of an evaluation, one at a time; nothing if it made no hotspots.

    Raises:
        SpinejaxError: the file is damaged, or not what `evaluate.py --hotspots` writes.
    """
    path = folder / MAPS
    if not path.is_file():
        return
    try:
        with h5py.File(path, "r") as file:
            tasks = from_json(json.loads(file.attrs["tasks"]))
            _check_layout(file, path, len(tasks))
            for place in range(len(file["map"])):
                step = file["step"][place][:, None, None, None]
                grades = [task.grades[grade] for task, grade in zip(tasks, file["grade"][place], strict=True)]
                maps = file["map"][place].astype(np.float32) * step
                name = {column: file[column][place].decode("ascii") for column in ("scan", "level")}
                yield name["scan"], name["level"], DiscMaps(tasks, tuple(grades), maps, file["affine"][place])
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise SpinejaxError(f"{path}: damaged ({str(error).splitlines()[0]}). Evaluate again.") from error


def _check_layout(file: h5py.File, path: Path, num_tasks: int) -> None:
    shapes = {"map": (num_tasks, *WINDOW_SHAPE), "step": (num_tasks,), "grade": (num_tasks,), "affine": (4, 4)}
    for name in (*shapes, "scan", "level"):
        column = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(column, h5py.Dataset) or column.is_virtual or column.external:
            raise SpinejaxError(f"{path}: {name} is missing, or keeps its data in other files. Refused.")
        if column.shape != (len(file["map"]), *shapes.get(name, ())):
            raise SpinejaxError(f"{path}: {name} is {list(column.shape)}. Not what evaluate.py --hotspots writes.")
