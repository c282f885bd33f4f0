"""Plots of a run and of an evaluation, as PNG files."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from spinejax.files.atomic import write_atomically
from spinejax.metrics.calibration import Doubt
from spinejax.metrics.grading import TaskResult


def learning_curves(entries: Sequence[dict], path: Path) -> None:
    """Loss, validation error with the learning rate's drops, and each task's validation accuracy, of a run's log."""
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
    """A confusion matrix for each task: counts, coloured by each row's fractions."""
    figure, axes = _grid(len(results), 3.6, 3.5)
    for axis, result in zip(axes, results, strict=True):
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


def trust(doubts: Sequence[Doubt], path: Path) -> None:
    """Above, accuracy against confidence; below, accuracy against the fraction of the discs that is kept."""
    figure = Figure(figsize=(3 * len(doubts), 5.6), layout="constrained")
    axes = figure.subplots(2, len(doubts), squeeze=False)
    for (above, below), doubt in zip(axes.T, doubts, strict=True):
        confidence, accuracy, count = doubt.bins
        above.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        above.plot(confidence, accuracy, color="tab:blue", linewidth=0.8)
        above.scatter(confidence, accuracy, s=120 * count / count.max(), color="tab:blue")
        above.set(title=f"{doubt.task.name} (n = {doubt.n})", xlabel="confidence", ylabel="accuracy")
        above.set(xlim=(0, 1.03), ylim=(-0.03, 1.03))
        for measure in doubt.kept:
            below.plot(*doubt.curve(measure).T, label=measure)
        below.set(xlabel="kept, least doubtful first", ylabel="accuracy", xlim=(0, 1))
    axes[1, 0].legend(title="doubt by", fontsize="small")
    _save(figure, path)


@dataclass(frozen=True, eq=False)
class Example:
    """A disc and its map; the lesion is outlined if it is known."""

    title: str
    window: Float[np.ndarray, "112 224 9"]
    map: Float[np.ndarray, "112 224 9"]
    lesion: Bool[np.ndarray, "112 224 9"] | None = None


def hotspot_examples(examples: Sequence[Example], path: Path) -> None:
    """The paper's Fig. 3: slices 2 to 8 of a disc, and below them its hotspots, for each example."""
    slices = range(1, 8)
    engine = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(2 * len(slices), 2.35 * len(examples)), layout=engine)
    for axes, example in zip(figure.subplots(2 * len(examples), 1).reshape(-1, 2), examples, strict=True):
        axes[0].set_title(example.title, loc="left", fontsize="medium")
        # A percentile: one pixel far above all others would leave the remainder of a map black.
        brightest = float(np.percentile(example.map, 99.9)) or 1.0
        axes[0].imshow(_side_by_side(example.window, slices), vmin=0, vmax=1, cmap="gray")
        axes[1].imshow(_side_by_side(example.map, slices), vmin=0, vmax=brightest, cmap="inferno")
        if example.lesion is not None and example.lesion[:, :, slices].any():
            outlined = _side_by_side(example.lesion, slices) == 1
            for axis in axes:
                axis.contour(outlined, [0.5], colors="cyan", linewidths=0.8)
        for axis in axes:
            axis.set_axis_off()
    _save(figure, path)


def _side_by_side(volume: Shaped[np.ndarray, "112 224 9"], slices: Sequence[int]) -> Float[np.ndarray, "112 _"]:
    """One picture of several slices, with gaps between them: one image is drawn much sooner than many."""
    gap = np.full((len(volume), 6), np.nan)
    parts = [part for s in slices for part in (gap, volume[:, :, s])]
    return np.concatenate(parts[1:], axis=1)


def mean_maps(means: Sequence[Example], path: Path) -> None:
    """Where each task looks: the mean map over the mean disc, both averaged over the slices."""
    figure, axes = _grid(len(means), 4.2, 2.45)
    for axis, mean in zip(axes, means, strict=True):
        map = mean.map.mean(2)
        axis.imshow(mean.window.mean(2), vmin=0, vmax=0.8, cmap="gray")
        axis.imshow(map, vmin=0, vmax=np.max(map), cmap="inferno", alpha=np.clip(map / (np.max(map) or 1), 0, 1) ** 0.7)
        axis.set_title(mean.title, fontsize="medium")
        axis.set_axis_off()
    _save(figure, path)


def _grid(number: int, width: float, height: float) -> tuple[Figure, list]:
    """A figure with `number` axes of the given size in inches, at most three per row."""
    columns = min(3, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(number)]


def _save(figure: Figure, path: Path) -> None:
    # Without the date and version in its metadata, the same numbers give the same file.
    about = {"Software": None}
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata=about))
