"""A table of the number of discs by grade and split, as the paper's Table 1."""

import numpy as np
from rich.table import Table

from spinejax.data.dataset import DataSet
from spinejax.data.shards import SPLITS
from spinejax.tasks import UNLABELLED


def grade_table(data: DataSet) -> Table:
    """One row per grade: its number of discs, and their share of the task's labelled discs, per split and in total."""
    groups = {split: data.split == split for split in SPLITS} | {"total": np.ones(len(data), bool)}
    table = Table("task", "grade", *groups, title=f"{len(data)} discs of {len(set(data.patient))} patients")
    table.add_row("patients", "", *(str(len(set(data.patient[group]))) for group in groups.values()))
    table.add_row("discs", "", *(str(group.sum()) for group in groups.values()), end_section=True)
    for task, labels in zip(data.tasks, data.labels.T, strict=True):
        for grade, name in enumerate(task.grades):
            counts = (_share(np.sum(labels[group] == grade), labels[group]) for group in groups.values())
            table.add_row("" if grade else task.name, name, *counts)
        labelled = (str(np.sum(labels[group] != UNLABELLED)) for group in groups.values())
        table.add_row("", "labelled", *labelled, end_section=True)
    return table


def _share(count, labels: np.ndarray) -> str:
    labelled = np.sum(labels != UNLABELLED)
    return f"{count} ({count / labelled:.0%})" if labelled else "0"
