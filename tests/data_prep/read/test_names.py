"""Names as archives and file systems of other kinds leave them: read, matched, and never able to forge a message."""

import json
import os
import unicodedata

import pytest

from data_prep.__main__ import main
from data_prep.anatomy.vertebrae import bodies_from_spider_mask
from data_prep.read.metaimage import read_mha, write_mha
from data_prep.read.nifti import write_nifti
from spinejax.data.dataset import DataSet, verify
from spinejax.errors import printable
from tests.block_spine import block_spine
from tests.data_prep.sources.test_scan_files import to_file

SPINE = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
DECOMPOSED = unicodedata.normalize("NFD", "Müller")
LATIN_1 = os.fsdecode("Müller".encode("latin-1"))


def write(path, scan):
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_mha if path.suffix == ".mha" else write_nifti)(path, scan)


def scans(root, *options):
    command = ["scans", str(root / "images"), "--masks", str(root / "masks"), "--key", str(root / "key")]
    return main([*command, "--out", str(root / "out"), *map(str, options)])


@pytest.mark.parametrize("ending", [".mha", ".nii.gz"])
@pytest.mark.parametrize(
    ("scan", "mask"), [(LATIN_1, LATIN_1), (DECOMPOSED, "Müller"), ("Müller", DECOMPOSED), (LATIN_1, DECOMPOSED)]
)
def test_scan_mask_and_labels_match_however_their_names_are_encoded(tmp_path, capsys, scan, mask, ending):
    """https://github.com/llmsresearch/paperbanana/issues/234: a zip unpacked on macOS has decomposed names."""
    write(tmp_path / "images" / f"{scan}_t2{ending}", SPINE.scan)
    write(tmp_path / "masks" / f"{mask}_t2{ending}", SPINE.mask)
    (tmp_path / "labels.csv").write_text("patient,scan,level,pfirrmann\nMüller,Müller_t2,L5-S1,3\n", encoding="utf-8")
    assert scans(tmp_path, "--labels", tmp_path / "labels.csv") == 0
    assert "no such scan" not in capsys.readouterr().err
    data = DataSet(tmp_path / "out")
    assert data.labels[data.level == "L5-S1"].tolist() == [[2]]
    assert verify(tmp_path / "out") == []


def test_a_name_that_is_not_utf_8_is_shown_and_the_next_scan_is_read(tmp_path, capsys):
    write(tmp_path / "images" / f"{LATIN_1}_t2.mha", SPINE.scan)
    (tmp_path / "images" / f"{LATIN_1}2_t2.nii").write_bytes(b"no scan")
    (tmp_path / "images" / f"{LATIN_1}_t1.mha").write_bytes(b"")
    (tmp_path / "images" / f"{LATIN_1}.txt").touch()
    write(tmp_path / "masks" / f"{LATIN_1}_t2.mha", SPINE.mask)
    assert scans(tmp_path) == 2
    captured = capsys.readouterr()
    assert "1 of 2 scans failed" in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("ller") >= 3


def test_both_forms_of_a_name_are_one_patient(tmp_path):
    for name in (f"{DECOMPOSED}_t2", "Müller_t2w"):
        write(tmp_path / "images" / f"{name}.mha", SPINE.scan)
        write(tmp_path / "masks" / f"{name}.mha", SPINE.mask)
    assert scans(tmp_path) == 0
    assert len(set(DataSet(tmp_path / "out").patient)) == 1


def test_corners_match_a_decomposed_name(tmp_path):
    write(tmp_path / "images" / f"{DECOMPOSED}_t2.mha", SPINE.scan)
    bodies, _ = bodies_from_spider_mask(SPINE.mask)
    corners = {"scans": {"Müller_t2": {body.name: to_file(body, SPINE.mask) for body in bodies}}}
    (tmp_path / "corners.json").write_text(json.dumps(corners))
    command = ["scans", str(tmp_path / "images"), "--corners", str(tmp_path / "corners.json")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0


def test_metaimage_in_folders_that_are_not_utf_8(tmp_path):
    """SimpleITK aborts the process if it is given such a name."""
    path = tmp_path / LATIN_1 / "scan.mha"
    write(path, SPINE.scan)
    assert (read_mha(path, "float32").voxels == SPINE.scan.voxels).all()


@pytest.mark.parametrize("name", ["p1\nfailed: p2", "p1\r\x1b[2Jp2", "p1\u202egnp.2t"])
def test_a_name_forges_no_line_of_the_output(tmp_path, capsys, name):
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "good_t2.mha", SPINE.scan)
    write(tmp_path / "masks" / "good_t2.mha", SPINE.mask)
    (tmp_path / "images" / f"{name}_t2.mha").write_bytes(b"no scan")
    (tmp_path / "images" / f"{name}_t1.mha").write_bytes(b"no scan")
    assert scans(tmp_path) == 2
    said = capsys.readouterr().err
    assert sum(line.startswith("failed: ") for line in said.splitlines()) == 1
    assert not {"\r", "\x1b", "\u202e"} & set(said)


def test_our_own_line_breaks_remain():
    assert printable("a.csv: 2 faults\n  line 3\n  line\t4\n") == "a.csv: 2 faults\n  line 3\n  line\\t4\\n"
