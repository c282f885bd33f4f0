"""The table at the end of a run, and its log."""

import json

import numpy as np
import pytest
from rich.console import Console

from data_prep.__main__ import main
from data_prep.dataset.build import Outcome
from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.read.found import Found
from data_prep.read.metaimage import write_mha
from data_prep.read.scan import Scan
from data_prep.sources.summary import Item, summarised
from data_prep.sources.ungraded import ungraded_discs
from spinejax.tasks import PAPER_TASKS
from tests.data_prep.sources.test_scan_files import SPINE, write_set
from tests.dicom_files import save, series

AXIAL = np.array([[0, 0.7, 0, 0], [0.7, 0, 0, 0], [0, 0, -4, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("name", "reason", "kind"),
    [
        ("a_t2.mha", "a_t2.mha: truncated: copy it again.", "truncated"),
        (
            "/x/IM1",
            "/x/IM1: damaged, truncated or not a DICOM image (7 bytes).",
            "damaged, truncated or not a DICOM image",
        ),
        ("s", "an axial series, 88° off the sagittal plane", "an axial series, … off the sagittal plane"),
        ("s", "t1 by its header, t2 was asked for (TE 9 ms)", "t1 by its header, t2 was asked for"),
        ("s", "3 of 5 files: modality CT (IM1, IM2)", "modality CT"),
        (
            "b_t2",
            "no mask b_t2.nii.gz or .mha among the 3 in --masks /m. Name",
            "no mask … or .mha among the … in --masks …",
        ),
    ],
)
def test_reasons_of_one_kind_are_one(name, reason, kind):
    assert Item(name, reason).kind == kind


def scans(root, *options):
    return main(["scans", str(root / "images"), "--masks", str(root / "masks"), "--out", str(root / "out"), *options])


def spoil(root):
    """A good scan; two without a mask, a damaged one, an axial volume, two T1, a text."""
    write_set(root, patients=("a", "b", "c", "d", "e"))
    for name in ("b", "c"):
        (root / "masks" / f"{name}_t2.mha").unlink()
    (root / "images" / "d_t2.mha").write_bytes(b"no scan")
    write_mha(root / "images" / "e_t2.mha", Scan(SPINE.scan.voxels, AXIAL, ""))
    for number in (1, 2):
        for one in series(root / "images" / f"t1-{number}", SPINE.scan, name=f"t1-{number}"):
            one.EchoTime, one.RepetitionTime = 9, 500
            save(one)
    (root / "images" / "readme.txt").touch()


def test_a_run_ends_with_a_table_of_kinds(tmp_path, capsys):
    spoil(tmp_path)
    assert scans(tmp_path) == 2
    table = capsys.readouterr().err.splitlines()[-6:]
    assert table[0].split() == ["read", "1", "scans"]
    assert {line.split()[0] for line in table[1:4]} == {"left"}
    assert "left out       2  t1 by its header, t2 was asked for" in table[1]
    assert any("1  files that are not scans" in line for line in table[2:4])
    assert any("is that of an axial series" in line for line in table[2:4]), table
    assert "failed         2  no mask … or .mha among the … in --masks …" in table[4]
    assert "failed         1  not a MetaImage header" in table[5]


def test_the_log_names_every_file_and_is_private(tmp_path, capsys):
    spoil(tmp_path)
    log = tmp_path / "logs" / "run.json"
    assert scans(tmp_path, "--log", str(log)) == 2
    assert log.stat().st_mode & 0o777 == 0o600
    content = json.loads(log.read_text())
    assert content["read"] == ["a_t2.mha"]
    assert {one["name"] for one in content["failed"]} == {"b_t2.mha", "c_t2.mha", "d_t2.mha"}
    assert sorted(len(one["files"]) for one in content["left_out"]) == [1, 2, 5, 5]
    assert all(one["kind"] and one["reason"] for one in content["left_out"] + content["failed"])


def test_the_log_is_never_inside_the_data_set(tmp_path, capsys):
    write_set(tmp_path)
    assert scans(tmp_path, "--log", str(tmp_path / "out" / "log.json")) == 2
    assert "lies inside the data set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_log_replaces_nothing_but_a_log_and_is_refused_before_the_work(tmp_path, capsys):
    write_set(tmp_path)
    key = tmp_path / "out.key"
    assert scans(tmp_path, "--log", str(key)) == 2  # the key has just been made
    assert "holds something else than a log" in capsys.readouterr().err
    assert len(key.read_bytes()) == 32
    (tmp_path / "file").write_text("no folder")
    for log in (tmp_path, tmp_path / "file" / "log.json"):
        assert scans(tmp_path, "--log", str(log)) == 2
        assert f"--log {log}: cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    log = str(tmp_path / "log.json")
    assert scans(tmp_path, "--log", log) == scans(tmp_path, "--log", log, "--overwrite") == 0


def test_a_run_without_a_disc_has_its_table_and_log(tmp_path, capsys):
    write_set(tmp_path)
    for mask in (tmp_path / "masks").iterdir():
        mask.write_bytes(b"damaged")
    log = tmp_path / "log.json"
    assert scans(tmp_path, "--log", str(log)) == 2
    content = json.loads(log.read_text())
    assert content["read"] == []
    assert len(content["failed"]) == sum(1 for _ in (tmp_path / "masks").iterdir())
    assert "read           0  scans" in capsys.readouterr().err


def test_a_level_that_is_left_out_is_in_the_log():
    job = Job("a.mha", "p", "s", "train", {}, lambda: None)
    notes = ["left out: a.mha, L3-L4: its corners span 80 mm", "left out: a.mha: its levels are doubtful", "b"]
    summary = summarised([job], Found(), Outcome(notes=notes))
    assert [one.reason for one in summary.left_out] == ["a.mha: its levels are doubtful"]
    assert summary.notes == ["left out: a.mha, L3-L4: its corners span 80 mm", "b"]


def test_a_run_of_phantoms_ends_with_the_table_too(tmp_path, capsys):
    assert main(["phantom", "--patients", "1", "--out", str(tmp_path / "out"), "--log", str(tmp_path / "log")]) == 0
    assert capsys.readouterr().err.splitlines()[-1].split() == ["read", "1", "scans"]
    assert json.loads((tmp_path / "log").read_text())["read"] == ["p00000"]


def test_raw_scans_that_are_graded_end_with_the_table_too(tmp_path):
    spoil(tmp_path)
    (tmp_path / "out").mkdir()
    notes = ungraded_discs(
        [tmp_path / "images"],
        tmp_path / "out",
        tasks=PAPER_TASKS,
        masks=tmp_path / "masks",
        pseudonyms=Pseudonyms(bytes(32)),
        console=Console(quiet=True),
    )
    assert "read 1 scans" in notes
    assert notes[-2:] == ["failed 2 no mask … or .mha among the … in --masks …", "failed 1 not a MetaImage header"]
