"""Scans of every format, through the command, to the same discs."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.detector.detect import Detection
from data_prep.read.dicom_files import is_dicom
from data_prep.read.metaimage import read_mha, write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import Scan
from data_prep.read.series import find_series
from data_prep.sources.phantoms import FORMATS
from data_prep.sources.scan_files import examinations
from spinejax.data.dataset import DataSet, verify
from spinejax.geometry import INTENSITY_ONE
from tests.block_spine import block_spine
from tests.data_prep.dataset.test_resuming import stop_at
from tests.dicom_files import save, series

SPINE = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5, angles_deg=(6.0, -4.0))


def scans(*arguments):
    return main(["scans", *map(str, arguments)])


def write_set(root, patients=("a", "b", "c"), suffix="_t2"):
    """Block spines of several patients as MetaImage, with masks."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, patient in enumerate(patients):
        voxels = SPINE.scan.voxels + np.float32(number)
        write_mha(root / "images" / f"{patient}{suffix}.mha", Scan(voxels, SPINE.scan.affine, ""))
        write_mha(root / "masks" / f"{patient}{suffix}.mha", SPINE.mask)
    return root


# One truth, every reader ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """One patient's phantom: data sets by way of each format, and straight from the drawing."""
    root = tmp_path_factory.mktemp("phantoms")
    options = ["--patients", "1", "--seed", "4"]
    assert main(["phantom", "--out", str(root / "straight"), *options]) == 0
    for name in FORMATS:
        assert main(["phantom", "--as", "scans", "--format", name, "--out", str(root / name), *options]) == 0
        labels = ["--labels", root / name / "labels.csv", "--key", root / "key"]
        assert (
            scans(root / name / "images", "--masks", root / name / "masks", "--out", root / f"of_{name}", *labels) == 0
        )
    return root


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_discs_that_were_drawn(phantoms, name):
    straight, read = DataSet(phantoms / "straight"), DataSet(phantoms / f"of_{name}")
    assert verify(phantoms / f"of_{name}") == []
    assert len(read) == len(straight) == 6
    for row in range(len(straight)):
        other = match(straight, row, read)
        np.testing.assert_allclose(read.affine[other], straight.affine[row], atol=1e-3)
        np.testing.assert_array_equal(read.labels[other], straight.labels[row])
        difference = abs(read.volume(other).astype(int) - straight.volume(row))
        assert difference.max() < 0.002 * INTENSITY_ONE
        assert np.mean(read.mask("region", other) != straight.mask("region", row)) < 1e-4


def match(data, row, other):
    """The row of another data set that is the same place in the same patient."""
    near = abs(other.affine - data.affine[row]).max((1, 2))
    assert other.level[np.argmin(near)] == data.level[row]
    return int(np.argmin(near))


def test_phantoms_in_spiders_layout_are_read_as_spider(phantoms, tmp_path):
    arguments = [str(phantoms / "mha"), "--out", str(tmp_path / "out")]
    assert main(["spider", *arguments]) == 0
    data, straight = DataSet(tmp_path / "out"), DataSet(phantoms / "straight")
    for row in range(len(straight)):
        assert data.labels[match(straight, row, data), 0] == straight.labels[row, 0]


def test_labels_are_compared_with_discs_where_people_gave_them(phantoms, tmp_path, capsys):
    """One scan is too few, which is noted. A phantom's labels are those that it was drawn by."""
    labels, masks = phantoms / "nifti" / "labels.csv", phantoms / "nifti" / "masks"
    told = []
    for command in (
        ["spider", str(phantoms / "mha")],
        ["scans", str(phantoms / "nifti" / "images"), "--masks", str(masks), "--labels", str(labels)],
        ["scans", str(phantoms / "nifti" / "images"), "--masks", str(masks)],
        ["phantom", "--patients", "1", "--seed", "4"],
    ):
        assert main([*command, "--out", str(tmp_path / f"out{len(told)}")]) == 0
        told.append("labels were not compared with what their discs look like: " in capsys.readouterr().err)
    assert told == [True, True, False, False]


def test_phantoms_are_not_written_over_files(phantoms, capsys):
    arguments = ["phantom", "--as", "scans", "--out", str(phantoms / "mha"), "--patients", "1"]
    assert main(arguments) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


# What is found, left out, and failed ---------------------------------------------------------------------------------


def test_mixed_tree_is_sorted_out_and_reported(tmp_path, capsys):
    """Two series in one folder, any nesting, no suffixes; T1, axial, a localiser, a report and junk beside them."""
    root, masks = tmp_path / "export", tmp_path / "masks"
    masks.mkdir()
    for patient in ("p1", "p2"):
        uids = [one.SeriesInstanceUID for one in put(root / "deep" / patient, SPINE.scan, patient, "t2")]
        write_mha(masks / f"{uids[0]}.mha", SPINE.mask)
        put(root / "deep" / patient, SPINE.scan, patient, "t1", EchoTime=9, RepetitionTime=500)
    axial = np.array([[0, 0.7, 0, 0], [0.7, 0, 0, 0], [0, 0, -4, 0], [0, 0, 0, 1]])
    put(root / "axial", Scan(SPINE.scan.voxels, axial, ""), "p1", "ax")
    put(root / "loc", SPINE.scan, "p1", "loc", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    planes = put(root / "planes", SPINE.scan, "p1", "planes")
    for one, axes in zip(planes, ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]), strict=False):
        one.ImageOrientationPatient = axes
        save(one)
    put(root / "other", SPINE.scan, "p2", "ct", Modality="CT")
    (root / "readme.txt").write_text("not a scan")
    write_mha(root / "sub-9_T1w.mha", SPINE.scan)
    assert scans(root, "--masks", masks, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "8 discs" in printed.out
    assert "of 2 scans" in printed.out
    for line in (
        "t1 by its header, t2 was asked for",
        "an axial series",
        "5 of 5 images: a localiser by its ImageType",
        "5 of 5 images: a localiser in 3 planes",
        "5 of 5 files: modality CT",
        "1 files are not scans: readme.txt",
        "sub-9_T1w.mha: t1 by its name",
    ):
        assert line in printed.err, line
    assert len(set(DataSet(tmp_path / "out").patient)) == 2


def test_axial_blocks_along_the_discs_are_left_out(tmp_path, capsys):
    """No one volume, with a gap and a tilt: as axial series of the lumbar spine mostly are."""
    root = write_set(tmp_path, ("a",))
    axial = np.array([[0, 0.7, 0, 0], [0.7, 0, 0, 0], [0, 0, -4, 0], [0, 0, 0, 1]])
    slices = put(root / "images" / "dicom", Scan(SPINE.scan.voxels, axial, ""), "p1", "ax")
    for one, tilt in zip(slices, (0, 0, 10, 20, 20), strict=True):
        down = np.deg2rad(tilt)
        one.ImageOrientationPatient = [1, 0, 0, 0, np.cos(down), -np.sin(down)]
        save(one)
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out", "--strict") == 0
    assert "an axial series, 90° or more off the sagittal plane" in capsys.readouterr().err


def put(folder, scan, patient, name, **values):
    """A DICOM series among others in a folder, files without suffixes, with some values changed."""
    slices = series(folder / name, scan, patient=patient, name=name)
    for one in slices:
        for key, value in values.items():
            setattr(one, key, value)
        save(one, folder / f"{name}{one.InstanceNumber:03d}")
        one.filename = str(folder / f"{name}{one.InstanceNumber:03d}")
    shutil.rmtree(folder / name)
    return slices


def test_bad_series_is_reported_and_the_others_are_written(tmp_path, capsys):
    root, masks = tmp_path / "export", tmp_path / "masks"
    masks.mkdir()
    for patient in ("p1", "p2"):
        slices = put(root / patient, SPINE.scan, patient, "t2")
        write_mha(masks / f"{slices[0].SeriesInstanceUID}.mha", SPINE.mask)
    (root / "p2" / "t2003").unlink()
    (root / "p1" / "cut").write_bytes((root / "p1" / "t2002").read_bytes()[:300])
    assert scans(root, "--masks", masks, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "4 discs" in printed.out
    assert re.search("1 slices are missing between t200[24] and t200[24]", printed.err)
    assert "cut: " in printed.err
    assert "1 of 2 scans failed" in printed.err
    assert "1 files or folders cannot be read" in printed.err
    assert scans(root, "--masks", masks, "--out", tmp_path / "strict", "--strict") == 2
    assert not (tmp_path / "strict").exists()


def test_series_whose_end_slice_is_damaged_fails(tmp_path, capsys):
    """Without its end slice it would be a whole series, though a shorter one."""
    root = write_set(tmp_path, ("a",))
    slices = put(root / "images" / "dicom", SPINE.scan, "p1", "t2")
    write_mha(root / "masks" / f"{slices[0].SeriesInstanceUID}.mha", SPINE.mask)
    whole = Path(slices[0].filename).read_bytes()
    Path(slices[0].filename).write_bytes(whole[: whole.index(slices[0].SeriesInstanceUID.encode()) + 80])
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "t2001 of it cannot be read" in printed.err
    assert "1 of 2 scans failed" in printed.err
    assert "4 discs" in printed.out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"PatientID": "p9"}, "files of 2 patients (p1, p9), expected one"),
        ({"SeriesInstanceUID": ""}, "no SeriesInstanceUID"),
    ],
)
def test_series_without_one_patient_fails(tmp_path, capsys, values, message):
    root = write_set(tmp_path, ("a",))
    slices = put(root / "images" / "dicom", SPINE.scan, "p1", "t2")
    for one in slices[:1] if values == {"PatientID": "p9"} else slices:
        for key, value in values.items():
            setattr(one, key, value)
        save(one)
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "4 discs" in printed.out


def test_series_whose_patient_id_was_completed_late_is_one_patients(tmp_path):
    """Images sent before an archive corrected the PatientID carry none, or another spelling of it."""
    root = write_set(tmp_path, ("a",))
    slices = put(root / "images" / "dicom", SPINE.scan, "p1", "t2")
    write_mha(root / "masks" / f"{slices[0].SeriesInstanceUID}.mha", SPINE.mask)
    for one, patient in zip(slices, ("", "P1 "), strict=False):
        one.PatientID = patient
        save(one)
    assert scans(root / "images" / "dicom", "--masks", root / "masks", "--out", tmp_path / "out") == 0
    assert len(set(DataSet(tmp_path / "out").patient)) == 1


def test_file_and_folder_that_may_not_be_read_are_reported_and_the_others_are_written(tmp_path, capsys, monkeypatch):
    root = write_set(tmp_path, ("a",))
    (root / "images" / "locked").mkdir()
    (root / "images" / "locked.dcm").touch()
    scandir = os.scandir

    def refuse(path, look):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, scandir))
    monkeypatch.setattr("data_prep.read.header_cache.is_dicom", lambda path: refuse(path, is_dicom))
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    for name in ("locked", "locked.dcm"):
        assert f"failed: {root / 'images' / name}: cannot be read (Permission denied)." in printed.err
    assert "4 discs" in printed.out
    assert "of 1 scans" in printed.out
    assert "2 files or folders cannot be read" in printed.err
    assert "scans failed" not in printed.err
    (root / "masks" / "locked").mkdir()
    assert scans(root / "images" / "a_t2.mha", "--masks", root / "masks", "--out", tmp_path / "none") == 2
    assert "error: " + str(root / "masks" / "locked") in capsys.readouterr().err


def test_folders_that_are_links_are_looked_into_once(tmp_path):
    """Also where they lead in a circle; what is there twice is of its own folder's patient."""
    root = write_set(tmp_path, ("a",))
    (root / "far").mkdir()
    shutil.copy(root / "images" / "a_t2.mha", root / "far" / "b_t2.mha")
    (root / "images" / "one").mkdir()
    (root / "images" / "a_t2.mha").rename(root / "images" / "one" / "a_t2.mha")
    for name, target in (("all", "images"), ("another", "images/one"), ("far", "far")):
        (root / "images" / name).symlink_to(root / target)
    found = find_series([root / "images"], patients_by="folder")
    assert {one.key for one in found.series} == {"one/a_t2", "far/b_t2"}


@pytest.mark.parametrize(
    ("names", "doubted"), [(("spine_000", "spine_001"), True), (("a_t2", "b_t2"), False), (("a_t2",), False)]
)
def test_names_that_make_all_scans_one_patients_are_doubted(tmp_path, capsys, names, doubted):
    root = write_set(tmp_path, names, suffix="")
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 0
    assert ("note: 2 scans are all of patient 'spine', by the part of their" in capsys.readouterr().err) == doubted


def test_axial_volume_needs_no_mask_to_be_left_out(tmp_path, capsys):
    root = write_set(tmp_path, ("a",))
    axial = np.array([[0, 0.7, 0, 0], [0.7, 0, 0, 0], [0, 0, -4, 0], [0, 0, 0, 1]])
    write_nifti(root / "images" / "b_t2.nii.gz", Scan(SPINE.scan.voxels, axial, ""))
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 0
    assert "left out: b_t2.nii.gz" in capsys.readouterr().err


def test_one_file_is_enough_and_levels_are_counted_from_the_lowest(tmp_path):
    root = write_set(tmp_path, ("a",))
    one = root / "images" / "a_t2.mha"
    assert scans(one, "--masks", root / "masks", "--out", tmp_path / "out", "--lowest-level", "L4-L5") == 0
    assert DataSet(tmp_path / "out").level.tolist() == ["L1-L2", "L2-L3", "L3-L4", "L4-L5"]


def test_flips_and_orders_of_axes_give_the_same_discs(tmp_path):
    """A rotated, anisotropic scan, stored in four ways: each disc has the same affine and image."""
    root = write_set(tmp_path, ("a",))
    key = ["--masks", root / "masks", "--key", tmp_path / "key"]
    assert scans(root / "images", *key, "--out", tmp_path / "plain") == 0
    plain = DataSet(tmp_path / "plain")
    for number, (order, flips) in enumerate(
        (((2, 0, 1), (1, 1, -1)), ((1, 2, 0), (-1, 1, 1)), ((0, 1, 2), (-1, -1, -1)))
    ):
        turn = np.eye(4)[:, [*order, 3]] @ np.diag([*flips, 1])
        turn[:3, 3] = [(SPINE.scan.voxels.shape[axis] - 1) * (turn[axis, :3].sum() < 0) for axis in range(3)]
        voxels = SPINE.scan.voxels.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        write_mha(root / "images" / "a_t2.mha", Scan(voxels, SPINE.scan.affine @ turn, ""))
        assert scans(root / "images", *key, "--out", tmp_path / f"{number}") == 0
        turned = DataSet(tmp_path / f"{number}")
        np.testing.assert_allclose(turned.affine, plain.affine, atol=1e-6)
        corners = np.array([[0, 0, 0, 1], [191, 319, 14, 1]])
        assert abs((turned.affine - plain.affine) @ corners.T).max() < 0.1  # mm
        for row in range(len(plain)):
            assert abs(turned.volume(row).astype(int) - plain.volume(row)).max() <= 1


def test_corner_file_gives_the_discs_of_the_mask(tmp_path, capsys):
    root = write_set(tmp_path, ("a",))
    mask = read_mha(root / "masks" / "a_t2.mha", np.uint8)
    bodies = {body.name: to_file(body, mask) for body in bodies_from_spider_mask(mask)[0]}
    (tmp_path / "corners.json").write_text(json.dumps({"scans": {"a_t2": bodies, "A_T2": bodies}}))
    key = ["--key", tmp_path / "key"]
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "m", *key) == 0
    assert scans(root / "images", "--corners", tmp_path / "corners.json", "--out", tmp_path / "c", *key) == 0
    assert "corners.json: no such scan: A_T2 (1 in all)" in capsys.readouterr().err  # else a misspelt name is not seen
    by_mask, by_corners = DataSet(tmp_path / "m"), DataSet(tmp_path / "c")
    assert by_corners.masks == ()
    np.testing.assert_allclose(by_corners.affine, by_mask.affine, atol=1e-6)


def to_file(body, mask):
    points = np.c_[body.corners, np.full(4, body.mid_slice), np.ones(4)] @ mask.affine.T
    corners = [None if np.isnan(point).any() else point[:3].tolist() for point in points]
    return {"corners_mm": corners, "width_mm": 30}


def test_labels_come_with_their_scans(tmp_path, capsys):
    root = write_set(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "patient,scan,level,pfirrmann,narrowing\na,,L5-S1,4,\na,a_t2,L4-L5,5,2\nb,b_t2,L5-S1,1,1\nzz,zz_t2,L5-S1,1,1\n"
    )
    labels = ["--labels", tmp_path / "labels.csv"]
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out", *labels) == 0
    data = DataSet(tmp_path / "out")
    assert [task.name for task in data.tasks] == ["pfirrmann", "narrowing"]
    labelled = {(level, *row) for level, row in zip(data.level, data.labels.tolist(), strict=True) if max(row) >= 0}
    assert labelled == {("L5-S1", 3, -1), ("L4-L5", 4, 1), ("L5-S1", 0, 0)}
    assert "labelled, but no such scan: zz zz_t2" in capsys.readouterr().err


def test_ids_that_a_spreadsheet_shortened_are_told(tmp_path, capsys):
    """https://github.com/incf-nidash/PyNIDM/pull/84: a table's reader strips leading zeros."""
    root = write_set(tmp_path, ("0007", "0008"))
    (tmp_path / "labels.csv").write_text("patient;level;pfirrmann\n7;L5-S1;2\n0008;L5/S1;2\n")
    command = [root / "images", "--masks", root / "masks", "--labels", tmp_path / "labels.csv"]
    assert scans(*command, "--out", tmp_path / "out") == 0
    said = "labelled, but no such scan: 7 (1 in all). Write 0007 for 7: a spreadsheet may have made 7 of 0007."
    assert said in capsys.readouterr().err
    assert np.sum(DataSet(tmp_path / "out").labels >= 0) == 1


def test_splits_of_the_label_table_are_kept(tmp_path, capsys):
    root = write_set(tmp_path, ("a", "b", "c", "d"))
    text = "patient,level,pfirrmann,split\na,L5-S1,2,test\nb,L5-S1,3,test\nc,L5-S1,4,train\n"
    (tmp_path / "labels.csv").write_text(text)
    command = [root / "images", "--masks", root / "masks", "--labels", tmp_path / "labels.csv"]
    assert scans(*command, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "1 patients have no split in --labels, and are in train: d." in said
    assert "no patient is in validation, by the splits in --labels." in said
    data = DataSet(tmp_path / "out")
    labelled = data.labels[:, 0] >= 0
    assert sorted(zip(data.labels[labelled, 0].tolist(), data.split[labelled], strict=True)) == [
        (1, "test"), (2, "test"), (3, "train")
    ]  # fmt: skip
    assert sum(data.split == "train") == sum(data.split == "test") == 8


def test_files_of_one_name_in_two_folders(tmp_path, capsys):
    """Each is called after as many of its folders as it takes, by masks and labels, too.

    https://github.com/pydicom/deid/issues/161: one of two files of a name took the other's place.
    """
    for number, patient in enumerate(("P1", "P2")):
        for folder in ("images", "masks"):
            (tmp_path / folder / patient).mkdir(parents=True)
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        write_nifti(tmp_path / "images" / patient / "T2.nii.gz", scan)
        write_mha(tmp_path / "masks" / patient / "T2.mha", SPINE.mask)
    (tmp_path / "labels.csv").write_text("patient,scan,level,pfirrmann\nP1,P1/T2,L5-S1,2\nP2,T2,L5-S1,3\n")
    command = [tmp_path / "images", "--labels", tmp_path / "labels.csv"]
    assert scans(*command, "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 0
    data = DataSet(tmp_path / "out")
    assert len(set(data.patient)) == len(set(data.scan)) == 2
    assert sorted(data.labels[data.level == "L5-S1"].ravel().tolist()) == [1, 2]
    (tmp_path / "flat").mkdir()
    shutil.copy(tmp_path / "masks" / "P1" / "T2.mha", tmp_path / "flat" / "T2.mha")
    capsys.readouterr()
    assert scans(*command, "--masks", tmp_path / "flat", "--out", tmp_path / "none") == 2
    assert "T2.mha could be the mask of 2 scans. Name it, or its folder, after one" in capsys.readouterr().err
    shutil.move(tmp_path / "flat" / "T2.mha", tmp_path / "flat" / "P1_T2.mha")
    shutil.copy(tmp_path / "masks" / "P2" / "T2.mha", tmp_path / "flat" / "P2_T2.mha")
    assert scans(*command, "--masks", tmp_path / "flat", "--out", tmp_path / "joined") == 0


def test_patient_then_series_is_one_patient(tmp_path, capsys):
    """PATIENT/SERIES/files without PatientIDs: one person's series were two people's in different splits."""
    root, masks = tmp_path / "export", tmp_path / "masks"
    masks.mkdir()
    for number, (patient, name) in enumerate(itertools.product(("PAT0", "PAT1", "PAT2"), ("4711", "4712"))):
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        study = f"1.2.{patient[-1]}"
        slices = put(root / patient / name, scan, patient, name, PatientID="", PatientName="", StudyInstanceUID=study)
        write_mha(masks / f"{slices[0].SeriesInstanceUID}.mha", SPINE.mask)
    for by, number in (("folder", 3), ("auto", 3), ("folder:1", 3)):
        out = tmp_path / by.replace(":", "")
        assert scans(root, "--masks", masks, "--out", out, "--patients-by", by, "--series-rule", "all") == 0
        data = DataSet(out)
        assert len(set(data.patient)) == number
        assert len(set(data.scan)) == 6
    assert "By their StudyInstanceUID they are of 3 people" in capsys.readouterr().err
    assert scans(root, "--masks", masks, "--out", tmp_path / "none", "--patients-by", "folder:2") == 2
    assert "StudyInstanceUID '1.2.0' is in the folders PAT0/4711, PAT0/4712" in capsys.readouterr().err


def test_contradictions_stop_a_data_set_and_nothing_else(tmp_path, capsys):
    """Who the patient is decides on splits; a picture of the scans needs no patient."""
    root, masks = tmp_path / "export", tmp_path / "masks"
    masks.mkdir()
    for patient, born in (("A^B", "19500101"), ("C^D", "19600101")):
        slices = put(root / patient, SPINE.scan, patient, "t2", PatientID="7", PatientBirthDate=born)
        write_mha(masks / f"{slices[0].SeriesInstanceUID}.mha", SPINE.mask)
    assert scans(root, "--masks", masks, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "error: Who is the patient?\n  PatientID '7': two names and two dates of birth. Give --patients" in said
    assert not (tmp_path / "out").exists()
    assert main(["overlay", str(root), "--masks", str(masks), "--out", str(tmp_path / "page.png")]) == 0
    assert scans(root, "--masks", masks, "--out", tmp_path / "out", "--patients-by", "folder") == 0


def test_labels_of_doubtful_levels_teach_nothing(tmp_path, capsys, monkeypatch):
    """Where no sacrum is seen every name may be off by one, and with it every label; unlabelled discs do no harm."""
    bodies, _ = bodies_from_spider_mask(SPINE.mask)
    doubtful = Detection(bodies, {}, ["no sacrum"], doubtful_levels=True)
    monkeypatch.setattr("data_prep.detector.detect.detect", lambda scan, **_: doubtful)
    root = write_set(tmp_path, ("a", "b"))
    (tmp_path / "labels.csv").write_text("patient,scan,level,pfirrmann\na,,L5-S1,2\n")
    command = [root / "images", "--labels", tmp_path / "labels.csv"]
    assert scans(*command, "--out", tmp_path / "out") == 0
    assert "left out: a_t2.mha: its levels are doubtful" in capsys.readouterr().err
    assert DataSet(tmp_path / "out").labels.max() == -1
    assert len(set(DataSet(tmp_path / "out").scan)) == 1
    assert scans(*command, "--out", tmp_path / "kept", "--keep-doubtful") == 0
    assert DataSet(tmp_path / "kept").labels.max() == 1
    (tmp_path / "labels.csv").write_text("patient,scan,level,pfirrmann\na,,L5-S1,2\nb,,L5-S1,2\n")
    assert scans(*command, "--out", tmp_path / "none") == 2
    assert "left out: b_t2.mha: its levels are doubtful" in capsys.readouterr().err  # the reason that nothing is left


def test_patients_by_folder(tmp_path):
    """Where each patient has a folder, files of one name are printed apart, and so are their masks and labels."""
    for number, patient in enumerate(("one", "two", "three")):
        for folder in ("images", "masks"):
            (tmp_path / folder / patient).mkdir(parents=True)
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        write_mha(tmp_path / "images" / patient / "t2.mha", scan)
        write_mha(tmp_path / "masks" / patient / "t2.mha", SPINE.mask)
    (tmp_path / "labels.csv").write_text("patient,scan,level,pfirrmann\none,,L5-S1,2\ntwo,two/t2,L5-S1,3\n")
    where = [tmp_path / "images", "--masks", tmp_path / "masks", "--labels", tmp_path / "labels.csv"]
    assert scans(*where, "--out", tmp_path / "by_folder", "--patients-by", "folder") == 0
    data = DataSet(tmp_path / "by_folder")
    assert len(set(data.patient)) == len(set(data.scan)) == 3
    assert sorted(data.labels[data.level == "L5-S1"].ravel().tolist()) == [-1, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "a_t2",
        "a_mod-t2_seg-vert_msk",
        "a_seg-vert_msk",
        "a_t2_seg",
        "a_t2_totalspineseg_v2",
        "a_t2_vertebrae_mr",
        "images",
        "deep/a_t2",
    ],
)
def test_masks_are_found_by_name(tmp_path, name):
    root = write_set(tmp_path, ("a",))
    mask = root / "masks" / f"{name}.mha"
    mask.parent.mkdir(exist_ok=True)
    (root / "masks" / "a_t2.mha").rename(mask)
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 0


def dicom_tree(root, *folders):
    """A DICOM series in each of these folders, and no masks: each is of the patient that its first folder is called."""
    for number, folder in enumerate(folders):
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        put(root / folder, scan, Path(folder).parts[0], f"IM{number}")


@pytest.mark.parametrize(
    ("folders", "masks"),
    [
        (["P001/T2", "P002/T2"], ["P001.mha", "P002.mha"]),
        (["P001/T2", "P002/T2"], ["P001_seg.mha", "P002_vertebrae_mr.mha"]),
        (["P001/T2", "P002/T2"], ["P001/seg.mha", "P002/seg.mha"]),
        (["P001/T2", "P002/T2"], ["P001/T2/vertebrae_mr.mha", "P002/T2/mask.mha"]),
        (["P001/T2", "P002/T2"], ["P001/T2.mha", "P002/T2.mha"]),
        (["P001/2024/S1/T2", "P002/2023/S1/T2"], ["labels/P001/seg.mha", "labels/P002/seg.mha"]),
        (["P001/A/T2", "P001/B/T2"], ["P001/A/seg.mha", "P001/B/seg.mha"]),  # two studies of one patient
        (["P001/A/T2", "P001/B/T2"], ["A.mha", "B.mha"]),
        (["P001/T2", "P002/T2"], ["P001.mha", "P002.mha", "P003.mha", "P003/seg.mha"]),
    ],
)
def test_masks_are_found_by_the_folders_above_a_scan(tmp_path, folders, masks):
    dicom_tree(tmp_path / "export", *folders)
    for mask in masks:
        (tmp_path / "masks" / mask).parent.mkdir(parents=True, exist_ok=True)
        write_mha(tmp_path / "masks" / mask, SPINE.mask)
    assert scans(tmp_path / "export", "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 0
    assert len(set(DataSet(tmp_path / "out").scan)) == 2


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (["P002.mha"], "no mask"),
        (["P002/T2.mha"], "no mask"),
        (["P002/T2/seg.mha", "P002/seg.mha"], "no mask"),
        (["T2/P002_seg.mha", "T2/P002.mha"], "no mask"),
        (["P001/a_seg.mha"], "no mask"),
        (["P001_seg.mha", "P001_mask.mha"], "P001_mask.mha, P001_seg.mha could all be its mask"),
        (["P001/seg.mha", "P001/mask.mha"], "could all be its mask"),
    ],
)
def test_another_patients_masks_and_ambiguous_ones_are_not_taken(tmp_path, capsys, masks, message):
    dicom_tree(tmp_path / "export", "P001/T2")
    for mask in masks:
        (tmp_path / "masks" / mask).parent.mkdir(parents=True, exist_ok=True)
        write_mha(tmp_path / "masks" / mask, SPINE.mask)
    assert scans(tmp_path / "export", "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_one_mask_for_two_patients_folders_is_refused(tmp_path, capsys):
    dicom_tree(tmp_path / "export", "P001/T2", "P002/T2")
    (tmp_path / "masks").mkdir()
    write_mha(tmp_path / "masks" / "T2.mha", SPINE.mask)
    assert scans(tmp_path / "export", "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 2
    assert "could be the mask of 2 scans" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ses-{}/T2w", "ses-{}_T2w"])
def test_one_mask_for_two_scans_of_a_patient_is_refused(tmp_path, capsys, name):
    for session in (1, 2):
        path = tmp_path / "images" / "sub-01" / f"{name.format(session)}.mha"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mha(path, SPINE.scan)
    (tmp_path / "masks").mkdir()
    write_mha(tmp_path / "masks" / "sub-01_seg.mha", SPINE.mask)
    command = [tmp_path / "images", "--masks", tmp_path / "masks", "--patients-by", "folder:1"]
    assert scans(*command, "--out", tmp_path / "out") == 2
    assert "could be the mask of 2 scans" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lumbar_{}", "P1_{}"])
@pytest.mark.parametrize("word", ["seg-vert", "seg-vert_msk", "seg"])
def test_scans_that_differ_by_the_last_word_have_masks_of_their_own(tmp_path, capsys, name, word):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in (1, 2):
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        write_mha(tmp_path / "images" / f"{name.format(number)}.mha", scan)
    write_mha(tmp_path / "masks" / f"{name.format(2)}_{word}.mha", SPINE.mask)
    command = [tmp_path / "images", "--masks", tmp_path / "masks", "--patients-by", "name:2"]
    assert scans(*command, "--out", tmp_path / "one") == 2
    printed = capsys.readouterr()
    assert f"failed: {name.format(1)}.mha: no mask" in printed.err
    assert "4 discs" in printed.out
    write_mha(tmp_path / "masks" / f"{name.format(1)}_{word}.mha", SPINE.mask)
    assert scans(*command, "--out", tmp_path / "both") == 0


def test_a_mask_that_is_flipped_against_its_scan_fails(tmp_path, capsys):
    root = write_set(tmp_path, ("a", "b"))
    turned = Scan(np.ascontiguousarray(SPINE.mask.voxels[:, ::-1]), SPINE.mask.affine, "")
    write_mha(root / "masks" / "a_t2.mha", turned)
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "it fits the image better when it is flipped back to front" in printed.err
    assert "4 discs" in printed.out


def test_doubts_of_shapes_are_notes_of_the_run(tmp_path, capsys):
    root = write_set(tmp_path, ("a",))
    rows = np.arange(SPINE.mask.voxels.shape[0])[:, None, None] < SPINE.corners["L3"][:2, 0].max() + 5
    lower = np.where((SPINE.mask.voxels == 3) & rows, 0, SPINE.mask.voxels).astype(np.uint8)
    write_mha(root / "masks" / "a_t2.mha", Scan(lower, SPINE.mask.affine, ""))
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 0
    assert "note: a_t2.mha: L2-L3 is doubtful: the middle between its bodies is" in capsys.readouterr().err


def test_doubts_of_shapes_are_notes_of_corner_files_too(tmp_path, capsys):
    root = write_set(tmp_path, ("a",))
    mask = read_mha(root / "masks" / "a_t2.mha", np.uint8)
    bodies = {body.name: to_file(body, mask) for body in bodies_from_spider_mask(mask)[0]}
    bodies["S1"]["corners_mm"] = [point and [*point[:2], point[2] - 12] for point in bodies["S1"]["corners_mm"]]
    (tmp_path / "corners.json").write_text(json.dumps({"scans": {"a_t2": bodies}}))
    assert scans(root / "images", "--corners", tmp_path / "corners.json", "--out", tmp_path / "out") == 0
    assert re.search("note: a_t2.mha: L5-S1 is doubtful: L5 and S1 are 2[01] mm apart", capsys.readouterr().err)


def test_corners_in_ras_fail_by_that_word(tmp_path, capsys):
    """Slicer issue 3731: a file that says one coordinate system and has the other's points."""
    root = write_set(tmp_path, ("a",))
    mask = read_mha(root / "masks" / "a_t2.mha", np.uint8)
    bodies = {body.name: to_file(body, mask) for body in bodies_from_spider_mask(mask)[0]}
    for body in bodies.values():
        body["corners_mm"] = [point and [-point[0], -point[1], point[2]] for point in body["corners_mm"]]
    (tmp_path / "corners.json").write_text(json.dumps({"scans": {"a_t2": bodies}}))
    command = [root / "images", "--corners", tmp_path / "corners.json"]
    assert scans(*command, "--out", tmp_path / "out") == 2
    assert "They fit in RAS" in capsys.readouterr().err
    (tmp_path / "corners.json").write_text(json.dumps({"coordinateSystem": "RAS", "scans": {"a_t2": bodies}}))
    assert scans(*command, "--out", tmp_path / "out") == 0


def test_a_mask_named_as_another_scan_is_that_ones(tmp_path, capsys):
    root = write_set(tmp_path, ("a",))
    shutil.copy(root / "images" / "a_t2.mha", root / "images" / "a.mha")
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    assert "failed: a.mha: no mask a.nii.gz" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", "_seg"])
def test_a_mask_of_a_longer_name_is_another_series(tmp_path, capsys, ending):
    """SPIDER has `110_t2` and `110_t2_SPACE`, on grids of their own."""
    root = write_set(tmp_path, ("a",))
    (root / "masks" / "a_t2.mha").rename(root / "masks" / f"a_t2_SPACE{ending}.mha")
    shutil.copy(root / "images" / "a_t2.mha", root / "images" / "a_t2_SPACE.mha")
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "failed: a_t2.mha: no mask a_t2.nii.gz" in printed.err
    assert "4 discs" in printed.out
    assert scans(root / "images" / "a_t2.mha", "--masks", root / "masks", "--out", tmp_path / "one") == 2


@pytest.mark.parametrize("scan", ["", "a_t2.mha"])
@pytest.mark.parametrize("ending", ["_seg", "_dseg", "_msk", "_mask", "_label", "_labels", "_T2w_seg-vert_msk"])
def test_masks_beside_their_scans_are_no_scans(tmp_path, capsys, ending, scan):
    root = write_set(tmp_path, ("a",))
    (root / "masks" / "a_t2.mha").rename(root / "images" / f"a_t2{ending}.mha")
    assert scans(root / "images" / scan, "--masks", root / "images", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "4 discs" in printed.out
    assert "of 1 scans" in printed.out
    assert scan or f"1 files are masks by the end of their names: a_t2{ending}.mha" in printed.err
    assert scans(root / "images" / f"a_t2{ending}.mha", "--out", tmp_path / "none") == 2
    assert "No sagittal scan was found" in capsys.readouterr().err


def test_a_scan_is_not_its_own_mask(tmp_path, capsys):
    root = write_set(tmp_path, ("a",))
    assert scans(root / "images", "--masks", root / "images", "--out", tmp_path / "out") == 2
    assert "no mask a_t2.nii.gz or .mha among the 0" in capsys.readouterr().err
    assert scans(root / "images", "--masks", root, "--out", tmp_path / "out") == 0


def test_normalising_per_disc_keeps_the_difference_between_slices(tmp_path):
    root = write_set(tmp_path, ("a",))
    for way in ("slice", "disc"):
        out = ["--out", tmp_path / way, "--normalise", way]
        assert scans(root / "images", "--masks", root / "masks", *out) == 0
        data = DataSet(tmp_path / way)
        marrow = np.median(data.volume(1)[70:80, 140:180, 6:9], axis=(0, 1)) / INTENSITY_ONE
        ramp = marrow / marrow[1]
        if way == "slice":
            np.testing.assert_allclose(ramp, 1, atol=0.02)
        else:
            assert ramp[0] < 0.95 < 1.05 < ramp[2]


# Interrupted runs, gone on with otherwise ----------------------------------------------------------------------------


@pytest.fixture
def detected(monkeypatch):
    """The detector finds what the block spine's mask says."""
    bodies, _ = bodies_from_spider_mask(SPINE.mask)
    monkeypatch.setattr("data_prep.detector.detect.detect", lambda scan, **_: Detection(bodies, {}, []))


def test_discs_that_were_detected_are_not_those_of_a_mask_that_is_missing(tmp_path, capsys, monkeypatch, detected):
    root = write_set(tmp_path, ("a", "b"))
    command = [root / "images", "--out", tmp_path / "out", "--shards", "1"]
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.dataset.resuming.save_scan", stop_at(1))
        assert scans(*command) == 130
    (root / "masks" / "a_t2.mha").unlink()
    assert scans(*command, "--masks", root / "masks") == 2
    assert "failed: a_t2.mha: no mask" in capsys.readouterr().err


def test_missing_mask_is_not_reported_of_where_the_detector_is_asked(tmp_path, detected):
    root = write_set(tmp_path, ("a",))
    (root / "masks" / "a_t2.mha").unlink()
    command = [root / "images", "--out", tmp_path / "out", "--strict"]
    assert scans(*command, "--masks", root / "masks") == 2
    assert scans(*command) == 0


# Bad input -----------------------------------------------------------------------------------------------------------


def other_grid(root):
    write_mha(root / "masks" / "a_t2.mha", block_spine(spacing_mm=(1.5, 1.4, 6.0), num_slices=5).mask)


def one_vertebra(root):
    voxels = np.where(np.isin(SPINE.mask.voxels, (2, 100)), SPINE.mask.voxels, 0).astype(np.uint8)
    write_mha(root / "masks" / "a_t2.mha", Scan(voxels, SPINE.mask.affine, ""))


def no_tool(root):
    voxels = np.where(SPINE.mask.voxels, 77, 0).astype(np.uint8)
    write_mha(root / "masks" / "a_t2.mha", Scan(voxels, SPINE.mask.affine, ""))


def constant(root):
    write_mha(root / "images" / "a_t2.mha", Scan(np.full_like(SPINE.scan.voxels, 7), SPINE.scan.affine, ""))


def black_bodies(root):
    marrow = np.isin(SPINE.mask.voxels, range(1, 9))
    write_mha(root / "images" / "a_t2.mha", Scan(np.where(marrow, 0, SPINE.scan.voxels), SPINE.scan.affine, ""))


def second_mask(root):
    (root / "masks" / "deep").mkdir()
    shutil.copy(root / "masks" / "a_t2.mha", root / "masks" / "deep" / "a_t2.mha")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_grid, "mask of a_t2.mha: .*voxels, but|A mask must lie on its scan's own grid"),
        (one_vertebra, "1 vertebrae from T9 down|1 usable vertebral bodies"),
        (no_tool, "with its labels 77 it fits none of spider"),
        (constant, "every voxel is 7: an empty image"),
        (black_bodies, "the median of the vertebral bodies is 0, too dark"),
        (second_mask, "could all be its mask"),
        (lambda root: (root / "masks" / "a_t2.mha").unlink(), "no mask a_t2.nii.gz or .mha among the 2"),
        (lambda root: (root / "images" / "a_t2.mha").write_bytes(b"junk"), "not a MetaImage header"),
    ],
)
def test_bad_scan_fails_with_its_reason_and_the_others_are_written(tmp_path, capsys, spoil, message):
    root = write_set(tmp_path)
    spoil(root)
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "failed: a_t2.mha" in printed.err
    assert re.search(message, printed.err)
    assert "8 discs" in printed.out
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{images}", "--masks", "{masks}", "--corners", "x"], "either --masks DIR or --corners FILE"),
        (["{images}", "--masks", "{masks}/none"], "no such folder"),
        (["{images}/none", "--masks", "{masks}"], "no such file or folder"),
        (["{masks}/../labels.csv", "--masks", "{masks}"], "No sagittal scan was found"),
        (["{images}", "--masks", "{masks}", "--lowest-level", "L9"], "--lowest-level L9: expected one of"),
        (["{images}", "--masks", "{masks}", "--labels", "none.csv"], "none.csv: no such file"),
        (
            ["{images}", "--labels", "{images}/../labels.csv"],
            "it names 7, 7 7_t2, the scans are a a_t2. Make the names",
        ),
        (["{images}", "--corners", "none.json"], "none.json: cannot be read"),
        (
            ["{images}", "{images}/../copy", "--masks", "{masks}"],
            "in several folders: a_t2 (copy, images).",
        ),
    ],
)
def test_bad_options_are_one_message_and_status_2(tmp_path, capsys, arguments, message):
    root = write_set(tmp_path, ("a",))
    shutil.copytree(root / "images", root / "copy")
    (root / "labels.csv").write_text("patient,scan,level,pfirrmann\n7,,L5-S1,2\n7,7_t2,L4-L5,2\n")
    filled = [argument.format(images=root / "images", masks=root / "masks") for argument in arguments]
    assert scans(*filled, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_one_image_under_two_patients_is_refused(tmp_path, capsys):
    root = write_set(tmp_path, tuple("abcdefghij"))
    for patient in "abcdefghij":
        shutil.copy(root / "images" / "a_t2.mha", root / "images" / f"{patient}_t2.mha.new")
        (root / "images" / f"{patient}_t2.mha.new").replace(root / "images" / f"{patient}_t2.mha")
    assert scans(root / "images", "--masks", root / "masks", "--out", tmp_path / "out") == 2
    assert "one and the same image is in the splits" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["{uid}", "{uid}_TE100"])
@pytest.mark.parametrize("given", ["masks", "corners"])
def test_part_of_a_series_is_named_by_its_own_key_or_by_the_series(tmp_path, name, given):
    """A dual echo: masks, corners and labels may be named after the T2 echo, or after the series."""
    slices = put(tmp_path / "images" / "x", SPINE.scan, "p1", "t2")
    for number, one in enumerate(slices):
        one.EchoTime = 20
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        save(one, f"{one.filename}_pd")
    name = name.format(uid=slices[0].SeriesInstanceUID)
    (tmp_path / "masks").mkdir()
    write_mha(tmp_path / "masks" / f"{name}.mha", SPINE.mask)
    options = ["--masks", tmp_path / "masks"]
    key = name.replace("_TE", "/TE")
    if given == "corners":
        bodies = {body.name: to_file(body, SPINE.mask) for body in bodies_from_spider_mask(SPINE.mask)[0]}
        (tmp_path / "corners.json").write_text(json.dumps({"scans": {key: bodies}}))
        options = ["--corners", tmp_path / "corners.json"]
    (tmp_path / "labels.csv").write_text(f"patient,scan,level,pfirrmann\np1,{key},L5-S1,4\n")
    options += ["--labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    assert scans(tmp_path / "images", *options) == 0
    data = DataSet(tmp_path / "out")
    assert len(data) == 4
    assert max(data.labels.ravel()) == 3


def test_repetition_that_is_chosen_in_an_inventory_is_read_with_the_mask_of_its_series(tmp_path, capsys):
    slices = put(tmp_path / "images" / "x", SPINE.scan, "p1", "t2", AcquisitionNumber=1)
    for number, one in enumerate(slices):
        one.AcquisitionNumber = 2
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        one.PixelData = bytes(one.PixelData[::-1])
        save(one, f"{one.filename}_again")
    (tmp_path / "masks").mkdir()
    write_mha(tmp_path / "masks" / f"{slices[0].SeriesInstanceUID}.mha", SPINE.mask)
    table = tmp_path / "inventory.csv"
    assert main(["inventory", str(tmp_path / "images"), "--out", str(table)]) in (0, 2)
    lines = table.read_text(encoding="utf-8-sig").splitlines()
    chosen = [line.replace("no,", "yes,", 1) if "/acquisition1" in line.split(",")[2] else line for line in lines]
    assert chosen != lines
    table.write_text("\n".join(chosen))
    options = ["--masks", tmp_path / "masks", "--inventory", table, "--out", tmp_path / "out"]
    scans(tmp_path / "images", *options)
    assert len(DataSet(tmp_path / "out")) == 4


def test_discs_of_an_inverted_and_padded_series_are_those_of_the_original(tmp_path):
    """MONOCHROME1, with 12 of 16 bits and padding in a margin; the padding moves no median."""
    for name in ("plain", "odd"):
        for one in put(tmp_path / name / "x", SPINE.scan, "p1", "t2"):
            values = one.pixel_array >> 4
            one.RescaleSlope = float(one.RescaleSlope) * 16
            one.BitsStored, one.HighBit = 12, 11
            if name == "odd":
                values = 4095 - values
                values[:, :2] = 7
                one.PhotometricInterpretation = "MONOCHROME1"
                one.add_new("PixelPaddingValue", "US", 7)
            one.PixelData = values.astype("<u2").tobytes()
            save(one)
    (tmp_path / "masks").mkdir()
    write_mha(tmp_path / "masks" / f"{one.SeriesInstanceUID}.mha", SPINE.mask)
    sets = []
    for name in ("plain", "odd"):
        options = ["--masks", tmp_path / "masks", "--key", tmp_path / "key", "--out", tmp_path / f"{name}-discs"]
        assert scans(tmp_path / name, *options) == 0
        sets.append(DataSet(tmp_path / f"{name}-discs"))
    plain, odd = sets
    np.testing.assert_array_equal(odd.affine, plain.affine)
    for row in range(len(plain)):
        assert np.abs(odd.volume(row)[40:150, 100:220].astype(int) - plain.volume(row)[40:150, 100:220]).max() <= 16


# Examinations of one patient -----------------------------------------------------------------------------------------


def dated(folder, scan, number, date):
    """One examination of patient p1, on a day; None for a series without a date."""
    for one in series(folder, Scan(scan.voxels + np.float32(number), scan.affine, ""), name=f"examination {number}"):
        one.SeriesDescription = "SAG T2"
        for name in ("SeriesDate", "AcquisitionDate", "StudyDate"):
            if name in one:
                del one[name]
        if date:
            one.SeriesDate = date
        save(one)
    return one.SeriesInstanceUID


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (("20240301", "20230301", "20240301"), [(2, 366), (1, 0), (2, 366)]),  # a leap year's day is between
        (("20240301", "20230301", None), [(1, None), (2, None), (3, None)]),
        (("20240301", "20230301", "20240231"), [(1, None), (2, None), (3, None)]),
    ],
)
def test_examinations_are_counted_in_the_order_of_time_and_no_date_is_kept(tmp_path, dates, expected):
    uids = [dated(tmp_path / "in" / str(n), SPINE.scan, n, date) for n, date in enumerate(dates)]
    found = examinations(find_series([tmp_path / "in"]).series)
    in_order = sorted(uids) if None in dict(expected).values() else uids  # without dates by name
    assert [tuple(found[uid]) for uid in in_order] == expected


def test_the_manifest_has_examinations_of_patients_with_several_scans_alone(tmp_path):
    write_set(tmp_path, patients=("a", "b_t2_10", "b_t2_9"), suffix="")
    assert scans(tmp_path / "images", "--masks", tmp_path / "masks", "--out", tmp_path / "out") == 0
    data = DataSet(tmp_path / "out")
    known = data.manifest["scans"]
    people = {patient: set(data.scan[data.patient == patient]) for patient in set(data.patient)}
    several = max(people.values(), key=len)
    assert {(known[scan]["examination"], known[scan]["days"]) for scan in several} == {(1, None), (2, None)}
    pseudonyms = Pseudonyms((tmp_path / "out.key").read_bytes())
    assert known[pseudonyms.scan("b_t2_9")]["examination"] == 1  # 9 is before 10
    assert not any("examination" in told for scan, told in known.items() if scan not in several)
