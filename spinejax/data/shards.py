"""The shard format, the one place where `data_prep` and the network meet.

A data set is a folder of HDF5 files and a manifest that lists them. Each file holds the same table, one row per disc:

    volume    uint16[N, 192, 320, 15]   the disc volume; 65535 is intensity 1
    checksum  uint64[N]                 XXH3-64 of the volume's bytes, as stored
    affine    float64[N, 4, 4]          (row, column, slice, 1) of the volume → patient space, LPS, mm
    slices    int16[N, 2]               first and one past the last slice inside the scan
    labels    int8[N, T]                a column per task of the manifest's task table; -1 where missing
    level, patient, scan, split         fixed-width ASCII; patient and scan are pseudonyms
    region    uint8[N, 192, 320, 15]    optional: 1 upper vertebral body, 2 disc, 3 lower vertebral body
    lesion    uint16[N, 192, 320, 15]   optional: bit t is set where the evidence for task t is

One disc is one chunk, so that a disc is one read. A volume is stored uncompressed, and its checksum in a column: HDF5's
own, Fletcher-32, which every other chunk carries, takes six times as long as the read (docs/performance.md). Version 1
of the schema had it for volumes too, and no column `checksum`. This file has the schema and the writer; `manifest.py`
lists the shards; `dataset.py` reads them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float, Int, UInt16

from spinejax.errors import SpinejaxError
from spinejax.files.checksums import sha256_of
from spinejax.files.hdf5 import Column, write_table
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.tasks import LEVELS, UNLABELLED, Task

SCHEMA_VERSION = 2
SPLITS = ("train", "validation", "test")

MASK_DTYPES: dict[str, np.dtype] = {"region": np.dtype("u1"), "lesion": np.dtype("<u2")}
VOLUME_DTYPES: dict[str, np.dtype] = {"volume": np.dtype("<u2")} | MASK_DTYPES


@dataclass(frozen=True, eq=False)
class Disc:
    """One row of a shard; the module's docstring gives units. `write_shard` checks it."""

    volume: np.ndarray
    affine: np.ndarray
    slices: tuple[int, int]
    labels: dict[str, int]
    level: str
    patient: str
    scan: str
    split: str
    region: np.ndarray | None = None
    lesion: np.ndarray | None = None


@dataclass
class ShardSummary:
    """What one shard adds to the manifest."""

    file: str = ""
    bytes: int = 0
    sha256: str = ""
    num_discs: int = 0
    discs: Counter = field(default_factory=Counter)
    patients: dict[str, set] = field(default_factory=lambda: {split: set() for split in SPLITS})
    grades: Counter = field(default_factory=Counter)
    images: set[tuple[str, str]] = field(default_factory=set)  # digest of a volume, and its split
    slice_sum: np.ndarray = field(default_factory=lambda: np.zeros(WINDOW_SHAPE[2], np.int64))

    def add(self, disc: Disc) -> str:
        """Count one disc, and return a digest that identifies its image, whatever names patient and scan have."""
        image = hashlib.blake2b(disc.volume.tobytes(), digest_size=16).hexdigest()
        self.images.add((image, disc.split))
        self.num_discs += 1
        self.discs[disc.split] += 1
        self.patients[disc.split].add(disc.patient)
        self.grades.update((disc.split, task, label) for task, label in disc.labels.items() if label != UNLABELLED)
        if disc.split == "train":
            self.slice_sum += central_window(disc.volume).sum((0, 1), dtype=np.int64)
        return image


def columns(num_tasks: int, version: int = SCHEMA_VERSION) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Column → dtype and shape of a row, for all columns but volumes and masks, in a version of the schema."""
    since_version_2 = {"checksum": (np.dtype("<u8"), ())} if version > 1 else {}
    return since_version_2 | {
        "affine": (np.dtype("<f8"), (4, 4)),
        "slices": (np.dtype("<i2"), (2,)),
        "labels": (np.dtype("i1"), (num_tasks,)),
        "level": (np.dtype("S8"), ()),
        "patient": (np.dtype("S32"), ()),
        "scan": (np.dtype("S32"), ()),
        "split": (np.dtype("S12"), ()),
    }


# What holds for every disc, when it is written and when it is read ----------------------------------------------------


def check_labels(labels: Int[np.ndarray, "N T"], tasks: Sequence[Task], where: str) -> None:
    """Raises SpinejaxError if a label is neither a grade of its task nor `UNLABELLED`."""
    # A cross-entropy takes -1 for the last grade, and gives NaN for a label past the end.
    for task, column in zip(tasks, labels.T, strict=True):
        wrong = column[(column < UNLABELLED) | (column >= task.num_grades)]
        if len(wrong):
            raise SpinejaxError(f"{where}: label {wrong[0]} for {task.name}, expected -1 to {task.num_grades - 1}.")


def check_geometry(affine: Float[np.ndarray, "N 4 4"], slices: Int[np.ndarray, "N 2"], where: str) -> None:
    """Raises SpinejaxError if an affine cannot be inverted, or a range of slices is empty or outside the volume."""
    if not np.isfinite(affine).all() or (np.abs(np.linalg.det(affine[:, :3, :3])) < 1e-9).any():
        raise SpinejaxError(f"{where}: an affine is not finite or not invertible.")
    first, stop = slices.T
    if (first < 0).any() or (stop <= first).any() or (stop > VOLUME_SHAPE[2]).any():
        raise SpinejaxError(f"{where}: a valid slice range is outside 0 to {VOLUME_SHAPE[2]}, or empty.")


def refuse_shared_patients(patients: dict[str, set], where: str | Path) -> None:
    """Raises SpinejaxError if a patient is in two of the splits."""
    seen = Counter(patient for members in patients.values() for patient in members)
    shared = sorted(patient for patient, count in seen.items() if count > 1)
    if shared:
        raise SpinejaxError(f"{where}: patient {shared[0]} is in two splits ({len(shared)} such). Split by patient.")


# Writing -------------------------------------------------------------------------------------------------------------


def shard_name(index: int, num_shards: int) -> str:
    """`discs-00003-of-00008.h5`, counted from 0."""
    return f"discs-{index:05d}-of-{num_shards:05d}.h5"


def write_shard(path: Path, discs: Iterable[Disc], tasks: Sequence[Task], masks: Sequence[str] = ()) -> ShardSummary:
    """Stream discs into one shard, which appears once it is complete; the same discs give the same bytes.

    Args:
        discs: in order; only one is in memory.
        tasks: the columns of `labels`.
        masks: which of "region" and "lesion" the data set stores; every disc must have them.

    Raises:
        SpinejaxError: a disc breaks the schema (shape, dtype, level, split, label out of range, a mask missing).
        OSError: the file cannot be written, as on a full disk.
    """
    summary = ShardSummary(path.name)
    one_disc = (1, *VOLUME_SHAPE)
    packed = {"compression": "gzip", "compression_opts": 1, "fletcher32": True}
    table = {name: Column(dtype, shape) for name, (dtype, shape) in columns(len(tasks)).items()}
    table["volume"] = Column(VOLUME_DTYPES["volume"], VOLUME_SHAPE, one_disc, {})
    table |= {name: Column(MASK_DTYPES[name], VOLUME_SHAPE, one_disc, packed) for name in masks}

    def rows() -> Iterator[dict]:
        for disc in discs:
            _check_disc(disc, tasks, masks)
            yield _row(disc, tasks, masks)
            summary.add(disc)

    write_table(path, table, rows())
    summary.bytes = path.stat().st_size
    summary.sha256 = sha256_of(path)
    return summary


def checksum_of(volume: UInt16[np.ndarray, "192 320 15"]) -> int:
    """XXH3-64 of a volume's bytes, rows first. It misses one change in 2⁶⁴."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(volume).data)


def _row(disc: Disc, tasks: Sequence[Task], masks: Sequence[str]) -> dict:
    row: dict[str, Any] = {name: np.bytes_(getattr(disc, name)) for name in ("level", "patient", "scan", "split")}
    row |= {"volume": disc.volume, "affine": disc.affine, "slices": disc.slices, "checksum": checksum_of(disc.volume)}
    row["labels"] = [disc.labels.get(task.name, UNLABELLED) for task in tasks]
    return row | {name: getattr(disc, name) for name in masks}


def _check_disc(disc: Disc, tasks: Sequence[Task], masks: Sequence[str]) -> None:
    where = f"Disc {disc.level} of scan {disc.scan}"
    for name in ("volume", *masks):
        dtype = VOLUME_DTYPES[name]
        array = getattr(disc, name)
        if array is None or array.shape != VOLUME_SHAPE or array.dtype != dtype:
            found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise SpinejaxError(f"{where}: {name} is {found}, expected {dtype}{list(VOLUME_SHAPE)}.")
    for name, (dtype, _) in columns(0).items():
        if dtype.kind == "S":
            text = getattr(disc, name)
            if not text or not text.isascii() or len(text) > dtype.itemsize:
                raise SpinejaxError(f"{where}: {name} {text!r} is not 1 to {dtype.itemsize} ASCII characters.")
    if disc.level not in LEVELS or disc.split not in SPLITS:
        raise SpinejaxError(f"{where}: unknown level or split {disc.split!r}; levels are {', '.join(LEVELS)}.")
    unknown = set(disc.labels) - {task.name for task in tasks}
    if unknown:
        raise SpinejaxError(f"{where}: labels for {', '.join(sorted(unknown))}, which the task table does not have.")
    labels = np.array([[disc.labels.get(task.name, UNLABELLED) for task in tasks]])
    check_labels(labels, tasks, where)
    check_geometry(np.asarray(disc.affine)[None], np.asarray(disc.slices)[None], where)
