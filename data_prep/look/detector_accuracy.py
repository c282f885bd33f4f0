"""Accuracy of the detector against masks: positions, corners, disc boxes, levels, doubts and time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import shapely
from jaxtyping import Bool, Float
from rich.table import Table

from data_prep.anatomy.discs import extract_discs, window_in_scan
from data_prep.anatomy.vertebrae import LAST_VERTEBRA, VertebralBody
from data_prep.dataset.job import Job, Located
from data_prep.detector.detect import Detection, detect
from data_prep.detector.training.truth import centre_of
from data_prep.detector.weights import SHIPPED, load
from data_prep.look.intervals import Metric, percentile, rate
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

COUNTED = ("T12", "L1", "L2", "L3", "L4", "L5")
_MAX_SACRUM_MM = 12.0  # the sacrum counts as found below this mean error of S1's upper corners

Summary = dict[str, int | Metric]  # names that begin with "n_" are numbers of things, the others metrics


@dataclass(kw_only=True)
class Outcome:
    """What the detector said of one scan as a whole, and whether its levels are right."""

    right: bool = False  # something was found, and all that was found has its true name
    refused: str = ""  # why the detector refused the scan; empty if it did not
    flagged: bool = False  # it doubts the levels
    doubt: float | None = None  # the probability of wrong levels that it states; None if it refused the scan
    notes: list[str] = field(default_factory=list)  # everything that it doubts
    seconds: float = 0.0  # time of the detection

    @property
    def unflagged(self) -> bool:
        """Whether the levels are given without a doubt."""
        return not self.refused and not self.flagged


AnyOutcome = TypeVar("AnyOutcome", bound=Outcome)


@dataclass(kw_only=True)
class ScanAccuracy(Outcome):
    """The measurements of one scan with a mask."""

    bodies: int = 0  # number of bodies, T12 to L5, whose mask gives all four corners
    found: int = 0  # number of these bodies that contain a detected centre
    false: int = 0  # number of detected bodies on no vertebra of the mask, but beside them
    sacra: int = 0
    sacra_found: int = 0
    levels_right: int = 0  # number of found bodies with the same name as in the mask
    corner_mm: list[float] = field(default_factory=list)  # distances of the found bodies' corners from the mask's
    corners_stated: int = 0  # number of these corners that have a stated uncertainty
    corners_within: int = 0  # number of those that are off by less than twice it
    sacrum_mm: list[float] = field(default_factory=list)  # the same for S1's two upper corners
    box_iou: list[float] = field(default_factory=list)  # per disc: the window by detection against the window by mask

    def in_words(self) -> str:
        """The measurements in a line."""
        median_mm = np.median(self.corner_mm) if self.corner_mm else np.nan
        return (
            f"{self.found} of {self.bodies} bodies, {self.false} false, {self.levels_right} levels right, "
            f"corners {median_mm:.2f} mm {self.refused or ' '.join(self.notes)}"
        )


def measure(jobs: Sequence[Job], *, weights: Path = SHIPPED, report: Callable[[str], None]) -> dict:
    """Detect the bodies of every scan and compare them with its mask. `report` is called with one line per scan.

    Returns:
        JSON values: "summary", each metric with a 95 % interval over patients, and "scans", by their numbers.

    Raises:
        SpinejaxError: a scan's mask, or the weights, cannot be used.
    """
    load(weights)  # unusable weights must raise now, not count as a refusal of every scan
    measured = []
    for job in jobs:
        truth = job.locate()
        found, seconds = timed(detect, truth.scan, weights=weights)
        accuracy = compare(truth, found)
        accuracy.seconds = seconds
        measured.append(accuracy)
        report(f"{job.name}: {accuracy.in_words()}")
    scans = [{"scan": number, **asdict(accuracy)} for number, accuracy in enumerate(measured, start=1)]
    return {"summary": summary([job.patient for job in jobs], measured), "scans": scans}


def timed(find: Callable[..., Detection], scan: Scan, **options) -> tuple[Detection | str, float]:
    """What `find(scan, **options)` finds, or why it refuses the scan, and the seconds that it took."""
    start = time.perf_counter()
    try:
        found: Detection | str = find(scan, **options)
    except SpinejaxError as error:
        found = str(error)
    return found, round(time.perf_counter() - start, 2)


def outcome(kind: type[AnyOutcome], scan: Scan, found: Detection | str) -> AnyOutcome:
    """What a detection, or the reason why it was refused, says of its scan; without the scan's name."""
    prefix = f"{scan.name}: "
    if isinstance(found, str):
        return kind(refused=found.removeprefix(prefix))
    notes = [note.removeprefix(prefix) for note in found.notes]
    return kind(flagged=found.doubtful_levels, doubt=round(found.doubt, 4), notes=notes)


def compare(truth: Located, found: Detection | str) -> ScanAccuracy:
    """Compare one scan's detection, or the reason why it was refused, with the bodies of its mask."""
    accuracy = outcome(ScanAccuracy, truth.scan, found)
    spacing = truth.scan.spacing_mm[:2]
    true = {body.name: body for body in truth.bodies}
    counted = {name: true[name] for name in COUNTED if name in true and np.isfinite(true[name].corners).all()}
    accuracy.bodies, accuracy.sacra = len(counted), int("S1" in true)
    accuracy.box_iou = _box_overlaps(truth.scan, truth.bodies, [] if isinstance(found, str) else found.bodies)
    if isinstance(found, str):
        return accuracy
    detected = {body.name: body for body in found.bodies}
    top, bottom = _field_rows(truth)
    matches: dict[str, str] = {}
    for name, body in detected.items():
        if name == "S1":
            continue
        centre = centre_of(body.corners * spacing) / spacing  # of a body that the image cuts, too
        match = next((other for other in true if other != "S1" and _inside(centre, true[other].corners)), None)
        if match is None:
            accuracy.false += int(top <= centre[0] <= bottom and not _on_vertebra(truth.regions, body, centre))
        elif match in counted and match not in matches.values():
            matches[name] = match
    accuracy.found = len(matches)
    accuracy.levels_right = sum(name == match for name, match in matches.items())
    accuracy.right = accuracy.found > 0 and accuracy.levels_right == accuracy.found
    for name, match in matches.items():
        distances_mm = np.linalg.norm((detected[name].corners - true[match].corners) * spacing, axis=1)
        known = [round(float(value), 3) for value in distances_mm if np.isfinite(value)]
        accuracy.corner_mm += known
        if name in found.corner_mm:
            accuracy.corners_stated += len(known)
            accuracy.corners_within += sum(value < 2 * found.corner_mm[name] for value in known)
    if "S1" in true and "S1" in detected:
        distances_mm = np.linalg.norm((detected["S1"].corners - true["S1"].corners)[:2] * spacing, axis=1)
        accuracy.sacra_found = int(distances_mm.mean() < _MAX_SACRUM_MM)
        accuracy.sacrum_mm = [round(float(value), 3) for value in distances_mm] if accuracy.sacra_found else []
    return accuracy


# Metrics -------------------------------------------------------------------------------------------------------------


def summary(patients: Sequence[str], measured: Sequence[ScanAccuracy]) -> Summary:
    """Metrics over all scans with masks, each with a 95 % interval. `patients` are those of the scans."""

    def share(part: str, whole: str) -> Metric:
        return rate(patients, [getattr(one, part) for one in measured], [getattr(one, whole) for one in measured])

    def of_all(name: str, percent: float) -> Metric:
        return percentile(patients, [getattr(one, name) for one in measured], percent)

    return {
        "n_patients": len(set(patients)),
        "n_scans": len(measured),
        "n_bodies": sum(one.bodies for one in measured),
        "bodies_found": share("found", "bodies"),
        "false_bodies_per_scan": rate(patients, [one.false for one in measured], [1] * len(measured)),
        "sacra_found": share("sacra_found", "sacra"),
        "levels_right": share("levels_right", "found"),
        "corner_mm_median": of_all("corner_mm", 50.0),
        "corner_mm_p95": of_all("corner_mm", 95.0),
        "corners_within_twice_stated": share("corners_within", "corners_stated"),
        "sacrum_corner_mm_median": of_all("sacrum_mm", 50.0),
        "disc_box_iou_median": of_all("box_iou", 50.0),
        "disc_box_iou_p5": of_all("box_iou", 5.0),
        **outcome_metrics(patients, measured),
    }


def outcome_metrics(patients: Sequence[str], measured: Sequence[Outcome]) -> dict[str, Metric]:
    """Metrics of the scans as wholes.

    A refused scan has no right levels, but it is not an unflagged one either.
    """
    one_each = [1] * len(measured)
    unflagged = [int(one.unflagged) for one in measured]
    unflagged_right = [int(one.unflagged and one.right) for one in measured]
    return {
        "scans_levels_right": rate(patients, [int(one.right) for one in measured], one_each),
        "unflagged_scans_levels_right": rate(patients, unflagged_right, unflagged),
        "scans_flagged": rate(patients, [int(one.flagged) for one in measured], one_each),
        "scans_refused": rate(patients, [int(bool(one.refused)) for one in measured], one_each),
        "scans_with_notes": rate(patients, [int(bool(one.notes)) for one in measured], one_each),
        "seconds_per_scan": percentile(patients, [[one.seconds] for one in measured], 50.0),
    }


def table(title: str, summaries: dict[str, Summary]) -> Table:
    """A row for each metric, with its interval and what it is of, and a column for each set of scans."""
    page = Table(title=title)
    page.add_column("metric")
    for name in summaries:
        page.add_column(name, justify="right")
    for metric in dict.fromkeys(metric for each in summaries.values() for metric in each):
        page.add_row(metric, *(_cell(each.get(metric)) for each in summaries.values()))
    return page


def _cell(metric: int | Metric | None) -> str:
    if not isinstance(metric, dict):
        return "" if metric is None else str(metric)
    if metric["value"] is None:
        return ""
    interval = "" if metric["low"] is None else f" [{metric['low']:.3f}, {metric['high']:.3f}]"
    return f"{metric['value']:.3f}{interval} of {metric['n']}"


# Geometry ------------------------------------------------------------------------------------------------------------


def _inside(point: np.ndarray, corners: np.ndarray) -> bool:
    """Whether a point is inside a polygon; False if one of its corners is unknown."""
    return bool(np.isfinite(corners).all()) and shapely.Polygon(corners).covers(shapely.Point(point))


def _on_vertebra(regions: Scan | None, body: VertebralBody, centre: np.ndarray) -> bool:
    if regions is None:
        return False
    row, column = np.rint(centre).astype(int).clip(0, np.array(regions.voxels.shape[:2]) - 1)
    return bool(_is_vertebra(regions.voxels[row, column, body.slices[0] : body.slices[1]]).any())


def _field_rows(truth: Located) -> tuple[float, float]:
    """The first and the last row with a vertebra of the mask: beyond them it says nothing of what is there."""
    if truth.regions is None:
        rows = np.concatenate([body.corners[:, 0] for body in truth.bodies if body.name != "S1"])
        return float(np.nanmin(rows)), float(np.nanmax(rows))
    rows = np.flatnonzero(_is_vertebra(truth.regions.voxels).any((1, 2)))
    return float(rows[0]), float(rows[-1])


def _is_vertebra(labels: np.ndarray) -> Bool[np.ndarray, "..."]:
    """Whether each label is of a vertebra, or of one that is cut by the field of view."""
    return ((labels > 0) & (labels <= LAST_VERTEBRA)) | ((labels > 100) & (labels <= 100 + LAST_VERTEBRA))


def _box_overlaps(scan: Scan, true: Sequence[VertebralBody], found: Sequence[VertebralBody]) -> list[float]:
    """Overlap of the window of each disc of the mask with the nearest detected window; 0 if none was detected."""
    found_boxes = _boxes(scan, found)
    overlaps = []
    for box in _boxes(scan, true):
        near = min(found_boxes, key=lambda other: np.linalg.norm(other.mean(0) - box.mean(0)), default=None)
        overlaps.append(0.0 if near is None else round(overlap(box, near), 4))
    return overlaps


def _boxes(scan: Scan, bodies: Sequence[VertebralBody]) -> list[np.ndarray]:
    """The windows, in mm in the sagittal plane, of all discs that can be cut out between the bodies."""
    try:
        discs = extract_discs(scan, bodies, notes=[])
    except SpinejaxError:
        return []
    return [window_in_scan(scan, disc.affine) * scan.spacing_mm[:2] for disc in discs]


def overlap(box: Float[np.ndarray, "N 2"], other: Float[np.ndarray, "M 2"]) -> float:
    """Intersection over union of two polygons."""
    first, second = shapely.Polygon(box), shapely.Polygon(other)
    return first.intersection(second).area / first.union(second).area
