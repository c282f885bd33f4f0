"""Sheets of measured scans: what was detected, beside the marks of those who know, the most doubtful scans first."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from data_prep.dataset.job import Located
from data_prep.detector.training.marked import MarkedSlice, middle_mm
from data_prep.look.marked_accuracy import SliceAccuracy
from data_prep.look.out_of_fold import SETS, Measured
from data_prep.look.overlay import blank_sheet, draw_scan, draw_slice, save_sheet
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

SCANS_PER_SHEET = 40
_MARK_COLOUR = "yellow"
_WRONG = "wrong"


def marked_sheets(measured: Sequence[Measured], folder: Path) -> Iterator[Path]:
    """Draw all scans on sheets of one set each: `<set>-<number>.png`; and again, on `wrong-…`, those with wrong levels.

    Refused scans come first, then by their doubt.

    Corners and windows are drawn as in `overlay`, marks in yellow: points as crosses, boxes as rectangles.

    Yields:
        The file of each sheet, once it is written.
    """
    sets = {name: [one for one in measured if one.case.set == name] for name in SETS}
    for name, unsorted in ({_WRONG: [one for one in measured if not one.accuracy.right]} | sets).items():
        some = sorted(unsorted, key=_sureness)
        for number, start in enumerate(range(0, len(some), SCANS_PER_SHEET), start=1):
            chosen = some[start : start + SCANS_PER_SHEET]
            figure, axes = blank_sheet(len(chosen))
            for ax, one in zip(axes, chosen, strict=False):
                ax.set_title(_title(one, name), fontsize=7, color="black" if one.accuracy.right else "red")
                _draw(ax, one, name)
            out = folder / f"{name}-{number:02d}.png"
            save_sheet(figure, out)
            yield out


def _sureness(one: Measured) -> float:
    return -2.0 if one.accuracy.doubt is None else -one.accuracy.doubt


def _title(one: Measured, sheet: str) -> str:
    doubt = "refused" if one.accuracy.doubt is None else f"doubt {one.accuracy.doubt:.1%}"
    levels = "levels right" if one.accuracy.right else "levels wrong" if one.accuracy.doubt is not None else ""
    patient = f"{one.case.set} {one.case.patient}" if sheet == _WRONG else one.case.patient
    return f"{patient}: {doubt}\n{levels}"


def _draw(ax: Axes, one: Measured, sheet: str) -> None:
    scan = one.case.read()
    if isinstance(one.found, str):
        draw_slice(ax, scan, scan.voxels.shape[2] // 2)
    else:
        try:
            draw_scan(ax, Located(scan, one.found.bodies, confidence=one.found.confidence))
        except SpinejaxError as error:  # no disc can be cut out; what was drawn until then stays
            ax.set_title(f"{_title(one, sheet)}\n{str(error)[:60]}", fontsize=6, color="red")
    if isinstance(one.case.truth, MarkedSlice) and isinstance(one.accuracy, SliceAccuracy):
        _draw_marks(ax, scan, one.case.truth, one.accuracy)


def _draw_marks(ax: Axes, scan: Scan, marked: MarkedSlice, accuracy: SliceAccuracy) -> None:
    """The marks where they were compared: those of another image are shifted."""
    by_mm, spacing = middle_mm(scan) + accuracy.shift_mm, scan.spacing_mm[:2]
    for level, point in marked.points.items():
        row, column = (point + by_mm) / spacing
        if level in marked.boxes:
            (top, left), (bottom, right) = (marked.boxes[level] + by_mm) / spacing
            ax.add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, color=_MARK_COLOUR, linewidth=0.6)
            )
            row, column = (top + bottom) / 2, right
        else:
            ax.plot(column, row, "x", color=_MARK_COLOUR, markersize=4, markeredgewidth=0.8)
        ax.annotate(
            level, (column, row), (3, 0), textcoords="offset points", color=_MARK_COLOUR, fontsize=5, va="center"
        )
