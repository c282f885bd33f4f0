"""What more viewers show than reports and maps: pictures as Secondary Captures, and bodies and discs as a Segmentation.

Every viewer shows a Secondary Capture; most draw a Segmentation over the images that it is of.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import highdicom as hd
import numpy as np
import pydicom
import shapely
from highdicom.sr import CodedConcept
from jaxtyping import Int, UInt8
from pydicom.sr.codedict import codes

import spinejax
from data_prep.anatomy.vertebrae import DISC_BELOW, SPIDER_VERTEBRAE
from data_prep.dataset.job import Located
from data_prep.output.dicom_objects import DISCLAIMER, NOTE, SCHEME, save, shortened, uids_of, without_name_warnings
from data_prep.read.dicom_headers import Frame, read_header
from data_prep.read.scan import Scan
from spinejax.tasks import LEVELS

_PICTURE_SERIES, _SEGMENTATION_SERIES = 9003, 9004
_DISC_BELOW = {  # part of the keyword of SCT's code
    "T9": "NinthThoracic", "T10": "TenthThoracic", "T11": "EleventhThoracic", "T12": "TwelfthThoracic",
    "L1": "FirstLumbar", "L2": "SecondLumbar", "L3": "ThirdLumbar", "L4": "FourthLumbar",
}  # fmt: skip
_COLOURS = {"body": ("#ffb000", "#4cc9f0"), "disc": ("#7ae582", "#2a9d8f")}

# Pictures ------------------------------------------------------------------------------------------------------------


def write_picture(
    path: Path,
    images: Sequence[pydicom.Dataset],
    pixels: UInt8[np.ndarray, "H W 3"],
    about: str,
    provenance: Sequence[str],
    number: int,
) -> None:
    """Write one picture as a Secondary Capture, in JPEG, with anterior to the left and superior up.

    Args:
        path: the file.
        images: the source series, from `read_source`.
        pixels: the picture. It shows no name of the patient, but for one that is in the source's pixels.
        about: what it shows, in a few words.
        provenance: how the grades were made, from `provenance_of`.
        number: instance number of the picture in the series of the scan's pictures, from 1.
    """
    uid = uids_of(images[0], provenance)
    with without_name_warnings():
        picture = hd.sc.SCImage.from_ref_dataset(
            ref_dataset=images[0],
            pixel_array=pixels,
            photometric_interpretation="YBR_FULL_422",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("P", "F"),
            series_instance_uid=uid("picture series"),
            series_number=_PICTURE_SERIES,
            sop_instance_uid=uid("picture", hashlib.sha256(pixels.tobytes()).hexdigest()),
            instance_number=number,
            manufacturer="spinejax",
            manufacturer_model_name="spinejax",
            software_versions=spinejax.__version__,
            series_description=f"spinejax pictures. {NOTE}",
            transfer_syntax_uid=pydicom.uid.JPEGBaseline8Bit,
        )
        picture.copy_patient_and_study_information(images[0])
        named = any(image.get("BurnedInAnnotation") == "YES" for image in images)
        picture.BurnedInAnnotation = "YES" if named else "NO"  # we add levels and grades to the source's pixels
        picture.DerivationDescription = shortened(about, 1024)
        picture.SourceImageSequence = [_reference(image) for image in images]
        ratio = pixels.size / len(picture.PixelData)
        picture.LossyImageCompression = "01"
        picture.LossyImageCompressionRatio = f"{ratio:.2f}"
        picture.LossyImageCompressionMethod = "ISO_10918_1"
        save(path, picture)


def _reference(image: pydicom.Dataset) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item


# Segmentation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """How the vertebral bodies of a Segmentation were found, as its attributes say."""

    kind: Literal["AUTOMATIC", "SEMIAUTOMATIC"]
    name: str
    family: str  # keyword of DCM's codes
    words: str


BY_MASK = Origin(
    "SEMIAUTOMATIC", "mask given to spinejax", "ImageProcessing",
    "Voxels of the mask that was given, without posterior elements. spinejax did not make it.",
)  # fmt: skip
BY_CORNERS = Origin(
    "SEMIAUTOMATIC", "corners given to spinejax", "ManualProcessing",
    "Straight lines between four corners that were given, on each slice that shows the body: not its outline.",
)  # fmt: skip
BY_DETECTOR = Origin(
    "AUTOMATIC", "spinejax vertebra detector", "ArtificialIntelligence",
    "Straight lines between four detected corners, on each slice that shows the body: not its outline.",
)  # fmt: skip


def segments_of(located: Located) -> tuple[Scan, list[tuple[str, str]]]:
    """The vertebral bodies and discs of a scan, as labels 1, 2, … on its grid.

    With a mask they are its voxels. Otherwise they are quadrilaterals: a body's between its own corners, a disc's
    between those of its neighbours, on the slices that show both.

    Returns:
        The labels, and for each the kind, "body" or "disc", and its name: a vertebra's or a level's.
    """
    voxels = np.zeros(located.scan.voxels.shape, np.uint8)
    found: list[tuple[str, str]] = []

    def add(kind: str, name: str, inside: np.ndarray) -> None:
        if inside.any():
            found.append((kind, name))
            voxels[inside] = len(found)

    bodies = {body.name: body for body in located.bodies}
    names = [name for name in SPIDER_VERTEBRAE if name in bodies]
    pairs = [(upper, lower) for upper, lower in (level.split("-") for level in LEVELS) if {upper, lower} <= set(bodies)]
    if located.regions is not None:
        labels = located.regions.voxels
        for name in names:
            add("body", name, np.isin(labels, (SPIDER_VERTEBRAE[name], 100 + SPIDER_VERTEBRAE[name])))
        for upper, lower in pairs:
            add("disc", f"{upper}-{lower}", labels == DISC_BELOW + SPIDER_VERTEBRAE[upper])
    else:
        for name in names:
            add("body", name, _inside(bodies[name].corners, bodies[name].slices, voxels.shape))
        for upper, lower in pairs:
            above, below = bodies[upper], bodies[lower]
            both = max(above.slices[0], below.slices[0]), min(above.slices[1], below.slices[1])
            corners = np.concatenate([above.corners[[3, 2]], below.corners[[1, 0]]])
            add("disc", f"{upper}-{lower}", _inside(corners, both, voxels.shape) & (voxels == 0))
    return Scan(voxels, located.scan.affine, located.scan.name), found


def _inside(corners: np.ndarray, slices: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    inside = np.zeros(shape, bool)
    if np.isfinite(corners).all():
        rows, columns = np.indices(shape[:2])
        inside[:, :, slice(*slices)] = shapely.intersects_xy(shapely.Polygon(corners), rows, columns)[:, :, None]
    return inside


def write_segmentation(
    path: Path,
    images: Sequence[pydicom.Dataset],
    files: Sequence[Path],
    located: Located,
    origin: Origin,
    provenance: Sequence[str],
) -> None:
    """Write the vertebral bodies and discs of a scan as a binary Segmentation of its own frames.

    Args:
        path: the file.
        images, files: the source series from `read_source`, and its files in the same order.
        located: the bodies.
        origin: how they were found.
        provenance: how the grades were made, from `provenance_of`.
    """
    labels, segments = segments_of(located)
    framed = [(frame, image) for image, file in zip(images, files, strict=True) for frame in read_header(file).frames]
    if len(images) > 1:  # else they are in the order of the one file
        normal = framed[0][0].normal
        framed.sort(key=lambda each: float(each[0].position_mm @ normal))
    frames = [frame for frame, _ in framed]
    pixels = np.stack([_on_frame(labels, frame) for frame in frames])
    uid = uids_of(images[0], [*provenance, origin.name])
    thickness = frames[0].thickness_mm or float(located.scan.spacing_mm[2])
    for image in images:  # highdicom takes it from the source
        if "Rows" in image and not image.get("SliceThickness"):
            image.SliceThickness = pydicom.valuerep.format_number_as_ds(thickness)
    with without_name_warnings():
        segmentation = hd.seg.Segmentation(
            source_images=[image for _, image in framed] if len(images) > 1 else images,
            pixel_array=pixels,
            segmentation_type="BINARY",
            segment_descriptions=[
                _described(number, kind, name, origin, uid) for number, (kind, name) in enumerate(segments, start=1)
            ],
            series_instance_uid=uid("segmentation series"),
            series_number=_SEGMENTATION_SERIES,
            sop_instance_uid=uid("segmentation", hashlib.sha256(pixels.tobytes()).hexdigest()),
            instance_number=1,
            manufacturer="spinejax",
            manufacturer_model_name="spinejax",
            software_versions=spinejax.__version__,
            device_serial_number="0",
            content_label="VERTEBRAE",
            content_description=f"Vertebral bodies and discs. {NOTE}",
            series_description=f"spinejax vertebrae. {NOTE}",
            pixel_measures=hd.PixelMeasuresSequence(frames[0].spacing_mm.tolist(), thickness, None),
            plane_orientation=hd.PlaneOrientationSequence("PATIENT", frames[0].axes.ravel().tolist()),
            plane_positions=[hd.PlanePositionSequence("PATIENT", frame.position_mm.tolist()) for frame in frames],
        )
        save(path, segmentation)


def _on_frame(labels: Scan, frame: Frame) -> Int[np.ndarray, "rows columns"] | UInt8[np.ndarray, "rows columns"]:
    """The labels at the pixels of a source frame. The two grids differ by order and direction of axes alone."""
    affine = np.eye(4)
    affine[:3, 0] = frame.axes[1] * frame.spacing_mm[0]
    affine[:3, 1] = frame.axes[0] * frame.spacing_mm[1]
    affine[:3, 3] = frame.position_mm
    to_scan = np.linalg.inv(labels.affine) @ affine
    steps = np.tensordot(to_scan[:3, :2], np.indices(frame.shape), 1) + to_scan[:3, 3, None, None]
    place = np.rint(steps).astype(int)
    size = np.array(labels.voxels.shape)[:, None, None]
    inside = ((place >= 0) & (place < size)).all(0)
    return np.where(inside, labels.voxels[tuple(place.clip(0, size - 1))], 0).astype(np.uint8)


def _described(number: int, kind: str, name: str, origin: Origin, uid) -> hd.seg.SegmentDescription:
    if kind == "disc":
        upper, lower = name.split("-")
        region = getattr(codes.SCT, f"LevelOf{upper}{lower}IntervertebralDisc")
        code = codes.SCT.StructureOfIntervertebralDiscOfL5AndS1
        if upper in _DISC_BELOW:
            code = getattr(codes.SCT, f"IntervertebralDiscStructureOf{_DISC_BELOW[upper]}Vertebra")
        concept = CodedConcept(
            code.value, code.scheme_designator, f"{name} intervertebral disc"
        )  # SCT's can be too long
    else:
        region = getattr(codes.SCT, f"{name}Vertebra")
        concept = CodedConcept("BODY", SCHEME, "Vertebral body")  # SCT's code of a vertebra includes its arch
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=f"{name} {kind}",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=concept,
        algorithm_type=origin.kind,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=origin.name, family=getattr(codes.DCM, origin.family), version=spinejax.__version__, source="spinejax"
        ),
        tracking_uid=uid("segment", name),
        tracking_id=f"{name} {kind}",
        anatomic_regions=[region],
        display_color=hd.color.CIELabColor.from_string(_COLOURS[kind][number % 2]),
    )
    described.SegmentDescription = f"{origin.words} {DISCLAIMER}"
    return described
