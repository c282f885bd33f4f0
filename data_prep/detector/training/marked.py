"""Slices in which somebody has marked the discs, but no corners: weak labels of level and place.

For SPIDER's mid-sagittal slices these are the hand-set points of the Lumbar Coordinate Dataset (`level_points.csv`, one
at the posterior margin of each disc from L1-L2 to L5-S1); a patient's T1 slice is planned like his T2 slice and takes
the same points, about. For Sudirman's slices they are the boxes around the discs (`boxes.csv`, LSMA-PQR).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.read.csv_tables import read_table
from data_prep.read.metaimage import read_mha
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS

SPIDER, SUDIRMAN = "spider", "sudirman"

# A patient's images are planned a little differently: by this much marks from another one are shifted, all together.
SHIFTS_MM = np.array([(row, column) for row in range(-14, 15, 2) for column in range(-9, 10, 3)], float)


@dataclass(frozen=True, eq=False)
class MarkedSlice:
    """One slice of a patient, and where its discs are."""

    source: str  # `SPIDER` or `SUDIRMAN`
    patient: str
    path: Path
    points: dict[str, Float[np.ndarray, "2"]]  # level → (row, column) in mm from the middle of the image
    posterior: bool  # the points are at the discs' posterior margins, not at their centres
    exact: bool  # they were set in this image, not in another one of the patient
    boxes: dict[str, Float[np.ndarray, "2 2"]]  # level → first and last (row, column) likewise; none for points

    def read(self) -> tuple[Scan, int]:
        """The scan, and the index of the slice: the middle one, as in the tables."""
        scan = read_mha(self.path, np.float32)
        return scan, scan.voxels.shape[2] // 2


def middle_mm(scan: Scan) -> Float[np.ndarray, "2"]:
    """The middle of a scan's slices, (row, column) in mm from the centre of the first pixel."""
    return (np.array(scan.voxels.shape[:2]) - 1) / 2 * scan.spacing_mm[:2]


def spider_slices(root: Path) -> list[MarkedSlice]:
    """SPIDER's T2 slices with their points, and the T1 slices of the same patients; none without `level_points.csv`."""
    table = root / "level_points.csv"
    if not table.is_file():
        return []
    relative: dict[str, dict[str, Float[np.ndarray, 2]]] = {}
    for line, row in read_table(table, ("file", "level", "relative_row", "relative_col"), ("patient",)).rows:
        place = _numbers(table, line, row["relative_row"], row["relative_col"])
        relative.setdefault(row["file"], {})[_level(table, line, row["level"])] = place
    slices = []
    for file, places in relative.items():
        path = root / "images" / file
        size_mm = 2 * middle_mm(read_mha(path, np.float32))
        points = {level: (place - 0.5) * size_mm for level, place in places.items()}
        patient = file.split("_")[0]
        slices.append(MarkedSlice(SPIDER, patient, path, points, posterior=True, exact=True, boxes={}))
        other = path.with_name(f"{patient}_t1.mha")
        if other.is_file():
            slices.append(MarkedSlice(SPIDER, patient, other, points, posterior=True, exact=False, boxes={}))
    return slices


def sudirman_slices(root: Path) -> list[MarkedSlice]:
    """Sudirman's slices, each with the boxes of its discs.

    Raises:
        SpinejaxError: `boxes.csv` is missing or wrong, or an image that it names.
    """
    table, edges = root / "boxes.csv", ("row_min", "col_min", "row_max", "col_max")
    by_scan: dict[str, dict[str, Float[np.ndarray, "2 2"]]] = {}
    patients = {}
    for line, row in read_table(table, ("patient", "scan", "level", *edges), ("class",)).rows:
        if row["level"]:  # a disc's second finding has a box without one
            box = _numbers(table, line, *(row[edge] for edge in edges)).reshape(2, 2)
            by_scan.setdefault(row["scan"], {})[_level(table, line, row["level"])] = box
            patients[row["scan"]] = row["patient"]
    slices = []
    for name, boxes_px in by_scan.items():
        path = root / "images" / f"{name}.mha"
        scan = read_mha(path, np.float32)
        boxes = {level: box * scan.spacing_mm[:2] - middle_mm(scan) for level, box in boxes_px.items()}
        points = {level: box.mean(0) for level, box in boxes.items()}
        slices.append(MarkedSlice(SUDIRMAN, patients[name], path, points, posterior=False, exact=True, boxes=boxes))
    return slices


def _level(table: Path, line: int, name: str) -> str:
    if name not in LEVELS and name not in ("T8-T9",):
        raise SpinejaxError(f"{table}, line {line}: level {name!r}, expected one of {', '.join(LEVELS)}.")
    return name


def _numbers(table: Path, line: int, *cells: str) -> Float[np.ndarray, "N"]:
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError as error:
        raise SpinejaxError(f"{table}, line {line}: {error}; expected numbers.") from error
