"""Where the network's window of a disc lies in a scan's plane."""

import numpy as np
from jaxtyping import Float

from data_prep.read.scan import Scan
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE


def window_in_scan(scan: Scan, affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 2"]:
    """The window's corners, (row, column) of the scan; `affine` is that of the disc volume, as in shards."""
    low = (np.array(VOLUME_SHAPE[:2]) - WINDOW_SHAPE[:2]) / 2 - 0.5
    corners = low + np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) * WINDOW_SHAPE[:2]
    points = np.c_[corners, np.full(4, VOLUME_SHAPE[2] // 2), np.ones(4)]
    return (points @ (np.linalg.inv(scan.affine) @ affine).T)[:, :2]
