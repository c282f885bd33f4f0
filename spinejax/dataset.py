"""A data set opened for reading. Nothing in its files is trusted: what the schema does not say is refused.

HDF5 follows links into other files, reads external storage and virtual data sets, and gives zeros for chunks that were
never written, all without a word. So there is one function that opens a shard, and it makes each of them a fault.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
import pydantic
from typing_extensions import TypedDict

from spinejax import tasks as task_tables
from spinejax.errors import SpinejaxError
from spinejax.shards import (
    MANIFEST,
    SPLITS,
    VOLUME_DTYPES,
    VOLUME_SHAPE,
    WINDOW_SHAPE,
    central_window,
    check_geometry,
    check_labels,
    columns,
    mean_of_slices,
    refuse_shared_patients,
    sha256_of,
)
from spinejax.tasks import LEVELS


@contextlib.contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turn what HDF5 says of a damaged file into one message that names it."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise SpinejaxError(
            f"{path}: damaged, truncated or not an HDF5 file ({str(error).splitlines()[0]}). "
            "Run `python -m data_prep verify` on its folder and make the file again."
        ) from error


def open_shard(path: Path, num_discs: int, num_tasks: int, masks: Sequence[str]) -> h5py.File:
    """Open a shard for reading, and refuse one that is not exactly what `shards.write_shard` writes.

    Raises:
        SpinejaxError: the file is missing, damaged, or differs from the schema or from the manifest's counts.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: the manifest lists this shard, but it is missing.")
    with _faults_named(path):
        file = h5py.File(path, "r", rdcc_nbytes=0)  # a disc is read whole and once: no chunk cache
        try:
            _check_layout(file, path, num_discs, num_tasks, masks)
        except BaseException:
            file.close()
            raise
    return file


def _check_layout(file: h5py.File, path: Path, num_discs: int, num_tasks: int, masks: Sequence[str]) -> None:
    expected = columns(num_tasks) | {name: (VOLUME_DTYPES[name], VOLUME_SHAPE) for name in ("volume", *masks)}
    if set(file) != set(expected):
        raise SpinejaxError(f"{path}: holds {', '.join(sorted(file))}; expected {', '.join(sorted(expected))}.")
    for name, (dtype, shape) in expected.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise SpinejaxError(f"{path}: {name} is a link to elsewhere; a shard holds its own data. Refused.")
        column = file[name]
        if not isinstance(column, h5py.Dataset) or column.is_virtual or column.external:
            raise SpinejaxError(f"{path}: {name} keeps its data in other files or is no data set. Refused.")
        if column.dtype != dtype or column.shape != (num_discs, *shape):
            raise SpinejaxError(
                f"{path}: {name} is {column.dtype}{list(column.shape)}, expected {dtype}{[num_discs, *shape]}."
            )
        if not column.chunks or column.chunks[1:] != shape or not column.fletcher32:
            raise SpinejaxError(f"{path}: {name} is not stored in whole rows with checksums. Make the data set again.")
        if column.id.get_num_chunks() != -(-num_discs // column.chunks[0]):
            raise SpinejaxError(f"{path}: {name} has rows that were never written. Make the data set again.")


class DataSet:
    """A data set opened for reading: the small columns in memory, the volumes on disk, each one read away.

    Attributes:
        folder: where it lies.
        manifest: `manifest.json` as it stands there.
        tasks: its task table.
        slice_mean: float32[9]. Mean intensity of each slice of the training windows.
        affine, slices, labels: the columns, over all shards in order.
        level, patient, scan, split: str[N].

    Raises:
        SpinejaxError: on opening, if the manifest or a shard is missing, damaged or of another schema; if a label is
            out of range; if a patient is in two splits.
    """

    affine: np.ndarray
    slices: np.ndarray
    labels: np.ndarray
    level: np.ndarray
    patient: np.ndarray
    scan: np.ndarray
    split: np.ndarray

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.tasks = task_tables.from_json(self.manifest["tasks"])
        self.masks = tuple(self.manifest["masks"])
        self.slice_mean = np.asarray(self.manifest["slice_mean"], np.float32)
        self._stops = np.cumsum([entry["discs"] for entry in self.manifest["files"]])
        self._files: dict[int, h5py.File] = {}
        shards = [self._read_columns(index) for index in range(len(self._stops))]
        for name in columns(0):
            column = np.concatenate([shard[name] for shard in shards])
            with _faults_named(self.folder):
                setattr(self, name, np.char.decode(column, "ascii") if column.dtype.kind == "S" else column)
        self._check_columns()

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getstate__(self):
        # Worker processes open the files for themselves: an HDF5 handle must not cross a fork or a pickle.
        return self.__dict__ | {"_files": {}}

    @property
    def digest(self) -> str:
        """What tells this data set from any other: one sha256 over its task table and its files' digests."""
        content = [self.manifest["tasks"], [entry["sha256"] for entry in self.manifest["files"]]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def rows(self, split: str) -> np.ndarray:
        """int[M]. Positions of a split's discs.

        Raises:
            SpinejaxError: the split is empty or unknown.
        """
        rows = np.flatnonzero(self.split == split)
        if not len(rows):
            counts = ", ".join(f"{name}: {np.sum(self.split == name)}" for name in SPLITS)
            raise SpinejaxError(f"{self.folder}: no disc in split {split!r} ({counts}).")
        return rows

    def volume(self, row: int) -> np.ndarray:
        """uint16[192, 320, 15]. Raises SpinejaxError if its checksum does not fit."""
        return self._read("volume", row)

    def volumes(self, rows: np.ndarray) -> np.ndarray:
        """uint16[M, 192, 320, 15]. The discs at `rows`, read straight into one array."""
        batch = _aligned((len(rows), *VOLUME_SHAPE), VOLUME_DTYPES["volume"])
        for place, row in enumerate(rows):
            self._read("volume", int(row), into=batch[place])
        return batch

    def mask(self, name: str, row: int) -> np.ndarray:
        """The "region" or "lesion" mask of a disc, [192, 320, 15]. Raises SpinejaxError if the set stores none."""
        if name not in self.masks:
            raise SpinejaxError(f"{self.folder}: this data set stores no {name} masks.")
        return self._read(name, row)

    def _read(self, name: str, row: int, into: np.ndarray | None = None) -> np.ndarray:
        into = np.empty(VOLUME_SHAPE, dtype=VOLUME_DTYPES[name]) if into is None else into
        index = int(np.searchsorted(self._stops, row, side="right"))
        first = self._stops[index] - self.manifest["files"][index]["discs"]
        with _faults_named(self._path(index)):
            self._file(index)[name].read_direct(into, source_sel=np.s_[row - first])
        return into

    def _path(self, index: int) -> Path:
        return self.folder / self.manifest["files"][index]["name"]

    def _file(self, index: int) -> h5py.File:
        if index not in self._files:
            num_discs = self.manifest["files"][index]["discs"]
            self._files[index] = open_shard(self._path(index), num_discs, len(self.tasks), self.masks)
        return self._files[index]

    def _read_columns(self, index: int) -> dict[str, np.ndarray]:
        with _faults_named(self._path(index)):
            return {name: self._file(index)[name][()] for name in columns(0)}

    def _check_columns(self) -> None:
        unknown = set(self.level) - set(LEVELS) | set(self.split) - set(SPLITS)
        if unknown:
            raise SpinejaxError(f"{self.folder}: unknown levels or splits {', '.join(sorted(unknown))}.")
        check_labels(self.labels, self.tasks, str(self.folder))
        check_geometry(self.affine, self.slices, str(self.folder))
        refuse_shared_patients({s: set(self.patient[self.split == s]) for s in SPLITS}, self.folder)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts on a 64-byte boundary, as XLA wants it: on CPUs such a batch needs no copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        raise SpinejaxError(
            f"{folder}: no {MANIFEST} there, so this is not a data set. `python -m data_prep` makes one."
        )
    try:
        manifest = pydantic.TypeAdapter(_Manifest).validate_json(path.read_bytes(), strict=True)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise SpinejaxError(f"{path}: damaged: {where}: {fault['msg']}. Make the data set again.") from error
    names = [entry["name"] for entry in manifest["files"]]
    if len(set(names)) < len(names):
        raise SpinejaxError(f"{path}: damaged: it lists a file twice. Make the data set again.")
    return dict(manifest)


_Count = Annotated[int, pydantic.Field(ge=0, lt=2**40)]
# A manifest names files of its own folder only: a path in it could lead a reader anywhere.
_FileName = Annotated[str, pydantic.Field(pattern=r"^discs-\d{5}-of-\d{5}\.h5$")]
_Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


class _File(TypedDict):
    name: _FileName
    discs: _Count
    bytes: _Count
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class _Split(TypedDict):
    patients: _Count
    discs: _Count
    grades: dict[str, list[_Count]]


class _Splits(TypedDict):
    train: _Split
    validation: _Split
    test: _Split


class _Task(TypedDict):
    name: str
    grades: list[str]


class _Manifest(TypedDict):
    """`manifest.json`, as `shards.write_manifest` writes it."""

    schema_version: Literal[1]
    tasks: Annotated[list[_Task], pydantic.Field(min_length=1)]
    levels: list[str]
    masks: list[Literal["region", "lesion"]]
    preprocessing: dict[str, Any]
    splits: _Splits
    slice_mean: Annotated[list[_Fraction], pydantic.Field(min_length=WINDOW_SHAPE[2], max_length=WINDOW_SHAPE[2])]
    files: Annotated[list[_File], pydantic.Field(min_length=1)]


# Verifying -----------------------------------------------------------------------------------------------------------


def verify(folder: str | Path) -> list[str]:
    """Read a whole data set and list every fault; an empty list means that all is well.

    Beyond what opening checks: each file's sha256, each chunk's checksum, zeros outside the valid slices, a level twice
    in one scan, the manifest's counts, and one image in two splits (a patient who came under two names).

    Raises:
        SpinejaxError: the data set cannot even be opened.
    """
    data = DataSet(folder)
    faults = []
    for entry in data.manifest["files"]:
        if sha256_of(data.folder / entry["name"]) != entry["sha256"]:
            faults.append(f"{entry['name']}: its sha256 is not the manifest's: the file was changed after it was made.")
    for key, count in Counter(zip(data.scan, data.level, strict=True)).items():
        if count > 1:
            faults.append(f"scan {key[0]}: level {key[1]} is there {count} times.")
    splits_of_image: dict[bytes, str] = {}
    slice_sum, all_read = np.zeros(WINDOW_SHAPE[2], np.int64), True
    for row in range(len(data)):
        where = f"row {row} (scan {data.scan[row]}, {data.level[row]})"
        try:
            volume = data.volume(row)
            for name in data.masks:
                data.mask(name, row)
        except SpinejaxError as error:
            faults.append(f"{where}: {error}")
            all_read = False
            continue
        first, stop = data.slices[row]
        if volume[:, :, :first].any() or volume[:, :, stop:].any():
            faults.append(f"{where}: voxels outside the valid slices.")
        digest = hashlib.blake2b(volume.tobytes(), digest_size=16).digest()
        if splits_of_image.setdefault(digest, data.split[row]) != data.split[row]:
            faults.append(f"{where}: the same image is in another split.")
        if data.split[row] == "train":
            slice_sum += central_window(volume).sum((0, 1), dtype=np.int64)
    for split in SPLITS:
        if data.manifest["splits"][split] != _count(data, split):
            faults.append(f"split {split}: the manifest's counts are not those of the shards.")
    slice_mean = mean_of_slices(slice_sum, int(np.sum(data.split == "train")))
    if all_read and not np.allclose(data.slice_mean, slice_mean, atol=1e-6):
        faults.append("the manifest's slice means are not those of the training discs.")
    return faults


def _count(data: DataSet, split: str) -> dict:
    inside = data.split == split
    grades = {
        task.name: [int(np.sum(data.labels[inside, column] == grade)) for grade in range(task.num_grades)]
        for column, task in enumerate(data.tasks)
    }
    return {"patients": len(set(data.patient[inside])), "discs": int(inside.sum()), "grades": grades}
