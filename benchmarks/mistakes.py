"""A picture of what the networks of a cross-validation got most wrong: to see why, and for the model card."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.graded_folds import NETWORK, Pool
from spinejax.data.dataset import DataSet
from spinejax.files.atomic import write_atomically
from spinejax.geometry import INTENSITY_ONE, central_window
from spinejax.tasks import Task

_EACH = 4  # discs of each source and contrast


def draw_mistakes(pool: Pool, data: DataSet, task: Task, path: Path) -> None:
    """Draw the discs whose label the network held for least likely, a line for each source and contrast (.png)."""
    groups = sorted({name for name in set(pool.groups) if pool.labelled(task, pool.groups == name)[1].size})
    figure = Figure(figsize=(3 * _EACH, 1.9 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), _EACH, squeeze=False)
    for line, name in zip(axes, groups, strict=True):
        rows = pool.rows[(pool.groups == name) & (pool.labels[task.name] >= 0)]
        labels, given = pool.labels[task.name][rows], pool.probabilities[NETWORK][task.name][rows]
        worst = np.argsort(given[np.arange(len(rows)), labels], kind="stable")[:_EACH]
        for ax, place in zip(line, worst, strict=False):
            _draw(ax, data, int(rows[place]))
            grade = given[place].argmax()
            rater, network = task.grades[labels[place]], f"{task.grades[grade]} ({given[place, grade]:.0%})"
            ax.set_title(f"{name}, {data.level[rows[place]]}\nrater {rater}, network {network}", fontsize=8)
        for ax in line:
            ax.set_axis_off()
    write_atomically(path, lambda part: figure.savefig(part, dpi=90, format="png"))


def _draw(ax, data: DataSet, row: int) -> None:
    window = central_window(data.volume(row))
    ax.imshow(window[:, :, window.shape[2] // 2], cmap="gray", vmin=0, vmax=INTENSITY_ONE)
