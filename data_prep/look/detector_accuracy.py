"""How well bodies are detected, held against masks: places, corners, disc boxes, levels and time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from data_prep.anatomy.discs import extract_discs
from data_prep.anatomy.vertebrae import LAST_VERTEBRA, VertebralBody
from data_prep.dataset.job import Job, Located
from data_prep.detector.detect import Detection, detect
from data_prep.detector.weights import SHIPPED, load
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE

COUNTED = ("T12", "L1", "L2", "L3", "L4", "L5")
_SACRUM_MM = 12.0  # from plate to plate, for a sacrum to count as found


@dataclass
class Measured:
    """What one scan adds. Lengths in mm; fractions of boxes in [0, 1].

    Args:
        scan: its number in the run; names stay out of results.
        bodies, found: T12 to L5 with all four corners in the mask, and those of them with a detected centre inside.
        false: detected bodies whose centre is on no vertebra of the mask.
        sacra, sacra_found: 0 or 1.
        levels_right: of the found bodies, those with the mask's name.
        corner_mm: distances of the found bodies' corners from the mask's.
        sacrum_mm: likewise, of S1's two upper corners.
        box_iou: overlap of the paper's window around each disc with that from the mask, matched by place.
        seconds: of the detection.
        notes: the detector's own doubts.
        refused: why it found nothing.
    """

    scan: int
    bodies: int = 0
    found: int = 0
    false: int = 0
    sacra: int = 0
    sacra_found: int = 0
    levels_right: int = 0
    corner_mm: list[float] = field(default_factory=list)
    sacrum_mm: list[float] = field(default_factory=list)
    box_iou: list[float] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    refused: str = ""


def measure(jobs: Sequence[Job], *, weights: Path = SHIPPED, tell: Callable[[str], None]) -> dict:
    """Detect in every scan and compare.

    Args:
        jobs: scans with masks.
        weights: of the detector.
        tell: is given a line a scan.

    Returns:
        JSON values: "summary", each figure with a 95 % interval over scans, and "scans".

    Raises:
        SpinejaxError: a scan's mask, or the weights, cannot be used.
    """
    load(weights)  # or their fault would pass for one of every scan
    measured = []
    for number, job in enumerate(jobs, start=1):
        truth = job.locate()
        start = time.perf_counter()
        try:
            found: Detection | str = detect(truth.scan, weights=weights)
        except SpinejaxError as error:
            found = str(error)
        one = compare(truth, found, number)
        one.seconds = round(time.perf_counter() - start, 2)
        measured.append(one)
        tell(
            f"{job.name}: {one.found} of {one.bodies} bodies, {one.false} false, {one.levels_right} levels right, "
            f"corners {np.median(one.corner_mm) if one.corner_mm else np.nan:.2f} mm {one.refused or one.notes or ''}"
        )
    return {"summary": summary(measured), "scans": [asdict(one) for one in measured]}


def compare(truth: Located, found: Detection | str, number: int) -> Measured:
    """One scan's detection, or the reason of its refusal, against its mask's bodies."""
    one = Measured(number)
    spacing = truth.scan.spacing_mm[:2]
    true = {body.name: body for body in truth.bodies}
    counted = {name: true[name] for name in COUNTED if name in true and np.isfinite(true[name].corners).all()}
    one.bodies, one.sacra = len(counted), int("S1" in true)
    if isinstance(found, str):
        one.refused = found.removeprefix(f"{truth.scan.name}: ")
        one.box_iou = _box_overlaps(truth.scan, truth.bodies, [])
        return one
    one.notes = [note.removeprefix(f"{truth.scan.name}: ") for note in found.notes]
    matches: dict[str, str] = {}
    for body in found.bodies:
        if body.name == "S1":
            continue
        centre = np.nanmean(body.corners, axis=0)
        here = next((name for name, other in true.items() if name != "S1" and _inside(centre, other.corners)), None)
        if here is None:
            one.false += not _on_vertebra(truth.regions, body, centre)
        elif here in counted and here not in matches.values():
            matches[body.name] = here
    one.found = len(matches)
    one.levels_right = sum(name == here for name, here in matches.items())
    own = {body.name: body for body in found.bodies}
    for name, here in matches.items():
        apart = np.linalg.norm((own[name].corners - true[here].corners) * spacing, axis=1)
        one.corner_mm += [round(float(value), 3) for value in apart if np.isfinite(value)]
    if "S1" in true and "S1" in own:
        apart = np.linalg.norm((own["S1"].corners - true["S1"].corners)[:2] * spacing, axis=1)
        one.sacra_found = int(apart.mean() < _SACRUM_MM)
        one.sacrum_mm = [round(float(value), 3) for value in apart] if one.sacra_found else []
    one.box_iou = _box_overlaps(truth.scan, truth.bodies, found.bodies)
    return one


def summary(measured: Sequence[Measured]) -> dict:
    """Figures over all scans, each as value, low, high: percentiles 2.5 and 97.5 of 2,000 draws of scans."""

    def total(name):
        return lambda drawn: sum(getattr(one, name) for one in drawn)

    def ratio(top, bottom):
        return lambda drawn: total(top)(drawn) / max(total(bottom)(drawn), 1)

    def pooled(name, statistic):
        def value(drawn):
            values = [value for one in drawn for value in getattr(one, name)]
            return statistic(values) if values else np.nan

        return value

    def p95(values):
        return np.percentile(values, 95)

    figures = {
        "bodies_found": ratio("found", "bodies"),
        "false_bodies_per_scan": lambda drawn: total("false")(drawn) / len(drawn),
        "sacra_found": ratio("sacra_found", "sacra"),
        "levels_right": ratio("levels_right", "found"),
        "corner_mm_median": pooled("corner_mm", np.median),
        "corner_mm_p95": pooled("corner_mm", p95),
        "sacrum_corner_mm_median": pooled("sacrum_mm", np.median),
        "disc_box_iou_median": pooled("box_iou", np.median),
        "disc_box_iou_p5": pooled("box_iou", lambda values: np.percentile(values, 5)),
        "seconds_per_scan": lambda drawn: float(np.median([one.seconds for one in drawn])),
        "scans_refused": lambda drawn: sum(bool(one.refused) for one in drawn) / len(drawn),
        "scans_flagged": lambda drawn: sum(bool(one.notes) for one in drawn) / len(drawn),
    }
    draws = np.random.default_rng(0).integers(len(measured), size=(2000, len(measured)))
    told: dict = {"n_scans": len(measured), "n_bodies": total("bodies")(measured)}
    for name, figure in figures.items():
        values = [figure([measured[index] for index in draw]) for draw in draws]
        low, high = np.nanpercentile(values, (2.5, 97.5)) if not np.isnan(values).all() else (np.nan, np.nan)
        told[name] = {key: _json(value) for key, value in (("value", figure(measured)), ("low", low), ("high", high))}
    return told


def table(told: dict) -> Table:
    """The summary to read."""
    page = Table(title=f"{told['n_bodies']} bodies T12 to L5 of {told['n_scans']} scans")
    for heading in ("figure", "value", "95 % interval"):
        page.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, figure in told.items():
        if isinstance(figure, dict) and figure["value"] is not None:
            interval = "" if figure["low"] is None else f"{figure['low']:.3f} to {figure['high']:.3f}"
            page.add_row(name, f"{figure['value']:.3f}", interval)
    return page


def _json(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


# Places --------------------------------------------------------------------------------------------------------------


def _inside(point: np.ndarray, corners: np.ndarray) -> bool:
    """Whether a point is inside a convex polygon; False if a corner is not known."""
    edges, to_point = np.roll(corners, -1, axis=0) - corners, point - corners
    return bool(np.all(edges[:, 1] * to_point[:, 0] - edges[:, 0] * to_point[:, 1] >= 0))


def _on_vertebra(regions: Scan | None, body: VertebralBody, centre: np.ndarray) -> bool:
    if regions is None:
        return False
    row, column = np.rint(centre).astype(int).clip(0, np.array(regions.voxels.shape[:2]) - 1)
    labels = regions.voxels[row, column, body.slices[0] : body.slices[1]]
    return bool((((labels > 0) & (labels <= LAST_VERTEBRA)) | ((labels > 100) & (labels <= 100 + LAST_VERTEBRA))).any())


def _box_overlaps(scan: Scan, true: Sequence[VertebralBody], found: Sequence[VertebralBody]) -> list[float]:
    """Intersection over union of each true disc's window with the nearest detected one; 0 where there is none near."""
    found_boxes = _boxes(scan, found)
    overlaps = []
    for box in _boxes(scan, true):
        near = min(found_boxes, key=lambda other: np.linalg.norm(other.mean(0) - box.mean(0)), default=None)
        overlaps.append(0.0 if near is None else round(overlap(box, near), 4))
    return overlaps


def _boxes(scan: Scan, bodies: Sequence[VertebralBody]) -> list[np.ndarray]:
    """The windows of all discs that can be cut out between some bodies."""
    try:
        return [_window(scan, disc.affine) for disc in extract_discs(scan, bodies, notes=[])]
    except SpinejaxError:
        return []


def _window(scan: Scan, affine: np.ndarray) -> np.ndarray:
    """float64[4, 2]. Corners, in mm of the scan's plane, of the paper's window in a disc volume."""
    low = (np.array(VOLUME_SHAPE[:2]) - WINDOW_SHAPE[:2]) / 2 - 0.5
    unit = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    points = np.c_[low + unit * WINDOW_SHAPE[:2], np.zeros(4), np.ones(4)]
    return (points @ (np.linalg.inv(scan.affine) @ affine).T)[:, :2] * scan.spacing_mm[:2]


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two convex polygons with corners clockwise on the screen (Sutherland–Hodgman)."""
    clipped = list(box)
    for start, end in zip(other, np.roll(other, -1, axis=0), strict=True):
        edge = end - start
        side = [edge[1] * (point - start)[0] - edge[0] * (point - start)[1] for point in clipped]
        kept = []
        for index, point in enumerate(clipped):
            before, was, now = clipped[index - 1], side[index - 1], side[index]
            if was * now < 0:
                kept.append(before + (point - before) * was / (was - now))
            if now >= 0:
                kept.append(point)
        clipped = kept
        if not clipped:
            return 0.0
    common = _area(np.array(clipped))
    return common / (_area(box) + _area(other) - common)


def _area(corners: np.ndarray) -> float:
    rows, columns = corners.T
    return 0.5 * abs(float(np.sum(columns * np.roll(rows, -1) - np.roll(columns, -1) * rows)))
