"""MetaImage files (`.mha`, `.mhd`), read with SimpleITK once their headers are known to tell the truth."""

import math
import os
import re
import zlib
from pathlib import Path

import numpy as np

from data_prep.read.scan import MAX_VOXELS, Scan, as_dtype, reorient
from spinejax.errors import NotInstalledError, SpinejaxError

_ELEMENT_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8}
_ELEMENT_BYTES |= {"LONG": 4, "ULONG": 4, "LONG_LONG": 8, "ULONG_LONG": 8}
_MAX_HEADER_BYTES = 1 << 16
_DEFLATE_LIMIT = 1032
"""No zlib stream unpacks to more than this many times its size (zlib's technical notes): more is a lie."""


def read_mha(path: str | Path, dtype) -> Scan:
    """Read a MetaImage file as a scan in the house's orientation.

    The header is judged before SimpleITK sees it, because SimpleITK follows a header to any file it names, believes any
    size, and fills what a damaged file lacks with zeros.

    Args:
        path: the file. Its voxels lie in it (`.mha`), or in a file beside it that it names (`.mhd`).
        dtype: of the voxels in memory: float32 for an image; for a mask an integer type, which must hold its labels.

    Raises:
        SpinejaxError: the file is missing, damaged, truncated, not one 3-D sagittal series, has voxels that are not
            finite or do not fit `dtype`; or SimpleITK is not installed.
    """
    path = Path(path)
    sitk = _simple_itk()
    shape = _judge_header(path)
    try:
        image = sitk.ReadImage(str(path), imageIO="MetaImageIO")
    except RuntimeError as error:
        raise SpinejaxError(f"{path}: SimpleITK cannot read it ({str(error).strip().splitlines()[-1]}).") from error
    if image.GetSize() != shape or image.GetNumberOfComponentsPerPixel() != 1:
        raise SpinejaxError(f"{path}: holds {image.GetSize()} voxels, its header says {shape}. Export it again.")

    # SimpleITK indexes (x, y, z) and hands out arrays [z, y, x]; the transpose puts array and affine in one order.
    voxels = as_dtype(sitk.GetArrayViewFromImage(image).T, dtype, path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return reorient(voxels, affine, path.name)


def write_mha(path: str | Path, scan: Scan) -> None:
    """Write a scan as a compressed MetaImage file (`.mha`), under its name only once it is whole.

    Raises:
        SpinejaxError: the name does not end in `.mha`, or SimpleITK is not installed.
    """
    path = Path(path)
    if path.suffix != ".mha":
        raise SpinejaxError(f"{path}: scans are written as MetaImage. Give a name that ends in .mha.")
    sitk = _simple_itk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(scan.voxels.T))
    image.SetSpacing(scan.spacing_mm.tolist())
    image.SetDirection((scan.affine[:3, :3] / scan.spacing_mm).ravel().tolist())
    image.SetOrigin(scan.affine[:3, 3].tolist())
    temporary = path.with_name(f".{path.stem}.tmp.mha")  # SimpleITK goes by the suffix
    sitk.WriteImage(image, str(temporary), useCompression=True)
    os.replace(temporary, path)


def _simple_itk():
    # Imported here: most of data_prep, and all that only reads shards, needs no reader.
    try:
        import SimpleITK
    except ImportError as error:
        raise NotInstalledError("Reading scans needs SimpleITK", "scans") from error
    return SimpleITK


def _judge_header(path: Path) -> tuple[int, ...]:
    """The size (x, y, z) that a MetaImage header declares, once header and data are known to agree."""
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    with open(path, "rb") as file:
        fields = _header_fields(file.read(_MAX_HEADER_BYTES), path)
        file.seek(int(fields.pop("_stop")))
        shape = tuple(int(value) for value in _numbers(fields, "DimSize", path))
        spacing = _numbers(fields, "ElementSpacing" if "ElementSpacing" in fields else "ElementSize", path)
        if len(shape) != 3 or len(spacing) != 3 or fields.get("ElementNumberOfChannels", "1") != "1":
            raise SpinejaxError(f"{path}: DimSize is {fields['DimSize']!r}; expected one 3-D volume of scalars.")
        if math.prod(shape) > MAX_VOXELS:
            raise SpinejaxError(f"{path}: DimSize is {fields['DimSize']!r}; expected at most {MAX_VOXELS} voxels.")
        if min(shape) < 1 or min(spacing) <= 0 or not np.isfinite(spacing).all():
            raise SpinejaxError(f"{path}: size {shape} with spacing {spacing} mm; expected positive, finite numbers.")
        kind = fields.get("ElementType", "").removeprefix("MET_")
        if kind not in _ELEMENT_BYTES:
            raise SpinejaxError(f"{path}: ElementType is {kind!r}; expected one of {', '.join(_ELEMENT_BYTES)}.")
        num_bytes = math.prod(shape) * _ELEMENT_BYTES[kind]
        if fields["ElementDataFile"] == "LOCAL":
            _judge_data(file, fields, num_bytes, path)
    if fields["ElementDataFile"] != "LOCAL":
        with open(path.with_name(fields["ElementDataFile"]), "rb") as file:
            _judge_data(file, fields, num_bytes, path)
    return shape


def _header_fields(head: bytes, path: Path) -> dict[str, str]:
    """The header's `Key = value` lines; `_stop` is the byte after them.

    Anything that SimpleITK could take otherwise than we do (a key twice, another separator, data elsewhere) is refused.
    """
    fields: dict[str, str] = {}
    position = 0
    for line in head.splitlines(keepends=True):
        position += len(line)
        match = re.fullmatch(rb"([A-Za-z0-9_]+)[ \t]*=[ \t]*([^\x00\r\n]*?)[ \t]*\r?\n", line)
        if not match or (key := match[1].decode()) in fields:
            break
        fields[key] = match[2].decode("latin-1")
        if key == "ElementDataFile":
            if fields[key] != "LOCAL" and not _lies_beside(path, fields[key]):
                raise SpinejaxError(
                    f"{path}: its voxels are said to lie in {fields[key]!r}. Only files that hold their own voxels are "
                    "read (ElementDataFile = LOCAL), and .mhd files with theirs in one file beside them: save it as a "
                    "single .mha."
                )
            if fields.get("HeaderSize", "0") != "0" or fields.get("BinaryData", "True") != "True":
                raise SpinejaxError(f"{path}: its voxels are text or lie at an offset. Save it as a plain .mha.")
            return fields | {"_stop": str(position)}
    raise SpinejaxError(f"{path}: not a MetaImage header (expected lines `Key = value` up to ElementDataFile).")


def _lies_beside(path: Path, name: str) -> bool:
    """Whether a header may name this file: a plain one in the header's own folder, and no link to elsewhere."""
    data = path.with_name(name) if re.fullmatch(r"\w[\w .-]*\.z?raw", name) else path
    return path.suffix == ".mhd" and data != path and data.is_file() and not data.is_symlink()


def _numbers(fields: dict[str, str], key: str, path: Path) -> list[float]:
    try:
        return [float(word) for word in fields[key].split()]
    except (KeyError, ValueError) as error:
        raise SpinejaxError(f"{path}: {key} is {fields.get(key)!r} in its header; expected numbers.") from error


def _judge_data(file, fields: dict[str, str], num_bytes: int, path: Path) -> None:
    """Hold the bytes that follow the header against the `num_bytes` that it declares."""
    stored = os.fstat(file.fileno()).st_size - file.tell()
    compressed = fields.get("CompressedData", "False") == "True"
    if num_bytes > stored * (_DEFLATE_LIMIT if compressed else 1):
        raise SpinejaxError(f"{path}: its header declares {num_bytes} bytes of voxels, it stores {stored}: truncated?")
    if not compressed:
        found = stored
    elif fields.get("CompressedDataSize", str(stored)) != str(stored):
        raise SpinejaxError(
            f"{path}: its header declares {fields['CompressedDataSize']} bytes of compressed voxels, it stores "
            f"{stored}: truncated? Copy it again."
        )
    else:
        found = _unpacked_bytes(file, num_bytes, path)
    if found != num_bytes:
        raise SpinejaxError(f"{path}: holds {found} bytes of voxels, its header declares {num_bytes}. Copy it again.")


def _unpacked_bytes(file, limit: int, path: Path) -> int:
    """How much a zlib stream unpacks to, counted piece by piece, and at most just past `limit`."""
    stream, total = zlib.decompressobj(), 0
    try:
        while not stream.eof and total <= limit and (piece := file.read(1 << 18)):
            while piece and total <= limit:
                total += len(stream.decompress(piece, 1 << 22))
                piece = stream.unconsumed_tail
    except zlib.error as error:
        raise SpinejaxError(f"{path}: its compressed voxels are damaged ({error}). Copy it again.") from error
    if not stream.eof and total <= limit:
        raise SpinejaxError(f"{path}: its compressed voxels end too early: truncated. Copy it again.")
    return total
