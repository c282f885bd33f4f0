"""What the view of a whole spine needs: short names of scans, and where each disc lies in its scan's picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spinejax.data.scan_picture import Body, ScanPicture
from spinejax.geometry import WINDOW_SHAPE, window_affine

_MIDDLE = (np.array(WINDOW_SHAPE) - 1) / 2
_HALF_WIDTH_PX = WINDOW_SHAPE[1] / 4  # a disc is half as wide as the window
_HALF_HEIGHT_PX = (14, 20, 32)  # of a disc's box in the window: least, where its bodies are not known, and most
_MARGIN_PX = 7


def short_names(patients: Sequence[str], scans: Sequence[str], examinations: Mapping[str, int] = {}) -> dict[str, str]:
    """Pseudonym of a scan → a name for reading: `Patient 12`, or `Patient 12, scan 3` if the patient has several.

    Patients are counted in the order given, their scans in that of their examinations where these are known. So a name
    holds within one report.
    """
    of_patient: dict[str, list[str]] = {}
    for patient, scan in zip(patients, scans, strict=True):
        known = of_patient.setdefault(patient, [])
        if scan not in known:
            known.append(scan)
    return {
        scan: f"Patient {number}" + (f", scan {place}" if len(known) > 1 else "")
        for number, known in enumerate(of_patient.values(), start=1)
        for place, scan in enumerate(sorted(known, key=lambda scan: examinations.get(scan, 0)), start=1)
    }


def picture_facts(picture: ScanPicture, affines: Float[np.ndarray, "N 4 4"]) -> dict[str, Any]:
    """What the page's script needs of a scan's picture. `affines` are those of its disc volumes."""
    spacing_mm = np.linalg.norm(np.array(picture["affine"])[:3, :3], axis=0)
    num_slices = len(picture["slices"])
    middles = [(_to_picture(picture, affine) @ [*_MIDDLE, 1])[2] for affine in affines]
    return {
        "shape": picture["shape"],
        "pixelMm": spacing_mm[:2].round(4).tolist(),
        "sliceMm": round(float(spacing_mm[2]), 3),
        "slices": num_slices,
        "middle": int(np.clip(round(float(np.median(middles))), 0, num_slices - 1)),
        "bodies": picture["bodies"],
        "doubtfulLevels": picture["doubtful_levels"],
    }


def place_of(picture: ScanPicture, affine: Float[np.ndarray, "4 4"], level: str) -> dict[str, Any]:
    """Where a disc lies in its scan's picture.

    Args:
        picture: of the scan.
        affine: of the disc volume.
        level: its name, such as L5-S1.

    Returns:
        `plane`: the numbers a to f for which a pixel (x, y) of the window, column and row, is at
        (a·x + c·y + e, b·x + d·y + f) of the picture; `slot`: scale and offset that give the window's slice from the
        picture's; `box`: the disc's first and last row and column in the window, from its two bodies where these are
        known.
    """
    to = _to_picture(picture, affine)
    plane = [to[1, 1], to[0, 1], to[1, 0], to[0, 0], to[1, 3], to[0, 3]]
    per_slice = float(to[2, 2]) or 1.0
    return {
        "plane": [round(float(number), 5) for number in plane],
        "slot": [round(1 / per_slice, 6), round(-float(to[2, 3]) / per_slice, 5)],
        "box": [round(float(each), 1) for each in box_of(picture["bodies"], to, level)],
    }


def box_of(bodies: Sequence[Body], to_picture: Float[np.ndarray, "4 4"], level: str) -> tuple[float, ...]:
    """A disc's first and last row and column in its window, from its two bodies where these are known.

    `to_picture` is (row, column, slice, 1) of the window → that of the picture with these bodies.
    """
    half_height = _half_height(bodies, np.linalg.inv(to_picture), level)
    top, left = _MIDDLE[0] - half_height, _MIDDLE[1] - _HALF_WIDTH_PX - _MARGIN_PX
    return top, 2 * _MIDDLE[0] - top, left, 2 * _MIDDLE[1] - left


def _to_picture(picture: ScanPicture, affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """(row, column, slice, 1) of the window → that of the picture."""
    return np.linalg.inv(np.array(picture["affine"])) @ window_affine(affine)


def _half_height(bodies: Sequence[Body], to_window: Float[np.ndarray, "4 4"], level: str) -> float:
    """Half the height of a disc's box in pixels of the window: up to the bodies' corners, and a margin."""
    least, usual, most = _HALF_HEIGHT_PX
    corners = {body["name"]: body["corners"] for body in bodies}
    upper, lower = (corners.get(name, [None] * 4) for name in level.split("-"))
    known = [corner for corner in (*upper[2:], *lower[:2]) if corner is not None]
    if len(known) < 4:
        return usual
    rows = np.array(known) @ to_window[0, :2] + to_window[0, 3]
    return float(np.clip(np.abs(rows - _MIDDLE[0]).max() + _MARGIN_PX, least, most))
