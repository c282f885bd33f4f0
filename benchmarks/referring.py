"""What referring doubtful grades to a rater brings in a cross-validation: how many stay, and how many are right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.graded_folds import Pool
from benchmarks.tables import show, table
from spinejax.files.atomic import write_atomically
from spinejax.metrics import calibration, grading
from spinejax.tasks import Task

_BELOW = (0.3, 0.5, 0.7, 0.9)  # of `evaluate.py --refer-below`
_SHOWN = (1.0, 0.8, 0.5)  # of `calibration.COVERAGES`

Referring = Mapping[str, Mapping[str, Mapping[str, Any]]]


def by_group(pool: Pool) -> Referring:
    """Group → task name → the accuracy-coverage curve, and what each `--refer-below` keeps; JSON.

    Grades and probabilities are those of `evaluate.py --calibrate`: of the group's rater, fitted to the other folds.
    """
    return {
        name: {
            task.name: _of_task(pool, task, pool.groups == name)
            for task in pool.tasks
            if len(set(pool.labelled(task, pool.groups == name)[1])) > 1
        }
        for name in sorted(set(pool.groups))
    }


def _of_task(pool: Pool, task: Task, inside: np.ndarray) -> dict[str, Any]:
    probabilities, frequencies = pool.as_rater(task, inside)
    grades = grading.decide(probabilities, "balance", frequencies)
    _, labels, patients = pool.labelled(task, inside)
    doubt = calibration.doubt(task, labels, probabilities, np.zeros(len(labels)), patients, grades)
    kept = (calibration.kept(task, labels, probabilities, grades, patients, below) for below in _BELOW)
    return doubt.to_json()["referring"]["confidence"] | {"below": {f"{each.below:g}": each.to_json() for each in kept}}


def markdown(found: Referring) -> str:
    """A table: accuracy in % of the grades that are kept, by their share and by `--refer-below`."""
    columns = [
        *("discs", "task"),
        *(f"{100 * share:g} % kept" for share in _SHOWN),
        *(f"--refer-below {below:g}: kept, right" for below in _BELOW),
    ]
    rows = []
    for name, tasks in found.items():
        for task, each in tasks.items():
            cells = [show(each["accuracy_at_coverage"][f"{share:g}"]) for share in _SHOWN]
            for below in _BELOW:
                kept = each["below"][f"{below:g}"]
                share, right = kept["share_kept"]["value"], kept["accuracy_of_kept"]["value"]
                cells.append(f"{100 * share:.0f}, {'–' if right is None else f'{100 * right:.1f}'}")
            rows.append((name, task, *cells))
    return table(columns, rows)


def draw(found: Referring, path: Path) -> None:
    """Draw the accuracy-coverage curves, a panel for each group and a line for each task (.png)."""
    figure = Figure(figsize=(4 * len(found), 3.6), layout="constrained")
    names = dict.fromkeys(task for tasks in found.values() for task in tasks)
    colours = {task: f"C{place}" for place, task in enumerate(names)}
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, (name, tasks) in zip(axes, found.items(), strict=True):
        for task, each in tasks.items():
            kept, right = 100 * np.array(each["curve"]).T
            from_here = kept >= 5  # of fewer discs the accuracy is noise
            ax.plot(kept[from_here], right[from_here], color=colours[task], label=task.replace("_", " "))
        ax.set(title=name, xlabel="grades kept, %", xlim=(100, 0))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("of these right, %")
    lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside right center", fontsize=8)
    write_atomically(path, lambda part: figure.savefig(part, dpi=90, format="png"))
