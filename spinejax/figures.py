"""Pictures of a run and of an evaluation, as PNG files."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spinejax.metrics import TaskResult
from spinejax.shards import write_atomically


def learning_curves(entries: Sequence[dict], path: Path) -> None:
    """Loss, validation error with the learning rate's drops, and each task's validation accuracy, against epochs.

    Args:
        entries: a run's log.
        path: the PNG to write.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, error, accuracy = figure.subplots(1, 3)
    epochs = [entry["epoch"] for entry in entries]
    loss.plot(epochs, [entry["loss"] for entry in entries])
    loss.set(title="training loss", xlabel="epoch", ylabel="nats")
    error.plot(epochs, [entry["validation_error"] for entry in entries])
    error.set(title="validation error", xlabel="epoch", ylabel="1 - mean per-class accuracy")
    for before, after in itertools.pairwise(entries):
        if after["learning_rate"] < before["learning_rate"]:
            error.axvline(after["epoch"], color="grey", linewidth=0.8, linestyle="--")
    prefix = "validation_accuracy/"
    for name in sorted({key for entry in entries for key in entry if key.startswith(prefix)}):
        accuracy.plot(epochs, [entry.get(name, np.nan) for entry in entries], label=name.removeprefix(prefix))
    accuracy.set(title="validation accuracy, per-class mean", xlabel="epoch")
    if entries:
        accuracy.legend(fontsize="small")
    _save(figure, path)


def confusion_matrices(results: Sequence[TaskResult], path: Path) -> None:
    """A confusion matrix per task: counts, coloured by each row's fractions.

    Args:
        results: the tasks' figures.
        path: the PNG to write.
    """
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.5 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[len(results) :]:
        axis.set_axis_off()
    for axis, result in zip(axes, results, strict=False):
        counts = result.confusion
        fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if fractions[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=colour)
        ticks = range(result.task.num_grades)
        axis.set_xticks(ticks, result.task.grades)
        axis.set_yticks(ticks, result.task.grades, rotation=90, va="center")
        axis.set(title=f"{result.task.name} (n = {result.n})", xlabel="predicted", ylabel="rater")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # Without the date and version in its metadata, the same numbers give the same file.
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    )
