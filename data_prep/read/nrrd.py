"""NRRD files (`.nrrd`), and 3D Slicer's segmentations (`.seg.nrrd`), read with SimpleITK once the header is checked.

SimpleITK follows a header to any file, reads any size, ignores units, and takes a file that says nothing of the patient
for one that lies along the patient's axes. The format: https://teem.sourceforge.net/nrrd/format.html; segmentations:
https://slicer.readthedocs.io (Segmentations, file formats).
"""

import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from data_prep.read.metaimage import with_simpleitk
from data_prep.read.scan import MAX_VOXELS, Scan, reorient
from data_prep.read.unpacking import unpacked
from spinejax.errors import SpinejaxError

_MAX_HEADER_BYTES = 1 << 20  # a segmentation describes each of its segments
_BYTES = {
    1: "signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, ushort, unsigned short, unsigned short int, "
    "uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t, ulonglong, "
    "unsigned long long, unsigned long long int, uint64, uint64_t, double",
}
_TYPE_BYTES = {name: size for size, names in _BYTES.items() for name in names.split(", ")}
_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
_UNIT_MM = {"mm": 1.0, "": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001}
_LAYER_KINDS = ("list", "vector")


@dataclass(frozen=True)
class _Segment:
    """A structure of a segmentation: voxels of one value in one layer."""

    name: str
    layer: int
    value: int


def read_nrrd(path: str | Path, dtype) -> Scan:
    """Read a NRRD file as a scan in the standard orientation.

    `dtype` is that of the voxels in memory: float32 for an image, an integer type that fits the labels for a mask. The
    segments of a segmentation keep their label values; where these are not their own, because each layer begins at 1,
    they are numbered from 1 as they come. Where segments overlap, the first is kept.

    Raises:
        SpinejaxError: the file is missing, damaged or truncated; its voxels are elsewhere or in an encoding that is not
            read; it is not one 3-D sagittal volume; gives no orientation; has voxels that are infinite or do not fit
            `dtype`; or SimpleITK is not installed.
    """
    path = Path(path)
    fields, pairs, num_header_bytes = _header(path)
    shape = _checked_shape(fields, np.dtype(dtype).kind in "iu", path)
    unit_mm = _unit_mm(fields, path)
    _check_data(fields, num_header_bytes, math.prod(shape), path)
    voxels, affine = with_simpleitk(path, "NrrdImageIO", dtype, path)
    if voxels.shape != (*shape[-3:], *shape[:-3]):
        raise SpinejaxError(f"{path}: holds {voxels.shape} voxels, its header says {shape}. Export it again.")
    if np.dtype(dtype).kind in "iu":
        segments = _segments(pairs, fields, path)
        voxels = _one_layer(voxels, segments) if segments else voxels
    return reorient(voxels, np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ affine, path.name)


def segment_names(path: Path) -> dict[int, str]:
    """The names of a segmentation's segments by the labels that `read_nrrd` gives them; none in another NRRD file.

    Raises:
        SpinejaxError: the header is missing or damaged.
    """
    fields, pairs, _ = _header(path)
    segments = _segments(pairs, fields, path)
    return dict(zip(_labels(segments), (segment.name for segment in segments), strict=True))


# Header --------------------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """The fields (`key: value`), the key/value pairs (`key:=value`), and the header's length in bytes."""
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    with open(path, "rb") as file:
        head = file.read(_MAX_HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n", head)
    if not head.startswith(b"NRRD000") or not end:
        raise SpinejaxError(f"{path}: not a NRRD file (expected NRRD000 and lines `key: value` up to an empty one).")
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for line in head[: end.start()].decode("utf-8", "replace").splitlines()[1:]:
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([^:]+):(=| )(.*)", line)
        key = match[1].strip() if match else ""
        key, into = (key, pairs) if match and match[2] == "=" else (key.lower().replace(" ", ""), fields)
        if match is None or key in into:
            raise SpinejaxError(f"{path}: damaged header at {line[:60]!r}. Export it again.")
        into[key] = match[3].strip()
    return fields, pairs, end.end()


def _checked_shape(fields: Mapping[str, str], is_mask: bool, path: Path) -> tuple[int, ...]:
    """The sizes that the header declares: (x, y, z), or (layers, x, y, z) in a mask."""
    for key, read, default in (
        ("datafile", ("",), ""),  # the voxels follow the header
        ("lineskip", ("0",), "0"),
        ("byteskip", ("0",), "0"),
        ("encoding", ("raw", "gzip", "gz"), "none"),
        ("type", _TYPE_BYTES, "none"),
    ):
        if (value := fields.get(key, default)).lower() not in read:
            raise SpinejaxError(
                f"{path}: its header says {key}: {value}. Save it as one .nrrd file of plain numbers, raw or "
                "compressed by gzip."
            )
    try:
        shape = tuple(int(size) for size in fields["sizes"].split())
    except (KeyError, ValueError) as error:
        raise SpinejaxError(f"{path}: sizes are {fields.get('sizes')!r} in its header; expected numbers.") from error
    layered = len(shape) == 4 and is_mask and fields.get("kinds", "").split()[:1] in [[kind] for kind in _LAYER_KINDS]
    if not (len(shape) == 3 or layered) or min(shape) < 1:
        raise SpinejaxError(f"{path}: its size is {shape}; expected one 3-D volume. Save each volume as its own file.")
    if math.prod(shape) > MAX_VOXELS:
        raise SpinejaxError(f"{path}: its header declares {shape} voxels, expected at most {MAX_VOXELS} in all.")
    if fields.get("space", "").lower() not in _SPACES or "spacedirections" not in fields:
        raise SpinejaxError(
            f"{path}: gives no orientation in the patient (space: {fields.get('space', 'missing')}). Convert the scan "
            "from its DICOM files again."
        )
    return shape


def _unit_mm(fields: Mapping[str, str], path: Path) -> float:
    units = set(re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))) or {"mm"}
    unit = units.pop()
    if units or unit not in _UNIT_MM:
        raise SpinejaxError(f"{path}: its unit is {fields['spaceunits']}; expected one of {', '.join(_UNIT_MM)}.")
    return _UNIT_MM[unit]


def _check_data(fields: Mapping[str, str], num_header_bytes: int, num_voxels: int, path: Path) -> None:
    """Refuse voxels whose size, once unpacked, is not the one that the header declares."""
    num_bytes = num_voxels * _TYPE_BYTES[fields["type"].lower()]
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size - num_header_bytes
        if fields["encoding"].lower() != "raw":
            file.seek(num_header_bytes)
            try:
                found = sum(map(len, unpacked(file, num_bytes, 16 + zlib.MAX_WBITS)))
            except (zlib.error, EOFError) as error:
                raise SpinejaxError(f"{path}: its compressed voxels are damaged ({error}). Copy it again.") from error
    if found != num_bytes:
        raise SpinejaxError(
            f"{path}: holds {found} bytes of voxels, its header declares {num_bytes}: truncated or damaged. Copy it "
            "again."
        )


# Segments ------------------------------------------------------------------------------------------------------------


def _segments(pairs: Mapping[str, str], fields: Mapping[str, str], path: Path) -> list[_Segment]:
    """A segmentation's segments. An older one gives no layers and values: its segment k is value 1 of layer k."""
    numbers = sorted({int(match[1]) for key in pairs if (match := re.match(r"Segment(\d+)_", key))})
    has_layers = len(fields.get("sizes", "").split()) == 4
    segments = []
    for number in numbers:
        try:
            layer = int(pairs.get(f"Segment{number}_Layer", number if has_layers else 0))
            value = int(pairs.get(f"Segment{number}_LabelValue", 1 if has_layers else number + 1))
        except ValueError as error:
            raise SpinejaxError(f"{path}: segment {number} has a layer or label value that is no number.") from error
        segments.append(_Segment(pairs.get(f"Segment{number}_Name", ""), layer, value))
    return segments


def _labels(segments: list[_Segment]) -> list[int]:
    """The label of each segment: its value, or its number from 1 if two of them share a value."""
    values = [segment.value for segment in segments]
    return values if len(set(values)) == len(values) else list(range(1, len(values) + 1))


def _one_layer(voxels: Integer[np.ndarray, "X Y Z *layers"], segments: list[_Segment]) -> Integer[np.ndarray, "X Y Z"]:
    """The segments of all layers as the labels of one mask. Values that belong to no segment are dropped."""
    layers = voxels.reshape(*voxels.shape[:3], -1)
    labels = np.zeros(voxels.shape[:3], voxels.dtype)
    for segment, label in zip(segments, _labels(segments), strict=True):
        if segment.layer < layers.shape[3]:
            labels[(labels == 0) & (layers[..., segment.layer] == segment.value)] = label
    return labels
