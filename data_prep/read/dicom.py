"""DICOM series, read with pydicom: classic files, one per slice, and enhanced multi-frame ones.

Both are read as frames, each with its own position in patient space. Frames make a volume if they have one orientation
and are evenly spaced in order of position. Instance numbers and file names are ignored.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Num

from data_prep.read.dicom_headers import DicomFile, Frame, import_pydicom, refuse_too_large, report_damage
from data_prep.read.scan import MAX_VOXELS, Scan, as_dtype, reorient
from spinejax.errors import NotInstalledError, SpinejaxError

# Frames → a volume ---------------------------------------------------------------------------------------------------

_SAME_MM = 0.01  # positions closer than this are the same
_UNEVEN = 0.02  # tolerance, as a fraction of the spacing; header rounding is less


def in_order(files: Sequence[DicomFile], name: str) -> tuple[list[Frame], Float[np.ndarray, "4 4"]]:
    """A series' frames in order of position, and the affine (row, column, slice, 1) → patient, LPS, mm.

    Raises:
        SpinejaxError: frames differ in size, spacing or orientation, share a position, leave a gap, are unevenly
            spaced, or are shifted against one another in their plane.
    """
    frames = [frame for file in files for frame in file.frames]
    first = frames[0]
    _refuse_mixture(frames, name)
    if len(frames) * first.shape[0] * first.shape[1] > MAX_VOXELS:
        raise SpinejaxError(f"{name}: {len(frames)} images of {first.shape} pixels; expected at most {MAX_VOXELS}.")
    frames = sorted(frames, key=lambda frame: float(frame.position_mm @ first.normal))
    positions = np.stack([frame.position_mm for frame in frames])
    steps_mm = np.diff(positions @ first.normal)
    _refuse_uneven(frames, steps_mm, name)

    between = first.normal * (first.thickness_mm or 1.0)
    if len(frames) > 1:
        between = (positions[-1] - positions[0]) / (len(frames) - 1)
        straight = positions[0] + np.arange(len(frames))[:, None] * between
        if np.abs(positions - straight).max() > 0.5 * first.spacing_mm.min():
            raise SpinejaxError(f"{name}: its slices are shifted against one another in their plane. Export it again.")
    affine = np.eye(4)
    affine[:3, 0] = first.axes[1] * first.spacing_mm[0]
    affine[:3, 1] = first.axes[0] * first.spacing_mm[1]
    affine[:3, 2] = between
    affine[:3, 3] = positions[0]
    return frames, affine


def _refuse_mixture(frames: Sequence[Frame], name: str) -> None:
    kinds = Counter((frame.shape, *np.round(frame.spacing_mm, 3)) for frame in frames)
    if len(kinds) > 1:
        sizes = ", ".join(f"{count} of {rows}×{columns}" for ((rows, columns), *_), count in kinds.items())
        raise SpinejaxError(f"{name}: its images differ in size or pixel spacing ({sizes}). Split the series.")
    turned = next((frame for frame in frames if abs(frame.axes - frames[0].axes).max() > 1e-3), None)
    if turned:
        raise SpinejaxError(
            f"{name}: images of several orientations in one series ({turned.path.name} differs from "
            f"{frames[0].path.name}). Expected one orientation, as in a sagittal series: leave the others out."
        )


def _refuse_uneven(frames: Sequence[Frame], steps_mm: np.ndarray, name: str) -> None:
    if not len(steps_mm):
        return
    positions = 1 + int(np.sum(steps_mm > _SAME_MM))
    if len(frames) > positions:
        first = int(np.argmax(steps_mm <= _SAME_MM))
        count = len(frames) // positions
        if len(frames) % positions == 0 and positions > 1:
            kind = f"{count} images at each of its {positions} positions: the series is 4-D or copied"
        else:
            kind = f"a slice occurs twice ({frames[first].path} and {frames[first + 1].path})"
        raise SpinejaxError(f"{name}: {kind}. Expected one image per position. Remove the other set.")
    typical = float(np.median(steps_mm))
    odd = np.flatnonzero(abs(steps_mm - typical) > max(_UNEVEN * typical, 2 * _SAME_MM))
    if len(odd):
        gap = float(steps_mm[odd[0]])
        between = f"between {frames[odd[0]].path.name} and {frames[odd[0] + 1].path.name}"
        missing = round(gap / typical) - 1
        if missing >= 1 and abs(gap - (missing + 1) * typical) < 0.1 * typical:
            kind = f"{missing} slices are missing {between} ({gap:.2f} mm apart, the others {typical:.2f} mm)"
        else:
            kind = f"its slices are unevenly spaced ({gap:.2f} mm {between}, mostly {typical:.2f} mm)"
        raise SpinejaxError(f"{name}: {kind}. Export the whole series again.")


_START_OF_FRAME = (0xC0, 0xC1, 0xC3, 0xF7)  # baseline, extended, lossless, JPEG-LS
_END_OF_IMAGE = b"\xff\xd9"

# pydicom's plug-in for each encoding; without a choice it takes whichever is installed. For RLE it is pydicom's own,
# because the faster one panics on damaged data.
_DECODERS = {
    "RLELossless": "pydicom",
    "JPEGBaseline8Bit": "pillow",
    "JPEGLossless": "gdcm",
    "JPEGLosslessSV1": "gdcm",
    "JPEGLSLossless": "pyjpegls",
    "JPEGLSNearLossless": "pyjpegls",
    "JPEG2000Lossless": "pylibjpeg",
    "JPEG2000": "pylibjpeg",
}


def read_series(files: Sequence[DicomFile], name: str, dtype) -> tuple[Scan, list[str]]:
    """A series as a scan in the standard orientation, its rescaling applied, and notes on what is doubtful.

    `files` may be in any order. `name` is used in messages. `dtype` is the voxels' dtype in memory.

    Raises:
        SpinejaxError: the frames make no volume (`in_order`), pixels are damaged or their encoding is not supported, or
            the series is not sagittal.
    """
    frames, affine = in_order(files, name)
    voxels = np.empty((len(frames), *frames[0].shape), np.float32)
    places = defaultdict(list)
    for place, frame in enumerate(frames):
        places[frame.path].append((place, frame))
    for path, members in places.items():
        pixels = _pixels(path, members[0][1].shape)
        for place, frame in members:
            with np.errstate(over="ignore"):  # reported by as_dtype, as infinite
                voxels[place] = pixels[frame.index] * np.float32(frame.slope) + np.float32(frame.intercept)
    declared = max(file.declared for file in files)
    note = f"{name}: {len(frames)} of the {declared} images that it declares. Is an end slice missing?"
    notes = [note] if declared > len(frames) else []
    return reorient(as_dtype(voxels.transpose(1, 2, 0), dtype, name), affine, name), notes


def _pixels(path: Path, shape: tuple[int, int]) -> Num[np.ndarray, "frames rows columns"]:
    """The stored values of every frame of a file."""
    pydicom = import_pydicom()
    refuse_too_large(path, pydicom)
    with report_damage(path):
        dataset = pydicom.dcmread(path)
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not syntax.is_deflated:
            decoder = _decoder(syntax, path, pydicom)
            _refuse_false_codestream(dataset, shape, path)
            dataset.pixel_array_options(decoding_plugin=decoder)
        pixels = dataset.pixel_array
    return pixels.reshape(-1, *shape)


def _decoder(syntax, path: Path, pydicom) -> str:
    decoder = _DECODERS.get(syntax.keyword)
    if decoder is None:
        raise SpinejaxError(
            f"{path}: its pixels are packed as {syntax.name}, which is not read. Unpack it first, with "
            "`gdcmconv --raw IN OUT` or `dcmdjpeg IN OUT`."
        )
    if decoder not in pydicom.pixels.get_decoder(syntax).available_plugins:
        need = f"{path}: its pixels are packed as {syntax.name}, and {decoder}, which unpacks them, is not installed"
        raise NotInstalledError(need, "scans")
    return decoder


def _refuse_false_codestream(dataset, shape: tuple[int, int], path: Path) -> None:
    """Refuse a packed frame that a decoder would accept: one whose own header declares another size than DICOM's, or a
    JPEG that ends too early, whose remainder would be filled.
    """
    from pydicom.encaps import generate_frames

    for frame in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)):
        found = _codestream_shape(frame)
        if found not in (None, shape):
            raise SpinejaxError(f"{path}: a packed frame is {found} pixels, its header says {shape}. Export it again.")
        if frame[:2] == b"\xff\xd8" and _END_OF_IMAGE not in frame[-4:]:  # a byte or two of padding may follow
            raise SpinejaxError(f"{path}: a packed frame ends too early: truncated. Export it again.")


def _codestream_shape(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns in a JPEG 2000 (ISO 15444-1, A.5.1) or JPEG (ISO 10918-1, B.2.2) header; None for RLE."""
    jpeg_2000 = re.search(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4})(.{4})(.{4})", frame[:4096], re.DOTALL)
    if jpeg_2000:
        right, bottom, left, top = (int.from_bytes(field, "big") for field in jpeg_2000.groups())
        return bottom - top, right - left
    if frame[:2] == b"\xff\xd8":
        place = 2
        while place + 9 <= len(frame) and frame[place] == 0xFF:
            if frame[place + 1] in _START_OF_FRAME:
                rows, columns = frame[place + 5 : place + 7], frame[place + 7 : place + 9]
                return int.from_bytes(rows, "big"), int.from_bytes(columns, "big")
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None
