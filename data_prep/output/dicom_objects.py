"""An evaluation's results as DICOM objects, for an archive and its viewers.

Grades become a Structured Report (TID 1500), each hotspot a Parametric Map. Both refer to the source images. They name
the patient: these attributes are copied from the patient's own series, which only the user has.
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
from data_prep.output.read_evaluation import DiscMaps, GradedDisc
from data_prep.read.dicom_headers import damage_named, refuse_bomb
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import Task

_SCHEME = "99SPINEJAX"  # "99" marks a private scheme (PS3.16, 8): tasks and grades are the data set's own
_NOTE = "Research use only"
_REPORT_SERIES, _MAP_SERIES = 9001, 9002  # series numbers after those of the scanner
# Attributes that every patient, study and image must have, if only empty; an export may lack them.
_EMPTY_IF_MISSING = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def read_source(files: Sequence[Path], name: str) -> list[pydicom.Dataset]:
    """The headers of a series' images, without pixels.

    Raises:
        SpinejaxError: a file is damaged, or lacks an identifier that results must refer to.
    """
    images: list[pydicom.Dataset] = []
    for path in files:
        refuse_bomb(path, pydicom)
        with damage_named(path):
            image = pydicom.dcmread(path, stop_before_pixels=True)
            for attribute in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
                if not image.get(attribute):
                    raise SpinejaxError(f"{name}: {path.name} has no {attribute}, so results cannot refer to it.")
            for attribute in _EMPTY_IF_MISSING:
                if attribute not in image:
                    setattr(image, attribute, "")
        images.append(image)
    return images


# Grades --------------------------------------------------------------------------------------------------------------


def write_report(
    path: Path, images: Sequence, discs: Sequence[tuple[GradedDisc, DiscMaps | None]], made: Sequence[str]
) -> None:
    """Write a scan's grades as a Comprehensive 3D SR, with a measurement group (TID 1410 or 1501) per disc.

    A group holds, for each task, the grade as a qualitative evaluation and its probability as a measurement. For a disc
    with maps the group also has a region: the outline of the network's window in the middle slice.

    Args:
        path: the file.
        images: the source series, from `read_source`.
        discs: the scan's discs, with their maps if there are any.
        made: how the grades were made, from `how_it_was_made`.
    """
    uid = _uids(images[0], made)
    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=uid("observer"), name="spinejax", manufacturer_name="spinejax", model_name=spinejax.__version__
        ),
    )
    with _as_in_the_source():
        report = hd.sr.MeasurementReport(
            observation_context=hd.sr.ObservationContext(observer_device_context=observer),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=[_group(images, disc, maps, made, uid) for disc, maps in discs],
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
            series_description=f"spinejax grades. {_NOTE}",
        )
        _save(path, document)


def _group(images: Sequence, disc: GradedDisc, maps: DiscMaps | None, made: Sequence[str], uid: Callable):
    level = getattr(codes.SCT, f"LevelOf{disc.level.replace('-', '')}IntervertebralDisc")
    parts: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(uid=uid("disc", disc.level), identifier=disc.level),
        "finding_sites": [hd.sr.FindingSite(anatomic_location=level)],
        "algorithm_id": hd.sr.AlgorithmIdentification("spinejax", spinejax.__version__, parameters=[*made, _NOTE]),
        "qualitative_evaluations": [
            hd.sr.QualitativeEvaluation(
                name=_concept(task, f"{_words(task)} grade"),
                value=_concept(f"{task}={disc.grade(task)}", f"{_words(task)}: {disc.grade(task)}"),
            )
            for task in disc.probabilities
        ],
        "measurements": [
            hd.sr.Measurement(
                name=_concept(f"{task}_p", f"Probability of the {_words(task)} grade"),
                value=grades[disc.grade(task)],
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
    return CodedConcept(value, _SCHEME, meaning[:64])


# Hotspots ------------------------------------------------------------------------------------------------------------


def write_map(
    path: Path, images: Sequence, disc: GradedDisc, maps: DiscMaps, task: Task, made: Sequence[str], number: int
) -> None:
    """Write one hotspot as a Parametric Map, with nine frames at their place in the patient.

    Args:
        path: the file.
        disc, maps, task: which hotspot.
        images, made: as for `write_report`.
        number: its number in the series of all the scan's maps, from 1.
    """
    uid, index = _uids(images[0], made), maps.tasks.index(task)
    values = np.ascontiguousarray(np.moveaxis(maps.maps[index], 2, 0), dtype=np.float32)
    volume = hd.Volume(values, maps.affine[:, [2, 0, 1, 3]], "PATIENT")
    high = float(np.max(np.abs(values))) or 1.0
    low, derivative = (-high, "d score / d intensity") if (values < 0).any() else (0.0, "|d score / d intensity|")
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="hotspot",
        lut_explanation=f"{derivative}, {task.name}, grade {maps.grades[index]}"[:64],
        unit=codes.UCUM.NoUnits,
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
        quantity_definition=codes.DCM.Saliency,
    )
    # Gradients are small numbers: a plain LINEAR window cannot be narrower than 1.
    window = hd.VOILUTTransformation((low + high) / 2, high - low, voi_lut_function="LINEAR_EXACT")
    with _as_in_the_source():
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
            content_description=f"{disc.level} {task.name}, grade {maps.grades[index]}. {_NOTE}"[:64],
            pixel_measures=volume.get_pixel_measures(),
            plane_orientation=volume.get_plane_orientation(),
            plane_positions=volume.get_plane_positions(),
            series_description=f"spinejax hotspots. {_NOTE}. What moved the network, not proven pathology"[:64],
        )
        image.BodyPartExamined = "LSPINE"  # without it, a series must say which of two paired parts it shows
        _save(path, image)


# Both ----------------------------------------------------------------------------------------------------------------


def _uids(image, made: Sequence[str]) -> Callable[..., str]:
    """Identifiers made from the source series and the grades: equal for the same results, new for others."""
    return lambda *names: pydicom.uid.generate_uid(entropy_srcs=[image.SeriesInstanceUID, *made, *names])


@contextlib.contextmanager
def _as_in_the_source() -> Iterator[None]:
    """Copy attributes of the source unchanged: highdicom warns of names of one word, but we must not change a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _save(path: Path, document: pydicom.Dataset) -> None:
    content = io.BytesIO()
    document.save_as(content, enforce_file_format=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    for value in vars(document).values():
        if isinstance(value, sqlite3.Connection):  # highdicom's index of a map's frames, which it leaves open
            value.close()
