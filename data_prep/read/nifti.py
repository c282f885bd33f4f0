"""NIfTI files (`.nii`, `.nii.gz`) and pairs (`.hdr` with `.img`), read with nibabel once the header is checked.

nibabel reads the voxels from wherever `vox_offset` points, ignores units, and takes the sform without a look at the
qform. So these are checked first, and set right where the file leaves no doubt.
"""

import gzip
import io
import itertools
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_prep.read.scan import MAX_VOXELS, Scan, as_dtype, reorient
from spinejax.errors import SpinejaxError, needs
from spinejax.files.atomic import write_atomically

_MAX_HEADER_BYTES = 540
_SLACK_BYTES = 1 << 20  # that may follow the voxels, or stand between them and the header
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_HEADER_SIZES = (348, 540)  # the first field, of NIfTI-1 and Analyze, and of NIfTI-2
_UNIT_MM = {1: 1000.0, 3: 0.001}  # metre and micron; 0, unknown, is taken for mm
_SPACING_MM = (0.05, 30.0)  # of any scan
_MAX_QUATERNION = 1.001  # its length squared: rounded, a unit quaternion can be longer than 1


def read_nifti(path: str | Path, dtype) -> Scan:
    """Read a NIfTI file, of version 1 or 2, as a scan in the standard orientation, its scale and unit applied.

    The file is unpacked in memory, no further than the size in its header, so a small file cannot become a huge one.
    Of a pair, `path` is either file. If sform and qform both are set, they must agree, and the sform is used.
    `dtype` is that of the voxels in memory: float32 for an image, an integer type that fits the labels for a mask.

    Raises:
        SpinejaxError: the file is missing, damaged or truncated; is not one 3-D sagittal volume of numbers; gives no
            orientation, or two; does not tell where its voxels begin; has voxels that are infinite or do not fit
            `dtype`; or nibabel is not installed.
    """
    path = Path(path)
    with needs("Reading NIfTI files needs nibabel", "scans"):
        import nibabel
    header_file, voxel_file = pair_of(path) or (path, path)
    for half in (header_file, voxel_file):
        if not half.is_file():
            both = "" if half == path else f" It belongs to {path.name}: copy both files."
            raise SpinejaxError(f"{half}: no such file.{both}")
    try:
        head = _unpacked(header_file, _MAX_HEADER_BYTES)
        kinds = [nibabel.Nifti1Header, nibabel.Nifti2Header]
        kind = next((kind for kind in kinds if kind.may_contain_header(head)), None)
        if kind is None:
            if is_nifti_header(header_file):  # but without NIfTI's magic word
                raise SpinejaxError(
                    f"{header_file}: a header of Analyze, which gives no orientation in the patient. Convert the scan "
                    "from its DICOM files again, to .nii.gz."
                )
            raise SpinejaxError(f"{header_file}: not a NIfTI file (its first bytes are {head[:4]!r}).")
        header = kind(head[: kind.sizeof_hdr], check=False)
        num_bytes = _declared_bytes(header, path)
        limit = num_bytes + int(header["vox_offset"]) + _SLACK_BYTES
        content = _unpacked(voxel_file, limit + 1)
        if len(content) > limit:
            declared = max(int(header["vox_offset"]), kind.sizeof_hdr + 4) + num_bytes
            raise SpinejaxError(f"{path}: unpacks to more than the {declared} bytes that its header declares.")
        header["vox_offset"] = _begin(header, content, num_bytes, path, single=header_file == voxel_file)
        affine = _affine(header, path)
        # Without a scale the stored numbers are the voxels: a mask's labels are not converted to floats.
        with np.errstate(all="ignore"):  # the result of a nonsensical scale is checked below
            voxels = np.asanyarray(nibabel.arrayproxy.ArrayProxy(io.BytesIO(content), header))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SpinejaxError(f"{path}: truncated or damaged ({error}). Copy it again.") from error
    except SpinejaxError:
        raise
    except Exception as error:  # nibabel raises anything while it parses a header
        raise SpinejaxError(f"{path}: not a readable NIfTI file ({error}). Export it again.") from error
    voxels = as_dtype(voxels.reshape(voxels.shape[:3]), dtype, path)  # older files pad their shape with ones
    return reorient(voxels, _LPS_FROM_RAS @ affine, path.name)


def nifti_geometry(path: Path) -> tuple[tuple[int, ...], Float[np.ndarray, "4 4"]]:
    """The size and the affine, (i, j, k, 1) → patient space, LPS, mm, in a header that was not checked.

    Raises:
        Exception: whatever nibabel raises for a damaged header.
    """
    import nibabel

    header: Any = nibabel.load((pair_of(path) or [path])[0]).header
    return header.get_data_shape()[:3], _LPS_FROM_RAS @ _affine(header, path)


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


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """The header and the voxel file of the pair that a file belongs to, by its name; None for any other file."""
    match = re.fullmatch(r"(.+\.)(hdr|img)((?:\.gz)?)", path.name, re.IGNORECASE)
    if not match:
        return None
    names = ("HDR", "IMG") if match[2].isupper() else ("hdr", "img")
    return path.with_name(f"{match[1]}{names[0]}{match[3]}"), path.with_name(f"{match[1]}{names[1]}{match[3]}")


def is_nifti_header(path: Path) -> bool:
    """Whether a file begins as the header of a NIfTI pair, or of Analyze, does: with its size."""
    try:
        size = _unpacked(path, 4)
    except (OSError, EOFError, zlib.error):
        return False
    return any(size in (number.to_bytes(4, "little"), number.to_bytes(4, "big")) for number in _HEADER_SIZES)


def _unpacked(path: Path, num_bytes: int) -> bytes:
    """The first bytes of a file, unpacked if it is a gzip file, whatever its name."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return (gzip.GzipFile(fileobj=file) if is_packed else file).read(num_bytes)


def _declared_bytes(header, path: Path) -> int:
    """The size of the voxels that a valid header declares."""
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
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        raise SpinejaxError(
            f"{path}: gives no orientation in the patient (sform_code and qform_code are 0). Convert the scan from its "
            "DICOM files again."
        )
    return math.prod(shape) * dtype.itemsize


def _begin(header, content: bytes, num_bytes: int, path: Path, *, single: bool) -> int:
    """The byte at which the voxels begin: where the header says, or where they fill the file if that cannot be.

    Some writers leave `vox_offset` 0, or forget the extensions that they wrote, or the four bytes behind the header.
    """
    stated, rest = int(header["vox_offset"]), len(content) - num_bytes
    first = header.sizeof_hdr + 4 if single else 0  # four bytes behind the header tell whether extensions follow
    if single and rest > first and content[header.sizeof_hdr] and _extensions_end(header, content, first, rest):
        first = rest
    if first <= stated <= rest:
        return stated
    if rest == first or (rest == stated == header.sizeof_hdr):
        return rest
    if rest < max(first, stated):
        raise SpinejaxError(
            f"{path}: holds {len(content)} bytes, its header declares {max(first, stated) + num_bytes}: truncated. "
            "Copy it again."
        )
    raise SpinejaxError(
        f"{path}: its voxels are said to begin at byte {stated} (vox_offset), inside the header, and its size does not "
        "tell where they begin. Export it again."
    )


def _extensions_end(header, content: bytes, place: int, end: int) -> bool:
    """Whether extensions, each of which begins with its size, fill the bytes from `place` to `end`."""
    while place < end:
        size = int(np.frombuffer(content, f"{header.endianness}i4", 1, place)[0])
        if size < 16 or size % 16:
            return False
        place += size
    return place == end


def _affine(header, path: Path) -> Float[np.ndarray, "4 4"]:
    """Voxel indices → patient space, RAS, in mm."""
    forms = [header.get_sform()] if header["sform_code"] > 0 else []
    if header["qform_code"] > 0:
        forms.append(_qform(header, path))
    if len(forms) == 2:
        _refuse_to_choose(forms[0], forms[1], header.get_data_shape()[:3], path)
    unit_mm = _UNIT_MM.get(int(header["xyzt_units"]) % 8, 1.0)
    affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ forms[0]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if unit_mm != 1 and not (_SPACING_MM[0] < spacing.min() and spacing.max() < _SPACING_MM[1]):
        raise SpinejaxError(
            f"{path}: its unit is the {'metre' if unit_mm > 1 else 'micron'} by its header (xyzt_units), so its voxels "
            f"would be {' × '.join(f'{value:g}' for value in spacing)} mm. Correct the unit or the spacing."
        )
    return affine


def _refuse_to_choose(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, ...], path: Path) -> None:
    """Raises SpinejaxError if the two forms put a voxel in places more than half a voxel apart."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in shape))])
    apart = np.abs((sform - qform) @ corners.T).max()
    if not apart <= 0.5 * np.linalg.norm(sform[:3, :3], axis=0).min():
        mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
        how = ", one the mirror image of the other" if mirrored else ""
        raise SpinejaxError(
            f"{path}: its sform and its qform put voxels in places up to {apart:.1f} mm apart{how}. Where both are "
            "set, the sform is used, and the qform must agree. Find out which is right, and set the other's code to 0."
        )


def _qform(header, path: Path) -> Float[np.ndarray, "4 4"]:
    """The affine of the quaternion. One that is longer than 1, by rounding, is a turn by 180°."""
    square = sum(float(header[f"quatern_{name}"]) ** 2 for name in "bcd")
    if not square <= _MAX_QUATERNION:
        raise SpinejaxError(
            f"{path}: the quaternion of its qform has a length of {math.sqrt(square):g}, expected 1 or less. Export it "
            "again."
        )
    if square > 1:
        header.quaternion_threshold = 1.01 * (square - 1)
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    if header["pixdim"][0] == 0:  # by the standard, that means 1
        header["pixdim"][0] = 1
    return header.get_qform()
