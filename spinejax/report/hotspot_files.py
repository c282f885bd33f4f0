"""Hotspots on disk: all maps of an evaluation in one HDF5 file, and single maps as NIfTI in the scan's own space.

`hotspots.h5` has one row per disc, and one column per task of the attribute `tasks`:

    map      uint8[N, T, 112, 224, 9]   the map in units of `step`; int8 if the maps are signed
    step     float32[N, T]              map · step is the map in score per intensity
    grade    int8[N, T]                 the grade whose evidence was traced
    affine   float64[N, 4, 4]           (row, column, slice, 1) of the map → patient space, LPS, mm
    level, patient, scan                fixed-width ASCII; patient and scan are pseudonyms

Eight bits suffice for viewing and ranking, and take a quarter of the space.
"""

import dataclasses
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int8, Integer, UInt8

from spinejax import tasks as task_tables
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError, needs
from spinejax.files.atomic import write_atomically
from spinejax.files.hdf5 import Column, write_table
from spinejax.geometry import WINDOW_SHAPE, window_affine
from spinejax.inference.hotspots import Method
from spinejax.tasks import Task

GZIP_LEVEL = 1
"""Higher levels take up to three times as long and save a few percent (docs/performance.md)."""

_NOTE = "Research use only: a hotspot shows what the score depends on, not proven pathology."
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_maps(
    path: Path,
    discs: Iterable[tuple[int | np.integer, Float32[np.ndarray, "T 112 224 9"]]],
    data: DataSet,
    tasks: Sequence[Task],
    grades: Int[np.ndarray, "D T"],
    method: Method,
) -> None:
    """Stream maps into one HDF5 file, which appears once it is complete; only one disc's maps are in memory.

    Args:
        discs: each disc's row in the data set, and its maps.
        tasks: the network's.
        grades: the grade whose evidence was traced, for every row of the data set.
    """
    dtype = np.int8 if method.signed else np.uint8
    names = {name: Column(f"S{getattr(data, name).dtype.itemsize // 4}") for name in ("level", "patient", "scan")}
    one_map = (1, 1, *WINDOW_SHAPE)  # the chunk: a viewer reads one disc's map of one task
    packed = {"compression": "gzip", "compression_opts": GZIP_LEVEL, "fletcher32": True}
    columns = {
        "map": Column(dtype, (len(tasks), *WINDOW_SHAPE), one_map, packed),
        "step": Column(np.float32, (len(tasks),)),
        "grade": Column(np.int8, (len(tasks),)),
        "affine": Column(np.float64, (4, 4)),
        **names,
    }

    def rows() -> Iterator[dict]:
        for row, maps in discs:
            numbers, step = _in_steps(maps, dtype)
            yield {
                "map": numbers,
                "step": step,
                "grade": grades[row],
                "affine": window_affine(data.affine[row]),
                **{name: np.bytes_(getattr(data, name)[row]) for name in names},
            }

    about = {"tasks": task_tables.to_json(tasks), "method": dataclasses.asdict(method)}
    texts = {name: json.dumps(each, allow_nan=False) for name, each in about.items()}
    write_table(path, columns, rows(), texts | {"note": _NOTE})


def write_nifti(
    folder: Path,
    data: DataSet,
    row: int | np.integer,
    tasks: Sequence[Task],
    maps: Float32[np.ndarray, "T 112 224 9"],
) -> None:
    """Write one disc's maps as `<scan>_<level>_<task>.nii.gz`, whose affine places them in the scan.

    NIfTI's patient space is RAS, the data set's LPS; the affine is converted. Raises as `check_nifti`.
    """
    check_nifti(data, [row])
    descriptions = [f"spinejax hotspot, {task.name}; research use only"[:79] for task in tasks]
    images = nifti(maps, window_affine(data.affine[row]), descriptions)
    for task, image in zip(tasks, images, strict=True):
        content = gzip.compress(image, GZIP_LEVEL, mtime=0)  # without the time, the same map gives the same bytes
        path = folder / f"{data.scan[row]}_{data.level[row]}_{task.name}.nii.gz"
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))


def nifti(
    maps: Float32[np.ndarray, "T 112 224 9"], affine: Float64[np.ndarray, "4 4"], descriptions: Sequence[str]
) -> Iterator[bytes]:
    """The content of a NIfTI file for each map of a disc; `affine` is that of the maps in LPS."""
    nibabel = _nibabel()
    numbers, steps = _in_steps(maps, np.int8 if maps.min() < 0 else np.uint8)
    for map, step, description in zip(numbers, steps, descriptions, strict=True):
        image = nibabel.Nifti1Image(map, _LPS_TO_RAS @ affine)
        image.header.set_slope_inter(step or 1, 0)  # else nibabel would look for a step of its own, in 2.5 ms a map
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = description.encode()
        yield image.to_bytes()


def _in_steps(
    maps: Float32[np.ndarray, "T 112 224 9"], dtype: type[np.int8] | type[np.uint8]
) -> tuple[Int8[np.ndarray, "T 112 224 9"] | UInt8[np.ndarray, "T 112 224 9"], Float32[np.ndarray, "T"]]:
    """Maps as whole numbers of steps, and each map's step: its largest value is the largest number."""
    step = np.abs(maps).max((1, 2, 3)) / np.float32(np.iinfo(dtype).max)
    return np.rint(maps / np.where(step > 0, step, 1)[:, None, None, None]).astype(dtype), step


def whole_numbers_as_nifti(values: UInt8[np.ndarray, "H W S"], affine: Float[np.ndarray, "4 4"]) -> bytes:
    """A compressed NIfTI file of whole numbers. `affine` is (row, column, slice, 1) → LPS, mm."""
    image = _nibabel().Nifti1Image(values, _LPS_TO_RAS @ affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def check_nifti(data: DataSet, rows: Sequence[int | np.integer] | Integer[np.ndarray, "M"]) -> None:
    """Raises SpinejaxError if nibabel is not installed, or a scan's name would lead to a file in another folder."""
    _nibabel()
    for scan in np.unique(data.scan[np.asarray(rows)]).tolist():
        if not re.fullmatch(r"[\w-][\w.-]*", scan, re.ASCII):
            raise SpinejaxError(f"{data.folder}: scan {scan!r} cannot be part of a file name. Make the data set again.")


def _nibabel():
    with needs("Writing NIfTI needs nibabel", "report"):
        import nibabel
    return nibabel
