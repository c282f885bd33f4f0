"""A page of discs, to check that each is horizontal, centred, with its front to the left, and has its own labels."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.tasks import UNLABELLED

_COLUMNS = 4
_REGION_COLOURS = ("tab:orange", "tab:cyan", "tab:green")


def contact_sheet(data: DataSet, out: Path, *, num_discs: int, seed: int) -> None:
    """Draw the middle slice of some discs, with the outlines of regions and lesions, their level and their grades.

    The dashed frame is the network's window. The discs are chosen at random.

    Raises:
        SpinejaxError: no disc was asked for, or `out` does not end in .png.
    """
    if num_discs < 1 or out.suffix != ".png":
        raise SpinejaxError(f"--discs {num_discs}, --out {out}: expected one disc or more, and a name in .png.")
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:num_discs])
    lines = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, row in zip(axes, rows, strict=False):
        _draw(ax, data, int(row))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: figure.savefig(path, dpi=100, format="png"))


def _draw(ax, data: DataSet, row: int) -> None:
    middle = VOLUME_SHAPE[2] // 2
    ax.imshow(data.volume(row)[:, :, middle], cmap="gray", vmin=0, vmax=INTENSITY_ONE)
    if "region" in data.masks:
        region = data.mask("region", row)[:, :, middle]
        for value, colour in enumerate(_REGION_COLOURS, start=1):
            _outline(ax, region == value, colour)
    if "lesion" in data.masks:
        _outline(ax, data.mask("lesion", row)[:, :, middle] > 0, "red")
    height, width = WINDOW_SHAPE[:2]
    top, left = (VOLUME_SHAPE[0] - height) / 2 - 0.5, (VOLUME_SHAPE[1] - width) / 2 - 0.5
    ax.plot(left + np.array([0, 1, 1, 0, 0]) * width, top + np.array([0, 0, 1, 1, 0]) * height, "w--", linewidth=0.6)
    ax.set_title(f"{data.patient[row]} {data.split[row]} {data.level[row]}\n{_grades(data, row)}", fontsize=7)


def _outline(ax, inside: np.ndarray, colour: str) -> None:
    if inside.any():  # matplotlib warns of an empty contour
        ax.contour(inside, levels=[0.5], colors=[colour], linewidths=0.8)


def _grades(data: DataSet, row: int) -> str:
    """The grades, without those that mean normal; a task without a label shows as "?"."""
    parts = []
    for task, label in zip(data.tasks, data.labels[row], strict=True):
        if label == UNLABELLED:
            parts.append(f"{task.name} ?")
        elif label > 0 or task.num_grades > 2:
            parts.append(f"{task.name} {task.grades[label]}")
    return ", ".join(parts[:3]) + ("\n" + ", ".join(parts[3:]) if len(parts) > 3 else "")
