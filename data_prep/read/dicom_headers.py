"""DICOM headers: a file's series, its contrast, and the position of each of its frames in the patient."""

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.read.contrast import functional_groups, weighting_of
from data_prep.read.names import canonical
from data_prep.read.scan import MAX_VOXELS
from data_prep.read.unpacking import unpacked
from spinejax.errors import SpinejaxError, needs

_META_BYTES = 144  # preamble, magic and the element that holds the length of the file's meta information
_MAX_FILE_BYTES = 1 << 31

_IMAGES_OF_MR = ("", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # truncated, classic, enhanced

# Read in the first pass: enough to sort files into series and to place each frame.
_HEADER_TAGS = [
    "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "Modality", "ImageType",
    "SeriesDescription", "ProtocolName", "SeriesDate", "AcquisitionDate", "StudyDate", "EchoTime",
    "RepetitionTime", "InversionTime", "ImagesInAcquisition", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

_DATES = ("SeriesDate", "AcquisitionDate", "StudyDate")


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a series and its place in the patient (DICOM PS3.3, C.7.6.2)."""

    path: Path
    index: int  # of the frame in its file, from 0
    position_mm: Float[np.ndarray, "3"]  # centre of the first pixel, LPS
    axes: Float[np.ndarray, "2 3"]  # directions in which the column index and the row index grow
    spacing_mm: Float[np.ndarray, "2"]  # between rows, between columns
    thickness_mm: float  # slice spacing, or else slice thickness; 0 if unknown
    shape: tuple[int, int]  # rows, columns
    slope: float  # scanner's value = slope * stored value + intercept
    intercept: float

    @property
    def normal(self) -> Float[np.ndarray, "3"]:
        """The unit normal of the slice plane."""
        return np.cross(*self.axes)


@dataclass(frozen=True, eq=False)
class DicomFile:
    """What the first pass reads from one file."""

    path: Path
    series: str  # its SeriesInstanceUID
    patient: str  # its PatientID
    description: str
    date: str  # YYYYMMDD, or "" if unknown
    weighting: str | None  # "t1", "t2", "pd", "stir", or None if the header does not say
    not_a_scan: str | None  # why the file cannot be part of a scan; None if it can
    declared: int  # number of images in the series (ImagesInAcquisition); 0 if unknown
    frames: tuple[Frame, ...]
    patient_name: str = ""
    birth_date: str = ""
    study: str = ""  # its StudyInstanceUID


class DamagedHeaderError(SpinejaxError):
    """A header that cannot be read. `series` is its SeriesInstanceUID if that is readable, or ""."""

    def __init__(self, message: str, series: str):
        super().__init__(message)
        self.series = series


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's magic bytes. Its name does not matter."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> DicomFile:
    """Read a DICOM file's header.

    Raises:
        DamagedHeaderError: the file is damaged.
        SpinejaxError: it is too large, or pydicom is not installed.
    """
    pydicom = import_pydicom()
    refuse_too_large(path, pydicom)
    with report_damage(path):
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
        series = str(dataset.get("SeriesInstanceUID", ""))
    try:
        with report_damage(path):
            if "Rows" not in dataset and dataset.file_meta.get("MediaStorageSOPClassUID", "") in _IMAGES_OF_MR:
                raise SpinejaxError(f"{path}: truncated: its header ends before the image's size. Copy it again.")
            not_a_scan = _not_a_scan(dataset)
            return DicomFile(
                path=path,
                series=series,
                patient=canonical(str(dataset.get("PatientID") or "")).strip(),
                description=" ".join(
                    str(dataset.get("SeriesDescription") or dataset.get("ProtocolName") or "").split()
                ),
                date=next((str(dataset.get(name)) for name in _DATES if dataset.get(name)), ""),
                weighting=weighting_of(dataset),
                not_a_scan=not_a_scan,
                declared=int(dataset.get("ImagesInAcquisition") or 0),
                frames=() if not_a_scan else tuple(_frames(dataset, path)),
                patient_name=canonical(str(dataset.get("PatientName") or "")).strip(),
                birth_date=str(dataset.get("PatientBirthDate") or "").strip(),
                study=str(dataset.get("StudyInstanceUID") or "").strip(),
            )
    except SpinejaxError as error:
        raise DamagedHeaderError(str(error), series) from error


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
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            file.seek(_META_BYTES + int(meta.FileMetaInformationGroupLength))
            num_bytes += sum(map(len, unpacked(file, _MAX_FILE_BYTES, -zlib.MAX_WBITS)))
    if num_bytes > _MAX_FILE_BYTES:
        raise SpinejaxError(f"{path}: more than {_MAX_FILE_BYTES >> 30} GiB once unpacked. Leave it out.")


def _not_a_scan(dataset) -> str | None:
    """Why a DICOM file cannot be part of a scan, or None."""
    if "Rows" not in dataset:
        return "no image"
    if dataset.get("Modality", "MR") != "MR":
        return f"modality {dataset.Modality}"
    if "LOCALIZER" in (dataset.get("ImageType") or ()):
        return "a localiser"
    if dataset.get("SamplesPerPixel", 1) != 1 or dataset.get("PhotometricInterpretation") != "MONOCHROME2":
        return f"a picture ({dataset.get('PhotometricInterpretation')}), not a scan"
    if "ImageOrientationPatient" not in dataset and "PerFrameFunctionalGroupsSequence" not in dataset:
        return "no position in the patient"
    return None


def _frames(dataset, path: Path) -> Iterator[Frame]:
    count = int(dataset.get("NumberOfFrames") or 1)
    enhanced = len(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    shape = (int(dataset.Rows), int(dataset.Columns))
    if (enhanced or 1) != count or count * shape[0] * shape[1] > MAX_VOXELS or min(shape) < 1:
        raise SpinejaxError(
            f"{path}: declares {count} frames of {shape[0]}×{shape[1]} pixels and positions for {enhanced or 1}; "
            f"expected a position for each frame and at most {MAX_VOXELS} pixels. Export it again."
        )
    for index in range(count):
        groups = [dataset]
        if enhanced:
            names = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
            groups = functional_groups(dataset, index, *names, "PixelValueTransformationSequence")
        yield _frame(groups, path, index, shape)


def _frame(groups: Sequence, path: Path, index: int, shape: tuple[int, int]) -> Frame:
    def numbers(name: str, size: int, default: float | None = None) -> np.ndarray:
        value = next((group.get(name) for group in groups if group.get(name) not in (None, "")), default)
        array = np.atleast_1d(np.asarray(value, float)) if value is not None else np.empty(0)
        if array.shape != (size,) or not np.isfinite(array).all():
            raise SpinejaxError(f"{path}: {name} is {value}; expected {size} finite numbers. Export it again.")
        return array

    axes = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        raise SpinejaxError(f"{path}: ImageOrientationPatient is {axes.ravel()}; expected two unit vectors.")
    spacing_mm = numbers("PixelSpacing", 2)
    if spacing_mm.min() <= 0:
        raise SpinejaxError(f"{path}: PixelSpacing is {spacing_mm} mm; expected positive numbers. Export it again.")
    thickness = numbers("SpacingBetweenSlices", 1, default=0.0) or numbers("SliceThickness", 1, default=0.0)
    return Frame(
        path=path,
        index=index,
        position_mm=numbers("ImagePositionPatient", 3),
        axes=axes,
        spacing_mm=spacing_mm,
        thickness_mm=float(thickness[0]),
        shape=shape,
        slope=float(numbers("RescaleSlope", 1, default=1.0)[0]),
        intercept=float(numbers("RescaleIntercept", 1, default=0.0)[0]),
    )
