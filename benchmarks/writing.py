"""What it costs to write a disc's hotspots, in several formats: CPU time and bytes, on the maps of an evaluation.

python -m benchmarks.writing --evaluation OUT --data DISCS
"""

import gzip
import io
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.running import start
from spinejax.data.dataset import DataSet
from spinejax.geometry import central_window
from spinejax.report import hotspot_files, page


@dataclass(frozen=True)
class Arguments:
    """Time the ways to write hotspots."""

    evaluation: Path
    """What `evaluate.py --hotspots` wrote."""
    data: Path
    """The data set that it graded; of raw scans the folder `discs` beside the results."""
    num_discs: int = 8
    """Discs whose maps are written."""
    turns: int = 3
    """Turns, of which the fastest counts."""


def main(arguments: Arguments) -> None:
    """Print the table."""
    with h5py.File(arguments.evaluation / "hotspots" / "hotspots.h5") as file:
        stored = file["map"][: arguments.num_discs]
        maps = stored * file["step"][: len(stored)][..., None, None, None]
    data = DataSet(arguments.data)
    windows = [central_window(data.volume(row)) for row in range(len(stored))]
    slices = [np.concatenate(np.moveaxis(window >> 8, 2, 0)).astype(np.uint8) for window in windows]
    sheets = [page.map_pixels(each) for each in maps]
    ways: dict[str, Callable[[int], int]] = {}
    for level in (1, 4, 6, 9):
        ways[f"maps, HDF5, gzip {level}"] = lambda disc, level=level: as_hdf5(stored[disc], level)
        ways[f"maps, zlib {level}"] = lambda disc, level=level: len(zlib.compress(stored[disc].tobytes(), level))
    for level in (1, 6, 9):
        ways[f"maps, NIfTI, gzip {level}"] = lambda disc, level=level: as_nifti(maps[disc], level)
    for method in (0, 1, 2, 4):
        for name, pictures, quality in (("slices", slices, 80), ("maps", sheets, 60)):
            options: dict = {"format": "WEBP", "quality": quality, "method": method}
            ways[f"{name}, WebP {method}"] = lambda disc, of=pictures, options=options: as_picture(of[disc], **options)
    ways["slices, PNG 6"] = lambda disc: as_picture(slices[disc], format="PNG", compress_level=6)
    ways["maps, PNG 6"] = lambda disc: as_picture(sheets[disc], format="PNG", compress_level=6)
    ways["slices, as shipped"] = lambda disc: len(page.window_sheet(windows[disc]))
    ways["maps, as shipped"] = lambda disc: len(page.map_sheet(maps[disc]))

    table = Table(title=f"{len(stored)} discs, {stored.shape[1]} tasks; a disc")
    for column in ("", "CPU ms", "kB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, write in ways.items():
        ms, num_bytes = timed(write, len(stored), arguments.turns)
        table.add_row(name, f"{ms:.1f}", f"{num_bytes / 1000:.0f}")
    Console(width=100).print(table)


def timed(write: Callable[[int], int], num_discs: int, turns: int) -> tuple[float, float]:
    """CPU milliseconds and bytes of one disc."""
    seconds, num_bytes = [], 0
    for _ in range(turns):
        begin = time.thread_time()
        num_bytes = sum(write(disc) for disc in range(num_discs))
        seconds.append(time.thread_time() - begin)
    return 1000 * min(seconds) / num_discs, num_bytes / num_discs


def as_hdf5(maps: np.ndarray, level: int) -> int:
    """Bytes of a file with one disc's maps, each a chunk."""
    content = io.BytesIO()
    with h5py.File(content, "w", libver="latest") as file:
        packed = {"compression": "gzip", "compression_opts": level, "fletcher32": True}
        file.create_dataset("map", data=maps, chunks=(1, *maps.shape[1:]), **packed)
    return len(content.getvalue())


def as_nifti(maps: np.ndarray, level: int) -> int:
    """Bytes of one disc's NIfTI files."""
    images = hotspot_files.nifti(maps, np.eye(4), ["a map"] * len(maps))
    return sum(len(gzip.compress(image, level, mtime=0)) for image in images)


def as_picture(pixels: np.ndarray, **options) -> int:
    """Bytes of a picture."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, **options)
    return len(content.getvalue())


if __name__ == "__main__":
    start("writing", Arguments, main)
