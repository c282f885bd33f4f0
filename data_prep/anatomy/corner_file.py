"""Corner files: vertebral bodies marked by hand or by another program, in the patient's own coordinates.

    {"scans": {"0007_t2": {"L4": {"corners_mm": [[x, y, z], [x, y, z], [x, y, z], [x, y, z]], "width_mm": 40}, …}, …}}

Corners are points of the patient (LPS, mm) in the body's mid-sagittal plane: upper anterior, upper posterior, lower
posterior, lower anterior; null where one is not known, as S1's lower ones. So they hold for the scan in any format.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.anatomy.vertebrae import SPIDER_VERTEBRAE, VertebralBody
from data_prep.read.scan import Scan
from data_prep.read.tables import refuse
from spinejax.errors import SpinejaxError

NAMES = ("S1", *SPIDER_VERTEBRAE)
_WIDTH_MM = 35.0  # of a lumbar body, from side to side, less its rounded flanks
_MAX_BYTES = 1 << 28
_FURTHEST_MM = 2000.0


def read_corners(path: Path) -> dict[str, dict[str, dict]]:
    """Read a corner file: scan → vertebra → `{"corners_mm": …, "width_mm": …}`.

    Raises:
        SpinejaxError: the file is missing, no JSON, or has faults. All are listed.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SpinejaxError(f"--corners {path}: more than {_MAX_BYTES >> 20} MiB. Is it a corner file?")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpinejaxError(f"--corners {path}: not a readable JSON file ({error}).") from error
    if not isinstance(content, dict) or set(content) != {"scans"} or not isinstance(content["scans"], dict):
        raise SpinejaxError(f'--corners {path}: expected {{"scans": {{…}}}} at its top. docs/data.md shows one.')
    faults = []
    for scan, bodies in content["scans"].items():
        if not isinstance(bodies, dict):
            faults.append(f"{scan}: expected vertebrae by name")
            continue
        faults += [f"{scan}, {name}: {fault}" for name, body in bodies.items() for fault in _faults(name, body)]
    refuse(path, faults)
    return content["scans"]


def _faults(name: str, body) -> list[str]:
    if name not in NAMES:
        return [f"unknown vertebra, expected one of {', '.join(NAMES)}"]
    if not isinstance(body, dict) or not {"corners_mm"} <= set(body) <= {"corners_mm", "width_mm"}:
        return ["expected corners_mm, and perhaps width_mm"]
    corners, width = body["corners_mm"], body.get("width_mm", _WIDTH_MM)
    if not isinstance(corners, list) or len(corners) != 4 or not all(c is None or _is_point(c) for c in corners):
        return ["corners_mm is not four points [x, y, z] in mm, or null where one is not known"]
    if not isinstance(width, int | float) or not 5 <= width <= 100:
        return [f"width_mm {width}, expected 5 to 100"]
    if not any(all(corners[i] is not None for i in pair) for pair in ((0, 1), (2, 3))):
        return ["neither its upper nor its lower corners are known"]
    return []


def _is_point(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(number, int | float) and abs(number) <= _FURTHEST_MM for number in value)
    )


def bodies_from_corners(scan: Scan, bodies: Mapping[str, Mapping]) -> list[VertebralBody]:
    """A scan's vertebral bodies from its part of a corner file.

    Raises:
        SpinejaxError: a body lies beside the scan's slices, or fewer than two are given.
    """
    if len(bodies) < 2:
        raise SpinejaxError(f"{scan.name}: the corner file has {len(bodies)} of its vertebrae; a disc needs two.")
    to_voxel = np.linalg.inv(scan.affine)
    found = []
    for name, body in bodies.items():
        points = np.array([[np.nan] * 3 if point is None else point for point in body["corners_mm"]], float)
        voxels = (np.c_[points, np.ones(4)] @ to_voxel.T)[:, :3]
        reach = body.get("width_mm", _WIDTH_MM) / 2 / scan.spacing_mm[2]
        middle = np.nanmean(voxels[:, 2])
        first, stop = int(np.ceil(middle - reach)), int(np.floor(middle + reach)) + 1
        if first >= stop:  # a body between two thick slices
            first, stop = int(np.rint(middle)), int(np.rint(middle)) + 1
        first, stop = max(first, 0), min(stop, scan.voxels.shape[2])
        if first >= stop:
            raise SpinejaxError(f"{scan.name}: {name}'s corners lie beside the slices. Are they in LPS and mm?")
        found.append(VertebralBody(name, voxels[:, :2], (first, stop)))
    return sorted(found, key=lambda body: NAMES.index(body.name), reverse=True)
