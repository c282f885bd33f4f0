"""Hotspots on disk: all maps of an evaluation in one HDF5 file, and single maps as NIfTI in the scan's own space.

`hotspots.h5`, a row a disc and a column a task of the attribute `tasks`:

    map      uint8[N, T, 112, 224, 9]   the map in steps of `step`; int8 if the maps are signed
    step     float32[N, T]              score per intensity and step: map · step is the map as it was made
    grade    int8[N, T]                 whose score was traced back
    affine   float64[N, 4, 4]           (row, column, slice, 1) of the map → patient space, LPS, mm
    level, patient, scan                fixed-width ASCII; patient and scan are pseudonyms

A map of 8 bits is what an eye or a rank can use, and a quarter of the size.
"""

import dataclasses
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from spinejax import tasks as task_tables
from spinejax.data.dataset import DataSet
from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.hdf5 import Column, write_table
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.inference.hotspots import Method
from spinejax.tasks import Task

_NOTE = "Research use only: a hotspot shows what moved the network, not proven pathology."
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def window_affine(affine: np.ndarray) -> np.ndarray:
    """float64[4, 4]. (row, column, slice, 1) of the identity window → LPS mm, from the same of the disc volume."""
    into_volume = np.eye(4)
    into_volume[:3, 3] = (np.array(VOLUME_SHAPE) - WINDOW_SHAPE) // 2
    return affine @ into_volume


def write_maps(
    path: Path,
    discs: Iterable[tuple[int, np.ndarray]],
    data: DataSet,
    tasks: Sequence[Task],
    grades: np.ndarray,
    method: Method,
) -> None:
    """Stream maps into one HDF5 file; one disc's are in memory.

    Args:
        path: the file; nothing stands there until it is whole.
        discs: each disc's row in the data set, and its maps, float32[T, 112, 224, 9].
        data: the data set.
        tasks: the network's.
        grades: int[D, T]. Whose score was traced back, for every row of the data set.
        method: how the maps were made.
    """
    dtype, top = (np.int8, 127) if method.signed else (np.uint8, 255)
    names = {name: Column(f"S{getattr(data, name).dtype.itemsize // 4}") for name in ("level", "patient", "scan")}
    columns = {
        # One map is one chunk: a viewer reads one disc's map of one task.
        "map": Column(
            dtype,
            (len(tasks), *WINDOW_SHAPE),
            (1, 1, *WINDOW_SHAPE),
            {"compression": "gzip", "fletcher32": True},
        ),
        "step": Column(np.float32, (len(tasks),)),
        "grade": Column(np.int8, (len(tasks),)),
        "affine": Column(np.float64, (4, 4)),
        **names,
    }

    def rows() -> Iterator[dict]:
        for row, maps in discs:
            step = np.abs(maps).max((1, 2, 3)) / top
            yield {
                "map": np.rint(maps / np.where(step > 0, step, 1)[:, None, None, None]),
                "step": step,
                "grade": grades[row],
                "affine": window_affine(data.affine[row]),
                **{name: np.bytes_(getattr(data, name)[row]) for name in names},
            }

    about = {"tasks": task_tables.to_json(tasks), "method": dataclasses.asdict(method)}
    texts = {name: json.dumps(each, allow_nan=False) for name, each in about.items()}
    write_table(path, columns, rows(), texts | {"note": _NOTE})


def write_nifti(folder: Path, data: DataSet, row: int, tasks: Sequence[Task], maps: np.ndarray) -> None:
    """Write one disc's maps as `<scan>_<level>_<task>.nii.gz`: laid over the scan, they lie where the disc is.

    NIfTI counts patient space as RAS, the data set as LPS; the file's affine says so to any viewer.

    Args:
        folder: where to.
        data: the data set.
        row: the disc's.
        tasks: the network's.
        maps: float32[T, 112, 224, 9].

    Raises:
        SpinejaxError: as `check_nifti`.
    """
    check_nifti(data, [row])
    nibabel = _nibabel()
    for task, map in zip(tasks, maps, strict=True):
        image = nibabel.Nifti1Image(map, _LPS_TO_RAS @ window_affine(data.affine[row]))
        image.set_data_dtype(
            np.int8 if map.min() < 0 else np.uint8
        )  # nibabel scales, and keeps the scale in the header
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = f"spinejax hotspot, {task.name}; research use only"[:79].encode()
        content = gzip.compress(image.to_bytes(), mtime=0)  # without the hour, the same map gives the same bytes
        path = folder / f"{data.scan[row]}_{data.level[row]}_{task.name}.nii.gz"
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))


def check_nifti(data: DataSet, rows: Sequence[int] | np.ndarray) -> None:
    """Raises SpinejaxError if nibabel is not installed, or a scan's name would lead a file elsewhere."""
    _nibabel()
    for scan in np.unique(data.scan[rows]).tolist():
        if not re.fullmatch(r"[\w-][\w.-]*", scan, re.ASCII):
            raise SpinejaxError(
                f"{data.folder}: scan {scan!r} cannot be part of a file's name. Make the data set again."
            )


def _nibabel():
    try:
        import nibabel
    except ImportError as error:
        raise NotInstalledError("Writing NIfTI needs nibabel", "report") from error
    return nibabel
