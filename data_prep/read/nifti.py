"""NIfTI files (`.nii`, `.nii.gz`), read with nibabel."""

import gzip
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np

from data_prep.read.scan import MAX_VOXELS, Scan, as_dtype, reorient
from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.files.atomic import write_atomically

_HEADER_BYTES = {1: 348, 2: 540}  # by version of the format
_SLACK_BYTES = 1 << 20  # what may follow the voxels, or lie between them and the header
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_nifti(path: str | Path, dtype) -> Scan:
    """Read a NIfTI file as a scan in the house's orientation, its scale applied.

    The file is unpacked in memory, no further than its header's own size, so that a small file cannot become a huge
    one.

    Args:
        path: the file, of either version of the format.
        dtype: of the voxels in memory: float32 for an image; for a mask an integer type, which must hold its labels.

    Raises:
        SpinejaxError: the file is missing, damaged or truncated; is not one 3-D sagittal volume of numbers; does not
            say how it lies in the patient; has voxels that are not finite or do not fit `dtype`; or nibabel is not
            installed.
    """
    path = Path(path)
    nibabel = _nibabel()
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    try:
        header, content = _unpack(path, nibabel)
        image_class = nibabel.Nifti2Image if header["sizeof_hdr"] == _HEADER_BYTES[2] else nibabel.Nifti1Image
        image = image_class.from_bytes(content)
        # Without a scale the stored numbers are the voxels: a mask's labels need no detour through floats.
        with np.errstate(all="ignore"):  # what a nonsensical scale makes of them is judged below
            voxels = np.asanyarray(image.dataobj)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SpinejaxError(f"{path}: truncated or damaged ({error}). Copy it again.") from error
    except SpinejaxError:
        raise
    except Exception as error:  # nibabel lets through whatever its parsing of a header meets
        raise SpinejaxError(f"{path}: not a readable NIfTI file ({error}). Export it again.") from error
    voxels = as_dtype(voxels.reshape(voxels.shape[:3]), dtype, path)
    return reorient(voxels, _LPS_FROM_RAS @ image.affine, path.name)


def write_nifti(path: str | Path, scan: Scan) -> None:
    """Write a scan as a NIfTI file (`.nii.gz`), under its name only once it is whole; the same scan, the same bytes.

    Raises:
        SpinejaxError: the name does not end in `.nii.gz`, or nibabel is not installed.
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise SpinejaxError(f"{path}: expected a name that ends in .nii.gz.")
    image = _nibabel().Nifti1Image(scan.voxels, _LPS_FROM_RAS @ scan.affine)
    packed = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    write_atomically(path, lambda temporary: temporary.write_bytes(packed))


def _nibabel():
    try:
        import nibabel
    except ImportError as error:
        raise NotInstalledError("Reading NIfTI files needs nibabel", "scans") from error
    return nibabel


def _unpack(path: Path, nibabel):
    """The header, once it is known to be sane, and all of the file's bytes."""
    with open(path, "rb") as packed:
        file = gzip.GzipFile(fileobj=packed) if packed.read(2) == b"\x1f\x8b" else packed
        packed.seek(0)
        head = file.read(_HEADER_BYTES[2])
        header = _header(head, path, nibabel)
        _judge(header, path)
        # Older files pad their shape with ones.
        num_bytes = int(header["vox_offset"]) + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        content = io.BytesIO(head)
        content.seek(0, os.SEEK_END)
        while (missing := num_bytes + _SLACK_BYTES + 1 - content.tell()) > 0 and (
            piece := file.read(min(missing, 1 << 22))
        ):
            content.write(piece)
    if content.tell() < num_bytes:
        raise SpinejaxError(
            f"{path}: holds {content.tell()} bytes, its header declares {num_bytes}: truncated. Copy it again."
        )
    if content.tell() > num_bytes + _SLACK_BYTES:
        raise SpinejaxError(f"{path}: unpacks to more than the {num_bytes} bytes that its header declares. Refused.")
    return header, content.getvalue()


def _header(head: bytes, path: Path, nibabel):
    classes = {1: nibabel.Nifti1Header, 2: nibabel.Nifti2Header}
    for version, size in _HEADER_BYTES.items():
        for order in ("little", "big"):
            if head[:4] == size.to_bytes(4, order) and len(head) >= size:
                return classes[version](head[:size], check=False)
    raise SpinejaxError(f"{path}: not a NIfTI file (its first bytes are {head[:4]!r}).")


def _judge(header, path: Path) -> None:
    num_axes = int(header["dim"][0])
    shape = tuple(int(size) for size in header["dim"][1 : 1 + max(num_axes, 0)])
    if not 3 <= num_axes <= 7 or min(shape) < 1 or math.prod(shape[3:]) > 1:
        raise SpinejaxError(f"{path}: its size is {shape}; expected one 3-D volume. Save each volume as its own file.")
    if math.prod(shape) > MAX_VOXELS:
        raise SpinejaxError(f"{path}: its header declares {shape} voxels, expected at most {MAX_VOXELS} in all.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise SpinejaxError(f"{path}: its voxels are {dtype}; expected plain numbers.")
    if not 0 <= header["vox_offset"] <= _SLACK_BYTES:
        raise SpinejaxError(f"{path}: its voxels are said to begin at byte {header['vox_offset']}. Export it again.")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise SpinejaxError(
            f"{path}: does not say how it lies in the patient (sform_code and qform_code are 0). Convert the scan "
            "from its DICOM files again."
        )
