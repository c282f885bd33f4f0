"""DICOM files: recognised by content, with a preamble or without, and opened with pydicom."""

import contextlib
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.read.unpacking import unpacked
from spinejax.errors import SpinejaxError, needs

_META_BYTES = 144  # preamble, magic and the element that holds the length of the file's meta information
_MAX_FILE_BYTES = 1 << 31


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's magic bytes, or begins as a data set without them does. Its name does not matter."""
    with open(path, "rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or _is_bare(start)


def _is_bare(start: bytes) -> bool:
    """Whether a file begins with a short element of group 2 or 8, as without a preamble (PS3.5, 7.1.2 and 7.1.3)."""
    group, element = (int.from_bytes(start[place : place + 2], "little") for place in (0, 2))
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    length = int.from_bytes(start[6:8] if explicit else start[4:8], "little")
    known = group in (2, 8) and element in (0x00, 0x01, 0x02, 0x05, 0x06, 0x08, 0x12, 0x14, 0x16, 0x18)
    return known and (length <= 256 or start[4:6] == b"OB")


def read_dataset(path: Path, **options: Any):
    """Read a DICOM file, with a preamble or without, as pydicom's `dcmread` does with these options.

    Raises:
        SpinejaxError: the file is damaged or too large, or pydicom is not installed.
    """
    pydicom = import_pydicom()
    refuse_too_large(path, pydicom)
    with report_damage(path):
        with open(path, "rb") as file:
            bare = _is_bare(file.read(132))
        dataset = pydicom.dcmread(path, force=bare, **options)
        if bare and "TransferSyntaxUID" not in dataset.file_meta:
            implicit, _ = dataset.original_encoding
            syntaxes = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian
            dataset.file_meta.TransferSyntaxUID = syntaxes[bool(implicit)]
    return dataset


def import_pydicom():
    """Import pydicom. Raises NotInstalledError if it is missing."""
    with needs("Reading DICOM files needs pydicom", "scans"):
        import pydicom
    return pydicom


@contextlib.contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Turn any exception that pydicom raises for a damaged file into one message with the file's name.

    pydicom parses lazily and may raise any exception, so all are caught. Its warnings are ignored: they report
    violations of the standard that do not matter here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SpinejaxError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpinejaxError(f"{path}: damaged, truncated or not a DICOM image ({reason}). Export it again.") from error


def refuse_too_large(path: Path, pydicom) -> None:
    """Raise SpinejaxError if a file is too large, as it is or decompressed (deflate)."""
    num_bytes = path.stat().st_size
    with report_damage(path), open(path, "rb") as file:
        if _is_bare(start := file.read(1024)):
            if pydicom.uid.DeflatedExplicitVRLittleEndian.encode() in start:
                raise SpinejaxError(f"{path}: packed as a whole, and without a preamble. Export it again.")
            return
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            file.seek(_META_BYTES + int(meta.FileMetaInformationGroupLength))
            num_bytes += sum(map(len, unpacked(file, _MAX_FILE_BYTES, -zlib.MAX_WBITS)))
    if num_bytes > _MAX_FILE_BYTES:
        raise SpinejaxError(f"{path}: more than {_MAX_FILE_BYTES >> 30} GiB once unpacked. Leave it out.")
