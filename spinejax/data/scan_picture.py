"""Pictures of whole scans, kept beside the discs that were cut out of them: a data set's `scans/<scan>.json`.

A report lays grades and hotspots over them. They are for the eye alone: 8 bits, no more slices than a slider needs.
Nothing but the scan's pseudonym names a file, and nothing of the source but its pixels and their place is inside.
`SHA256SUMS` lists the files. A data set without them is whole.
"""

from pathlib import Path
from typing import Annotated

import pydantic
from typing_extensions import TypedDict

from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.files import checksums, lock
from spinejax.files.json_files import read_json, write_json
from spinejax.files.mirror import Mirror, mirror_of
from spinejax.files.stores import Address, cache_folder

FOLDER = "scans"

_Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
_Share = Annotated[float, pydantic.Field(ge=0, le=1)]
_Size = Annotated[int, pydantic.Field(ge=1, le=4096)]
_Picture = Annotated[str, pydantic.Field(pattern="^[A-Za-z0-9+/]+=*$")]
_Row = Annotated[list[_Finite], pydantic.Field(min_length=4, max_length=4)]


class Body(TypedDict):
    """A vertebral body, in the picture's pixels."""

    name: str
    corners: Annotated[list[tuple[_Finite, _Finite] | None], pydantic.Field(min_length=4, max_length=4)]
    """(row, column): upper anterior, upper posterior, lower posterior, lower anterior; None where not known."""
    slices: tuple[int, int]
    """The first of the picture's slices that shows it, and one past the last."""
    confidence: _Share | None
    """None if it was not detected but given."""


class ScanPicture(TypedDict):
    """A scan as a report shows it: sagittal slices from the patient's right to the left, superior up, anterior left."""

    affine: Annotated[list[_Row], pydantic.Field(min_length=4, max_length=4)]
    """(row, column, slice, 1) of the picture → patient space, LPS, mm."""
    shape: tuple[_Size, _Size]
    """Rows and columns."""
    slices: Annotated[list[_Picture], pydantic.Field(min_length=1, max_length=512)]
    """Each slice as a WebP file in base64."""
    bodies: list[Body]
    doubtful_levels: bool
    """Whether all names may be off by one."""


def write_scan_picture(discs: Path, scan: str, picture: ScanPicture) -> None:
    """Write a scan's picture, by its pseudonym, into a data set's folder. `checksums.seal` must follow the last one."""
    (discs / FOLDER).mkdir(exist_ok=True)
    write_json(discs / FOLDER / f"{scan}.json", picture)


def check_scan_pictures(data: DataSet) -> None:
    """Raises SpinejaxError if a data set has pictures of its scans, and they are not what was written.

    Those in an object store are copied to this machine.
    """
    folder = _folder_of(data)
    if isinstance(data.shards, Address):
        copied = _copied(data, data.shards)
        with lock.waited_for(copied.folder):  # another process of this machine may copy the same
            copied.pull(lambda name: name == checksums.SUMS or name.startswith(f"{FOLDER}/"))
    if folder.is_dir() and (fault := checksums.fault_of(folder.parent, FOLDER)):
        raise SpinejaxError(
            f"{folder}: {fault}. Make the data set again, or delete this folder: the report then shows discs only."
        )


def read_scan_picture(data: DataSet, scan: str) -> ScanPicture | None:
    """The picture of one scan of a data set, or None if there is none.

    Raises:
        SpinejaxError: it is damaged.
    """
    path = _folder_of(data) / f"{scan}.json"
    if "/" in scan or not path.is_file():
        return None
    return read_json(path, ScanPicture, "Make the data set again, or delete this file.")


def _folder_of(data: DataSet) -> Path:
    """A fold has the scans of its original."""
    shards = data.shards
    return (_copied(data, shards).folder if isinstance(shards, Address) else shards) / FOLDER


def _copied(data: DataSet, shards: Address) -> Mirror:
    return mirror_of(shards, cache_folder(data.cache_dir), "pictures")
