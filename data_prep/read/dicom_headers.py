"""DICOM headers: a file's series, its contrast, and the position of each of its frames in the patient."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_prep.read.contrast import Contrast, contrast_of
from data_prep.read.dicom_files import read_dataset, report_damage
from data_prep.read.image_kind import NO_PLACE, why_derived, why_no_scan
from data_prep.read.names import canonical
from data_prep.read.scan import MAX_VOXELS
from spinejax.errors import SpinejaxError

_IMAGES_OF_MR = ("", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")  # truncated, classic, enhanced

_DATES = ("SeriesDate", "AcquisitionDate", "StudyDate")
_TIMES = ("SeriesTime", "AcquisitionTime", "StudyTime")

# Attributes that may tell repetitions at one place apart, and what a part is then called.
_REPEATS = {
    "TemporalPositionIndex": "time",
    "TemporalPositionIdentifier": "time",
    "AcquisitionNumber": "acquisition",
    "EchoNumbers": "echo",
    "TriggerTime": "trigger",
}

# Read in the first pass: enough to sort files into series and to place each frame.
_HEADER_TAGS = [
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"),
    *("PatientName", "PatientBirthDate", "Modality", "ImageType", "SeriesDescription", "ProtocolName"),
    *("BurnedInAnnotation", *_DATES, *_TIMES),
    *("EchoTime", "RepetitionTime", "InversionTime", "ScanningSequence", "SequenceVariant", "ScanOptions"),
    *("SequenceName", "PulseSequenceName", "EchoPulseSequence", "MRAcquisitionType", "DiffusionBValue"),
    *("ContrastBolusAgent", "ContrastBolusAgentSequence"),
    *(*_REPEATS, "ImagesInAcquisition", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]

_GROUPS_OF_A_FRAME = (
    *("FrameContentSequence", "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    *("PixelValueTransformationSequence", "MRImageFrameTypeSequence", "MRTimingAndRelatedParametersSequence"),
    *("MREchoSequence", "MRModifierSequence", "MRDiffusionSequence"),
)


@dataclass(frozen=True)
class Kind:
    """What an image is, beside its place: the images of one scan are of one kind."""

    derived: str = ""  # what it is instead of an acquired image: "an ADC map by its ImageType"
    image_type: tuple[str, ...] = ()  # in lower case
    echo_ms: float = 0.0  # 0 if unknown
    stack: str = ""  # StackID
    repeats: tuple[tuple[str, str], ...] = ()  # what may tell repetitions apart: ("acquisition", "2"), …
    contrast: Contrast = field(default_factory=Contrast)


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
    kind: Kind = field(default_factory=Kind)

    @functools.cached_property
    def normal(self) -> Float[np.ndarray, "3"]:
        """The unit normal of the slice plane."""
        return np.cross(*self.axes)


@dataclass(frozen=True, eq=False)
class DicomFile:
    """What the first pass reads from one file."""

    path: Path
    series: str  # its SeriesInstanceUID
    instance: str  # its SOPInstanceUID
    patient: str  # its PatientID
    description: str
    date: str  # YYYYMMDD, or "" if unknown
    time: str  # HHMMSS, or "" if unknown
    not_a_scan: str  # why the file, or each of its frames, cannot be part of a scan; "" if it can
    burned_in: bool  # whether it says that text is burned into its pixels
    declared: int  # number of images in the series (ImagesInAcquisition); 0 if unknown
    frames: tuple[Frame, ...]  # those with a place in the patient
    placeless: int = 0  # number of its other frames
    patient_name: str = ""
    birth_date: str = ""
    study: str = ""  # its StudyInstanceUID


class DamagedHeaderError(SpinejaxError):
    """A header that cannot be read. `series` is its SeriesInstanceUID if that is readable, or ""."""

    def __init__(self, message: str, series: str):
        super().__init__(message, series)  # pickled with these, on its way from a worker
        self.series = series

    def __str__(self) -> str:
        return self.args[0]


def read_header(path: Path) -> DicomFile:
    """Read a DICOM file's header.

    Raises:
        DamagedHeaderError: the file is damaged.
        SpinejaxError: it is too large, or pydicom is not installed.
    """
    dataset = read_dataset(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
    with report_damage(path):
        series = str(dataset.get("SeriesInstanceUID") or "")
    try:
        with report_damage(path):
            if "Rows" not in dataset and dataset.file_meta.get("MediaStorageSOPClassUID", "") in _IMAGES_OF_MR:
                raise SpinejaxError(f"{path}: truncated: its header ends before the image's size. Copy it again.")
            not_a_scan = why_no_scan(dataset)
            frames = () if not_a_scan else tuple(_frames(dataset, path))

            def text(*names: str) -> str:
                return " ".join(str(next(filter(None, map(dataset.get, names)), "")).split())

            return DicomFile(
                path=path,
                series=series,
                instance=text("SOPInstanceUID"),
                patient=canonical(str(dataset.get("PatientID") or "")).strip(),
                description=text("SeriesDescription", "ProtocolName"),
                date=text(*_DATES),
                time=text(*_TIMES),
                not_a_scan=not_a_scan or ("" if frames else _kind(_values([dataset])).derived or NO_PLACE),
                burned_in=text("BurnedInAnnotation").upper() == "YES",
                declared=int(dataset.get("ImagesInAcquisition") or 0),
                frames=frames,
                placeless=int(dataset.get("NumberOfFrames") or 1) - len(frames) if frames else 0,
                patient_name=canonical(text("PatientName")),
                birth_date=text("PatientBirthDate"),
                study=text("StudyInstanceUID"),
            )
    except SpinejaxError as error:
        raise DamagedHeaderError(str(error), series) from error


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
        groups = [*(functional_groups(dataset, index) if enhanced else ()), dataset]
        value = _values(groups)
        if value("ImagePositionPatient") is not None and value("ImageOrientationPatient") is not None:
            yield _frame(value, path, index, shape)


def _values(groups: Sequence) -> Callable[..., Any]:
    """A function that gives the first value of some attributes, in order, that is not empty; or None."""

    def value(*names: str) -> Any:
        found = (group.get(name) for name in names for group in groups)
        return next((each for each in found if each not in (None, "", [])), None)

    return value


def functional_groups(dataset, index: int) -> list:
    """The functional groups of one frame of an enhanced file: its own, and the shared ones."""
    groups = [*(dataset.get("PerFrameFunctionalGroupsSequence") or ())][index : index + 1]
    groups += [*(dataset.get("SharedFunctionalGroupsSequence") or ())]
    return [item for group in groups for name in _GROUPS_OF_A_FRAME for item in (group.get(name) or ())]


def _kind(value: Callable[..., Any]) -> Kind:
    words = value("FrameType", "ImageType") or ()
    image_type = tuple("_".join(str(word).lower().split()) for word in ([words] if isinstance(words, str) else words))
    description = " ".join(str(value("SeriesDescription", "ProtocolName") or "").split())
    echo = value("EchoTime", "EffectiveEchoTime")
    repeats = {label: str(found) for name, label in _REPEATS.items() if (found := value(name)) is not None}
    repeats |= {f"dimension{n}": str(each) for n, each in enumerate(value("DimensionIndexValues") or (), start=1)}
    return Kind(
        derived=why_derived(image_type, description, value),
        image_type=image_type,
        echo_ms=float(echo) if isinstance(echo, int | float) and echo > 0 else 0.0,
        stack=str(value("StackID") or ""),
        repeats=tuple(repeats.items()),
        contrast=contrast_of(value, image_type, description),
    )


def _frame(value: Callable[..., Any], path: Path, index: int, shape: tuple[int, int]) -> Frame:
    def numbers(name: str, size: int, default: float | None = None) -> np.ndarray:
        try:
            found = value(name)
            found = default if found is None else found
            array = np.atleast_1d(np.asarray(found, float)) if found is not None else np.empty(0)
        except ValueError as error:
            raise SpinejaxError(f"{path}: {name} is no number ({error}). Export it again.") from error
        if array.shape != (size,) or not np.isfinite(array).all():
            raise SpinejaxError(f"{path}: {name} is {found}; expected {size} finite numbers. Export it again.")
        return array

    axes = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        raise SpinejaxError(f"{path}: ImageOrientationPatient is {axes.ravel()}; expected two unit vectors.")
    spacing_mm = numbers("PixelSpacing", 2)
    if spacing_mm.min() <= 0:
        raise SpinejaxError(f"{path}: PixelSpacing is {spacing_mm} mm; expected positive numbers. Export it again.")
    try:
        thickness = numbers("SpacingBetweenSlices", 1, default=0.0) or numbers("SliceThickness", 1, default=0.0)
    except SpinejaxError:  # as "4,0": of several slices, the positions tell
        thickness = np.zeros(1)
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
        kind=_kind(value),
    )
