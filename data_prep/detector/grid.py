"""The network's grid, and how a slice of any scan is brought to it.

A slice is resampled to one pixel size and scaled by its own percentiles, so the network sees neither the scanner's
matrix nor its units. The network's output is coarser: one cell for every `CELL_PX` × `CELL_PX` pixels.
"""

import numpy as np
from jaxtyping import Float, Float32, Num
from scipy import ndimage

PIXEL_MM = 1.5  # of the network's input: a lumbar endplate is 20 to 27 pixels long
CELL_PX = 2
CELL_MM = CELL_PX * PIXEL_MM
OFFSET_MM = 10.0  # unit of the network's offsets, so that they are of the order of one


def resample(
    image: Num[np.ndarray, "H W"], spacing_mm: Float[np.ndarray, "2"], pixel_mm: float = PIXEL_MM
) -> Float32[np.ndarray, "h w"]:
    """Resample a slice to `pixel_mm` without aliasing. The centre of pixel (0, 0) stays where it is."""
    step = pixel_mm / spacing_mm
    shape = np.maximum(np.ceil(np.array(image.shape) / step).astype(int), 1)
    image = image.astype(np.float32)
    if np.max(step) > 1:
        image = ndimage.gaussian_filter(image, 0.5 * np.sqrt(np.maximum(step**2 - 1, 0)), mode="nearest")
    return ndimage.affine_transform(image, step, output_shape=tuple(shape), order=1, mode="nearest")


def normalise(image: Float[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    """Map the percentiles 1 and 99 to 0 and 1, and clip to [0, 1.25]."""
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) / max(float(high - low), 1e-6), 0, 1.25).astype(np.float32)
