"""The network's grid, and how a slice of any scan is brought to it.

A slice is resampled to one pixel size and scaled by its own percentiles, so the network sees neither the scanner's
matrix nor its units. It comes with the slices next to it, where the scan has any. The network's output is coarser: one
cell for every `CELL_PX` × `CELL_PX` pixels.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np
from jaxtyping import Float, Float32, Num
from scipy import ndimage

from data_prep.read.scan import Scan

PIXEL_MM = 1.5  # of the network's input: a lumbar endplate is 20 to 27 pixels long
CELL_PX = 2
CELL_MM = CELL_PX * PIXEL_MM
OFFSET_MM = 10.0  # unit of the network's offsets, so that they are of the order of one
NEIGHBOUR_MM = 4.0  # from a slice to those that the network sees beside it: the usual spacing of sagittal slices
PERCENTILES = (1, 99)  # of a slice's pixels that are mapped to 0 and 1
BRIGHTEST = 1.25


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
    """Map the percentiles 1 and 99 to 0 and 1, and clip to [0, 1.25]. Pixels at the image's minimum do not count.

    They are padding or air that the scanner has cut to one value, and their share says nothing about the tissue.
    """
    data = image[image > image.min()]
    low, high = np.percentile(data if data.size else image, PERCENTILES)
    return np.clip((image - low) / max(float(high - low), 1e-6), 0, BRIGHTEST).astype(np.float32)


def with_neighbours(
    scan: Scan, indices: Iterable[int], pixel_mm: float = PIXEL_MM
) -> list[Float32[np.ndarray, "h w 3"]]:
    """Slices of a scan, each between those about `NEIGHBOUR_MM` before and after it; one that is not there is zero."""
    step = max(1, round(NEIGHBOUR_MM / scan.spacing_mm[2]))

    @cache
    def image(index: int) -> Float32[np.ndarray, "h w"]:
        if not 0 <= index < scan.voxels.shape[2]:
            return np.zeros_like(image(scan.voxels.shape[2] // 2))
        return normalise(resample(scan.voxels[:, :, index], scan.spacing_mm[:2], pixel_mm))

    return [np.stack([image(at) for at in (index - step, index, index + step)], axis=-1) for index in indices]


def alone(image: Float[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W 3"]:
    """A normalised image as the network's input, without neighbours."""
    return np.stack([np.zeros_like(image), image, np.zeros_like(image)], axis=-1).astype(np.float32)
