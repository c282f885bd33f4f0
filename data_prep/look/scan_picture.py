"""The picture of a whole scan that a report shows, from the scan and its vertebral bodies."""

import numpy as np
from jaxtyping import Float

from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.dataset.job import Located
from spinejax.data.scan_picture import Body, ScanPicture
from spinejax.files.html import webp

MAX_SLICES, MAX_PX = 32, 640
"""The most slices, and the most rows or columns, of a picture."""

_QUALITY = 75
_GREY = (0.5, 99.7)  # percentiles shown as black and white


def picture_of(found: Located) -> ScanPicture:
    """The slices of a scan in 8 bits, with the bodies that were found in it.

    A scan of more than `MAX_SLICES` is shown by every second, third … slice; one of more than `MAX_PX` rows or columns
    by means over 2×2, 3×3 … pixels.
    """
    scan = found.scan
    rows, columns, num_slices = scan.voxels.shape
    step, shrink = -(-num_slices // MAX_SLICES), -(-max(rows, columns) // MAX_PX)
    first = num_slices // 2 % step  # so that the middle slice is among them
    rows, columns = rows // shrink, columns // shrink
    planes = scan.voxels[: rows * shrink, : columns * shrink, first::step]
    planes = planes.reshape(rows, shrink, columns, shrink, -1).mean((1, 3))
    black, white = np.nanpercentile(planes, _GREY)
    grey = np.nan_to_num(255 * (planes - black) / max(white - black, 1e-9)).clip(0, 255)
    to_scan = np.diag([shrink, shrink, step, 1.0])
    to_scan[:3, 3] = [(shrink - 1) / 2, (shrink - 1) / 2, first]
    confidence = found.confidence or {}
    return ScanPicture(
        affine=(scan.affine @ to_scan).tolist(),
        shape=(rows, columns),
        slices=[webp(plane, _QUALITY) for plane in np.moveaxis(np.rint(grey).astype(np.uint8), 2, 0)],
        bodies=[_body(body, np.linalg.inv(to_scan), confidence.get(body.name)) for body in found.bodies],
        doubtful_levels=found.doubtful_levels,
    )


def _body(body: VertebralBody, to_picture: Float[np.ndarray, "4 4"], confidence: float | None) -> Body:
    corners = body.corners @ to_picture[:2, :2] + to_picture[:2, 3]
    first, last = to_picture[2, 2] * np.array([body.slices[0], body.slices[1] - 1]) + to_picture[2, 3]
    return Body(
        name=body.name,
        corners=[(row, column) if np.isfinite(row + column) else None for row, column in corners.round(2).tolist()],
        slices=(int(np.ceil(first)), int(np.floor(last)) + 1),
        confidence=None if confidence is None else round(confidence, 3),
    )
