"""MetaImage files (`.mha`, `.mhd`), read with SimpleITK once header and data are known to agree."""

import contextlib
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Shaped

from data_prep.read.scan import MAX_VOXELS, Scan, as_dtype, reorient
from data_prep.read.unpacking import unpacked
from spinejax.errors import SpinejaxError, needs

_ELEMENT_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8}
_ELEMENT_BYTES |= {"LONG": 4, "ULONG": 4, "LONG_LONG": 8, "ULONG_LONG": 8}
_MAX_HEADER_BYTES = 1 << 16
_LOCAL = ("LOCAL", "Local", "local")  # the voxels follow the header
_DEFLATE_LIMIT = 1032  # no zlib stream unpacks to more than this many times its size (zlib's technical notes)


def read_mha(path: str | Path, dtype) -> Scan:
    """Read a MetaImage file as a scan in the standard orientation.

    The header is checked first, because SimpleITK follows it to any file, accepts any size, and fills with zeros the
    missing part of a damaged file, or of one that does not tell how long its compressed voxels are. The voxels are in
    the file (`.mha`), or in one beside it that it names (`.mhd`).
    `dtype` is that of the voxels in memory: float32 for an image, an integer type that fits the labels for a mask.

    Raises:
        SpinejaxError: the file is missing, damaged, truncated, not one 3-D sagittal series, has voxels that are not
            finite or do not fit `dtype`; or SimpleITK is not installed.
    """
    path = Path(path)
    with needs("Reading scans needs SimpleITK", "scans"):
        import SimpleITK  # noqa: F401
    shape, corrected = _check(path)
    with tempfile.TemporaryDirectory() if corrected else contextlib.nullcontext() as folder:
        file = path
        if folder is not None:
            file = Path(folder, "corrected.mha")
            file.write_bytes(corrected)
        voxels, affine = with_simpleitk(file, "MetaImageIO", dtype, path)
    if voxels.shape != shape:
        raise SpinejaxError(f"{path}: holds {voxels.shape} voxels, its header says {shape}. Export it again.")
    return reorient(voxels, affine, path.name)


def with_simpleitk(
    file: Path, image_io: str, dtype, name: Path
) -> tuple[Shaped[np.ndarray, "X Y Z *layers"], Float[np.ndarray, "4 4"]]:
    """Read a file, whose header was checked, with SimpleITK.

    Args:
        file: the file.
        image_io: SimpleITK's name of the format.
        dtype: of the voxels in memory.
        name: for messages.

    Returns:
        The voxels, with the components of a vector last; and their affine, (x, y, z, 1) → patient space, LPS, mm.

    Raises:
        SpinejaxError: SimpleITK cannot read it, or is not installed; or `as_dtype` refuses the voxels.
    """
    with needs("Reading scans needs SimpleITK", "scans"):
        import SimpleITK
    try:
        with _name_in_utf8(file) as utf8:
            image = SimpleITK.ReadImage(utf8, imageIO=image_io)
    except RuntimeError as error:
        raise SpinejaxError(f"{name}: SimpleITK cannot read it ({str(error).strip().splitlines()[-1]}).") from error
    # SimpleITK indexes (x, y, z) but its arrays are [z, y, x]; the transpose gives array and affine the same order.
    array = SimpleITK.GetArrayViewFromImage(image)
    voxels = as_dtype(array.transpose(2, 1, 0, *range(3, array.ndim)), dtype, name)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return voxels, affine


def simpleitk_geometry(path: Path) -> tuple[tuple[int, ...], Float[np.ndarray, "4 4"]]:
    """The size (x, y, z) and the affine, (x, y, z, 1) → patient space, LPS, mm, in a header that was not checked.

    Raises:
        SpinejaxError: the file's name is not UTF-8 and it has a second file.
        RuntimeError: SimpleITK cannot read it.
        ImportError: SimpleITK is not installed.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    with _name_in_utf8(path) as utf8:
        reader.SetFileName(utf8)
        reader.ReadImageInformation()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    return reader.GetSize(), affine


def write_mha(path: str | Path, scan: Scan) -> None:
    """Write a scan as a compressed MetaImage file (`.mha`) that appears whole or not at all.

    Raises:
        SpinejaxError: the name does not end in `.mha`, or SimpleITK is not installed.
    """
    path = Path(path)
    if path.suffix != ".mha":
        raise SpinejaxError(f"{path}: scans are written as MetaImage. Give a name that ends in .mha.")
    with needs("Writing scans needs SimpleITK", "scans"):
        import SimpleITK
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(scan.voxels.T))
    image.SetSpacing(scan.spacing_mm.tolist())
    image.SetDirection((scan.affine[:3, :3] / scan.spacing_mm).ravel().tolist())
    image.SetOrigin(scan.affine[:3, 3].tolist())
    temporary = path.with_name(f".{path.stem}.tmp.mha")  # SimpleITK chooses the format by the suffix
    with _name_in_utf8(temporary) as name:
        SimpleITK.WriteImage(image, name, useCompression=True)
    os.replace(temporary, path)


@contextlib.contextmanager
def _name_in_utf8(path: Path) -> Iterator[str]:
    """A file's name for SimpleITK, which aborts the process if it is given one that is not UTF-8: a link stands for it.

    Raises:
        SpinejaxError: the voxels are in a second file, whose name the link does not have.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        if path.suffix.lower() == ".mhd":
            raise SpinejaxError(f"{path}: its name is not UTF-8. Rename it, or save it as a single .mha.") from None
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, f"scan{path.suffix}")
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)


def _check(path: Path) -> tuple[tuple[int, ...], bytes]:
    """The size (x, y, z) that a MetaImage header declares, if header and data agree.

    And the file with a corrected header if SimpleITK needs it: if the size of the compressed voxels is wrong there, or
    not given. Otherwise b"".
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    with open(path, "rb") as file:
        fields, num_header_bytes = _header_fields(file.read(_MAX_HEADER_BYTES), path)
    sizes = _numbers(fields, "DimSize", path)
    if not all(size.is_integer() for size in sizes):  # nor infinite
        raise SpinejaxError(f"{path}: DimSize is {fields['DimSize']!r}; expected whole numbers.")
    shape = tuple(map(int, sizes))
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
    inside = fields["ElementDataFile"] in _LOCAL
    begin = num_header_bytes if inside else 0
    with open(path if inside else path.with_name(fields["ElementDataFile"]), "rb") as file:
        stored = os.fstat(file.fileno()).st_size - begin
        file.seek(begin)
        _check_data(file, fields, stored, math.prod(shape) * _ELEMENT_BYTES[kind], path)
        if not _is_true(fields.get("CompressedData")) or fields.get("CompressedDataSize") == str(stored):
            return shape, b""
        file.seek(begin)
        fields["CompressedDataSize"] = str(stored)
        del fields["ElementDataFile"]
        lines = [*(f"{key} = {value}" for key, value in fields.items()), "ElementDataFile = LOCAL", ""]
        return shape, "\n".join(lines).encode("latin-1") + file.read()


def _header_fields(head: bytes, path: Path) -> tuple[dict[str, str], int]:
    """The header's `Key = value` lines, and their length in bytes.

    Whatever SimpleITK could read otherwise (a key twice, another separator, voxels elsewhere) is refused.
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
            if fields[key] not in _LOCAL and not _is_beside(path, fields[key]):
                raise SpinejaxError(
                    f"{path}: its voxels are said to be in {fields[key]!r}. Only files that hold their own voxels are "
                    "read (ElementDataFile = LOCAL), and .mhd files with theirs in one file beside them: save it as a "
                    "single .mha."
                )
            if fields.get("HeaderSize", "0") not in ("0", "-1") or not _is_true(fields.get("BinaryData", "True")):
                raise SpinejaxError(f"{path}: its voxels are text or begin at an offset. Save it as a plain .mha.")
            return fields, position
    raise SpinejaxError(f"{path}: not a MetaImage header (expected lines `Key = value` up to ElementDataFile).")


def _is_beside(path: Path, name: str) -> bool:
    """Whether a header may name this file: a plain one in the header's own folder, and no link."""
    data = path.with_name(name) if re.fullmatch(r"\w[\w .-]*\.z?raw", name) else path
    return path.suffix == ".mhd" and data != path and data.is_file() and not data.is_symlink()


def _is_true(value: str | None) -> bool:
    """As MetaImage's own library reads it."""
    return value is not None and value[:1] in ("T", "t", "1")


def _numbers(fields: dict[str, str], key: str, path: Path) -> list[float]:
    try:
        return [float(word) for word in fields[key].split()]
    except (KeyError, ValueError) as error:
        raise SpinejaxError(f"{path}: {key} is {fields.get(key)!r} in its header; expected numbers.") from error


def _check_data(file: BinaryIO, fields: dict[str, str], stored: int, num_bytes: int, path: Path) -> None:
    """Refuse `stored` bytes of voxels whose size, once unpacked, is not the `num_bytes` that the header declares."""
    found = stored
    compressed = _is_true(fields.get("CompressedData"))
    if num_bytes > stored * (_DEFLATE_LIMIT if compressed else 1):
        raise SpinejaxError(f"{path}: its header declares {num_bytes} bytes of voxels, it stores {stored}: truncated?")
    if compressed:
        try:
            found = sum(map(len, unpacked(file, num_bytes)))
        except (zlib.error, EOFError) as error:
            raise SpinejaxError(f"{path}: its compressed voxels are damaged ({error}). Copy it again.") from error
    if found != num_bytes:
        raise SpinejaxError(f"{path}: holds {found} bytes of voxels, its header declares {num_bytes}. Copy it again.")
