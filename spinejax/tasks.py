"""What is graded: tasks and their grades, and the names of the discs.

A task table is data. The paper's six tasks are the default; every shard carries its own table, so a data set with
other scores (SPIDER's, a hospital's) needs no change of code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spinejax.errors import SpinejaxError

UNLABELLED = -1
"""The label of a disc that no rater graded for a task."""

LEVELS = ("T9-T10", "T10-T11", "T11-T12", "T12-L1", "L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1")
"""Disc names from the top down. The paper grades the last six; SPIDER also grades lower thoracic discs."""


@dataclass(frozen=True)
class Task:
    """A radiological score: its name and the names of its grades, from the mildest to the most severe.

    Args:
        name: identifier in snake case; it names the network's head, a column of tables and a key of `results.json`.
        grades: at least two distinct names. A label is an index into them.

    Raises:
        SpinejaxError: the name is not an identifier, or there are fewer than two distinct grades.
    """

    name: str
    grades: tuple[str, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise SpinejaxError(f"Task name {self.name!r}: expected lower-case letters, digits and underscores.")
        if len(self.grades) < 2 or len(set(self.grades)) != len(self.grades):
            raise SpinejaxError(f"Task {self.name}: expected two or more distinct grades, found {self.grades}.")

    @property
    def num_grades(self) -> int:
        """C, the size of the task's softmax."""
        return len(self.grades)


PAPER_TASKS = (
    Task("pfirrmann", ("1", "2", "3", "4", "5")),
    Task("narrowing", ("1", "2", "3", "4")),
    Task("upper_endplate", ("normal", "abnormal")),
    Task("lower_endplate", ("normal", "abnormal")),
    Task("upper_marrow", ("normal", "abnormal")),
    Task("lower_marrow", ("normal", "abnormal")),
)
"""The paper's six tasks (Table 1). "Upper" is the vertebra above the disc, "lower" the one below."""


def select(tasks: Sequence[Task], names: Sequence[str]) -> tuple[Task, ...]:
    """Those of `tasks` that `names` lists, in the table's order; all of them if `names` is empty.

    Raises:
        SpinejaxError: a name is not in the table.
    """
    known = {task.name for task in tasks}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SpinejaxError(f"Unknown task {', '.join(unknown)}: the data set has {', '.join(sorted(known))}.")
    return tuple(task for task in tasks if not names or task.name in names)


def to_json(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The task table as JSON values: `[{"name": …, "grades": […]}, …]`."""
    return [{"name": task.name, "grades": list(task.grades)} for task in tasks]


def from_json(values: Any) -> tuple[Task, ...]:
    """The task table from `to_json`'s values.

    Raises:
        SpinejaxError: a field is missing, a task is malformed, or two share a name.
    """
    try:
        tasks = tuple(Task(str(value["name"]), tuple(map(str, value["grades"]))) for value in values)
    except (KeyError, TypeError) as error:
        raise SpinejaxError(f"Task table: expected a list of name and grades, found {values!r}.") from error
    if len({task.name for task in tasks}) != len(tasks) or not tasks:
        raise SpinejaxError("Task table: expected one or more tasks with distinct names.")
    return tasks
