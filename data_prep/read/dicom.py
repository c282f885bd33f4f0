"""The pixels of DICOM series, read with pydicom: of classic files, one per slice, and of enhanced multi-frame ones."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Num

from data_prep.read.dicom_files import import_pydicom, read_dataset, report_damage
from data_prep.read.dicom_headers import Frame
from data_prep.read.scan import Scan, as_dtype, reorient
from data_prep.read.stacks import in_order
from spinejax.errors import NotInstalledError, SpinejaxError

_START_OF_FRAME = (0xC0, 0xC1, 0xC3, 0xF7)  # baseline, extended, lossless, JPEG-LS
_END_OF_IMAGE = b"\xff\xd9"

# pydicom's plug-in for each encoding; without a choice it takes whichever is installed. For RLE it is pydicom's own,
# because the faster one panics on damaged data.
_DECODERS = {
    "RLELossless": "pydicom",
    "JPEGBaseline8Bit": "pillow",
    "JPEGExtended12Bit": "gdcm",
    "JPEGLossless": "gdcm",
    "JPEGLosslessSV1": "gdcm",
    "JPEGLSLossless": "pyjpegls",
    "JPEGLSNearLossless": "pyjpegls",
    "JPEG2000Lossless": "pylibjpeg",
    "JPEG2000": "pylibjpeg",
}


def read_series(frames: Sequence[Frame], name: str, dtype, notes: Sequence[str] = ()) -> tuple[Scan, list[str]]:
    """A series as a scan in the standard orientation, its rescaling applied, and notes on what is doubtful.

    Padding, where the scanner has no data, gets the lowest of the other voxels' values. Overlays are ignored.

    Args:
        frames: its images, in any order.
        name: for messages.
        dtype: the voxels' dtype in memory.
        notes: what is known to be doubtful already.

    Raises:
        SpinejaxError: the frames make no volume (`in_order`), pixels are damaged or their encoding is not supported, or
            the series is not sagittal.
    """
    frames, affine = in_order(frames, name)
    voxels = np.empty((len(frames), *frames[0].shape), np.float32)
    padded = np.zeros(voxels.shape, bool)
    places = defaultdict(list)
    for place, frame in enumerate(frames):
        places[frame.path].append((place, frame))
    for path, members in places.items():
        pixels, padding = stored_pixels(path, members[0][1].shape)
        for place, frame in members:
            with np.errstate(over="ignore"):  # reported by as_dtype, as infinite
                voxels[place] = pixels[frame.index] * np.float32(frame.slope) + np.float32(frame.intercept)
            padded[place] = padding[frame.index]
    notes = [*notes]
    if np.isfinite(voxels).all():
        if (outlying := _outlying(voxels, padded)).any():
            notes.append(f"{name}: {outlying.mean():.0%} of its voxels hold a value far from all others: no data there")
        padded |= outlying
        if padded.all():
            raise SpinejaxError(f"{name}: all of its voxels are padding, by PixelPaddingValue. Export it again.")
        if padded.any():
            voxels[padded] = voxels[~padded].min()
    return reorient(as_dtype(voxels.transpose(1, 2, 0), dtype, name), affine, name), notes


def middle_slice(frames: Sequence[Frame]) -> Num[np.ndarray, "H W"]:
    """The stored values of the middle one of some images, which need make no volume. Raises SpinejaxError: damaged."""
    frame = sorted(frames, key=lambda frame: float(frame.position_mm @ frames[0].normal))[len(frames) // 2]
    return stored_pixels(frame.path, frame.shape)[0][frame.index]


def _outlying(voxels: Num[np.ndarray, "S H W"], padded: Bool[np.ndarray, "S H W"]) -> Bool[np.ndarray, "S H W"]:
    """Voxels of one value that is farther from all others than those are from each other: a margin without data.

    A lowest value counts only if it is negative, as no magnitude image has it; one in a thousand voxels must have it.
    """
    known = voxels[~padded] if padded.any() else voxels.ravel()
    for end in (known.min(initial=0), known.max(initial=0)):
        if end and np.count_nonzero(known == end) > 1e-3 * len(known):
            rest = known[known != end]
            if len(rest) and abs(rest - end).min() > np.ptp(rest) > 0:
                return ~padded & (voxels == end)
    return np.zeros_like(padded)


def stored_pixels(
    path: Path, shape: tuple[int, int]
) -> tuple[Num[np.ndarray, "frames rows columns"], Bool[np.ndarray, "frames rows columns"]]:
    """The stored values of every frame of a file, larger ones brighter; and which of them are padding.

    Raises:
        SpinejaxError: they are damaged, or their encoding is not supported.
    """
    dataset = read_dataset(path)
    with report_damage(path):
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not syntax.is_deflated:
            decoder = _decoder(syntax, path, import_pydicom(), int(dataset.BitsStored))
            _refuse_false_codestream(dataset, shape, path)
            dataset.pixel_array_options(decoding_plugin=decoder)
        elif int(dataset.HighBit) != int(dataset.BitsStored) - 1:
            raise SpinejaxError(
                f"{path}: HighBit {dataset.HighBit} with BitsStored {dataset.BitsStored}; expected one less. Export it "
                "again."
            )
        elif syntax.is_little_endian:
            _refuse_more_bits(dataset, path)
        pixels = dataset.pixel_array.reshape(-1, *shape)  # without the unused high bits, where overlays may be
        padded = np.zeros(pixels.shape, bool)
        if dataset.get("PixelPaddingValue") is not None:
            limits = dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)
            padded = (pixels >= min(limits)) & (pixels <= max(limits))
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # low values are bright (PS3.3, C.7.6.3.1.2)
            both_ends = -1 if dataset.PixelRepresentation else (1 << int(dataset.BitsStored)) - 1
            pixels = both_ends - pixels.astype(np.int64)
    return pixels, padded


def _refuse_more_bits(dataset, path: Path) -> None:
    """Refuse values that do not fit BitsStored: their high bits would be cut off. Overlays may be in these bits."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    overlays = any(0x6000 <= tag.group <= 0x60FF for tag in tuple(dataset.keys()))
    if stored < allocated == 16 and not dataset.PixelRepresentation and not overlays:
        beyond = np.frombuffer(dataset.PixelData, "<u2") >> stored
        if beyond.any():
            raise SpinejaxError(f"{path}: values above the {stored} bits that BitsStored declares. Export it again.")


def _decoder(syntax, path: Path, pydicom, bits: int) -> str:
    decoder = _DECODERS.get(syntax.keyword)
    if decoder is None or (syntax.keyword == "JPEGExtended12Bit" and bits > 8):  # GDCM decodes 12 bits wrongly
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
