"""Reading a data set. Nothing in its files is trusted: what the schema does not allow is refused.

HDF5 silently follows links into other files, reads external storage and virtual data sets, and gives zeros for chunks
that were never written. So one function opens shards, and it refuses each of these.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float, Float32, Int, Integer, Shaped, UInt8, UInt16

from spinejax import tasks as task_tables
from spinejax.data.copies import Copies
from spinejax.data.manifest import folder_of_shards, read_manifest, totals
from spinejax.data.shards import (
    SPLITS,
    VOLUME_DTYPES,
    Disc,
    ShardSummary,
    check_geometry,
    check_labels,
    checksum_of,
    columns,
    refuse_shared_patients,
)
from spinejax.errors import SpinejaxError
from spinejax.files.checksums import sha256_of
from spinejax.files.stores import Address, cache_folder, located
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.tasks import LEVELS, UNLABELLED

ALL = "all"
"""In place of a split's name: the discs of all splits."""


@contextlib.contextmanager
def _report_damage(path: Path | Address) -> Iterator[None]:
    """Turn HDF5's errors about a damaged file into one message that names it."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise SpinejaxError(
            f"{path}: damaged, truncated or not an HDF5 file ({str(error).splitlines()[0]}). "
            "Run `python -m data_prep verify` on its folder and make the file again."
        ) from error


def open_shard(path: Path | Address, num_discs: int, num_tasks: int, masks: Sequence[str], version: int) -> h5py.File:
    """Open a shard, and refuse one that is not exactly what `shards.write_shard` writes, or wrote in version 1.

    Raises:
        SpinejaxError: the file is missing, damaged, or differs from the schema or from the manifest's counts.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: the manifest lists this shard, but it is missing.")
    expected = columns(num_tasks, version) | {name: (VOLUME_DTYPES[name], VOLUME_SHAPE) for name in ("volume", *masks)}
    with _report_damage(path):
        source = path.open() if isinstance(path, Address) else path
        file = h5py.File(source, "r", rdcc_nbytes=0)  # a disc is read whole and once: no chunk cache
        try:
            if set(file) != set(expected):
                raise SpinejaxError(f"{path}: holds {', '.join(sorted(file))}; expected {', '.join(sorted(expected))}.")
            for name, (dtype, shape) in expected.items():
                if fault := _fault_of(file, name, dtype, (num_discs, *shape), version):
                    raise SpinejaxError(f"{path}: {name} {fault}. Make the data set again.")
        except BaseException:
            file.close()
            raise
    return file


def _fault_of(file: h5py.File, name: str, dtype: np.dtype, shape: tuple[int, ...], version: int) -> str | None:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return "is a link to elsewhere; a shard holds its own data"
    column = file[name]
    if not isinstance(column, h5py.Dataset) or column.is_virtual or column.external:
        return "keeps its data in other files, or is not an HDF5 dataset"
    if column.dtype != dtype or column.shape != shape:
        return f"is {column.dtype}{list(column.shape)}, expected {dtype}{list(shape)}"
    if not column.chunks or column.chunks[1:] != shape[1:]:
        return "is not stored in whole rows"
    if name == "volume" and version > 1:
        if column.chunks[0] != 1 or column.id.get_create_plist().get_nfilters():
            return "is not stored unchanged, disc by disc"
    elif not column.fletcher32:
        return "is stored without checksums"
    if column.id.get_num_chunks() != -(-shape[0] // column.chunks[0]):
        return "has rows that were never written"
    return None


class DataSet:
    """A data set opened for reading: the small columns in memory, the volumes on disk, one read each.

    Of a data set in an object store the columns are read there. A shard is copied to this machine when a disc in it is
    read, or by `copy`.

    Args:
        folder: a folder of this machine, or one in a store: `s3://…`, `gs://…`.
        cache_dir: where the copies are kept. Default: the user's cache.

    Raises:
        SpinejaxError: on opening, if the manifest or a shard is missing, damaged or of another schema; if a label is
            out of range; if a patient is in two splits; if a fold's original is not there.
    """

    shards: Path | Address
    """The folder that has the shards: its own, or for a fold that of the original data set."""
    paths: list[Path]
    """The shards: in the data set's folder, or for a fold in that of the original data set; or their copies."""
    slice_mean: Float32[np.ndarray, "9"]
    """Mean intensity of each slice of the training windows."""
    # The columns, over all shards in order, as in `shards`. Version 1 of the schema has no `checksum`.
    affine: Float[np.ndarray, "N 4 4"]
    checksum: Integer[np.ndarray, "N"]
    slices: Int[np.ndarray, "N 2"]
    labels: Int[np.ndarray, "N T"]
    level: Shaped[np.ndarray, "N"]
    patient: Shaped[np.ndarray, "N"]
    scan: Shaped[np.ndarray, "N"]
    split: Shaped[np.ndarray, "N"]

    def __init__(self, folder: str | Path | Address, *, cache_dir: Path | None = None):
        self.folder = located(folder)
        self.manifest = read_manifest(self.folder)
        self.shards, self.cache_dir = folder_of_shards(self.folder, self.manifest), cache_dir
        self._copies = None
        if isinstance(self.shards, Address):
            self._copies = Copies(self.shards, self.manifest["files"], cache_folder(cache_dir))
            self.paths = self._copies.paths
        else:
            self.paths = [self.shards / entry["name"] for entry in self.manifest["files"]]
        self._version = self.manifest["schema_version"]
        self.tasks = task_tables.from_json(self.manifest["tasks"])
        self.masks = tuple(self.manifest["masks"])
        self.slice_mean = np.asarray(self.manifest["slice_mean"], np.float32)
        self._stops = np.cumsum([entry["discs"] for entry in self.manifest["files"]])
        self._files: dict[int, h5py.File] = {}
        self._volumes: dict[int, h5py.Dataset] = {}  # per file; each lookup would take a third of a disc's read
        self._starts: dict[int, list[int]] = {}  # per file: where in it each volume begins
        self._pools: dict[int, concurrent.futures.Executor] = {}  # by number of threads
        tables = [self._read_columns(index) for index in range(len(self._stops))]
        for name in columns(0, self._version):
            column = np.concatenate([table[name] for table in tables])
            with _report_damage(self.folder):
                setattr(self, name, np.char.decode(column, "ascii") if column.dtype.kind == "S" else column)
        if (splits := self.manifest.get("patients")) is not None:
            if set(splits) != set(self.patient.tolist()):
                raise SpinejaxError(f"{self.folder}: damaged: its patients are not those of its discs. Make it again.")
            self.split = np.array([splits[patient] for patient in self.patient.tolist()])
        self._averaged = np.flatnonzero(self.split == "train")  # what `slice_mean` is the mean of
        self._check_columns()

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getstate__(self):
        # Worker processes open the files for themselves: an HDF5 handle must not cross a fork or a pickle.
        return self.__dict__ | {"_files": {}, "_volumes": {}, "_pools": {}}

    @property
    def digest(self) -> str:
        """A sha256 that identifies this data set: over its task table, its files' digests, and a fold's splits."""
        content: list = [self.manifest["tasks"], [entry["sha256"] for entry in self.manifest["files"]]]
        if "patients" in self.manifest:
            content.append(sorted(self.manifest["patients"].items()))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @functools.cached_property
    def source(self) -> Int[np.ndarray, "N"]:
        """The source of each disc, counted from 0 in alphabetical order; 0 for all if the manifest names none."""
        described: dict = self.manifest.get("scans", {})
        names = [described.get(scan, {}).get("source", "") for scan in self.scan.tolist()]
        return np.unique(names, return_inverse=True)[1].astype(np.int32)

    def mean_of_filled_slices(self) -> Float32[np.ndarray, "9"]:
        """`slice_mean` over only those training windows that have the slice inside their scan.

        Like `slice_mean`, it is of the training split that is stored, whatever `split` was changed to since.
        """
        place = np.arange(WINDOW_SHAPE[2]) + (VOLUME_SHAPE[2] - WINDOW_SHAPE[2]) // 2
        first, stop = self.slices[self._averaged].T[:, :, None]
        inside = ((first <= place) & (place < stop)).mean(0)
        filled = np.where(inside > 0, self.slice_mean / np.maximum(inside, 1e-9), self.slice_mean.max())
        return filled.astype(np.float32)

    def rows(self, split: str) -> Int[np.ndarray, "M"]:
        """Positions of a split's discs, or with `ALL` of all discs.

        Raises:
            SpinejaxError: the split is empty or unknown.
        """
        rows = np.arange(len(self)) if split == ALL else np.flatnonzero(self.split == split)
        if not len(rows):
            counts = ", ".join(f"{name}: {np.sum(self.split == name)}" for name in SPLITS)
            raise SpinejaxError(f"{self.folder}: no disc in split {split!r} ({counts}).")
        return rows

    def copy(self, rows: Int[np.ndarray, "M"], *, tell: Callable[[str], None] = lambda line: None) -> None:
        """Copy the shards that have these rows to this machine, if they are in a store and not copied yet.

        Raises:
            SpinejaxError: there is no room, the store fails, or a shard's sha256 is not the manifest's.
        """
        if self._copies:
            self._copies.make({self._locate(int(row))[0] for row in rows}, tell=tell)

    def volume(self, row: int | np.integer) -> UInt16[np.ndarray, "192 320 15"]:
        """A disc volume as stored. Raises SpinejaxError if its checksum does not fit."""
        return self._read_volume(int(row), np.empty(VOLUME_SHAPE, VOLUME_DTYPES["volume"]))

    def volumes(self, rows: Integer[np.ndarray, "M"], *, threads: int = 1) -> UInt16[np.ndarray, "M 192 320 15"]:
        """The disc volumes at `rows`, read straight into one array, from several shards at once by several threads."""
        batch = _aligned((len(rows), *VOLUME_SHAPE), VOLUME_DTYPES["volume"])

        def read(places: np.ndarray) -> None:
            for place in places:
                self._read_volume(int(rows[place]), batch[place])

        parts = np.array_split(np.arange(len(rows)), max(1, min(threads, len(rows))))
        if len(parts) == 1:
            read(parts[0])
        else:  # a pool's threads begin with its first task: of two made at once, one stays empty
            pool = self._pools.setdefault(threads, concurrent.futures.ThreadPoolExecutor(threads))
            list(pool.map(read, parts))
        return batch

    def mask(
        self, name: str, row: int | np.integer
    ) -> UInt8[np.ndarray, "192 320 15"] | UInt16[np.ndarray, "192 320 15"]:
        """The "region" or "lesion" mask of a disc. Raises SpinejaxError if the data set stores none."""
        if name not in self.masks:
            raise SpinejaxError(f"{self.folder}: this data set stores no {name} masks.")
        index, place = self._locate(int(row))
        with _report_damage(self.paths[index]):
            return self._file(index)[name][place]

    def labels_of(self, row: int) -> dict[str, int]:
        """Task → grade, for the tasks that have a label for one disc."""
        labels = zip(self.tasks, self.labels[row].tolist(), strict=True)
        return {task.name: label for task, label in labels if label != UNLABELLED}

    def disc(self, row: int, *, masks: bool = True) -> Disc:
        """One row as `shards.write_shard` takes it, with or without its masks."""
        first, stop = self.slices[row].tolist()
        return Disc(
            volume=self.volume(row),
            affine=self.affine[row],
            slices=(first, stop),
            labels=self.labels_of(row),
            level=str(self.level[row]),
            patient=str(self.patient[row]),
            scan=str(self.scan[row]),
            split=str(self.split[row]),
            **{name: self.mask(name, row) for name in (self.masks if masks else ())},
        )

    def _read_volume(self, row: int, into: np.ndarray) -> np.ndarray:
        index, place = self._locate(row)
        with _report_damage(self.paths[index]):
            file = self._file(index)
            if self._version == 1:  # HDF5 verifies what it reads
                self._volumes[index].read_direct(into, source_sel=np.s_[place])
                return into
            # HDF5 lets one thread read at a time. A volume is stored unchanged (`open_shard`), so the system reads it.
            start = self._starts_in(index)[place]
            if os.preadv(file.id.get_vfd_handle(), [into.reshape(-1).view(np.uint8).data], start) != into.nbytes:
                raise ValueError(f"the volume of disc {place} is cut short")
            if checksum_of(into) != self.checksum[row]:
                raise ValueError(f"the volume of disc {place} does not fit its checksum")
        return into

    def _starts_in(self, index: int) -> list[int]:
        if index not in self._starts:
            column = self._volumes[index].id
            chunks = range(self.manifest["files"][index]["discs"])
            self._starts[index] = [column.get_chunk_info_by_coord((i, 0, 0, 0)).byte_offset for i in chunks]
        return self._starts[index]

    def _locate(self, row: int) -> tuple[int, int]:
        """The index of a disc's file, and its row in that file."""
        index = int(np.searchsorted(self._stops, row, side="right"))
        return index, int(row - self._stops[index] + self.manifest["files"][index]["discs"])

    def _file(self, index: int) -> h5py.File:
        if index not in self._files:
            if self._copies:
                self._copies.make({index})
            file = self._open(index, self.paths[index])
            self._volumes[index] = file["volume"]
            self._files[index] = file
        return self._files[index]

    def _open(self, index: int, path: Path | Address) -> h5py.File:
        num_discs = self.manifest["files"][index]["discs"]
        return open_shard(path, num_discs, len(self.tasks), self.masks, self._version)

    def _read_columns(self, index: int) -> dict[str, np.ndarray]:
        if self._copies and not self.paths[index].is_file():
            path = self._copies.sources[index]
            with _report_damage(path), self._open(index, path) as file:
                return {name: file[name][()] for name in columns(0, self._version)}
        with _report_damage(self.paths[index]):
            return {name: self._file(index)[name][()] for name in columns(0, self._version)}

    def _check_columns(self) -> None:
        unknown = set(self.level) - set(LEVELS) | set(self.split) - set(SPLITS)
        if unknown:
            raise SpinejaxError(f"{self.folder}: unknown levels or splits {', '.join(sorted(unknown))}.")
        check_labels(self.labels, self.tasks, str(self.folder))
        check_geometry(self.affine, self.slices, str(self.folder))
        refuse_shared_patients({s: set(self.patient[self.split == s]) for s in SPLITS}, str(self.folder))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts on a 64-byte boundary: on CPUs, XLA uses such a batch without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


# Verifying -----------------------------------------------------------------------------------------------------------


def verify(folder: str | Path | Address, *, cache_dir: Path | None = None) -> list[str]:
    """Read a whole data set and list every fault; the list is empty if there is none.

    Beyond what opening checks: each file's sha256, each checksum, zeros outside the valid slices, a level twice in one
    scan, the manifest's counts, and one image in two splits (a patient who came under two names).

    Raises:
        SpinejaxError: the data set cannot be opened.
    """
    data = DataSet(folder, cache_dir=cache_dir)
    data.copy(data.rows(ALL))
    faults = [
        f"{entry['name']}: its sha256 is not the manifest's: the file was changed after it was made."
        for entry, path in zip(data.manifest["files"], data.paths, strict=True)
        if sha256_of(path) != entry["sha256"]
    ]
    for (scan, level), count in Counter(zip(data.scan, data.level, strict=True)).items():
        if count > 1:
            faults.append(f"scan {scan}: level {level} occurs {count} times.")
    summary = ShardSummary()
    split_of_image: dict[str, str] = {}
    for row in range(len(data)):
        where = f"row {row} (scan {data.scan[row]}, {data.level[row]})"
        try:
            disc = data.disc(row)
        except SpinejaxError as error:
            faults.append(f"{where}: {error}")
            continue
        first, stop = disc.slices
        if disc.volume[:, :, :first].any() or disc.volume[:, :, stop:].any():
            faults.append(f"{where}: voxels outside the valid slices.")
        if split_of_image.setdefault(summary.add(disc), disc.split) != disc.split:
            faults.append(f"{where}: the same image is in another split.")
    if summary.num_discs == len(data):  # all could be read
        found = totals([summary], data.tasks)
        for split, listed in data.manifest["splits"].items():
            if listed != found["splits"][split]:
                faults.append(f"split {split}: the manifest's counts are not those of the shards.")
        if not np.allclose(data.slice_mean, found["slice_mean"], atol=1e-6):
            faults.append("the manifest's slice means are not those of the training discs.")
    return faults
