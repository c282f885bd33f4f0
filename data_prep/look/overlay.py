"""A page of whole scans with the corners of their vertebral bodies and the box that each disc is cut out of."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep.anatomy.discs import extract_discs, window_in_scan
from data_prep.dataset.job import Job, Located
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically

_COLUMNS = 5
_COLOURS = ("tab:orange", "tab:cyan")


def overlay_sheet(
    jobs: Sequence[Job],
    out: Path,
    *,
    num_scans: int,
    seed: int,
    also: Callable[[Job, Located], None] = lambda job, found: None,
) -> list[str]:
    """Draw the middle slice of some scans with corners (solid) and the network's windows (dashed).

    The scans are chosen at random. The page shows no names. `also` is called with each scan that was drawn.

    Returns:
        For each place on the page, its scan, or why that could not be drawn.

    Raises:
        SpinejaxError: no scan was asked for, or `out` does not end in .png.
    """
    if num_scans < 1 or out.suffix != ".png":
        raise SpinejaxError(
            f"--scans {num_scans}, --out {out}: expected one scan or more, and a name in .png or .html, or a folder."
        )
    chosen = [jobs[index] for index in sorted(np.random.default_rng(seed).permutation(len(jobs))[:num_scans])]
    figure, axes = blank_sheet(len(chosen))
    notes = []
    for number, (ax, job) in enumerate(zip(axes, chosen, strict=False), start=1):
        ax.set_title(str(number), fontsize=8)
        try:
            found = job.locate()
            draw_scan(ax, found)
            also(job, found)
            doubts = f": {' '.join(found.notes)}" if found.confidence else ""  # of masks, `scans` prints the notes
            notes.append(f"{number}: {job.name}{doubts}")
        except SpinejaxError as error:
            notes.append(f"{number}: {error}")
    save_sheet(figure, out)
    return notes


def blank_sheet(num_scans: int) -> tuple[Figure, Sequence[Axes]]:
    """A page, and the places on it: at least as many as there are scans."""
    rows = -(-num_scans // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    return figure, list(axes)


def save_sheet(figure: Figure, out: Path) -> None:
    """Write a page as PNG."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: figure.savefig(path, dpi=110, format="png"))


def draw_slice(ax: Axes, scan: Scan, index: int) -> None:
    """Draw one slice of a scan."""
    image = scan.voxels[:, :, index]
    rows_mm, columns_mm = scan.spacing_mm[:2]
    ax.imshow(image, cmap="gray", vmin=0, vmax=np.percentile(image, 99.5), aspect=rows_mm / columns_mm)


def draw_scan(ax: Axes, found: Located) -> None:
    """Draw the slice in the middle of a scan's bodies, with their corners and the windows of their discs."""
    scan = found.scan
    draw_slice(ax, scan, int(np.median([body.mid_slice for body in found.bodies])))
    confidence = found.confidence or {}
    for body, colour in zip(found.bodies, itertools.cycle(_COLOURS), strict=False):
        known = body.corners[np.isfinite(body.corners).all(1)]
        outline = np.concatenate([known, known[:1]])
        ax.plot(outline[:, 1], outline[:, 0], "-", color=colour, linewidth=0.9)
        ax.plot(known[:, 1], known[:, 0], ".", color=colour, markersize=2.5)
        text = f"{body.name} {100 * confidence[body.name]:.0f}" if body.name in confidence else body.name
        ax.annotate(text, known.mean(0)[::-1], color=colour, fontsize=6, ha="center", va="center")
    for disc in extract_discs(scan, found.bodies, notes=[]):
        outline = window_in_scan(scan, disc.affine)[[0, 1, 2, 3, 0]]
        ax.plot(outline[:, 1], outline[:, 0], "w--", linewidth=0.4)
