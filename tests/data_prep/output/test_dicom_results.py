"""Results as DICOM: phantoms as a hospital's series, graded, and brought back to them by the key."""

import contextlib
import csv
import io
import json
import re
import shutil
import sqlite3
import stat
import subprocess
from collections import Counter
from pathlib import Path

import h5py
import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.anatomy.discs import extract_discs
from data_prep.anatomy.vertebrae import VertebralBody, bodies_from_spider_mask
from data_prep.dataset.job import Located
from data_prep.output import dicom_results
from data_prep.output.dicom_images import BY_CORNERS, BY_DETECTOR, write_picture, write_segmentation
from data_prep.output.dicom_objects import DISCLAIMER, read_source, write_map, write_report
from data_prep.output.pictures import PlacedDisc, hotspot_picture, hotspot_slices, spine_picture
from data_prep.output.read_evaluation import DiscMaps, GradedDisc, read_maps, read_predictions
from data_prep.phantom.write_dicom import write_dicom
from data_prep.read.dicomweb import fetched, store
from data_prep.read.scan import Scan
from data_prep.read.volume_files import read_scan
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE, window_affine
from spinejax.inference.graded import Graded, labels_of
from spinejax.inference.hotspots import Method
from spinejax.report import hotspot_files
from spinejax.tasks import Task
from tests.block_spine import block_spine
from tests.dicom_files import enhanced, save, series, small_scan_voxels
from tests.orthanc import PASSWORD, USER, needs_orthanc, running_orthanc

DCIODVFY = shutil.which("dciodvfy")
SMALL_AFFINE = np.array([[0, 0, 4.0, -10], [0, 0.5, 0, -20], [-0.5, 0, 0, 30], [0, 0, 0, 1]])
NUM_MAPPED = 2  # tasks with hotspots; each has a picture a slice, which takes time


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Two patients' DICOM series, the data set made of them, and an evaluation of it with made-up grades and maps."""
    root = tmp_path_factory.mktemp("hospital")
    assert main(["phantom", "--as", "scans", "--format", "dicom", "--patients", "2", "--out", str(root / "files")]) == 0
    scans = ["scans", str(root / "files" / "images"), "--masks", str(root / "files" / "masks")]
    assert main([*scans, "--labels", str(root / "files" / "labels.csv"), "--out", str(root / "discs")]) == 0
    data = DataSet(root / "discs")
    rng = np.random.default_rng(0)
    rows = np.arange(len(data))
    probabilities = {task.name: rng.dirichlet(np.ones(task.num_grades), len(rows)) for task in data.tasks}
    spread = {task.name: np.zeros(len(rows)) for task in data.tasks}
    labels = labels_of(data, rows, data.tasks)
    graded = Graded(data, rows, data.tasks, labels, probabilities, spread, decide_by="distance")
    out = root / "evaluation"
    (out / "hotspots").mkdir(parents=True)
    (root / "nifti").mkdir()
    graded.write(out / "predictions.csv")
    (out / "results.json").write_text(json.dumps({"step": 7, "num_views": 54, "average": "probabilities"}))
    grades = np.stack([graded.grades[task.name] for task in data.tasks], axis=1)
    mapped = data.tasks[:NUM_MAPPED]
    maps = [(row, rng.random((NUM_MAPPED, *WINDOW_SHAPE)).astype(np.float32)) for row in rows]
    hotspot_files.write_maps(out / "hotspots" / "hotspots.h5", maps, data, mapped, grades[:, :NUM_MAPPED], Method())
    hotspot_files.write_nifti(root / "nifti", data, 0, mapped, maps[0][1])
    return root, data, graded, maps


@pytest.fixture(scope="module")
def hospital_without_maps(hospital, tmp_path_factory):
    """The hospital's root, and its evaluation without hotspots, which is brought back in no time."""
    evaluation = shutil.copytree(hospital[0] / "evaluation", tmp_path_factory.mktemp("no maps") / "evaluation")
    shutil.rmtree(evaluation / "hotspots")
    return hospital[0], evaluation


def bring_back(root, out, *changes):
    arguments = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key"), "--out", str(out)]
    arguments += ["--masks", str(root / "files" / "masks")]
    return main(["results", str(root / "evaluation"), *arguments, *changes])


@pytest.fixture(scope="module")
def returned(hospital, tmp_path_factory):
    out = tmp_path_factory.mktemp("returned") / "dicom"
    assert bring_back(hospital[0], out) == 0
    return out


@contextlib.contextmanager
def opened(path):
    """An image as highdicom reads it. highdicom leaves the database of its frames open; here it is closed."""
    image = highdicom.imread(path)
    try:
        yield image
    finally:
        image._db_con.close()


def source_of(hospital, scan_folder):
    """The source images that the results refer to."""
    report = pydicom.dcmread(scan_folder / "grades.dcm")
    images = [pydicom.dcmread(path) for path in (hospital[0] / "files" / "images").rglob("*") if path.is_file()]
    return [image for image in images if image.PatientID == report.PatientID]


def test_a_scan_has_a_report_a_map_a_task_pictures_and_a_segmentation(hospital, returned):
    data = hospital[1]
    assert {path.name for path in returned.iterdir()} == set(data.scan)
    for folder in returned.iterdir():
        levels, mapped = data.level[data.scan == folder.name], [task.name for task in data.tasks[:NUM_MAPPED]]
        maps = {f"{level}_{task}.dcm" for level in levels for task in mapped}
        found = {path.name for path in folder.iterdir()}
        pictures = {name for name in found if "_slice-" in name}
        assert found == {"grades.dcm", "spine.dcm", "vertebrae.dcm", *maps, *pictures}
        assert {name.partition("_slice-")[0] for name in pictures} == set(mapped)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(returned.stat().st_mode) == 0o700


def decoded(path):
    """A picture's pixels as RGB, by its JPEG alone."""
    dataset = pydicom.dcmread(path)
    [frame] = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    return dataset, np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")).astype(int)


def test_every_viewer_can_show_the_pictures(hospital, returned):
    """Plain Secondary Captures: of one series a scan, numbered, in colour, with the disclaimer whole."""
    for folder in returned.iterdir():
        pictures = [decoded(path) for path in [folder / "spine.dcm", *sorted(folder.glob("*_slice-*.dcm"))]]
        images = source_of(hospital, folder)
        assert len({dataset.SeriesInstanceUID for dataset, _ in pictures}) == 1
        assert sorted(dataset.InstanceNumber for dataset, _ in pictures) == list(range(1, len(pictures) + 1))
        for dataset, pixels in pictures:
            assert dataset.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
            assert dataset.StudyInstanceUID == images[0].StudyInstanceUID
            sources = {item.ReferencedSOPInstanceUID for item in dataset.SourceImageSequence}
            assert sources == {image.SOPInstanceUID for image in images}
            assert (dataset.BurnedInAnnotation, dataset.LossyImageCompression) == ("NO", "01")
            assert dataset.ImageComments.endswith("A hotspot shows what moved the network, not proven pathology.")
            assert len(dataset.SeriesDescription) <= 64
            assert "Research use only" in dataset.SeriesDescription
            assert pixels.shape == (dataset.Rows, dataset.Columns, 3)
            assert (np.ptp(pixels, axis=2) > 60).mean() > 0.002  # colours, and not of a few labels alone


def test_a_hotspot_lies_on_its_place_of_the_slice():
    """A point of a map is drawn where the source's own geometry puts it."""
    scan = Scan(np.random.default_rng(0).random((200, 180, 9)).astype(np.float32), SMALL_AFFINE, "scan")
    to_scan = np.array([[0.4, 0.1, 0, 40], [-0.1, 0.4, 0, 50], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    task = Task("side", ("front", "back"))
    map = np.zeros((1, *WINDOW_SHAPE), np.float32)
    map[0, 20:26, 180:186, 3] = 1
    affine = SMALL_AFFINE @ to_scan
    disc = GradedDisc("p", "s", "L4-L5", {"side": "back"}, {"side": {"front": 0.25, "back": 0.75}})
    placed = [PlacedDisc(disc, affine, DiscMaps((task,), ("back",), map, affine))]
    assert hotspot_slices(scan, placed) == list(range(1, 9))
    with_it, without = (hotspot_picture(scan, index, placed, task, "note").astype(int) for index in (4, 4))
    empty = [PlacedDisc(disc, affine, DiscMaps((task,), ("back",), np.zeros_like(map), affine))]
    without = hotspot_picture(scan, 4, empty, task, "note").astype(int)
    rows, columns = np.nonzero(np.abs(with_it - without).max(2) > 30)
    row, column = (to_scan @ [22.5, 182.5, 3, 1])[:2]
    # The slice is 200 × 180 pixels of 1 mm, fitted into the square of 720 below the title's 34 pixels.
    expected = 34 + (row + 0.5) * 3.6, (720 - 180 * 3.6) / 2 + (column + 0.5) * 3.6
    np.testing.assert_allclose([rows.mean(), columns.mean()], expected, atol=2)


def test_a_table_of_grades_takes_any_names():
    """They are of the data set's own task table: long, with signs of formulas, or in any alphabet."""
    scan = Scan(small_scan_voxels(), SMALL_AFFINE, "small")
    grades = {"$x^$": 0.25, "moderate to severe stenosis": 0.25, "異常": 0.5}
    narrow, wide = (
        spine_picture(
            scan,
            [
                PlacedDisc(
                    GradedDisc("p", "s", "L4-L5", {"t" * 40: max(each, key=each.get)}, {"t" * 40: each}), SMALL_AFFINE
                )
            ],
            [],
            "Research use only.",
        )
        for each in ({"1": 1.0}, grades)
    )
    assert wide.shape[1] > narrow.shape[1] + 80


def test_the_segmentation_is_the_mask_on_the_sources_own_frames(hospital, returned):
    root, data, _, _ = hospital
    for folder in returned.iterdir():
        images = {image.SOPInstanceUID: image for image in source_of(hospital, folder)}
        segmentation = highdicom.seg.segread(folder / "vertebrae.dcm")
        names = {item.SegmentNumber: item.SegmentLabel for item in segmentation.SegmentSequence}
        assert set(names.values()) == {
            *(f"{name} body" for name in ("T12", "L1", "L2", "L3", "L4", "L5")),
            *(f"{level} disc" for level in data.level[data.scan == folder.name]),
        }
        [kind] = {item.SegmentAlgorithmType for item in segmentation.SegmentSequence}
        assert kind == "SEMIAUTOMATIC"
        assert all("Voxels of the mask" in item.SegmentDescription for item in segmentation.SegmentSequence)
        order = sorted(images, key=lambda uid: float(images[uid].ImagePositionPatient[0]))
        found = segmentation.get_pixels_by_source_instance(
            order, combine_segments=True, assert_missing_frames_are_empty=True
        )
        segmentation._db_con.close()
        patient = images[order[0]].PatientID
        mask = read_scan(next((root / "files" / "masks").glob(f"{images[order[0]].SeriesInstanceUID}*")), np.uint8)
        labels = np.moveaxis(mask.voxels, 2, 0)
        for number, name in names.items():
            where = found == number
            upper = name.partition(" ")[0].partition("-")[0]
            label = ("L5", "L4", "L3", "L2", "L1", "T12").index(upper) + 1 + (200 if "disc" in name else 0)
            if "disc" in name:
                np.testing.assert_array_equal(where, labels == label, err_msg=f"{patient} {name}")
            else:  # without posterior elements
                assert where.any()
                assert not (where & (labels != label)).any()


def test_vertebrae_located_elsewhere_make_no_segmentation(hospital, tmp_path, capsys):
    root = hospital[0]
    assert bring_back(root, tmp_path / "out", "--lowest-level", "L4-L5") == 0
    printed = capsys.readouterr()
    assert "are not those that were graded" in printed.err
    assert "0 segmentations" in printed.out
    assert not list((tmp_path / "out").rglob("vertebrae.dcm"))


def spoil(root, tmp_path, patient, **values):
    """The hospital's images, one patient's with other attributes."""
    images = shutil.copytree(root / "files" / "images", tmp_path / "images")
    with disabled_checks():
        for path in (images / patient).iterdir():
            image = pydicom.dcmread(path)
            for keyword, value in values.items():
                setattr(image, keyword, value)
            image.save_as(path, enforce_file_format=True)
    return images


@contextlib.contextmanager
def disabled_checks():
    settings = pydicom.config.settings
    before = settings.reading_validation_mode, settings.writing_validation_mode
    settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        yield
    finally:
        settings.reading_validation_mode, settings.writing_validation_mode = before


def test_odd_fields_of_a_patient_stop_no_report(hospital_without_maps, tmp_path, capsys):
    """In every object the name is the source's; a field that cannot be legal is empty, and a note names it."""
    root, evaluation = hospital_without_maps
    odd = {"SpecificCharacterSet": ["", "ISO 2022 IR 149"], "PatientName": "Ye^Si=例^示", "PatientSex": "U"}
    images = spoil(root, tmp_path, "p00000", **odd, PatientBirthDate="1950", StudyDescription="x" * 80)
    where = ["--source", str(images), "--key", str(root / "discs.key"), "--masks", str(root / "files" / "masks")]
    assert main(["results", str(evaluation), *where, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "2 structured reports" in said.out
    for field in ("Patient's Sex is not legal DICOM: left empty", "Birth Date is not", "Study Description is not"):
        assert "p00000, series" in next(line for line in said.err.splitlines() if field in line)
    found = [pydicom.dcmread(path) for path in (tmp_path / "out").rglob("*.dcm")]
    assert {str(one.PatientName) for one in found} == {"Ye^Si=例^示", "p00001"}
    assert {one.PatientSex for one in found} == {""}


def test_sources_without_a_preamble_or_a_slice_thickness_get_their_results_too(hospital_without_maps, tmp_path):
    root, evaluation = hospital_without_maps
    odd = {"SliceThickness": None, "StudyInstanceUID": "1.02.3", "BurnedInAnnotation": "YES"}
    images = spoil(root, tmp_path, "p00000", **odd)
    for path in (images / "p00001").iterdir():
        path.write_bytes(path.read_bytes()[132:])
    where = ["--source", str(images), "--key", str(root / "discs.key"), "--masks", str(root / "files" / "masks")]
    assert main(["results", str(evaluation), *where, "--out", str(tmp_path / "out")]) == 0
    found = [pydicom.dcmread(path) for path in (tmp_path / "out").rglob("vertebrae.dcm")]
    assert {one.PatientID for one in found} == {"p00000", "p00001"}
    for one in found:
        assert one.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness > 0
    pictures = [pydicom.dcmread(path) for path in (tmp_path / "out").rglob("spine.dcm")]
    # A picture has the source's pixels, and so whatever is written in them.
    assert {one.PatientID: one.BurnedInAnnotation for one in pictures} == {"p00000": "YES", "p00001": "NO"}


def test_the_places_of_an_evaluations_own_discs_are_held_against_the_vertebrae(hospital_without_maps, tmp_path, capsys):
    """An evaluation of raw scans has its discs beside it, whose places tell whether levels are the same."""
    root, evaluation = hospital_without_maps
    evaluation = shutil.copytree(evaluation, tmp_path / "evaluation")
    shutil.copytree(root / "discs", evaluation / "discs")
    for shift, segmentations in (([], 2), (["--lowest-level", "L4-L5"], 0)):
        arguments = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key"), *shift]
        arguments += ["--masks", str(root / "files" / "masks"), "--out", str(tmp_path / f"out{segmentations}")]
        assert main(["results", str(evaluation), *arguments]) == 0
        said = capsys.readouterr()
        assert f"0 parametric maps, 2 pictures, {segmentations} segmentations" in said.out
        assert ("are not those that were graded" in said.err) == (not segmentations)


def test_a_series_of_several_multi_frame_files_gets_its_report_and_pictures(hospital_without_maps, tmp_path, capsys):
    root, evaluation = hospital_without_maps
    images = shutil.copytree(root / "files" / "images" / "p00000", tmp_path / "images")
    slices = [pydicom.dcmread(path) for path in sorted(images.iterdir())]
    for path in images.iterdir():
        path.unlink()
    for number, part in enumerate((slices[:7], slices[7:])):
        whole = enhanced(part)
        whole.SOPInstanceUID = whole.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}"
        save(whole, images / f"{number}")
    where = ["--source", str(images), "--key", str(root / "discs.key"), "--masks", str(root / "files" / "masks")]
    assert main(["results", str(evaluation), *where, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "1 structured reports, 0 parametric maps, 1 pictures, 0 segmentations" in said.out
    assert "no maps and no segmentation, because they cannot refer to several multi-frame files" in said.err


@pytest.mark.parametrize("error", [KeyError("whatever"), FileNotFoundError(2, "whatever", "/a/source/that/was/there")])
def test_a_study_that_cannot_be_written_is_named_and_the_next_is_written(
    hospital_without_maps, tmp_path, capsys, monkeypatch, error
):
    root, evaluation = hospital_without_maps

    def refuse(path, images, *arguments):
        if images[0].PatientID == "p00000":
            raise error
        write_segmentation(path, images, *arguments)

    monkeypatch.setattr(dicom_results, "write_segmentation", refuse)
    where = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key")]
    where += ["--masks", str(root / "files" / "masks"), "--out", str(tmp_path / "out")]
    assert main(["results", str(evaluation), *where]) == 2
    said = capsys.readouterr()
    assert re.search("failed: p00000, series .*whatever", said.err)
    assert "1 structured reports" in said.out
    [folder] = (tmp_path / "out").iterdir()  # and nothing of the other
    assert pydicom.dcmread(folder / "grades.dcm").PatientID == "p00001"


def test_a_series_that_is_no_scan_is_named_with_the_reason(hospital_without_maps, tmp_path, capsys):
    root, evaluation = hospital_without_maps
    images = spoil(root, tmp_path, "p00000", ImageType=["DERIVED", "SECONDARY", "MPR"], Modality="OT")
    where = ["--source", str(images), "--key", str(root / "discs.key"), "--masks", str(root / "files" / "masks")]
    assert main(["results", str(evaluation), *where, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "1 of 2 scans have no source series here" in said.err
    assert re.search("left out: p00000.*OT", said.err)


def test_no_database_of_highdicoms_stays_open(hospital, tmp_path, monkeypatch):
    """Python 3.13 warns of each that does, whenever it is collected: once it ended the process."""
    connect, opened = sqlite3.connect, []
    monkeypatch.setattr(sqlite3, "connect", lambda *arguments: opened.append(connect(*arguments)) or opened[-1])
    assert bring_back(hospital[0], tmp_path / "archive") == 0
    assert opened
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_a_folder_that_is_there_keeps_its_mode_and_an_evaluation_gets_no_names(hospital, tmp_path, capsys):
    archive = tmp_path / "archive"
    archive.mkdir(mode=0o755)
    assert bring_back(hospital[0], archive) == 0
    assert stat.S_IMODE(archive.stat().st_mode) == 0o755
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in archive.iterdir()} == {0o700}
    capsys.readouterr()
    assert bring_back(hospital[0], hospital[0] / "evaluation" / "dicom") == 2
    assert "lies inside the evaluation" in capsys.readouterr().err


def test_the_reports_grades_are_those_of_the_predictions(hospital, returned):
    _, data, graded, _ = hospital
    for folder in returned.iterdir():
        report = highdicom.sr.srread(folder / "grades.dcm")
        images = source_of(hospital, folder)
        assert report.SOPClassUID == pydicom.uid.Comprehensive3DSRStorage
        assert (report.PatientID, report.StudyInstanceUID) == (images[0].PatientID, images[0].StudyInstanceUID)
        assert report.SeriesInstanceUID != images[0].SeriesInstanceUID
        assert (report.VerificationFlag, report.CompletionFlag) == ("UNVERIFIED", "COMPLETE")
        [study] = report.CurrentRequestedProcedureEvidenceSequence
        [series] = study.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == images[0].SeriesInstanceUID
        assert {item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence} == {
            image.SOPInstanceUID for image in images
        }
        groups = report.content.get_planar_roi_measurement_groups()
        rows = np.flatnonzero(data.scan == folder.name)
        assert [group.tracking_identifier for group in groups] == data.level[rows].tolist()
        for group, row in zip(groups, rows, strict=True):
            evaluations, measurements = group.get_qualitative_evaluations(), group.get_measurements()
            for task, evaluation, measurement in zip(data.tasks, evaluations, measurements, strict=True):
                chances, grade = graded.probabilities[task.name][row], graded.grades[task.name][row]
                words = task.name.replace("_", " ")
                assert evaluation.name.meaning == f"{words} grade"
                assert evaluation.value.meaning == f"{words}: {task.grades[grade]}"
                assert measurement.value == pytest.approx(chances[grade], abs=1e-6)
            [site] = group.finding_sites
            assert site.value.meaning == f"Level of {data.level[row].replace('-', '/')} intervertebral disc"
            region = group.roi.value
            centre = hotspot_files.window_affine(data.affine[row]) @ [55.5, 111.5, 4, 1]
            np.testing.assert_allclose(region[:4].mean(0), centre[:3], atol=1e-3)


def test_a_maps_voxels_lie_where_the_niftis_do(hospital, returned):
    """Every voxel's value and its place in mm, read back without this library."""
    root, data, _, maps = hospital
    row = 0
    for task in data.tasks[:NUM_MAPPED]:
        name = f"{data.level[row]}_{task.name}"
        with opened(returned / data.scan[row] / f"{name}.dcm") as image:
            volume = image.get_volume(apply_real_world_transform=True)
        nifti = nibabel.load(root / "nifti" / f"{data.scan[row]}_{name}.nii.gz")
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nifti.affine
        index = np.argwhere(np.ones(WINDOW_SHAPE))[::10_007]
        millimetres = np.c_[index, np.ones(len(index))] @ to_lps.T
        inside = np.rint(volume.map_reference_to_indices(millimetres[:, :3])).astype(int)
        np.testing.assert_allclose(volume.map_indices_to_reference(inside), millimetres[:, :3], atol=1e-3)
        np.testing.assert_allclose(
            volume.array[tuple(inside.T)], nifti.get_fdata()[tuple(index.T)], atol=maps[row][1].max() / 100
        )
        assert image.FrameOfReferenceUID == source_of(hospital, returned / data.scan[row])[0].FrameOfReferenceUID
        [mapping] = image.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
        assert task.name in mapping.LUTExplanation


def test_a_planted_lesion_is_found_again_at_its_millimetres(hospital, returned):
    _, data, _, _ = hospital
    row = 3
    affine = hotspot_files.window_affine(data.affine[row])
    with opened(returned / data.scan[row] / f"{data.level[row]}_pfirrmann.dcm") as image:
        pass
    frame = image.PerFrameFunctionalGroupsSequence[2]
    corner = frame.PlanePositionSequence[0].ImagePositionPatient
    np.testing.assert_allclose(corner, (affine @ [0, 0, 2, 1])[:3], atol=1e-3)
    shared = image.SharedFunctionalGroupsSequence[0]
    along_row, along_column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(
        float
    )
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    found = np.array(corner, float) + 30 * spacing[0] * along_column + 100 * spacing[1] * along_row
    np.testing.assert_allclose(found, (affine @ [30, 100, 2, 1])[:3], atol=1e-3)


@pytest.mark.skipif(DCIODVFY is None, reason="no dciodvfy on this machine: Debian has it in dicom3tools")
@pytest.mark.parametrize(
    "pattern", ["grades.dcm", "L4-L5_narrowing.dcm", "spine.dcm", "pfirrmann_slice-08.dcm", "vertebrae.dcm"]
)
def test_dciodvfy_finds_no_error(returned, pattern):
    paths = list(returned.rglob(pattern))
    assert len(paths) == 2
    for path in paths:
        found = subprocess.run([DCIODVFY, path], capture_output=True, text=True, check=False)
        assert not [line for line in found.stderr.splitlines() if line.startswith("Error")]


def test_the_same_results_get_the_same_identifiers(hospital, returned, tmp_path):
    assert bring_back(hospital[0], tmp_path / "again") == 0
    for path in returned.rglob("*.dcm"):
        again = pydicom.dcmread(tmp_path / "again" / path.relative_to(returned), stop_before_pixels=True)
        assert again.SOPInstanceUID == pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID


def test_without_hotspots_there_are_no_maps(hospital_without_maps, tmp_path, capsys):
    root, evaluation = hospital_without_maps
    arguments = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key")]
    arguments += ["--masks", str(root / "files" / "masks"), "--out", str(tmp_path / "out")]
    assert main(["results", str(evaluation), *arguments]) == 0
    assert "2 structured reports, 0 parametric maps, 2 pictures, 2 segmentations" in capsys.readouterr().out
    [report, _] = (highdicom.sr.srread(path) for path in (tmp_path / "out").rglob("grades.dcm"))
    assert len(report.content.get_image_measurement_groups()) == 6


@needs_orthanc
def test_results_go_to_the_archive_that_the_series_came_from(hospital_without_maps, tmp_path, capsys, monkeypatch):
    """The archive's own account of what it has; and again, with the same identifiers, which adds nothing."""
    root, evaluation = hospital_without_maps
    monkeypatch.setenv("DICOMWEB_USER", USER)
    monkeypatch.setenv("DICOMWEB_PASSWORD", PASSWORD)
    (tmp_path / "orthanc").mkdir()
    files = sorted((root / "files" / "images" / "p00000").iterdir())
    study = pydicom.dcmread(files[0]).StudyInstanceUID
    with running_orthanc(tmp_path / "orthanc") as server:
        assert store(f"http://{server}", files) == (len(files), {})
        arguments = ["--source", f"dicomweb://{server}/studies/{study}", "--key", str(root / "discs.key")]
        arguments += ["--masks", str(root / "files" / "masks"), "--stow", f"http://{server}"]
        for out in ("one", "two"):
            assert main(["results", str(evaluation), *arguments, "--out", str(tmp_path / out)]) == 0
            assert f"http://{server}: 3 of 3 objects stored" in capsys.readouterr().out
        with fetched([Path(f"dicomweb://{server}/studies/{study}")]) as [folder]:
            found = [pydicom.dcmread(path) for path in folder.iterdir()]
    assert Counter(one.Modality for one in found) == {"MR": len(files), "SR": 1, "OT": 1, "SEG": 1}
    assert {one.PatientID for one in found} == {"p00000"}


def test_another_key_finds_nobody(hospital, tmp_path, capsys):
    other = tmp_path / "other.key"
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    assert bring_back(hospital[0], tmp_path / "out", "--key", str(other)) == 2
    assert "None of the 2 scans" in capsys.readouterr().err
    assert bring_back(hospital[0], tmp_path / "out", "--key", str(tmp_path / "none.key")) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "none.key").exists()
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_noted(hospital, tmp_path, capsys):
    root = hospital[0]
    some = sorted((root / "files" / "images").iterdir())[0]
    assert bring_back(root, tmp_path / "out", "--source", str(some)) == 0
    printed = capsys.readouterr()
    assert "1 of 2 scans have no source series here" in printed.err
    assert "1 structured reports" in printed.out


def test_a_disc_that_lies_elsewhere_is_not_written(hospital, tmp_path, capsys):
    root = hospital[0]
    evaluation = shutil.copytree(root / "evaluation", tmp_path / "evaluation")
    with h5py.File(evaluation / "hotspots" / "hotspots.h5", "r+") as file:
        affine = file["affine"][0]
        affine[:3, 3] += 1000
        file["affine"][0] = affine
    arguments = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key")]
    arguments += ["--masks", str(root / "files" / "masks")]
    assert main(["results", str(evaluation), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "the disc is outside this series" in capsys.readouterr().err


def test_the_grade_is_the_one_that_was_given(hospital, tmp_path):
    """It need not be the most probable one, but is one of the task's."""
    discs = read_predictions(hospital[0] / "evaluation")
    with open(hospital[0] / "evaluation" / "predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    given = [disc.grades["pfirrmann"] for disc in discs]
    assert given == [line["pfirrmann_grade"] for line in table]
    assert given != [max(chances, key=chances.get) for chances in (disc.probabilities["pfirrmann"] for disc in discs)]
    table[2]["pfirrmann_grade"] = "9"
    with open(tmp_path / "predictions.csv", "w", newline="") as file:
        written = csv.DictWriter(file, list(table[0]))
        written.writeheader()
        written.writerows(table)
    with pytest.raises(SpinejaxError, match="line 4: pfirrmann '9' has no probability"):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("patient,scan", "name,scan", "no column 'patient'"),
        ("L5-S1", "L9-S1", "line 7: no such level"),
        (",0.", ",x.", "could not convert"),
        ("_p_", "_q_", "no task with its grades"),
    ],
)
def test_a_damaged_table_is_named(hospital, tmp_path, old, new, fault):
    text = (hospital[0] / "evaluation" / "predictions.csv").read_text()
    (tmp_path / "predictions.csv").write_text(text.replace(old, new))
    with pytest.raises(SpinejaxError, match=f"(?s)predictions.csv.*{fault}"):
        read_predictions(tmp_path)


def link_elsewhere(file):
    del file["map"]
    file["map"] = h5py.ExternalLink("elsewhere.h5", "map")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (link_elsewhere, "map is missing, or keeps its data in other files"),
        (lambda file: file.pop("affine"), "affine is missing"),
        (lambda file: file["step"].resize(1, axis=0), r"step is \[1, 2\]"),
        (lambda file: file.attrs.pop("tasks"), "damaged"),
        (lambda file: file["grade"].__setitem__(0, 9), "damaged"),
    ],
)
def test_a_damaged_file_of_maps_is_named(hospital, tmp_path, damage, fault):
    (tmp_path / "hotspots").mkdir()
    path = shutil.copy(hospital[0] / "evaluation" / "hotspots" / "hotspots.h5", tmp_path / "hotspots")
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(SpinejaxError, match=f"hotspots.h5: {fault}"):
        list(read_maps(tmp_path))


def test_an_enhanced_file_is_a_source_too(tmp_path):
    affine = SMALL_AFFINE
    slices = series(tmp_path / "classic", Scan(small_scan_voxels(), affine, "small"))
    save(enhanced(slices), tmp_path / "enhanced")
    images = read_source([tmp_path / "enhanced"], "small")
    task = Task("side", ("front", "back"))
    disc = GradedDisc("p", "s", "L5-S1", {"side": "back"}, {"side": {"front": 0.25, "back": 0.75}})
    maps = DiscMaps((task,), ("back",), np.ones((1, *WINDOW_SHAPE), np.float32), affine)
    write_report(tmp_path / "grades.dcm", images, [(disc, maps)], ["step 7"])
    write_map(tmp_path / "map.dcm", images, disc, maps, task, ["step 7"], 1)
    [group] = highdicom.sr.srread(tmp_path / "grades.dcm").content.get_planar_roi_measurement_groups()
    assert group.get_qualitative_evaluations()[0].value.meaning == "side: back"
    write_picture(tmp_path / "picture.dcm", images, np.zeros((8, 8, 3), np.uint8), "nothing", ["step 7"], 1)
    assert pydicom.dcmread(tmp_path / "picture.dcm").StudyInstanceUID == slices[0].StudyInstanceUID
    with opened(tmp_path / "map.dcm") as image:
        volume = image.get_volume()
    np.testing.assert_allclose(
        volume.map_reference_to_indices((affine @ [3, 5, 2, 1])[None, :3]), [[2, 3, 5]], atol=1e-4
    )


@pytest.mark.parametrize("form", ["classic", "enhanced"])
@pytest.mark.parametrize("origin", [BY_CORNERS, BY_DETECTOR])
def test_without_a_mask_segments_are_what_lies_between_corners_and_say_so(tmp_path, form, origin):
    scan = Scan(small_scan_voxels(), SMALL_AFFINE, "small")
    slices = series(tmp_path / "classic", scan)
    files = sorted((tmp_path / "classic").iterdir())
    if form == "enhanced":
        files = [tmp_path / "enhanced"]
        save(enhanced([slices[place] for place in (3, 1, 0, 2, 5, 4)]), files[0])
    boxes = {"L4": (5, 12), "L5": (18, 25)}  # rows
    bodies = [
        VertebralBody(name, np.array([[top, 8.0], [top, 24], [bottom, 24], [bottom, 8]]), (1, 5))
        for name, (top, bottom) in boxes.items()
    ]
    images = read_source(files, "small")
    write_segmentation(tmp_path / "seg.dcm", images, files, Located(scan, bodies), origin, ["step 7"])
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    pixels = found.get_volume(combine_segments=True)
    found._db_con.close()
    names = {item.SegmentLabel: item.SegmentNumber for item in found.SegmentSequence}
    assert set(names) == {"L4 body", "L5 body", "L4-L5 disc"}
    for name, (top, bottom) in {"L4 body": (5, 12), "L4-L5 disc": (12, 18), "L5 body": (18, 25)}.items():
        index = np.argwhere(pixels.array == names[name])
        place = np.c_[pixels.map_indices_to_reference(index), np.ones(len(index))] @ np.linalg.inv(SMALL_AFFINE).T
        rows, _, numbers = place[:, :3].round(3).T
        assert set(numbers) == {1, 2, 3, 4}
        assert (top, bottom) == pytest.approx((rows.min(), rows.max()), abs=1)
        assert len(index) == pytest.approx(4 * (bottom - top) * 16, rel=0.3)
    for item in found.SegmentSequence:
        assert (item.SegmentAlgorithmType, item.SegmentAlgorithmName) == (origin.kind, origin.name)
        assert item.SegmentDescription.startswith("Straight lines between four")
        assert item.SegmentDescription.endswith("not proven pathology.")
    [derived] = found.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence
    [source] = derived.SourceImageSequence
    assert source.ReferencedSOPInstanceUID in {image.SOPInstanceUID for image in images}


def test_long_names_of_tasks_and_grades_cut_no_disclaimer(tmp_path):
    """Short attributes lose the middle of a name; the whole disclaimer is where there is room for it."""
    series(tmp_path / "classic", Scan(small_scan_voxels(), SMALL_AFFINE, "small"))
    images = read_source(sorted((tmp_path / "classic").iterdir()), "small")
    task = Task("degeneration_of_the_" * 4 + "disc", ("none", "moderate to severe, on both sides of the disc (µ)"))
    disc = GradedDisc(
        "p", "s", "L5-S1", {task.name: task.grades[1]}, {task.name: {task.grades[0]: 0.25, task.grades[1]: 0.75}}
    )
    maps = DiscMaps((task,), task.grades[1:], np.ones((1, *WINDOW_SHAPE), np.float32), SMALL_AFFINE)
    write_report(tmp_path / "report", images, [(disc, maps)], ["step 7"])
    write_map(tmp_path / "map", images, disc, maps, task, ["step 7"], 1)
    written = pydicom.dcmread(tmp_path / "map")
    assert len(written.ContentDescription) <= 64
    assert written.ContentDescription.startswith("L5-S1 degeneration")
    assert written.ContentDescription.endswith("on both sides of the disc (µ)")
    assert written.ImageComments == DISCLAIMER
    assert DISCLAIMER.endswith("A hotspot shows what moved the network, not proven pathology.")
    report = pydicom.dcmread(tmp_path / "report")
    texts: list[str] = []
    report.walk(lambda dataset, element: texts.append(element.value) if element.keyword == "TextValue" else None)
    assert DISCLAIMER in texts
    assert {written.ContentQualification, report.ContentQualification} == {"RESEARCH"}
    for name in ("map", "report") if DCIODVFY else ():
        found = subprocess.run([DCIODVFY, tmp_path / name], capture_output=True, text=True, check=False)
        assert not [line for line in found.stderr.splitlines() if line.startswith("Error")]


def test_a_signed_map_says_so_and_shows_what_is_below_nothing(tmp_path):
    affine = SMALL_AFFINE
    series(tmp_path / "classic", Scan(small_scan_voxels(), affine, "small"))
    images = read_source(sorted((tmp_path / "classic").iterdir()), "small")
    task = Task("side", ("front", "back"))
    disc = GradedDisc("p", "s", "L5-S1", {"side": "back"}, {"side": {"front": 0.25, "back": 0.75}})
    map = np.ones((1, *WINDOW_SHAPE), np.float32)
    for name, sign, window in (("plain", 1, [1, 2]), ("signed", -1, [0, 4])):
        maps = DiscMaps((task,), ("back",), map * 2 * np.where(np.arange(9) == 4, sign, 1), affine)
        write_map(tmp_path / name, images, disc, maps, task, ["step 7"], 1)
        shared = pydicom.dcmread(tmp_path / name).SharedFunctionalGroupsSequence[0]
        [voi], [value] = shared.FrameVOILUTSequence, shared.RealWorldValueMappingSequence
        assert [float(voi.WindowCenter), float(voi.WindowWidth)] == window
        assert value.LUTExplanation.startswith("|d score" if sign > 0 else "d score")


def test_a_source_without_identifiers_is_named(tmp_path):
    affine = SMALL_AFFINE
    [first, *_] = series(tmp_path / "classic", Scan(small_scan_voxels(), affine, "small"))
    del first.FrameOfReferenceUID
    save(first)
    with pytest.raises(SpinejaxError, match="small: 00000 has no FrameOfReferenceUID"):
        read_source(sorted((tmp_path / "classic").iterdir()), "small")


def test_maps_and_pictures_of_slabs_lie_where_their_slices_do(tmp_path):
    """Of 45 slices of 1 mm every 4 make a slab; the window's middle one has slices 21 to 24 of the scan."""
    spine = block_spine(spacing_mm=(1.6, 1.6, 1.0), num_slices=45)
    write_dicom(tmp_path / "series", spine.scan, patient="p", series="s")
    disc = extract_discs(spine.scan, bodies_from_spider_mask(spine.mask)[0])[1]
    affine = window_affine(disc.affine)
    images = read_source(sorted((tmp_path / "series").iterdir()), "s")
    task, graded = (
        Task("side", ("front", "back")),
        GradedDisc("p", "s", disc.level, {"side": "back"}, {"side": {"front": 0.2, "back": 0.8}}),
    )
    maps = DiscMaps((task,), ("back",), np.ones((1, *WINDOW_SHAPE), np.float32), affine)
    write_map(tmp_path / "map.dcm", images, graded, maps, task, ["step 7"], 1)
    written = pydicom.dcmread(tmp_path / "map.dcm")
    assert float(written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices) == 4
    places = [
        [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
        for frame in written.PerFrameFunctionalGroupsSequence
    ]
    for place, step in zip(places, range(-4, 5), strict=True):
        in_scan = np.linalg.inv(spine.scan.affine) @ [*place, 1]
        np.testing.assert_allclose(in_scan[2], 22.5 + 4 * step, atol=1e-3)
    assert hotspot_slices(spine.scan, [PlacedDisc(graded, affine, maps)]) == [6, 10, 14, 18, 22, 26, 30, 34, 38]
