"""NIfTI files (`.nii`, `.nii.gz`), read with nibabel."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from data_prep.read.scan import MAX_VOXELS, Scan, as_dtype, reorient
from spinejax.errors import SpinejaxError, needs
from spinejax.files.atomic import write_atomically

_MAX_HEADER_BYTES = 540
_SLACK_BYTES = 1 << 20  # that may follow the voxels, or stand between them and the header
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_nifti(path: str | Path, dtype) -> Scan:
    """Read a NIfTI file, of version 1 or 2, as a scan in the standard orientation, its scale applied.

    The file is unpacked in memory, no further than the size in its header, so a small file cannot become a huge one.
    `dtype` is that of the voxels in memory: float32 for an image, an integer type that fits the labels for a mask.

    Raises:
        SpinejaxError: the file is missing, damaged or truncated; is not one 3-D sagittal volume of numbers; gives no
            orientation; has voxels that are not finite or do not fit `dtype`; or nibabel is not installed.
    """
    path = Path(path)
    with needs("Reading NIfTI files needs nibabel", "scans"):
        import nibabel
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    try:
        with open(path, "rb") as packed:
            is_packed = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            file = gzip.GzipFile(fileobj=packed) if is_packed else packed
            content = bytearray(file.read(_MAX_HEADER_BYTES))
            kinds = [nibabel.Nifti1Image, nibabel.Nifti2Image]
            kind = next((kind for kind in kinds if kind.header_class.may_contain_header(content)), None)
            if kind is None:
                raise SpinejaxError(f"{path}: not a NIfTI file (its first bytes are {bytes(content[:4])!r}).")
            num_bytes = _declared_bytes(
                kind.header_class(bytes(content[: kind.header_class.sizeof_hdr]), check=False), path
            )
            while len(content) <= num_bytes + _SLACK_BYTES and (piece := file.read(1 << 20)):
                content += piece
        if len(content) < num_bytes:
            raise SpinejaxError(
                f"{path}: holds {len(content)} bytes, its header declares {num_bytes}: truncated. Copy it again."
            )
        if len(content) > num_bytes + _SLACK_BYTES:
            raise SpinejaxError(f"{path}: unpacks to more than the {num_bytes} bytes that its header declares.")
        image = kind.from_bytes(bytes(content))
        # Without a scale the stored numbers are the voxels: a mask's labels are not converted to floats.
        with np.errstate(all="ignore"):  # the result of a nonsensical scale is checked below
            voxels = np.asanyarray(image.dataobj)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SpinejaxError(f"{path}: truncated or damaged ({error}). Copy it again.") from error
    except SpinejaxError:
        raise
    except Exception as error:  # nibabel raises anything while it parses a header
        raise SpinejaxError(f"{path}: not a readable NIfTI file ({error}). Export it again.") from error
    voxels = as_dtype(voxels.reshape(voxels.shape[:3]), dtype, path)  # older files pad their shape with ones
    return reorient(voxels, _LPS_FROM_RAS @ image.affine, path.name)


def write_nifti(path: str | Path, scan: Scan) -> None:
    """Write a scan as a NIfTI file (`.nii.gz`) that appears whole or not at all; the same scan gives the same bytes.

    Raises:
        SpinejaxError: the name does not end in `.nii.gz`, or nibabel is not installed.
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise SpinejaxError(f"{path}: expected a name that ends in .nii.gz.")
    with needs("Writing NIfTI files needs nibabel", "scans"):
        import nibabel
    image = nibabel.Nifti1Image(scan.voxels, _LPS_FROM_RAS @ scan.affine)
    packed = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    write_atomically(path, lambda temporary: temporary.write_bytes(packed))


def _declared_bytes(header, path: Path) -> int:
    """The size of the file, up to the last voxel, that a valid header declares."""
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
            f"{path}: gives no orientation in the patient (sform_code and qform_code are 0). Convert the scan from its "
            "DICOM files again."
        )
    return int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
