"""Accuracy of the detector against masks: positions, corners, disc boxes, levels and time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import shapely
from jaxtyping import Float
from rich.table import Table

from data_prep.anatomy.discs import extract_discs, window_in_scan
from data_prep.anatomy.vertebrae import LAST_VERTEBRA, VertebralBody
from data_prep.dataset.job import Job, Located
from data_prep.detector.detect import Detection, detect
from data_prep.detector.weights import SHIPPED, load
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError

COUNTED = ("T12", "L1", "L2", "L3", "L4", "L5")
_MAX_SACRUM_MM = 12.0  # the sacrum counts as found below this mean error of S1's upper corners
_NUM_DRAWS = 2000


@dataclass
class ScanAccuracy:
    """The measurements of one scan."""

    scan: int  # number of the scan in the run; its name is not stored
    bodies: int = 0  # number of bodies, T12 to L5, whose mask gives all four corners
    found: int = 0  # number of these bodies that contain a detected centre
    false: int = 0  # number of detected bodies whose centre is on no vertebra of the mask
    sacra: int = 0
    sacra_found: int = 0
    levels_right: int = 0  # number of found bodies with the same name as in the mask
    corner_mm: list[float] = field(default_factory=list)  # distances of the found bodies' corners from the mask's
    sacrum_mm: list[float] = field(default_factory=list)  # the same for S1's two upper corners
    box_iou: list[float] = field(default_factory=list)  # per disc: the window by detection against the window by mask
    seconds: float = 0.0  # time of the detection
    notes: list[str] = field(default_factory=list)  # the detector's notes on what is doubtful
    refused: str = ""  # why the detector refused the scan; empty if it did not


def measure(jobs: Sequence[Job], *, weights: Path = SHIPPED, report: Callable[[str], None]) -> dict:
    """Detect the bodies of every scan and compare them with its mask. `report` is called with one line per scan.

    Returns:
        JSON values: "summary", each metric with a 95 % interval over scans, and "scans".

    Raises:
        SpinejaxError: a scan's mask, or the weights, cannot be used.
    """
    load(weights)  # unusable weights must raise now, not count as a refusal of every scan
    measured = []
    for number, job in enumerate(jobs, start=1):
        truth = job.locate()
        start = time.perf_counter()
        try:
            found: Detection | str = detect(truth.scan, weights=weights)
        except SpinejaxError as error:
            found = str(error)
        accuracy = compare(truth, found, number)
        accuracy.seconds = round(time.perf_counter() - start, 2)
        measured.append(accuracy)
        report(
            f"{job.name}: {accuracy.found} of {accuracy.bodies} bodies, {accuracy.false} false, "
            f"{accuracy.levels_right} levels right, corners {_percentile(accuracy.corner_mm, 50.0):.2f} mm "
            f"{accuracy.refused or accuracy.notes or ''}"
        )
    return {"summary": summary(measured), "scans": [asdict(accuracy) for accuracy in measured]}


def compare(truth: Located, found: Detection | str, number: int) -> ScanAccuracy:
    """Compare one scan's detection, or the reason why it was refused, with the bodies of its mask."""
    accuracy = ScanAccuracy(number)
    spacing, prefix = truth.scan.spacing_mm[:2], f"{truth.scan.name}: "
    true = {body.name: body for body in truth.bodies}
    counted = {name: true[name] for name in COUNTED if name in true and np.isfinite(true[name].corners).all()}
    accuracy.bodies, accuracy.sacra = len(counted), int("S1" in true)
    accuracy.box_iou = _box_overlaps(truth.scan, truth.bodies, [] if isinstance(found, str) else found.bodies)
    if isinstance(found, str):
        accuracy.refused = found.removeprefix(prefix)
        return accuracy
    accuracy.notes = [note.removeprefix(prefix) for note in found.notes]
    detected = {body.name: body for body in found.bodies}
    matches: dict[str, str] = {}
    for name, body in detected.items():
        if name == "S1":
            continue
        centre = np.nanmean(body.corners, axis=0)
        match = next((other for other in true if other != "S1" and _inside(centre, true[other].corners)), None)
        if match is None:
            accuracy.false += not _on_vertebra(truth.regions, body, centre)
        elif match in counted and match not in matches.values():
            matches[name] = match
    accuracy.found = len(matches)
    accuracy.levels_right = sum(name == match for name, match in matches.items())
    for name, match in matches.items():
        distances_mm = np.linalg.norm((detected[name].corners - true[match].corners) * spacing, axis=1)
        accuracy.corner_mm += [round(float(value), 3) for value in distances_mm if np.isfinite(value)]
    if "S1" in true and "S1" in detected:
        distances_mm = np.linalg.norm((detected["S1"].corners - true["S1"].corners)[:2] * spacing, axis=1)
        accuracy.sacra_found = int(distances_mm.mean() < _MAX_SACRUM_MM)
        accuracy.sacrum_mm = [round(float(value), 3) for value in distances_mm] if accuracy.sacra_found else []
    return accuracy


def summary(measured: Sequence[ScanAccuracy]) -> dict:
    """Metrics over all scans: each one's value, and the low and high end of its 95 % bootstrap interval over scans."""

    def total(scans: Sequence[ScanAccuracy], name: str) -> int:
        return sum(getattr(accuracy, name) for accuracy in scans)

    def percentile(name: str, percent: float) -> Callable:
        return lambda scans: _percentile([value for accuracy in scans for value in getattr(accuracy, name)], percent)

    def ratio(part: str, whole: str) -> Callable:
        return lambda scans: total(scans, part) / max(total(scans, whole), 1)

    metrics: dict[str, Callable] = {
        "bodies_found": ratio("found", "bodies"),
        "false_bodies_per_scan": lambda scans: total(scans, "false") / len(scans),
        "sacra_found": ratio("sacra_found", "sacra"),
        "levels_right": ratio("levels_right", "found"),
        "corner_mm_median": percentile("corner_mm", 50.0),
        "corner_mm_p95": percentile("corner_mm", 95.0),
        "sacrum_corner_mm_median": percentile("sacrum_mm", 50.0),
        "disc_box_iou_median": percentile("box_iou", 50.0),
        "disc_box_iou_p5": percentile("box_iou", 5.0),
        "seconds_per_scan": lambda scans: _percentile([accuracy.seconds for accuracy in scans], 50.0),
        "scans_refused": lambda scans: sum(bool(accuracy.refused) for accuracy in scans) / len(scans),
        "scans_flagged": lambda scans: sum(bool(accuracy.notes) for accuracy in scans) / len(scans),
    }
    draws = np.random.default_rng(0).integers(len(measured), size=(_NUM_DRAWS, len(measured)))
    result: dict = {"n_scans": len(measured), "n_bodies": total(measured, "bodies")}
    for name, metric in metrics.items():
        values = np.array([metric([measured[index] for index in draw]) for draw in draws])
        low, high = (_percentile(values[~np.isnan(values)], percent) for percent in (2.5, 97.5))
        result[name] = {"value": _json(metric(measured)), "low": _json(low), "high": _json(high)}
    return result


def table(summary: dict) -> Table:
    """The summary as a table."""
    page = Table(title=f"{summary['n_bodies']} bodies T12 to L5 of {summary['n_scans']} scans")
    page.add_column("metric")
    page.add_column("value", justify="right")
    page.add_column("95 % interval", justify="right")
    for name, metric in summary.items():
        if isinstance(metric, dict) and metric["value"] is not None:
            interval = "" if metric["low"] is None else f"{metric['low']:.3f} to {metric['high']:.3f}"
            page.add_row(name, f"{metric['value']:.3f}", interval)
    return page


def _percentile(values: Sequence[float] | np.ndarray, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else np.nan


def _json(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


# Geometry ------------------------------------------------------------------------------------------------------------


def _inside(point: np.ndarray, corners: np.ndarray) -> bool:
    """Whether a point is inside a polygon; False if one of its corners is unknown."""
    return bool(np.isfinite(corners).all()) and shapely.Polygon(corners).covers(shapely.Point(point))


def _on_vertebra(regions: Scan | None, body: VertebralBody, centre: np.ndarray) -> bool:
    if regions is None:
        return False
    row, column = np.rint(centre).astype(int).clip(0, np.array(regions.voxels.shape[:2]) - 1)
    labels = regions.voxels[row, column, body.slices[0] : body.slices[1]]
    return bool((((labels > 0) & (labels <= LAST_VERTEBRA)) | ((labels > 100) & (labels <= 100 + LAST_VERTEBRA))).any())


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
