"""Pictures of a graded scan for any viewer: the spine with its levels and grades, and hotspots over its slices."""

import functools
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Affine2D

from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.output.read_evaluation import DiscMaps, GradedDisc
from data_prep.read.scan import Scan
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import Task

_DPI = 100
_IMAGE_PX, _HEADER_PX, _FOOTER_PX = 720, 34, 54
_COLUMN_PX, _LEVELS_PX = 76, 80  # of the table of grades; columns are wider if a grade's name is
_ASIDE_PX = 210  # beside a hotspot picture
_TOP_PERCENTILE = 99.9  # of each map: as in the report's page
_COLOURS = ("#ffb000", "#4cc9f0")


@dataclass(frozen=True, eq=False)
class PlacedDisc:
    """A graded disc, the place of its window in the patient, and its hotspots if there are any.

    `affine` takes (row, column, slice, 1) of the network's window to patient space, LPS, mm.
    """

    graded: GradedDisc
    affine: Float[np.ndarray, "4 4"]
    maps: DiscMaps | None = None

    @functools.cached_property
    def tops(self) -> list[float]:
        """The strength that is drawn in full, of each task's map."""
        maps: Sequence[np.ndarray] = list(self.maps.maps) if self.maps else []
        return [float(np.percentile(np.abs(each), _TOP_PERCENTILE)) or 1.0 for each in maps]

    def to_scan(self, scan: Scan) -> Float[np.ndarray, "4 4"]:
        """(row, column, slice, 1) of the window → that of the scan."""
        return np.linalg.inv(scan.affine) @ self.affine

    def centre(self, scan: Scan) -> Float[np.ndarray, "3"]:
        """The middle of the window, as (row, column, slice) of the scan."""
        return (self.to_scan(scan) @ [*((np.array(WINDOW_SHAPE) - 1) / 2), 1])[:3]


def spine_picture(
    scan: Scan, discs: Sequence[PlacedDisc], bodies: Sequence[VertebralBody], note: str
) -> UInt8[np.ndarray, "H W 3"]:
    """The middle slice with vertebral bodies, discs and the network's windows, beside a table of all grades.

    Args:
        scan: the scan.
        discs: its graded discs.
        bodies: its vertebral bodies, if they are known.
        note: said below the picture.
    """
    tasks = list(discs[0].graded.probabilities)
    middle = int(np.clip(round(np.median([disc.centre(scan)[2] for disc in discs])), 0, scan.voxels.shape[2] - 1))
    longest = max(len(grade) for task in tasks for grade in discs[0].graded.probabilities[task])
    column_px = max(_COLUMN_PX, 7 * longest + 12)
    aside = _LEVELS_PX + column_px * len(tasks) + 20
    figure, image, beside = _page(aside, f"levels and grades, slice {middle + 1} of {scan.voxels.shape[2]}", note)
    _show_slice(image, scan, middle)
    for number, body in enumerate(bodies):
        outline = body.corners[np.isfinite(body.corners).all(1)]
        outline = np.concatenate([outline, outline[:1]])
        image.plot(outline[:, 1], outline[:, 0], "-", color=_COLOURS[number % 2], linewidth=1)
        image.text(*outline.mean(0)[::-1], body.name, color=_COLOURS[number % 2], ha="center", va="center", fontsize=8)
    for disc in discs:
        _outline(image, scan, disc)
    beside.set(xlim=(0, aside), ylim=(len(discs) + 2, -2))
    for column, task in enumerate(tasks):
        place = _LEVELS_PX + column_px * column
        beside.text(place, -0.4, task.replace("_", " "), color="white", fontsize=8, rotation=35, va="bottom")
        for row, disc in enumerate(discs):
            grade = disc.graded.grades[task]
            text = f"{grade}\n{100 * disc.graded.probabilities[task][grade]:.0f} %"
            beside.text(place, row + 0.3, text, color="white", fontsize=8, va="center", parse_math=False)
    for row, disc in enumerate(discs):
        beside.text(8, row + 0.3, disc.graded.level, color="white", fontsize=9, weight="bold", va="center")
    beside.text(8, len(discs) + 0.6, "grade and its probability; dashed: what the network saw", color="0.7", fontsize=7)
    return _pixels(figure)


def hotspot_slices(scan: Scan, discs: Sequence[PlacedDisc]) -> list[int]:
    """The slices of the scan on which the discs' maps have one."""
    numbers = {round(disc.centre(scan)[2] + step * disc.to_scan(scan)[2, 2]) for disc in discs for step in range(-4, 5)}
    return sorted(number for number in numbers if 0 <= number < scan.voxels.shape[2])


def hotspot_picture(
    scan: Scan, index: int, discs: Sequence[PlacedDisc], task: Task, note: str
) -> UInt8[np.ndarray, "H W 3"]:
    """One slice of the scan with a task's hotspots over it, each on its own scale, and the discs' grades beside it.

    Args:
        scan: the scan.
        index: of the slice.
        discs: its graded discs; those with maps of the task are shown.
        task: one of the maps' tasks.
        note: said below the picture.
    """
    title = f"hotspots of {task.name.replace('_', ' ')}, slice {index + 1} of {scan.voxels.shape[2]}"
    figure, image, beside = _page(_ASIDE_PX, title, note)
    _show_slice(image, scan, index)
    beside.set(xlim=(0, _ASIDE_PX), ylim=image.get_ylim())
    colours = colormaps["hot"]
    for disc in discs:
        if disc.maps is None or task not in disc.maps.tasks:
            continue
        number, to_scan = disc.maps.tasks.index(task), disc.to_scan(scan)
        slot = round((index - to_scan[2, 3]) / to_scan[2, 2])
        if 0 <= slot < WINDOW_SHAPE[2]:
            strength = np.clip(np.abs(disc.maps.maps[number, :, :, slot]) / disc.tops[number], 0, 1)
            shades = colours(0.25 + 0.6 * strength)
            shades[..., 3] = np.clip(1.4 * strength, 0, 0.75)
            (rr, rc), (cr, cc) = to_scan[:2, :2]
            turn = Affine2D(np.array([[cc, cr, to_scan[1, 3]], [rc, rr, to_scan[0, 3]], [0, 0, 1]]))
            image.imshow(shades, transform=turn + image.transData, interpolation="bilinear", aspect="auto")
        _outline(image, scan, disc)
        grade = disc.maps.grades[number]
        chance = disc.graded.probabilities.get(task.name, {}).get(grade)
        said = f"{disc.graded.level}   {grade}" + ("" if chance is None else f"   {100 * chance:.0f} %")
        row = disc.centre(scan)[0]
        beside.text(8, row, said, color="white", fontsize=9, va="center", clip_on=True, parse_math=False)
    _show_whole(image, scan)
    beside.set_ylim(image.get_ylim())
    return _pixels(figure)


# Parts of a picture --------------------------------------------------------------------------------------------------


def _page(aside_px: int, title: str, note: str):
    """A black page with an image on the left, text beside it, a title above and a note below."""
    width, height = _IMAGE_PX + aside_px, _HEADER_PX + _IMAGE_PX + _FOOTER_PX
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="black")
    image = figure.add_axes((0, _FOOTER_PX / height, _IMAGE_PX / width, _IMAGE_PX / height))
    beside = figure.add_axes((_IMAGE_PX / width, _FOOTER_PX / height, aside_px / width, _IMAGE_PX / height))
    for axes in (image, beside):
        axes.set_axis_off()
    figure.text(10 / width, 1 - _HEADER_PX / 2 / height, f"spinejax: {title}", color="white", fontsize=11, va="center")
    lines = textwrap.fill(note, width // 7)
    figure.text(10 / width, _FOOTER_PX / 2 / height, lines, color="#ffd166", fontsize=8.5, va="center")
    return figure, image, beside


def _show_slice(image, scan: Scan, index: int) -> None:
    rows_mm, columns_mm = scan.spacing_mm[:2]
    plane = scan.voxels[:, :, index]
    image.imshow(plane, cmap="gray", vmin=plane.min(), vmax=np.percentile(plane, 99.5), aspect=rows_mm / columns_mm)
    _show_whole(image, scan)


def _show_whole(image, scan: Scan) -> None:
    """Show the slice, whatever is drawn beyond it."""
    rows, columns = scan.voxels.shape[:2]
    image.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    image.set_aspect(scan.spacing_mm[0] / scan.spacing_mm[1])


def _outline(image, scan: Scan, disc: PlacedDisc) -> None:
    """The network's window (dashed), and a line as long as the disc is wide, with its level."""
    rows, columns, slices = WINDOW_SHAPE
    corners = [(-0.5, -0.5), (-0.5, columns - 0.5), (rows - 0.5, columns - 0.5), (rows - 0.5, -0.5), (-0.5, -0.5)]
    middle = [((rows - 1) / 2, (columns - 1) / 2 + side * columns / 4) for side in (-1, 1)]
    places = np.array([[*place, slices // 2, 1] for place in corners + middle]) @ disc.to_scan(scan).T
    image.plot(places[:5, 1], places[:5, 0], "w--", linewidth=0.5, alpha=0.7)
    image.plot(places[5:, 1], places[5:, 0], "-", color="#7ae582", linewidth=0.8)
    label = image.text(
        *places[6, 1::-1], f" {disc.graded.level}", color="#7ae582", fontsize=8, va="center", clip_on=True
    )
    label.set_path_effects([withStroke(linewidth=2, foreground="black")])  # it may lie on bright fluid


def _pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a grade's name in an alphabet that the font lacks
        canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
