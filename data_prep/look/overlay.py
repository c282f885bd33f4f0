"""A page of whole scans with what was found in them: the bodies' corners, and the box that each disc is cut out of."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data_prep.anatomy.discs import extract_discs
from data_prep.dataset.job import Job, Located
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE

_COLUMNS = 5
_COLOURS = ("tab:orange", "tab:cyan")


def overlay_sheet(jobs: Sequence[Job], out: Path, *, num_scans: int, seed: int) -> list[str]:
    """Draw the middle slice of some scans with corners (solid) and the paper's windows (dashed).

    Args:
        jobs: the scans to choose from.
        out: a PNG file. It carries no names.
        num_scans: how many, drawn at random.
        seed: of the draw.

    Returns:
        Which scan is in which place of the page, or why it could not be drawn.

    Raises:
        SpinejaxError: no scan was asked for, or `out` does not end in .png.
    """
    if num_scans < 1 or out.suffix != ".png":
        raise SpinejaxError(f"--scans {num_scans}, --out {out}: expected one scan or more, and a name in .png.")
    chosen = [jobs[index] for index in sorted(np.random.default_rng(seed).permutation(len(jobs))[:num_scans])]
    lines = -(-len(chosen) // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 3.6 * lines), layout="constrained")
    notes = []
    for number, (ax, job) in enumerate(
        itertools.zip_longest(figure.subplots(lines, _COLUMNS, squeeze=False).ravel(), chosen), start=1
    ):
        ax.set_axis_off()
        if job is None:
            continue
        ax.set_title(str(number), fontsize=8)
        try:
            found = job.locate()
            _draw(ax, found)
            notes.append(f"{number}: {job.name}{_doubts(found)}")
        except SpinejaxError as error:
            notes.append(f"{number}: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: figure.savefig(path, dpi=110, format="png"))
    return notes


def _doubts(found: Located) -> str:
    """What a detection itself doubts; of masks, `scans` tells when it makes discs of them."""
    return f": {' '.join(found.notes)}" if found.confidence else ""


def _draw(ax, found: Located) -> None:
    scan = found.scan
    middle = int(np.median([body.mid_slice for body in found.bodies]))
    image = scan.voxels[:, :, middle]
    rows_mm, columns_mm = scan.spacing_mm[:2]
    ax.imshow(image, cmap="gray", vmin=0, vmax=np.percentile(image, 99.5), aspect=rows_mm / columns_mm)
    sure = found.confidence or {}
    for body, colour in zip(found.bodies, itertools.cycle(_COLOURS), strict=False):
        known = body.corners[np.isfinite(body.corners).all(1)]
        outline = np.concatenate([known, known[:1]])
        ax.plot(outline[:, 1], outline[:, 0], "-", color=colour, linewidth=0.9)
        ax.plot(known[:, 1], known[:, 0], ".", color=colour, markersize=2.5)
        told = f"{body.name} {100 * sure[body.name]:.0f}" if body.name in sure else body.name
        ax.annotate(told, known.mean(0)[::-1], color=colour, fontsize=6, ha="center", va="center")
    to_scan = np.linalg.inv(scan.affine)
    for disc in extract_discs(scan, found.bodies, notes=[]):
        outline = (_window_corners() @ (to_scan @ disc.affine).T)[:, :2]
        ax.plot(outline[:, 1], outline[:, 0], "w--", linewidth=0.4)


def _window_corners() -> np.ndarray:
    """float64[5, 4]. The window's outline in a disc volume's middle slice, closed."""
    (height, width), (rows, columns) = WINDOW_SHAPE[:2], VOLUME_SHAPE[:2]
    top, left = (rows - height) / 2 - 0.5, (columns - width) / 2 - 0.5
    unit = np.array([[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]])
    return np.c_[unit * (height, width) + (top, left), np.full(5, VOLUME_SHAPE[2] // 2), np.ones(5)]
