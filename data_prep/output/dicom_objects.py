"""An evaluation's results as DICOM objects, for an archive and its viewers.

Grades are written as a Structured Report (TID 1500), and each hotspot as a Parametric Map. Both refer to the source
images and name the patient. The patient's attributes are copied from the source series, which only the user has.
"""

import contextlib
import io
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from highdicom.sr import CodedConcept
from pydicom.sr.codedict import codes

import spinejax
from data_prep.output.patient_fields import UTF_8, legalise
from data_prep.output.read_evaluation import DiscMaps, GradedDisc
from data_prep.read.dicom_files import refuse_too_large, report_damage
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import Task

_IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
SCHEME = "99SPINEJAX"  # private, as "99" marks (PS3.16, 8), because each data set defines its own tasks
NOTE = "Research use only"
DISCLAIMER = (
    "Research use only: not a medical device, not for diagnosis. Grades are a neural network's. A hotspot shows what "
    "moved the network, not proven pathology."
)
_REPORT_SERIES, _MAP_SERIES = 9001, 9002  # higher than the scanner's series numbers


def read_source(files: Sequence[Path], name: str, notes: list[str] | None = None) -> list[pydicom.Dataset]:
    """The headers of a series' images, without pixels, with legal fields of the patient and the study.

    Args:
        files: the series.
        name: for messages.
        notes: gets a line for each field that was not legal.

    Raises:
        SpinejaxError: a file is damaged, or has no identifier for the results to refer to.
    """
    images: list[pydicom.Dataset] = []
    found: dict[str, None] = {}
    for path in files:
        refuse_too_large(path, pydicom)
        with report_damage(path):
            image = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            for attribute in _IDENTIFIERS:
                if not image.get(attribute):
                    raise SpinejaxError(f"{name}: {path.name} has no {attribute}, so results cannot refer to it.")
                if not pydicom.uid.UID(image[attribute].value).is_valid:
                    found[f"{attribute} is not legal DICOM: kept, because results belong to what it names."] = None
            found.update(dict.fromkeys(legalise(image)))
        images.append(image)
    if notes is not None:
        notes += [f"{name}: {note}" for note in found]
    return images


# Grades --------------------------------------------------------------------------------------------------------------


def write_report(
    path: Path, images: Sequence, discs: Sequence[tuple[GradedDisc, DiscMaps | None]], provenance: Sequence[str]
) -> None:
    """Write a scan's grades as a Comprehensive 3D SR, with a measurement group (TID 1410 or 1501) per disc.

    A group holds, for each task, the grade as a qualitative evaluation and its probability as a measurement. For a disc
    with maps the group also has a region: the outline of the network's window in the middle slice.

    Args:
        path: the file.
        images: the source series, from `read_source`.
        discs: the scan's discs, with their maps if there are any.
        provenance: how the grades were provenance, from `provenance_of`.
    """
    uid = uids_of(images[0], provenance)
    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=uid("observer"), name="spinejax", manufacturer_name="spinejax", model_name=spinejax.__version__
        ),
    )
    with without_name_warnings():
        report = hd.sr.MeasurementReport(
            observation_context=hd.sr.ObservationContext(observer_device_context=observer),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=[_group(images, disc, maps, provenance, uid) for disc, maps in discs],
            title=codes.DCM.ImagingMeasurementReport,
        )
        document = hd.sr.Comprehensive3DSR(
            evidence=images,
            content=report,
            series_instance_uid=uid("report series"),
            series_number=_REPORT_SERIES,
            sop_instance_uid=uid("report"),
            instance_number=1,
            manufacturer="spinejax",
            is_complete=True,
            series_description=f"spinejax grades. {NOTE}",
        )
        save(path, document)


def _group(images: Sequence, disc: GradedDisc, maps: DiscMaps | None, provenance: Sequence[str], uid: Callable):
    level = getattr(codes.SCT, f"LevelOf{disc.level.replace('-', '')}IntervertebralDisc")
    parts: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(uid=uid("disc", disc.level), identifier=disc.level),
        "finding_sites": [hd.sr.FindingSite(anatomic_location=level)],
        "algorithm_id": hd.sr.AlgorithmIdentification(
            "spinejax", spinejax.__version__, parameters=[*provenance, DISCLAIMER]
        ),
        "qualitative_evaluations": [
            hd.sr.QualitativeEvaluation(
                name=_concept(task, f"{_words(task)} grade"),
                value=_concept(f"{task}={disc.grades[task]}", f"{_words(task)}: {disc.grades[task]}"),
            )
            for task in disc.probabilities
        ],
        "measurements": [
            hd.sr.Measurement(
                name=_concept(f"{task}_p", f"Probability of the {_words(task)} grade"),
                value=grades[disc.grades[task]],
                unit=codes.UCUM.NoUnits,
            )
            for task, grades in disc.probabilities.items()
        ],
    }
    if maps is None:
        return hd.sr.MeasurementsAndQualitativeEvaluations(**parts)
    rows, columns, num_slices = WINDOW_SHAPE
    outline = [[0, 0], [0, columns - 1], [rows - 1, columns - 1], [rows - 1, 0], [0, 0]]
    corners = np.array([[*corner, num_slices // 2, 1] for corner in outline]) @ maps.affine.T
    region = hd.sr.ImageRegion3D("POLYGON", corners[:, :3], images[0].FrameOfReferenceUID)
    return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=region, **parts)


def _words(task: str) -> str:
    return task.replace("_", " ")


def _concept(value: str, meaning: str) -> CodedConcept:
    return CodedConcept(value, SCHEME, shortened(meaning))


# Hotspots ------------------------------------------------------------------------------------------------------------


def write_map(
    path: Path, images: Sequence, disc: GradedDisc, maps: DiscMaps, task: Task, provenance: Sequence[str], number: int
) -> None:
    """Write one hotspot as a Parametric Map, with nine frames in patient space.

    Args:
        path: the file.
        disc, maps, task: the hotspot to write.
        images, provenance: as for `write_report`.
        number: instance number of the map in the series of the scan's maps, from 1.
    """
    uid, index = uids_of(images[0], provenance), maps.tasks.index(task)
    values = np.ascontiguousarray(np.moveaxis(maps.maps[index], 2, 0), dtype=np.float32)
    volume = hd.Volume(values, maps.affine[:, [2, 0, 1, 3]], "PATIENT")
    high = float(np.max(np.abs(values))) or 1.0
    low, derivative = (-high, "d score / d intensity") if (values < 0).any() else (0.0, "|d score / d intensity|")
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="hotspot",
        lut_explanation=shortened(f"{derivative}, {task.name}, grade {maps.grades[index]}"),
        unit=codes.UCUM.NoUnits,
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
        quantity_definition=codes.DCM.Saliency,
    )
    # Gradients are much smaller than 1, and a LINEAR window cannot be narrower than 1.
    window = hd.VOILUTTransformation((low + high) / 2, high - low, voi_lut_function="LINEAR_EXACT")
    with without_name_warnings():
        image = hd.pm.ParametricMap(
            source_images=images,
            pixel_array=values,
            series_instance_uid=uid("map series"),
            series_number=_MAP_SERIES,
            sop_instance_uid=uid("map", disc.level, task.name),
            instance_number=number,
            manufacturer="spinejax",
            manufacturer_model_name="spinejax",
            software_versions=spinejax.__version__,
            device_serial_number="0",
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[window],
            content_label="HOTSPOT",
            content_description=shortened(f"{disc.level} {task.name}, grade {maps.grades[index]}"),
            pixel_measures=volume.get_pixel_measures(),
            plane_orientation=volume.get_plane_orientation(),
            plane_positions=volume.get_plane_positions(),
            series_description=f"spinejax hotspots. {NOTE}. Not proven pathology",
        )
        save(path, image)


# Shared --------------------------------------------------------------------------------------------------------------


def uids_of(image, provenance: Sequence[str]) -> Callable[..., str]:
    """Make UIDs from the source series and the provenance. The same results get the same UIDs."""
    return lambda *names: pydicom.uid.generate_uid(entropy_srcs=[image.SeriesInstanceUID, *provenance, *names])


@contextlib.contextmanager
def without_name_warnings() -> Iterator[None]:
    """Silence highdicom's warning about one-word names: patients' names are copied from the source unchanged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def shortened(text: str, length: int = 64) -> str:
    """A text that fits into an attribute; what does not is left out of its middle.

    DICOM counts characters, but some of its readers and checkers count bytes, so these are counted.
    """
    kept, short = len(text), text
    while len(short.encode()) > length:
        kept -= 1
        short = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
    return short


def save(path: Path, document: pydicom.Dataset) -> None:
    """Write an object of results, marked as research, in UTF-8; an image also has the whole disclaimer."""
    document.SpecificCharacterSet = UTF_8
    document.ContentQualification = "RESEARCH"
    if "Rows" in document:
        document.ImageComments = DISCLAIMER
        document.BodyPartExamined = "LSPINE"  # an unpaired part; otherwise Laterality would be required
    content = io.BytesIO()
    document.save_as(content, enforce_file_format=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    for value in vars(document).values():
        if isinstance(value, sqlite3.Connection):  # highdicom leaves its index of a map's frames open
            value.close()
