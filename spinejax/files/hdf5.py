"""Writing HDF5: the one way for all writers. A full disk is an error, and the same rows give the same bytes.

HDF5 itself does not raise when a write fails: it crashes the process.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spinejax.files.atomic import write_atomically


@dataclass(frozen=True)
class Column:
    """One column of a table: dtype and shape of a row, rows per chunk, and further options of `create_dataset`."""

    dtype: np.dtype | type | str
    shape: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    """Default: 64 whole rows, which keeps the file of a small column small."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"fletcher32": True})


def write_table(
    path: Path,
    columns: Mapping[str, Column],
    rows: Iterable[Mapping[str, Any]],
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Stream rows into the columns of one file. Only one row is in memory.

    Args:
        path: the file. It appears once all rows are on disk.
        columns: name → column.
        rows: name → value, for each row.
        attributes: texts stored with the file.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """

    def write(temporary: Path) -> None:
        with _Sink(temporary, "w+") as sink:
            with h5py.File(sink, "w", libver="latest") as file:
                file.attrs.update(attributes or {})
                table = {name: _create(file, name, column) for name, column in columns.items()}
                for place, row in enumerate(rows):
                    for name, value in row.items():
                        table[name].resize(place + 1, axis=0)
                        table[name][place] = value
                    sink.check()
                for column in table.values():
                    # HDF5 places a chunk in the file when it leaves the cache. Without this that is the moment when
                    # Python frees the column, and the bytes would depend on threads and profilers.
                    column.flush()
            sink.check()

    write_atomically(path, write)


def _create(file: h5py.File, name: str, column: Column) -> h5py.Dataset:
    return file.create_dataset(
        name,
        shape=(0, *column.shape),
        maxshape=(None, *column.shape),
        dtype=column.dtype,
        chunks=column.chunk or (64, *column.shape),
        track_times=False,  # otherwise the bytes would depend on the hour
        **column.options,
    )


class _Sink(io.FileIO):
    """A file that HDF5 writes into. After a failed write it ignores all others, and `check` raises the failure."""

    failure: OSError | None = None

    def write(self, data) -> int:
        left = memoryview(data)
        try:
            while len(left) and self.failure is None:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            self.failure = error
        return len(data)

    def truncate(self, size=None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size

    def check(self) -> None:
        """Raises OSError if a write has failed."""
        if self.failure is not None:
            raise self.failure
