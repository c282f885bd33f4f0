"""Accuracy of the detector in slices whose discs are marked, by points or boxes: discs found, their levels, doubts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.detector.detect import Detection
from data_prep.detector.training.marked import MarkedSlice
from data_prep.detector.training.matching import discs_at_marks, marked_levels, place_mm
from data_prep.look.detector_accuracy import Outcome, Summary, outcome, outcome_metrics
from data_prep.look.intervals import Metric, percentile, rate, ratio
from data_prep.read.scan import Scan
from spinejax.tasks import LEVELS


@dataclass(kw_only=True)
class MarkAccuracy:
    """One marked disc."""

    level: str
    found_as: str | None = None  # the level that the detector gives the disc which it found there
    distance_mm: float | None = None  # from the mark, or from the middle of its box


@dataclass(kw_only=True)
class SliceAccuracy(Outcome):
    """The measurements of one slice with marks."""

    marks: list[MarkAccuracy] = field(default_factory=list)  # from the top down
    false: int = 0  # number of detected bodies below the topmost mark that are next to no mark
    shift_mm: tuple[float, float] = (0.0, 0.0)  # by which the marks of another image were moved, (row, column)

    @property
    def found(self) -> int:
        """The number of marks with a detected disc."""
        return sum(mark.found_as is not None for mark in self.marks)

    @property
    def levels_right(self) -> int:
        """The number of marks with a detected disc of the same level."""
        return sum(mark.found_as == mark.level for mark in self.marks)

    def in_words(self) -> str:
        """The measurements in a line."""
        return (
            f"{self.found} of {len(self.marks)} discs, {self.false} false bodies, {self.levels_right} levels right "
            f"{self.refused or ' '.join(self.notes)}"
        )


def compare_marks(marked: MarkedSlice, scan: Scan, found: Detection | str) -> SliceAccuracy:
    """Compare one slice's detection, or the reason why it was refused, with its marks (`discs_at_marks`)."""
    accuracy = outcome(SliceAccuracy, scan, found)
    levels = marked_levels(marked)
    accuracy.marks = [MarkAccuracy(level=level) for level in levels]
    if isinstance(found, str) or not levels:
        return accuracy
    at_marks = discs_at_marks(marked, scan, found.bodies)
    accuracy.shift_mm = at_marks.shift_mm
    for mark in accuracy.marks:
        if disc := at_marks.discs.get(mark.level):
            mark.found_as, mark.distance_mm = disc.level, round(at_marks.distances_mm[mark.level], 2)
    accuracy.right = at_marks.levels_right
    explained = {body.name for disc in at_marks.discs.values() for body in (disc.above, disc.below)}
    rows_mm = [float(marked.points[level][0]) + accuracy.shift_mm[0] for level in levels]
    unexplained = [body for body in found.bodies if body.name != "S1" and body.name not in explained]
    accuracy.false = sum(_in_range(float(place_mm(scan, body.corners)[0]), levels, rows_mm) for body in unexplained)
    return accuracy


# Metrics -------------------------------------------------------------------------------------------------------------


def marked_summary(patients: Sequence[str], measured: Sequence[SliceAccuracy]) -> Summary:
    """Metrics over all slices with marks, each with a 95 % interval. `patients` are those of the slices."""
    marks, found = [len(one.marks) for one in measured], [one.found for one in measured]
    distances_mm = [[mark.distance_mm for mark in one.marks if mark.distance_mm is not None] for one in measured]
    return {
        "n_patients": len(set(patients)),
        "n_scans": len(measured),
        "n_discs": sum(marks),
        "discs_found": rate(patients, found, marks),
        "false_bodies_per_scan": rate(patients, [one.false for one in measured], [1] * len(measured)),
        "levels_right": rate(patients, [one.levels_right for one in measured], found),
        "mark_mm_median": percentile(patients, distances_mm, 50.0),
        **outcome_metrics(patients, measured),
    }


def beside(
    patients: Sequence[str], first: Sequence[SliceAccuracy], second: Sequence[SliceAccuracy]
) -> dict[str, Metric]:
    """How the rates of each patient's first slice compare with those of his second: their ratios, 1 if equal."""
    ones = [1] * len(patients)

    def of(slices: Sequence[SliceAccuracy], name: str) -> list[int]:
        return [int(getattr(one, name)) for one in slices]

    def marks(slices: Sequence[SliceAccuracy]) -> list[int]:
        return [len(one.marks) for one in slices]

    return {
        "discs_found": ratio(patients, of(first, "found"), of(second, "found"), marks(first), marks(second)),
        "scans_levels_right": ratio(patients, of(first, "right"), of(second, "right"), ones, ones),
        "scans_unflagged": ratio(patients, of(first, "unflagged"), of(second, "unflagged"), ones, ones),
    }


def _in_range(row_mm: float, levels: Sequence[str], rows_mm: Sequence[float]) -> bool:
    """Whether the marks say which bodies are at this row: below the topmost one, and in no gap between two of them."""
    above = sum(mark_mm <= row_mm for mark_mm in rows_mm)
    if above in (0, len(levels)):
        return above > 0
    return LEVELS.index(levels[above]) == LEVELS.index(levels[above - 1]) + 1
