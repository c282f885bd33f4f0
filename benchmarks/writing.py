"""What it costs to write a disc's hotspots, in several formats: CPU time and bytes, on the maps of an evaluation.

python -m benchmarks.writing --evaluation OUT --data DISCS

Each turn writes the discs in all ways, one after the other. A time is the median of the turns; a ratio is the median of
the turns' ratios, of the first way's time of its kind over its own. zstd and blosc need hdf5plugin (extra `bench`);
without it their rows are left out. Reading is timed too where files are read again, from memory.
"""

import gzip
import importlib.util
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.running import peer, start
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
    turns: int = 7
    """Turns, of which the median counts."""


def main(arguments: Arguments) -> None:
    """Print the table."""
    with h5py.File(arguments.evaluation / "hotspots" / "hotspots.h5") as file:
        stored = file["map"][: arguments.num_discs]
        maps = stored * file["step"][: len(stored)][..., None, None, None]
    data = DataSet(arguments.data)
    windows = [central_window(data.volume(row)) for row in range(len(stored))]
    slices = [np.concatenate(np.moveaxis(window >> 8, 2, 0)).astype(np.uint8) for window in windows]
    sheets = [page.map_pixels(each) for each in maps]
    ways: dict[str, dict[str, Callable[[int], int]]] = {}
    stored_as = ways["maps, HDF5"] = {}
    for name, options in filters().items():
        stored_as[name] = lambda disc, options=options: len(as_hdf5(stored[disc], options))
    files = {name: as_hdf5(stored[0], options) for name, options in filters().items()}
    ways["a disc's maps, HDF5, read"] = {name: lambda _, file=file: read(file) for name, file in files.items()}
    ways["maps, NIfTI"] = {
        f"gzip {level}": lambda disc, level=level: as_nifti(maps[disc], level) for level in (1, 6, 9)
    }
    for kind, pictures, quality in (("slices", slices, 80), ("maps", sheets, 60)):
        drawn_as = ways[f"{kind}, picture"] = {}
        for method in (0, 1, 2, 4):
            options: dict = {"format": "WEBP", "quality": quality, "method": method}
            drawn_as[f"WebP {method}"] = lambda disc, of=pictures, options=options: as_picture(of[disc], **options)
        drawn_as["PNG 6"] = lambda disc, of=pictures: as_picture(of[disc], format="PNG", compress_level=6)
    ways["slices, picture"]["as shipped"] = lambda disc: len(page.window_sheet(windows[disc]))
    ways["maps, picture"]["as shipped"] = lambda disc: len(page.map_sheet(maps[disc]))

    table = Table(title=f"{len(stored)} discs, {stored.shape[1]} tasks; a disc")
    for column in ("", "CPU ms", "ratio", "kB"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, each in ways.items():
        seconds, num_bytes = timed(each, len(stored), arguments.turns)
        first = seconds[next(iter(each))]
        for name in each:
            ratios = first / seconds[name]
            spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            table.add_row(f"{kind}, {name}", f"{np.median(seconds[name]):.1f}", spread, f"{num_bytes[name] / 1000:.0f}")
    Console(width=100).print(table)


def timed(
    ways: Mapping[str, Callable[[int], int]], num_discs: int, turns: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """CPU milliseconds of one disc in each turn, and its bytes, by way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    num_bytes = {}
    for _ in range(turns):
        for name, write in ways.items():
            begin = time.thread_time()
            num_bytes[name] = sum(write(disc) for disc in range(num_discs)) / num_discs
            seconds[name].append(1000 * (time.thread_time() - begin) / num_discs)
    return {name: np.array(each) for name, each in seconds.items()}, num_bytes


def filters() -> dict[str, dict]:
    """Ways to compress the maps; the first is what `evaluate.py` uses."""
    ways: dict[str, dict] = {
        f"gzip {level}": {"compression": "gzip", "compression_opts": level} for level in (1, 4, 6, 9)
    }
    if importlib.util.find_spec("hdf5plugin"):
        plugin = peer("hdf5plugin")
        ways |= {f"zstd {level}": {"compression": plugin.Zstd(clevel=level)} for level in (1, 3, 9)}
        for shuffle in ("shuffle", "bitshuffle"):
            how = {"clevel": 5, "shuffle": getattr(plugin.Blosc, shuffle.upper())}
            ways |= {f"blosc {name}, {shuffle}": {"compression": plugin.Blosc(name, **how)} for name in ("lz4", "zstd")}
    return ways


def as_hdf5(maps: np.ndarray, options: dict) -> bytes:
    """A file with one disc's maps, each a chunk."""
    content = io.BytesIO()
    with h5py.File(content, "w", libver="latest") as file:
        file.create_dataset("map", data=maps, chunks=(1, *maps.shape[1:]), fletcher32=True, **options)
    return content.getvalue()


def read(content: bytes) -> int:
    """Read a file's maps; its bytes."""
    with h5py.File(io.BytesIO(content)) as file:
        file["map"][...]
    return len(content)


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
