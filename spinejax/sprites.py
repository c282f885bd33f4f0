"""Discs and their maps as pictures that a page can carry: one sheet of slices a disc, one sheet of its maps.

A page of 300 discs with six maps each is some 170 million pixels; packed as WebP it is about 14 MB. Each sheet keeps to
a budget, so that no page outgrows its own: what would not fit is packed more coarsely. The sheets are grey: the page's
script paints the maps, so colour and opacity cost nothing.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from spinejax.shards import WINDOW_SHAPE

MAP_SHRINK = 2
"""A map is smooth: half of its rows and columns are enough to paint it."""
WINDOW_BYTES, MAP_BYTES = 32_000, 8_000
"""Of a disc's slices, and of each of its maps, at most, as base64."""
_WINDOW_QUALITIES, _MAP_QUALITIES = (80, 60, 40, 20, 5, 0), (60, 40, 20, 5, 0)
_BRIGHTEST = 99.9  # percentile: one pixel far above all others would leave the rest of a map black


def window_sheet(window: np.ndarray) -> str:
    """A disc's slices below one another, from the patient's right to the left, 1008×224 pixels.

    Args:
        window: uint16[112, 224, 9].

    Returns:
        A WebP file, base64.
    """
    return _webp(np.concatenate(np.moveaxis(window >> 8, 2, 0)).astype(np.uint8), _WINDOW_QUALITIES, WINDOW_BYTES)


def map_sheet(maps: np.ndarray) -> str:
    """A disc's maps: a row of pictures a task, a column a slice, 56×112 pixels each, each map by its own brightest.

    Args:
        maps: float32[T, 112, 224, 9]; the size of a value counts, not its sign.

    Returns:
        A WebP file, base64.
    """
    num_tasks, (rows, columns, num_slices) = len(maps), WINDOW_SHAPE
    small = np.abs(maps).reshape(num_tasks, rows // MAP_SHRINK, MAP_SHRINK, columns // MAP_SHRINK, MAP_SHRINK, -1)
    small = small.mean((2, 4))
    brightest = np.percentile(small, _BRIGHTEST, axis=(1, 2, 3), keepdims=True)
    grey = np.rint(255 * (small / np.where(brightest > 0, brightest, 1)).clip(0, 1)).astype(np.uint8)
    sheet = grey.transpose(0, 1, 3, 2).reshape(num_tasks * rows // MAP_SHRINK, num_slices * columns // MAP_SHRINK)
    return _webp(sheet, _MAP_QUALITIES, num_tasks * MAP_BYTES)


def _webp(pixels: np.ndarray, qualities: Sequence[int], most_bytes: int) -> str:
    for quality in qualities:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", quality=quality)
        text = base64.b64encode(file.getvalue()).decode()
        if len(text) <= most_bytes:
            break
    return text
