"""An inventory as a page: every series with its middle slice, what it is, and why it is left out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from rich.console import Console

from data_prep.dataset.progress import with_progress
from data_prep.dataset.workers import workers
from data_prep.read.inventory import COLUMNS, Entry
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_privately
from spinejax.files.html import style_and_script, templates, webp

_LARGEST_PX = 128
_GREY = (1, 99.5)  # percentiles that are drawn black and white
_QUALITY = 60


def inventory_page(path: Path, entries: Sequence[Entry], *, num_workers: int, console: Console) -> None:
    """Write the page. It holds everything that it shows, and only its owner can read it.

    Args:
        path: the file.
        entries: the series.
        num_workers: number of processes that read slices.
        console: where to show the progress.

    Raises:
        NotInstalledError: Jinja2 is missing.
    """
    page = templates("data_prep.look", "The page of an inventory needs Jinja2").get_template("inventory.html")
    with workers(num_workers if len(entries) > 100 else 1, None) as run:
        pictures = list(with_progress(run(thumbnail, entries), len(entries), "series", console))
    rows = [
        {"picture": picture} | dict(zip(COLUMNS, entry.cells, strict=True))
        for entry, picture in zip(entries, pictures, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    own = style_and_script(Path(__file__).parent / "templates", "inventory")
    write_privately(path, page.render(rows=rows, chosen=sum(not entry.reason for entry in entries), **own))


def thumbnail(entry: Entry) -> str:
    """A series' middle slice as a WebP file in base64; empty if it cannot be read."""
    if entry.series is None:
        return ""
    try:
        if entry.series.look:
            pixels = entry.series.look()
        else:
            voxels = entry.series.read()[0].voxels
            pixels = voxels[:, :, voxels.shape[2] // 2]
    except (SpinejaxError, OSError):
        return ""
    return webp(_small(pixels), _QUALITY)


def _small(pixels: Shaped[np.ndarray, "H W"]) -> np.ndarray:
    """A slice in grey, at most 128 pixels high and wide."""
    step = -(-max(pixels.shape) // _LARGEST_PX)
    pixels = np.nan_to_num(pixels[::step, ::step].astype(np.float32))  # a resampled slice has NaN around it
    black, white = np.percentile(pixels, _GREY)
    return np.rint(255 * ((pixels - black) / max(white - black, 1e-9)).clip(0, 1)).astype(np.uint8)
