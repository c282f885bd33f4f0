"""A scan: one sagittal MR series in memory, its voxels in one orientation, with their place in the patient."""

import itertools
import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spinejax.errors import SpinejaxError


@dataclass(frozen=True, eq=False)
class Scan:
    """One sagittal series in the house's orientation.

    Args:
        voxels: float32[H, W, S] (or an integer dtype for a mask). Rows superior→inferior, columns
            anterior→posterior, slices from the patient's right to the left.
        affine: float64[4, 4]. Maps (row, column, slice, 1) to patient space, LPS, in mm; column vectors.
        name: how messages call this scan.
    """

    voxels: np.ndarray
    affine: np.ndarray
    name: str

    @property
    def spacing_mm(self) -> np.ndarray:
        """float64[3]. Distance between neighbouring rows, columns and slices."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


# Orientation ---------------------------------------------------------------------------------------------------------

# Rows, columns and slices of the house in LPS: x grows to the patient's left, y to the back, z to the head.
_HOUSE_AXES = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
_MIN_NORMAL_X = math.cos(math.radians(40))
_MAX_ANISOTROPY = 1.5


def reorient(voxels: np.ndarray, affine: np.ndarray, name: str) -> Scan:
    """Turn a series into the house's orientation by permuting and flipping axes; no voxel is resampled.

    Args:
        voxels: [A, B, C], in any order and direction of axes.
        affine: float64[4, 4]. (a, b, c, 1) → patient space, LPS, mm.
        name: how messages call the scan.

    Returns:
        The scan. Every voxel keeps its place in the patient.

    Raises:
        SpinejaxError: the axes are not at right angles, or the series is not sagittal.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        raise SpinejaxError(f"{name}: its geometry is not finite or has a zero spacing. Export the series again.")
    directions = affine[:3, :3] / spacing
    if not np.allclose(directions.T @ directions, np.eye(3), atol=1e-2):
        raise SpinejaxError(f"{name}: its axes are not at right angles. Resample it to an orthogonal grid.")

    closeness = _HOUSE_AXES @ directions
    order = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(closeness[range(3), axes])))
    flipped = [closeness[house, axis] < 0 for house, axis in enumerate(order)]

    turn = np.eye(4)[:, [*order, 3]]
    for house, axis in enumerate(order):
        if flipped[house]:
            turn[axis, house] = -1
            turn[axis, 3] = voxels.shape[axis] - 1
    affine = affine @ turn
    _require_sagittal(affine, name)
    voxels = voxels.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
    return Scan(np.ascontiguousarray(voxels), affine, name)


def _require_sagittal(affine: np.ndarray, name: str) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    normal = affine[:3, 2] / spacing[2]
    if normal[0] < _MIN_NORMAL_X:
        angle_deg = math.degrees(math.acos(normal[0]))
        raise SpinejaxError(
            f"{name}: its slices stand {angle_deg:.0f}° off the sagittal plane. Give a sagittal series."
        )
    # An axial or coronal series has its thick slices along what would be our rows or columns.
    if spacing[:2].max() > _MAX_ANISOTROPY * spacing[2]:
        plane = ("an axial", "a coronal")[int(np.argmax(spacing[:2]))]
        millimetres = " × ".join(f"{value:.2f}" for value in spacing)
        raise SpinejaxError(
            f"{name}: spacing {millimetres} mm (superior–inferior × anterior–posterior × left–right) is that of "
            f"{plane} series. Give a sagittal series."
        )


def require_same_grid(scan: Scan, other: Scan) -> None:
    """Raises SpinejaxError if two scans differ in size, or in the place of any voxel by more than half a spacing."""
    if scan.voxels.shape != other.voxels.shape:
        raise SpinejaxError(
            f"{other.name}: {list(other.voxels.shape)} voxels, but {scan.name} has {list(scan.voxels.shape)}. "
            "A mask must lie on its scan's own grid."
        )
    corners = np.array([*itertools.product(*((0, size - 1) for size in scan.voxels.shape))])
    corners = np.c_[corners, np.ones(len(corners))]
    apart_mm = np.abs((scan.affine - other.affine) @ corners.T).max()
    if apart_mm > 0.5 * scan.spacing_mm.min():
        raise SpinejaxError(
            f"{other.name}: lies up to {apart_mm:.1f} mm away from {scan.name} in patient space. "
            "A mask must lie on its scan's own grid."
        )


# MetaImage files -----------------------------------------------------------------------------------------------------

_ELEMENT_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8}
_ELEMENT_BYTES |= {"LONG": 4, "ULONG": 4, "LONG_LONG": 8, "ULONG_LONG": 8}
_MAX_HEADER_BYTES = 1 << 16
_MAX_BYTES = 1 << 32
_DEFLATE_LIMIT = 1032
"""No zlib stream unpacks to more than this many times its size (zlib's technical notes): more is a lie."""


def read_scan(path: str | Path, dtype) -> Scan:
    """Read a MetaImage file (`.mha`) as a scan in the house's orientation.

    The header is judged before SimpleITK sees it, because SimpleITK follows a header to any file it names, believes any
    size, and fills what a damaged file lacks with zeros.

    Args:
        path: the file; its voxels lie in it (`ElementDataFile = LOCAL`).
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
    voxels = _as_dtype(sitk.GetArrayViewFromImage(image).T, np.dtype(dtype), path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return reorient(voxels, affine, path.name)


def write_scan(path: str | Path, scan: Scan) -> None:
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
    try:
        import SimpleITK
    except ImportError as error:
        raise SpinejaxError("Reading scans needs SimpleITK. Run `pip install spinejax[scans]`.") from error
    return SimpleITK


def _as_dtype(voxels: np.ndarray, dtype: np.dtype, path: Path) -> np.ndarray:
    """Voxels as `dtype`, having made sure that no value is lost."""
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise SpinejaxError(f"{path}: {np.sum(~np.isfinite(voxels))} voxels are NaN or infinite. Export it again.")
    converted = voxels.astype(dtype)
    if dtype.kind in "iu" and voxels.dtype != dtype and not np.array_equal(converted, voxels):
        raise SpinejaxError(f"{path}: a mask's labels must be whole numbers that fit {dtype}; found others.")
    return converted


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
        if min(shape) < 1 or min(spacing) <= 0 or not np.isfinite(spacing).all():
            raise SpinejaxError(f"{path}: size {shape} with spacing {spacing} mm; expected positive, finite numbers.")
        kind = fields.get("ElementType", "").removeprefix("MET_")
        if kind not in _ELEMENT_BYTES:
            raise SpinejaxError(f"{path}: ElementType is {kind!r}; expected one of {', '.join(_ELEMENT_BYTES)}.")
        _judge_data(file, fields, math.prod(shape) * _ELEMENT_BYTES[kind], path)
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
            if fields[key] != "LOCAL":
                raise SpinejaxError(
                    f"{path}: its voxels are said to lie in {fields[key]!r}. Only files that hold their own voxels are "
                    "read (ElementDataFile = LOCAL): save it as a single .mha."
                )
            if fields.get("HeaderSize", "0") != "0" or fields.get("BinaryData", "True") != "True":
                raise SpinejaxError(f"{path}: its voxels are text or lie at an offset. Save it as a plain .mha.")
            return fields | {"_stop": str(position)}
    raise SpinejaxError(f"{path}: not a MetaImage header (expected lines `Key = value` up to ElementDataFile).")


def _numbers(fields: dict[str, str], key: str, path: Path) -> list[float]:
    try:
        return [float(word) for word in fields[key].split()]
    except (KeyError, ValueError) as error:
        raise SpinejaxError(f"{path}: {key} is {fields.get(key)!r} in its header; expected numbers.") from error


def _judge_data(file, fields: dict[str, str], num_bytes: int, path: Path) -> None:
    """Hold the bytes that follow the header against the `num_bytes` that it declares."""
    stored = os.fstat(file.fileno()).st_size - file.tell()
    compressed = fields.get("CompressedData", "False") == "True"
    if num_bytes > min(_MAX_BYTES, stored * (_DEFLATE_LIMIT if compressed else 1)):
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
