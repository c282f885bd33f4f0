"""Speed of the input pipeline: reading against plain reads and PyTorch, views against TorchIO and MONAI.

    python -m benchmarks.input --data runs/quickstart/discs [--parts formats threads loaders views] [--json FILE]

What is compared runs in turn in one process. A figure is the median of its turns; a ratio is the median of the turns'
ratios, with the least and the greatest. With `taskset -c 0` figures are per core. Needs the extra `bench`.

    formats     ways to store a disc: its size, and the CPU time to read and check it from the page cache
    loaders     shuffled batches by shards and Grain, and by PyTorch's DataLoader over the same files, which checks
                nothing, against plain reads of the same bytes into allocated memory. Once from the page cache and once
                from the disk: each turn drops the data set from this machine's page cache, not from its host's
    threads     batches of random discs from the page cache, read by each of `--threads` out of one shard and out of
                all, in wall time, against plain reads in one thread, and against copying the same bytes in memory
    views       one rotation, shift and scale of nine slices with linear interpolation, in CPU time: spinejax's views
                from stored discs, against MONAI and TorchIO from float32 in memory. They must agree first, on smooth
                discs, up to the difference between one and two passes of interpolation
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.running import peer, start
from spinejax.data.batches import num_steps, train_batches
from spinejax.data.dataset import DataSet
from spinejax.data.shards import checksum_of
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.network import views as our_views
from spinejax.network.views import ViewRanges
from spinejax.parallel import runtime

Part = Literal["formats", "threads", "loaders", "views"]
DISC_BYTES = 2 * int(np.prod(VOLUME_SHAPE))
AHEAD = 6  # batches that a loader may read ahead
INTERPOLATION_DIFFERENCE = 0.01  # of the intensities' range


@dataclass(frozen=True)
class Arguments:
    """Time the input pipeline."""

    data: Path
    """Data set to read from."""
    parts: tuple[Part, ...] = ("formats", "threads", "loaders", "views")
    """Tables to make."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes of the loaders."""
    threads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of reading threads."""
    batch_size: int = 32
    """Discs per batch."""
    rounds: int = 7
    """Number of turns of each."""
    json: Path | None = None
    """Also write the rows to this file: for each part a list of the table's rows. It keeps the parts not made now."""


@dataclass
class Row:
    """One row of a table. Its ratio is the first row's time over its own: above 1 it is faster."""

    name: str
    seconds: list[float] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    def figures(self, first: "Row", count: int) -> dict[str, Any]:
        """The row as JSON; `count` is the number of discs of a turn."""
        ratios = np.array(first.seconds) / np.array(self.seconds)
        spread = {"ratio": np.median(ratios), "low": ratios.min(), "high": ratios.max()}
        about = {"ms_per_disc": 1e3 * np.median(self.seconds) / count} | spread | self.notes
        return {"name": self.name} | {key: float(value) for key, value in about.items()}


def main(arguments: Arguments) -> None:
    """Print one table per part, and write each as soon as it is complete."""
    if {"loaders", "views"} & set(arguments.parts):
        peer("torch")
    runtime.set_up()
    kept = arguments.json and arguments.json.exists()
    figures: dict[str, Any] = json.loads(arguments.json.read_text()) if kept else {}
    for part in arguments.parts:
        for title, rows, count in PARTS[part](arguments):
            figures[title] = [row.figures(rows[0], count) for row in rows]
            figures.setdefault("cores", {})[title] = len(os.sched_getaffinity(0))
            show(title, figures[title])
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table("", "ms a disc", "discs/s", "times the first", "least to greatest", *rows[0].keys() - _ALWAYS)
    table.title, table.title_justify = title, "left"
    for row in rows:
        rest = [f"{row[key]:.3g}" for key in rows[0].keys() - _ALWAYS]
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        cells = f"{row['ms_per_disc']:.3f}", f"{1e3 / row['ms_per_disc']:,.0f}", f"{row['ratio']:.2f}", spread
        table.add_row(row["name"], *cells, *rest)
    Console(width=120).print(table)


_ALWAYS = {"name", "ms_per_disc", "ratio", "low", "high"}


# Formats -------------------------------------------------------------------------------------------------------------


def formats(arguments: Arguments) -> Iterator[tuple[str, list[Row], int]]:
    """The same discs in a file of each format, read one by one into allocated memory."""
    data = DataSet(arguments.data)
    volumes = data.volumes(data.rows("train")[: 2 * arguments.batch_size])
    shuffled = {"shuffle": True, "fletcher32": True}
    stored: dict[str, dict] = {
        "uncompressed, unchecked": {},
        "uncompressed, XXH3 in a column": {},
        "uncompressed, Fletcher-32 of HDF5": {"fletcher32": True},
        "LZF, Fletcher-32": {"compression": "lzf", **shuffled},
        "gzip 1, Fletcher-32": {"compression": "gzip", "compression_opts": 1, **shuffled},
        "float32, uncompressed, XXH3": {"dtype": np.float32},
    }
    rows, reads = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in stored.items():
            file = h5py.File(Path(folder) / name, "w", libver="latest", rdcc_nbytes=0)
            column = file.create_dataset("volume", data=volumes, chunks=(1, *VOLUME_SHAPE), **options)
            file.flush()
            rows.append(Row(name, notes={"MB": column.id.get_storage_size() / len(volumes) / 1e6}))
            reads.append(reading(column, checked="XXH3" in name))
        places = range(len(volumes))
        take_turns(rows, [lambda read=read: [read(place) for place in places] for read in reads], arguments)
    yield "formats", rows, len(volumes)


def reading(column: h5py.Dataset, *, checked: bool) -> Callable[[int], None]:
    """A function that reads one disc: through HDF5's filters, or directly, with its checksum computed if `checked`."""
    into = np.zeros(VOLUME_SHAPE, column.dtype)

    def filtered(place):
        column.read_direct(into, source_sel=np.s_[place])

    def direct(place):
        column.id.read_direct_chunk((place, 0, 0, 0), out=into.reshape(-1).view(np.uint8))
        if checked:
            checksum_of(into)

    return filtered if column.id.get_create_plist().get_nfilters() else direct


def take_turns(rows: Sequence[Row], calls: Sequence[Callable], arguments: Arguments) -> None:
    """Add the CPU seconds of each call in each turn to its row. The first turn, which fills caches, is not counted."""
    for turn in range(arguments.rounds + 1):
        for row, call in zip(rows, calls, strict=True):
            started = time.process_time()
            call()
            if turn:
                row.seconds.append(time.process_time() - started)


# Threads -------------------------------------------------------------------------------------------------------------


def threads(arguments: Arguments) -> Iterator[tuple[str, list[Row], int]]:
    """The same number of random discs, read by some threads out of some shards."""
    data, size = DataSet(arguments.data), 2 * arguments.batch_size
    rng, discs = np.random.default_rng(0), [entry["discs"] for entry in data.manifest["files"]]
    source, target = (np.ones((size, *VOLUME_SHAPE), np.uint16) for _ in range(2))
    plain = plain_reads(data, size)
    calls: dict[str, Callable] = {"plain reads": lambda: next(plain), "memory copy": lambda: np.copyto(target, source)}
    for count in arguments.threads:
        for shards in sorted({1, len(discs)}):
            among = np.arange(sum(discs[:shards]))
            name = f"{count} threads, {shards} shards"
            calls[name] = lambda count=count, among=among: data.volumes(rng.choice(among, size), threads=count)
    rows = [Row(name) for name in calls]
    for turn in range(arguments.rounds + 1):
        for row, call in zip(rows, calls.values(), strict=True):
            started = time.perf_counter()
            call()
            if turn:
                row.seconds.append(time.perf_counter() - started)
    for row in rows:
        row.notes["MB/s"] = size * DISC_BYTES / 1e6 / float(np.median(row.seconds))
        row.notes["times the copy"] = float(np.median(np.array(rows[1].seconds) / row.seconds))
    yield "threads", rows, size


# Loaders -------------------------------------------------------------------------------------------------------------


class Discs:
    """The shards as a PyTorch user would read them: each worker opens the HDF5 files, and an item is one disc."""

    def __init__(self, data: DataSet):
        self.files = data.paths
        self.stops = np.cumsum([entry["discs"] for entry in data.manifest["files"]])
        self.labels = data.labels
        self.opened: dict[int, h5py.Dataset] = {}

    def __len__(self) -> int:
        return int(self.stops[-1])

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        index = int(np.searchsorted(self.stops, row, side="right"))
        if index not in self.opened:
            self.opened[index] = h5py.File(self.files[index], "r")["volume"]
        volume = self.opened[index][row - (self.stops[index - 1] if index else 0)]
        torch = peer("torch")
        return torch.from_numpy(volume), torch.from_numpy(self.labels[row])


def loaders(arguments: Arguments) -> Iterator[tuple[str, list[Row], int]]:
    """Batches in shuffled order, by each loader; once from the page cache and once from the disk.

    A turn is one pass over the training discs. Its first batches are not timed, because the loader has read them ahead
    during the turns of the others.
    """
    data, size = DataSet(arguments.data), arguments.batch_size
    timed = num_steps(len(data.rows("train")), size) - AHEAD
    if timed < AHEAD:
        raise SystemExit(f"{arguments.data}: {len(data.rows('train'))} training discs; expected {2 * AHEAD * size}.")
    columns = list(range(len(data.tasks)))
    every: dict[str, Iterator] = {"plain reads": plain_reads(data, size)}
    for count in arguments.workers:
        ours = train_batches(data, columns, batch_size=size, seed=0, workers=count)
        every[f"shards + Grain, {count} workers"] = ours
    for count in arguments.workers:
        every[f"DataLoader, {count} workers"] = data_loader(data, size, count)
    for state in ("page cache", "disk"):
        rows = [Row(name) for name in every]
        for turn in range(arguments.rounds + 1):
            for row, batches in zip(rows, every.values(), strict=True):
                for _ in range(AHEAD):
                    next(batches)
                if state == "disk":
                    drop_from_page_cache(data)
                started = time.perf_counter()
                for _ in range(timed):
                    next(batches)
                if turn:  # the first turn starts processes and fills the page cache
                    row.seconds.append(time.perf_counter() - started)
        for row in rows:
            row.notes["MB/s"] = timed * size * DISC_BYTES / 1e6 / float(np.median(row.seconds))
        yield f"loaders, from the {state}", rows, timed * size


def plain_reads(data: DataSet, size: int) -> Iterator[np.ndarray]:
    """Read each disc's bytes in shuffled order into the memory of one batch, which is reused, without end."""
    places = []
    for path, entry in zip(data.paths, data.manifest["files"], strict=True):
        with h5py.File(path) as file:
            volume = file["volume"].id
            starts = [volume.get_chunk_info_by_coord((i, 0, 0, 0)).byte_offset for i in range(entry["discs"])]
        opened = os.open(path, os.O_RDONLY)
        places += [(opened, start) for start in starts]
    batch, rng = np.zeros((size, DISC_BYTES), np.uint8), np.random.default_rng(0)
    while True:
        order = rng.permutation(data.rows("train"))
        for rows in order[: len(order) // size * size].reshape(-1, size):
            for into, row in zip(batch, rows, strict=True):
                opened, start = places[row]
                os.preadv(opened, [into], start)
            yield batch


def data_loader(data: DataSet, size: int, workers: int) -> Iterator:
    """PyTorch's DataLoader, shuffled, without end. Its workers are spawned, because this process has threads."""
    how: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    torch = peer("torch")
    discs = torch.utils.data.Subset(Discs(data), data.rows("train").tolist())
    loader = torch.utils.data.DataLoader(discs, size, shuffle=True, drop_last=True, num_workers=workers, **how)
    while True:
        yield from loader


def drop_from_page_cache(data: DataSet) -> None:
    """Drop the data set from the page cache, so that the next read comes from the disk."""
    for path in data.paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # what is not written yet cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


# Views ---------------------------------------------------------------------------------------------------------------


def views(arguments: Arguments) -> Iterator[tuple[str, list[Row], int]]:
    """The same in-plane views of a batch of discs, by each library, with one thread each."""
    torch = peer("torch")
    torch.set_num_threads(1)
    key, size = jax.random.key(0), arguments.batch_size
    ranges = ViewRanges(shift_slices=0, intensity=0, flip=False)
    drawn = jax.vmap(lambda key: our_views.sample(key, ranges))(jax.random.split(key, size))
    take = jax.jit(jax.vmap(our_views.take))
    smooth, stored = smooth_discs(size), DataSet(arguments.data).volumes(np.arange(size))
    chosen = jax.tree.map(np.asarray, drawn)
    expected = np.asarray(take(smooth, drawn))
    peers = {"MONAI": monai_windows, "TorchIO": torchio_windows}
    for name, windows in peers.items():
        off = float(np.abs(expected - windows(smooth, chosen)()).max())
        print(f"{name}: differs by {off:.4f} of the intensities' range at most")
        if off > INTERPOLATION_DIFFERENCE:
            raise SystemExit(f"{name}: more than {INTERPOLATION_DIFFERENCE}: this is not the same view.")
    calls: Mapping[str, Callable] = {
        "spinejax": lambda: jax.block_until_ready(take(stored, drawn)),
        **{name: windows(stored, chosen) for name, windows in peers.items()},
    }
    rows = [Row(name) for name in calls]
    take_turns(rows, list(calls.values()), arguments)
    yield "views", rows, size


def smooth_discs(size: int) -> np.ndarray:
    """float32[size, 192, 320, 15] of slow waves that fade at the borders, which the libraries treat differently."""
    row, column, place = np.ogrid[: VOLUME_SHAPE[0], : VOLUME_SHAPE[1], : VOLUME_SHAPE[2]]
    fades = np.sin(np.pi * row / (VOLUME_SHAPE[0] - 1)) * np.sin(np.pi * column / (VOLUME_SHAPE[1] - 1))
    lengths = np.random.default_rng(0).uniform(20, 40, (size, 2))
    each = [fades * (1 + np.sin(row / down + place) * np.cos(column / across)) / 2 for down, across in lengths]
    return np.stack(each).astype(np.float32)


def float_slices(volumes: np.ndarray) -> np.ndarray:
    """The window's slices as float32 intensities. For the peers this is not timed."""
    first = (VOLUME_SHAPE[2] - WINDOW_SHAPE[2]) // 2
    slices = volumes[..., first : first + WINDOW_SHAPE[2]]
    return slices if slices.dtype == np.float32 else slices.astype(np.float32) / 65535


def monai_windows(volumes: np.ndarray, chosen) -> Callable[[], np.ndarray]:
    """MONAI's Affine in two dimensions, with slices as channels, directly onto the window's grid: its fastest way."""
    affine = peer("monai.transforms").Affine
    torch = peer("torch")
    discs = [torch.tensor(np.moveaxis(slices, -1, 0).copy()) for slices in float_slices(volumes)]
    both = zip(matrices(chosen), chosen.shift_px, strict=True)
    grids = [np.block([[matrix, shift[:, None]], [0, 0, 1]]) for matrix, shift in both]

    def call():
        options = {"spatial_size": WINDOW_SHAPE[:2], "mode": "bilinear", "padding_mode": "zeros", "image_only": True}
        return [affine(affine=grid, **options)(disc) for disc, grid in zip(discs, grids, strict=True)]

    return lambda: np.moveaxis(np.stack([np.asarray(window) for window in call()]), 1, -1)


def torchio_windows(volumes: np.ndarray, chosen) -> Callable[[], np.ndarray]:
    """TorchIO's Affine on the nine slices, then a crop of the window from the middle."""
    torchio = peer("torchio")
    torch = peer("torch")
    peer("SimpleITK").ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    discs = [torch.tensor(slices.copy())[None] for slices in float_slices(volumes)]
    margins = [(outer - inner) // 2 for outer, inner in zip(VOLUME_SHAPE, WINDOW_SHAPE, strict=True)][:2]
    inside = tuple(slice(margin, margin + size) for margin, size in zip(margins, WINDOW_SHAPE[:2], strict=True))
    transforms = []
    for angle, scale, shift, matrix in zip(
        chosen.angle_deg, chosen.scale, chosen.shift_px, matrices(chosen), strict=True
    ):
        back = -np.linalg.inv(matrix * scale) @ shift
        options = {"default_pad_value": 0, "image_interpolation": "linear"}
        transforms.append(
            torchio.Affine((float(scale), float(scale), 1), (0, 0, float(angle)), (*map(float, back), 0), **options)
        )

    def call():
        return [transform(disc)[0][inside] for disc, transform in zip(discs, transforms, strict=True)]

    return lambda: np.stack([window.numpy() for window in call()])


def matrices(chosen) -> np.ndarray:
    """float[V, 2, 2]. From a window's pixel to the volume's, both relative to the centre, without the shift."""
    angle = np.deg2rad(chosen.angle_deg)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (turn / chosen.scale).transpose(2, 0, 1)


PARTS = {"formats": formats, "threads": threads, "loaders": loaders, "views": views}

if __name__ == "__main__":
    start("input", Arguments, main)
