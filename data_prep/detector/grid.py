"""The grid that the network works on, and how a slice of any scan is brought to it.

A slice is resampled to one pixel size and scaled by its own percentiles, so that neither the scanner's matrix nor its
units reach the network. The network answers on a coarser grid of cells, each `CELL_MM` wide.
"""

import numpy as np
from scipy import ndimage

PIXEL_MM = 1.5
"""Of the network's input: a lumbar endplate is 20 to 27 pixels long."""

CELL_PX = 2
"""Input pixels along a cell of the network's output."""

CELL_MM = CELL_PX * PIXEL_MM

BLOCK_PX = 16
"""The network's coarsest stride: heights and widths are padded to a multiple of it."""

OFFSET_MM = 10.0
"""Unit of the network's offsets: they are then of the order of one."""


def resample(image: np.ndarray, spacing_mm: np.ndarray, pixel_mm: float = PIXEL_MM) -> np.ndarray:
    """float32[h, w]. A slice at `pixel_mm`, without aliasing; its pixel (0, 0) is centred where the slice's is."""
    step = pixel_mm / np.asarray(spacing_mm, float)
    shape = np.maximum(np.ceil(np.array(image.shape) / step).astype(int), 1)
    image = image.astype(np.float32)
    if step.max() > 1:
        image = ndimage.gaussian_filter(image, 0.5 * np.sqrt(np.maximum(step**2 - 1, 0)), mode="nearest")
    return ndimage.affine_transform(image, step, output_shape=tuple(shape), order=1, mode="nearest")


def normalise(image: np.ndarray) -> np.ndarray:
    """float32, as `image`. Its percentiles 1 and 99 become 0 and 1; what is beyond is clipped to [0, 1.25]."""
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) / max(float(high - low), 1e-6), 0, 1.25).astype(np.float32)
