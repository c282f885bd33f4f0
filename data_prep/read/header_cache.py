"""DICOM headers, each read once: they are kept between an inventory and the run that uses it.

A header is used again while its file has the same size and time of change. The file of headers holds patients' data, so
only its owner can read it. It is JSON with a checksum; one that is damaged, or of another version, is ignored.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import spinejax
from data_prep.read.contrast import Contrast
from data_prep.read.dicom_files import is_dicom
from data_prep.read.dicom_headers import DicomFile, Frame, Kind, read_header
from data_prep.read.volume_files import is_volume
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_privately

Header: TypeAlias = DicomFile | SpinejaxError | OSError | None
"""A file's DICOM header; None if it has none; or why it cannot be read."""

_CLASSES = {each.__name__: each for each in (DicomFile, Frame, Kind, Contrast)}
_CHUNK = 64  # files that a process reads at once
_VERSION = [spinejax.__version__, *(field.name for each in _CLASSES.values() for field in fields(each))]


def header_of(path: Path) -> Header:
    """The header of a file, or why it has none."""
    try:
        return read_header(path) if not is_volume(path) and is_dicom(path) else None
    except (SpinejaxError, OSError) as error:
        return error


def headers_of(paths: Sequence[Path]) -> list[Header]:
    """The headers of some files."""
    return [header_of(path) for path in paths]


class HeaderCache:
    """Headers that were read before, and those that are read now."""

    def __init__(self, path: Path | None = None):
        """Open a file of headers. `path` may not exist yet; None keeps nothing."""
        self._path = path
        self._known = _load(path) if path else {}
        self._now: dict[str, tuple[list[int], DicomFile | None]] = {}

    def read(self, paths: Sequence[Path], run: Callable[..., Iterable[list[Header]]] = map) -> Iterator[Header]:
        """The headers of some files, in order.

        Args:
            paths: the files.
            run: like `map`; does the work of `headers_of`, and may do it elsewhere.
        """
        stamps = [_stamp(path) for path in paths]
        kept = [self._kept(path, stamp) for path, stamp in zip(paths, stamps, strict=True)]
        unknown = [path for path, known in zip(paths, kept, strict=True) if not known]
        chunks = [unknown[start : start + _CHUNK] for start in range(0, len(unknown), _CHUNK)]
        read = (header for chunk in run(headers_of, chunks) for header in chunk)
        for path, stamp, known in zip(paths, stamps, kept, strict=True):
            header = _decoded(known[1], path) if known else next(read)
            if self._path and stamp and not isinstance(header, Exception):
                self._now[_name(path)] = stamp, header
            yield header

    def _kept(self, path: Path, stamp: list[int]) -> list | None:
        """What was kept of a file that has not changed since."""
        known = self._known.get(_name(path))
        return known if known and known[0] == stamp else None

    def changed(self, paths: Iterable[Path]) -> list[Path]:
        """The files that are not as they were when the headers were kept; none if no headers were kept."""
        return [path for path in paths if self._known and not self._kept(path, _stamp(path))]

    def save(self) -> None:
        """Keep the headers that were read, readable by the owner alone."""
        if self._path:
            text = json.dumps([_VERSION, self._now], default=_encoded)
            digest = hashlib.sha256(text.encode()).hexdigest()
            write_privately(self._path, f"{digest}\n{text}")


def _name(path: Path) -> str:
    return os.path.abspath(path)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _load(path: Path) -> dict[str, list]:
    """Absolute path → stamp and encoded header."""
    try:
        digest, _, text = path.read_text().partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return {}
        version, known = json.loads(text)
        return known if version == _VERSION else {}
    except (OSError, ValueError):
        return {}


# Dataclasses as JSON: a class is its name and its fields. There are no lists, only tuples; and one path, the file's.


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"": "array", "of": value.tolist()}
    if not is_dataclass(value):
        return None
    kept = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "path"}
    return {"": type(value).__name__} | kept


def _decoded(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(each, path) for each in value)
    if not isinstance(value, dict):
        return value
    if value[""] == "array":
        return np.array(value["of"], float)
    cls = _CLASSES[value[""]]
    kept = {name: _decoded(each, path) for name, each in value.items() if name}
    return cls(**kept | ({"path": path} if "path" in cls.__dataclass_fields__ else {}))
