"""The shapes of disc volumes and windows, and the step of a stored intensity."""

import numpy as np

VOLUME_SHAPE = (192, 320, 15)
WINDOW_SHAPE = (112, 224, 9)
INTENSITY_ONE = 65535
INTENSITY_STEP = np.float32(1 / INTENSITY_ONE)  # a product, unlike a quotient, is the same to the bit on every backend


def central_window(volume):
    """The paper's 112×224×9 input inside a [192, 320, 15] array: its middle, as a view of the array."""
    starts = [(outer - inner) // 2 for outer, inner in zip(VOLUME_SHAPE, WINDOW_SHAPE, strict=True)]
    return volume[tuple(slice(start, start + size) for start, size in zip(starts, WINDOW_SHAPE, strict=True))]
