"""Evaluations read back: `predictions.csv` with `results.json` beside it. Neither is trusted."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import TypedDict

from spinejax.errors import SpinejaxError
from spinejax.files import lock
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of
from spinejax.files.json_files import read_json
from spinejax.files.mirror import Mirror, mirror_of
from spinejax.files.stores import Address
from spinejax.tasks import UNLABELLED, Task

PREDICTIONS, RESULTS = "predictions.csv", "results.json"
_DISC = ("patient", "scan", "level")


class _Network(TypedDict, total=False):
    name: str
    weights: str


class About(TypedDict, total=False):
    """What `results.json` says of an evaluation; a reader's table has none of it."""

    split: str
    num_views: int
    average: str
    rater: str | None
    network: _Network
    step: int
    data: str


@dataclass(frozen=True, eq=False)
class Predictions:
    """The graded discs of one evaluation, or of a reader, in the order of the table."""

    path: Path
    about: About
    digest: str
    """Of the data set; of the table itself, where no `results.json` tells."""
    patients: Sequence[str]
    discs: Mapping[tuple[str, str], int]
    """(scan, level) → its place in the table."""
    grades_of: Mapping[str, tuple[str, ...]]
    """Task → its grades in order; none for a table without probabilities."""
    given: Mapping[str, Sequence[str]]
    """Task → the grade of each disc; "" where it was not graded."""
    labels: Mapping[str, Sequence[str]]
    """Task → the rater's grade of each disc; "" where there is none."""
    confidence: Mapping[str, Float[np.ndarray, "N"]]
    """Task → the given grade's probability; none for a table without probabilities."""

    @property
    def name(self) -> str:
        """Who graded, without a path."""
        if not self.about:
            return "a reader"
        network = self.about.get("network", {}).get("name") or f"a network, step {self.about.get('step', '?')}"
        num_views = self.about.get("num_views", 1)
        rater = self.about.get("rater")
        return f"{network}, {num_views} view{'' if num_views == 1 else 's'}{f', as {rater} grades' if rater else ''}"

    def indices(self, task: Task, column: Mapping[str, Sequence[str]], places: Sequence[int]) -> Int[np.ndarray, "M"]:
        """The grades in a column, at some places of the table, as indices; `UNLABELLED` where there is none.

        Raises:
            SpinejaxError: a grade is none of the task's.
        """
        known = {grade: index for index, grade in enumerate(task.grades)} | {"": UNLABELLED}
        cells = [column[task.name][place] for place in places] if task.name in column else [""] * len(places)
        if unknown := next((cell for cell in cells if cell not in known), None):
            raise SpinejaxError(f"{self.path}: {task.name} {unknown!r}: expected one of {', '.join(task.grades)}.")
        return np.array([known[cell] for cell in cells], int)


def fetch_predictions(address: Address, cache: Path) -> Mirror:
    """Copy what `read_predictions` reads from an object store to this machine: into the `folder` that is returned."""
    mirror = mirror_of(address, cache, "evaluations")
    with lock.waited_for(mirror.folder):  # another process of this machine may fetch the same
        if address.is_file():
            content = address.read_bytes()
            write_atomically(mirror.folder, lambda path: path.write_bytes(content))
        else:
            mirror.pull(lambda name: name in (PREDICTIONS, RESULTS))
    return mirror


def read_predictions(place: Path) -> Predictions:
    """Read an evaluation's folder; or a table of a reader's grades, a file or alone in its folder.

    Columns of the table are `patient`, `scan`, `level`, and of each task `<task>_grade`; then, where known,
    `<task>_label` and `<task>_p_<grade>`. Others are not read.

    Raises:
        SpinejaxError: the table is missing or damaged, has no task, or a disc twice; or `results.json` is damaged.
    """
    path = place / PREDICTIONS if place.is_dir() else place
    if not path.is_file():
        raise SpinejaxError(f"{place}: no {PREDICTIONS} in it: expected the folder of an evaluation.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SpinejaxError(f"{path}: not a CSV table in UTF-8 ({error}). Evaluate again.") from error
    if missing := [name for name in _DISC if name not in header]:
        raise SpinejaxError(f"{path}: has no column {', '.join(missing)}. Evaluate again.")
    if short := next((number for number, row in enumerate(rows, 2) if len(row) != len(header)), None):
        raise SpinejaxError(f"{path}, line {short}: expected {len(header)} cells. Evaluate again.")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    probabilities = _probability_columns(header)
    if not probabilities:
        raise SpinejaxError(f"{path}: has no column of a task's grades, as pfirrmann_grade.")
    discs: dict[tuple[str, str], int] = {}
    for number, disc in enumerate(zip(columns["scan"], columns["level"], strict=True)):
        if discs.setdefault(disc, number) != number:
            raise SpinejaxError(f"{path}: scan {disc[0]}, level {disc[1]} is in it twice. Evaluate again.")
    results = path.with_name(RESULTS)
    about = read_json(results, About, "Evaluate again.") if place.is_dir() and results.is_file() else About()
    return Predictions(
        path=path,
        about=about,
        digest=about.get("data") or sha256_of(path),
        patients=columns["patient"],
        discs=discs,
        grades_of={task: tuple(each) for task, each in probabilities.items() if each},
        given={task: columns[f"{task}_grade"] for task in probabilities},
        labels={task: columns[name] for task in probabilities if (name := f"{task}_label") in columns},
        confidence={
            task: _of_given(path, columns, each, columns[f"{task}_grade"])
            for task, each in probabilities.items()
            if each
        },
    )


def _probability_columns(header: Sequence[str]) -> dict[str, dict[str, str]]:
    """Task → grade → the column of its probability. These follow `<task>_grade`, without a gap."""
    found: dict[str, dict[str, str]] = {}
    task = ""
    for name in header:
        if task and name.startswith(f"{task}_p_"):
            found[task][name.removeprefix(f"{task}_p_")] = name
            continue
        task = name.removesuffix("_grade") if name.endswith("_grade") else ""
        if task:
            found[task] = {}
    return found


def _of_given(
    path: Path, columns: Mapping[str, list[str]], of_grade: Mapping[str, str], given: Sequence[str]
) -> Float[np.ndarray, "N"]:
    """The probability of each disc's grade; of the most probable one where none is given."""
    try:
        chances = np.array([columns[name] for name in of_grade.values()], float)
    except ValueError as error:
        raise SpinejaxError(f"{path}: {next(iter(of_grade.values()))}: {error}. Evaluate again.") from error
    if not ((chances >= 0) & (chances <= 1)).all():
        raise SpinejaxError(f"{path}: {next(iter(of_grade.values()))}: a probability is not from 0 to 1.")
    place = {grade: number for number, grade in enumerate(of_grade)}
    return np.array(
        [
            each[place[grade]] if grade in place else each.max(initial=0)
            for grade, each in zip(given, chances.T, strict=True)
        ]
    )
