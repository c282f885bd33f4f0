"""Results as DICOM: phantoms as a hospital's series, graded, and brought back to them by the key."""

import contextlib
import json
import shutil
import sqlite3
import stat
import subprocess

import h5py
import highdicom
import nibabel
import numpy as np
import pydicom
import pytest

from data_prep.__main__ import main
from data_prep.output.dicom_objects import read_source, write_map, write_report
from data_prep.output.read_evaluation import DiscMaps, GradedDisc, read_maps, read_predictions
from data_prep.read.scan import Scan
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE
from spinejax.inference.graded import Graded, labels_of
from spinejax.inference.hotspots import Method
from spinejax.report import hotspot_files
from spinejax.tasks import Task
from tests.dicom_files import enhanced, save, series, small_scan_voxels

DCIODVFY = shutil.which("dciodvfy")


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
    graded = Graded(data, rows, data.tasks, labels_of(data, rows, data.tasks), probabilities, spread)
    out = root / "evaluation"
    (out / "hotspots").mkdir(parents=True)
    (root / "nifti").mkdir()
    graded.write(out / "predictions.csv")
    (out / "results.json").write_text(json.dumps({"step": 7, "num_views": 54, "average": "probabilities"}))
    grades = np.stack([probabilities[task.name].argmax(1) for task in data.tasks], axis=1)
    shape = (len(data.tasks), *WINDOW_SHAPE)
    maps = [(row, rng.random(shape).astype(np.float32)) for row in rows]
    hotspot_files.write_maps(out / "hotspots" / "hotspots.h5", maps, data, data.tasks, grades, Method())
    hotspot_files.write_nifti(root / "nifti", data, 0, data.tasks, maps[0][1])
    return root, data, graded, maps


def bring_back(root, out, *changes):
    arguments = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key"), "--out", str(out)]
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


def test_a_report_a_scan_and_a_map_a_task(hospital, returned):
    data = hospital[1]
    assert {path.name for path in returned.iterdir()} == set(data.scan)
    for folder in returned.iterdir():
        levels = data.level[data.scan == folder.name]
        maps = {f"{level}_{task.name}.dcm" for level in levels for task in data.tasks}
        assert {path.name for path in folder.iterdir()} == {"grades.dcm", *maps}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(returned.stat().st_mode) == 0o700


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
                chances = graded.probabilities[task.name][row]
                words = task.name.replace("_", " ")
                assert evaluation.name.meaning == f"{words} grade"
                assert evaluation.value.meaning == f"{words}: {task.grades[chances.argmax()]}"
                assert measurement.value == pytest.approx(chances.max(), abs=1e-6)
            [site] = group.finding_sites
            assert site.value.meaning == f"Level of {data.level[row].replace('-', '/')} intervertebral disc"
            region = group.roi.value
            centre = hotspot_files.window_affine(data.affine[row]) @ [55.5, 111.5, 4, 1]
            np.testing.assert_allclose(region[:4].mean(0), centre[:3], atol=1e-3)


def test_a_maps_voxels_lie_where_the_niftis_do(hospital, returned):
    """Every voxel's value and its place in mm, read back without this library."""
    root, data, _, maps = hospital
    row = 0
    for task in data.tasks:
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
@pytest.mark.parametrize("pattern", ["grades.dcm", "L4-L5_narrowing.dcm"])
def test_dciodvfy_finds_no_error(returned, pattern):
    for path in returned.rglob(pattern):
        found = subprocess.run([DCIODVFY, path], capture_output=True, text=True, check=False)
        assert not [line for line in found.stderr.splitlines() if line.startswith("Error")]


def test_the_same_results_get_the_same_identifiers(hospital, returned, tmp_path):
    assert bring_back(hospital[0], tmp_path / "again") == 0
    for path in returned.rglob("*.dcm"):
        again = pydicom.dcmread(tmp_path / "again" / path.relative_to(returned), stop_before_pixels=True)
        assert again.SOPInstanceUID == pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID


def test_without_hotspots_there_are_reports_alone(hospital, tmp_path, capsys):
    root = hospital[0]
    evaluation = shutil.copytree(root / "evaluation", tmp_path / "evaluation")
    shutil.rmtree(evaluation / "hotspots")
    arguments = ["--source", str(root / "files" / "images"), "--key", str(root / "discs.key")]
    assert main(["results", str(evaluation), *arguments, "--out", str(tmp_path / "out")]) == 0
    assert "2 structured reports, 0 parametric maps" in capsys.readouterr().out
    [report, _] = (highdicom.sr.srread(path) for path in (tmp_path / "out").rglob("grades.dcm"))
    assert len(report.content.get_image_measurement_groups()) == 6


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
    assert main(["results", str(evaluation), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "the disc is outside this series" in capsys.readouterr().err


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
        (lambda file: file["step"].resize(1, axis=0), r"step is \[1, 6\]"),
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
    affine = np.array([[0, 0, 4.0, -10], [0, 0.5, 0, -20], [-0.5, 0, 0, 30], [0, 0, 0, 1]])
    slices = series(tmp_path / "classic", Scan(small_scan_voxels(), affine, "small"))
    save(enhanced(slices), tmp_path / "enhanced")
    images = read_source([tmp_path / "enhanced"], "small")
    task = Task("side", ("front", "back"))
    disc = GradedDisc("p", "s", "L5-S1", {"side": {"front": 0.25, "back": 0.75}})
    maps = DiscMaps((task,), ("back",), np.ones((1, *WINDOW_SHAPE), np.float32), affine)
    write_report(tmp_path / "grades.dcm", images, [(disc, maps)], ["step 7"])
    write_map(tmp_path / "map.dcm", images, disc, maps, task, ["step 7"], 1)
    [group] = highdicom.sr.srread(tmp_path / "grades.dcm").content.get_planar_roi_measurement_groups()
    assert group.get_qualitative_evaluations()[0].value.meaning == "side: back"
    with opened(tmp_path / "map.dcm") as image:
        volume = image.get_volume()
    np.testing.assert_allclose(
        volume.map_reference_to_indices((affine @ [3, 5, 2, 1])[None, :3]), [[2, 3, 5]], atol=1e-4
    )


def test_a_signed_map_says_so_and_shows_what_is_below_nothing(tmp_path):
    affine = np.array([[0, 0, 4.0, -10], [0, 0.5, 0, -20], [-0.5, 0, 0, 30], [0, 0, 0, 1]])
    series(tmp_path / "classic", Scan(small_scan_voxels(), affine, "small"))
    images = read_source(sorted((tmp_path / "classic").iterdir()), "small")
    task = Task("side", ("front", "back"))
    disc = GradedDisc("p", "s", "L5-S1", {"side": {"front": 0.25, "back": 0.75}})
    map = np.ones((1, *WINDOW_SHAPE), np.float32)
    for name, sign, window in (("plain", 1, [1, 2]), ("signed", -1, [0, 4])):
        maps = DiscMaps((task,), ("back",), map * 2 * np.where(np.arange(9) == 4, sign, 1), affine)
        write_map(tmp_path / name, images, disc, maps, task, ["step 7"], 1)
        shared = pydicom.dcmread(tmp_path / name).SharedFunctionalGroupsSequence[0]
        [voi], [value] = shared.FrameVOILUTSequence, shared.RealWorldValueMappingSequence
        assert [float(voi.WindowCenter), float(voi.WindowWidth)] == window
        assert value.LUTExplanation.startswith("|d score" if sign > 0 else "d score")


def test_a_source_without_identifiers_is_named(tmp_path):
    affine = np.array([[0, 0, 4.0, -10], [0, 0.5, 0, -20], [-0.5, 0, 0, 30], [0, 0, 0, 1]])
    [first, *_] = series(tmp_path / "classic", Scan(small_scan_voxels(), affine, "small"))
    del first.FrameOfReferenceUID
    save(first)
    with pytest.raises(SpinejaxError, match="small: 00000 has no FrameOfReferenceUID"):
        read_source(sorted((tmp_path / "classic").iterdir()), "small")
