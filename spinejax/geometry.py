"""The shapes of disc volumes and windows, and the step of a stored intensity."""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

VOLUME_SHAPE = (192, 320, 15)
"""Rows, columns and slices of a disc volume, as it is stored."""
WINDOW_SHAPE = (112, 224, 9)
"""Those of a window, as the network sees it (paper, Sect. 4)."""
MARGINS = tuple((outer - inner) // 2 for outer, inner in zip(VOLUME_SHAPE, WINDOW_SHAPE, strict=True))
"""Rows, columns and slices of a volume on either side of its central window."""

INTENSITY_ONE = 65535
"""The stored value of intensity 1."""
INTENSITY_STEP = np.float32(1 / INTENSITY_ONE)  # a product, unlike a quotient, is the same to the bit on every backend


def central_window(volume: Shaped[Any, "192 320 15"]) -> Shaped[Any, "112 224 9"]:
    """The middle of a volume, the paper's input, as a view of the array."""
    return volume[tuple(slice(margin, margin + size) for margin, size in zip(MARGINS, WINDOW_SHAPE, strict=True))]


def window_affine(affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """(row, column, slice, 1) of the identity window → LPS mm, from the affine of the disc volume."""
    into_volume = np.eye(4)
    into_volume[:3, 3] = MARGINS
    return affine @ into_volume
