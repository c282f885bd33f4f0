"""An evaluation's results as DICOM, to lie beside the series that they are of: for an archive and its viewers.

Grades become a Structured Report (TID 1500), hotspots a Parametric Map each, both with references to the source images.
A result that goes back to the archive is about a patient, by name: all that identifies him is copied from his own
series, which only the user has.
"""

import contextlib
import io
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import spinejax
from data_prep.output.evaluation import DiscMaps, GradedDisc
from data_prep.read.dicom_headers import damage_named, import_pydicom, refuse_bomb
from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.geometry import WINDOW_SHAPE
from spinejax.tasks import Task

_SCHEME = "99SPINEJAX"  # "99" marks a private scheme (PS3.16, 8): tasks and grades are the data set's own
_NOTE = "Research use only"
_MAP_NOTE = "What moved the network, not proven pathology"
# SNOMED CT: "Level of … intervertebral disc".
_LEVEL_CODES = {
    "T9-T10": "243916002",
    "T10-T11": "243917006",
    "T11-T12": "243918001",
    "T12-L1": "243926009",
    "L1-L2": "243920003",
    "L2-L3": "243921004",
    "L3-L4": "243922006",
    "L4-L5": "243923001",
    "L5-S1": "243927000",
}
# Attributes that every patient, study and image has, if only empty: an export may lack them altogether.
_EMPTY_IF_MISSING = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def import_highdicom():
    """The library, or the advice to install it."""
    try:
        import highdicom
    except ImportError as error:
        raise NotInstalledError("Writing DICOM results needs highdicom", "scans") from error
    return highdicom


def read_source(files: Sequence[Path], name: str) -> list:
    """The headers of a series' images, without pixels, as pydicom data sets.

    Raises:
        SpinejaxError: a file is damaged, or lacks an identifier that results must refer to.
    """
    pydicom = import_pydicom()
    images = []
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


def write_report(
    path: Path, images: Sequence, discs: Sequence[tuple[GradedDisc, DiscMaps | None]], made: Sequence[str]
):
    """Write a scan's grades as a Comprehensive 3D SR: a measurement group (TID 1410 or 1501) a disc.

    A group holds, for each task, the grade as a qualitative evaluation and its probability as a measurement. Where the
    disc's place is known, the group is of a region: the outline of what the network saw, in the middle slice.

    Args:
        path: the file.
        images: of the source series, from `read_source`.
        discs: the scan's, with their maps if there are any.
        made: how the grades were made, from `how_it_was_made`.
    """
    hd, codes = import_highdicom(), _codes()
    uid = _uids(images[0], made)
    with _as_it_is():
        _save(path, _report(hd, codes, images, discs, made, uid))


def _report(hd, codes, images, discs, made, uid):
    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=uid("observer"), name="spinejax", manufacturer_name="spinejax", model_name=spinejax.__version__
        ),
    )
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[_group(hd, images, disc, maps, made, uid) for disc, maps in discs],
        title=codes.DCM.ImagingMeasurementReport,
    )
    return hd.sr.Comprehensive3DSR(
        evidence=images,
        content=report,
        series_instance_uid=uid("report series"),
        series_number=_SERIES_NUMBERS[0],
        sop_instance_uid=uid("report"),
        instance_number=1,
        manufacturer="spinejax",
        is_complete=True,
        series_description=f"spinejax grades. {_NOTE}",
    )


def write_map(
    path: Path, images: Sequence, disc: GradedDisc, maps: DiscMaps, task: Task, made: Sequence[str], number: int
) -> None:
    """Write one hotspot as a Parametric Map, float32, nine frames where the disc lies in the patient.

    Args:
        path: the file.
        images: of the source series, from `read_source`.
        disc, maps, task: which hotspot.
        made: how it was made, from `how_it_was_made`.
        number: its place in the series of all the scan's maps, from 1.
    """
    hd, codes = import_highdicom(), _codes()
    with _as_it_is():
        _save(path, _map(hd, codes, images, disc, maps, task, number, _uids(images[0], made)))


def _map(hd, codes, images, disc: GradedDisc, maps: DiscMaps, task: Task, number: int, uid):
    place = maps.tasks.index(task)
    values = np.ascontiguousarray(np.moveaxis(maps.maps[place], 2, 0), dtype=np.float32)
    top = float(np.max(np.abs(values))) or 1.0
    signed = bool((values < 0).any())
    bottom, derivative = (-top, "d score / d intensity") if signed else (0.0, "|d score / d intensity|")
    spacing_mm = np.linalg.norm(maps.affine[:3, :3], axis=0)
    axes = maps.affine[:3, :3] / spacing_mm
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="hotspot",
        lut_explanation=f"{derivative}, {task.name}, grade {maps.grades[place]}"[:64],
        unit=codes.UCUM.NoUnits,
        value_range=(bottom, top),
        slope=1.0,
        intercept=0.0,
        quantity_definition=codes.DCM.Saliency,
    )
    # Gradients are small numbers: a plain LINEAR window may not be narrower than 1.
    window = hd.VOILUTTransformation((bottom + top) / 2, top - bottom, voi_lut_function="LINEAR_EXACT")
    image = hd.pm.ParametricMap(
        source_images=images,
        pixel_array=values,
        series_instance_uid=uid("map series"),
        series_number=_SERIES_NUMBERS[1],
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
        content_description=f"{disc.level} {task.name}, grade {maps.grades[place]}. {_NOTE}"[:64],
        pixel_measures=hd.PixelMeasuresSequence(
            pixel_spacing=spacing_mm[:2].tolist(),
            slice_thickness=float(spacing_mm[2]),
            spacing_between_slices=float(spacing_mm[2]),
        ),
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", [*axes[:, 1], *axes[:, 0]]),
        plane_positions=[
            hd.PlanePositionSequence("PATIENT", (maps.affine @ [0, 0, s, 1])[:3]) for s in range(WINDOW_SHAPE[2])
        ],
        series_description=f"spinejax hotspots. {_NOTE}. {_MAP_NOTE}"[:64],
    )
    image.BodyPartExamined = "LSPINE"  # or a series must say of which of two paired parts it is
    return image


_SERIES_NUMBERS = (9001, 9002)  # behind whatever the scanner has numbered


def _group(hd, images: Sequence, disc: GradedDisc, maps: DiscMaps | None, made: Sequence[str], uid):
    codes = _codes()
    level = hd.sr.CodedConcept(
        _LEVEL_CODES[disc.level], "SCT", f"Level of {disc.level.replace('-', '/')} intervertebral disc"
    )
    parts = {
        "tracking_identifier": hd.sr.TrackingIdentifier(uid=uid("disc", disc.level), identifier=disc.level),
        "finding_sites": [hd.sr.FindingSite(anatomic_location=level)],
        "algorithm_id": hd.sr.AlgorithmIdentification("spinejax", spinejax.__version__, parameters=[*made, _NOTE]),
        "qualitative_evaluations": [
            hd.sr.QualitativeEvaluation(
                name=_concept(hd, task, f"{_words(task)} grade"),
                value=_concept(hd, f"{task}={disc.grade(task)}", f"{_words(task)}: {disc.grade(task)}"),
            )
            for task in disc.probabilities
        ],
        "measurements": [
            hd.sr.Measurement(
                name=_concept(hd, f"{task}_p", f"Probability of the {_words(task)} grade"),
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


def _concept(hd, value: str, meaning: str):
    return hd.sr.CodedConcept(value, _SCHEME, meaning[:64])


def _codes():
    from pydicom.sr.codedict import codes

    return codes


def _uids(image, made: Sequence[str]):
    """Identifiers made from the source series and the grades: the same results get the same, other results others."""
    pydicom = import_pydicom()
    return lambda *names: pydicom.uid.generate_uid(entropy_srcs=[image.SeriesInstanceUID, *made, *names])


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """Copy what stands in the source: highdicom doubts names of one word, but a patient's name is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _save(path: Path, document) -> None:
    content = io.BytesIO()
    document.save_as(content, enforce_file_format=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    for value in vars(document).values():
        if isinstance(value, sqlite3.Connection):  # highdicom's index of a map's frames, which it leaves open
            value.close()
