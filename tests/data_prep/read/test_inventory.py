"""The inventory: what it lists, what the user's edits of it change, and headers that are read once."""

import csv
import json
import re

import numpy as np
import pydicom
import pytest

from data_prep.__main__ import main
from data_prep.commands.reading import Reading
from data_prep.read import header_cache
from data_prep.read.header_cache import HeaderCache, header_of
from data_prep.read.inventory import COLUMNS, choose
from data_prep.read.metaimage import write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import Scan
from data_prep.read.series import doubt_again, find_series
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine
from tests.dicom_files import save, series

SPINE = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)


@pytest.fixture
def export(tmp_path):
    """Two patients: T2 and T1 series, a damaged file, and masks of all."""
    root = tmp_path / "export"
    (tmp_path / "masks").mkdir()
    for number, (patient, name) in enumerate((("anna", "t2"), ("anna", "t1"), ("bert", "t2"))):
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        for one in series(root / patient / name, scan, patient=patient, name=name):
            one.SeriesDescription, one.EchoTime = f"{name} tse sag", 100 if name == "t2" else 10
            one.RepetitionTime = 3000 if name == "t2" else 500
            save(one)
        write_mha(tmp_path / "masks" / f"{one.SeriesInstanceUID}.mha", SPINE.mask)
    (root / "anna" / "damaged").write_bytes(bytes(128) + b"DICM" + b"junk" * 9)
    return root


def inventory(export, *options):
    out = export.parent / "inventory.csv"
    return main(["inventory", str(export), "--out", str(out), *map(str, options)])


def read(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def edit(path, change, delimiter=",", encoding="utf-8"):
    rows = read(path)
    for row in rows:
        change(row)
    with open(path, "w", encoding=encoding, newline="") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def scans(export, *options):
    root = export.parent
    command = ["scans", str(export), "--masks", str(root / "masks"), "--out", str(root / "out"), "--overwrite"]
    return main([*command, "--inventory", str(root / "inventory.csv"), *map(str, options)])


def test_every_series_is_listed_and_why_it_is_not_chosen(export, capsys):
    assert inventory(export) == 0
    assert "4 series, 2 chosen, 1 left out, 1 failed" in capsys.readouterr().out
    rows = read(export.parent / "inventory.csv")
    assert [row["chosen"] for row in rows if "t2" in row["description"]] == ["yes", "yes"]
    (t1,) = [row for row in rows if "t1" in row["description"]]
    assert (t1["chosen"], t1["patient"], t1["plane"], t1["contrast"]) == ("no", "anna", "sagittal", "t1")
    assert (t1["slices"], t1["files"], t1["spacing_mm"]) == ("5", "5", "1.5 x 1.5 x 6")
    assert "t2 was asked for" in t1["reason"]
    (damaged,) = [row for row in rows if row["file"] == "damaged"]
    assert damaged["chosen"] == "no"
    assert "truncated" in damaged["reason"]
    for name in ("inventory.csv", "inventory.headers.json"):
        assert (export.parent / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("ending", [".mha", ".nii.gz"])
def test_volume_files_are_described_by_their_headers(tmp_path, ending):
    write = write_mha if ending == ".mha" else write_nifti
    axial = np.array([[0, 0.7, 0, 0], [0.8, 0, 0, 0], [0, 0, -4, 0], [0, 0, 0, 1]])
    (tmp_path / "export").mkdir()
    write(tmp_path / "export" / f"a_t2{ending}", SPINE.scan)
    write(tmp_path / "export" / f"b_t2{ending}", Scan(SPINE.scan.voxels, axial, ""))
    (tmp_path / "export" / f"c_t2{ending}").write_bytes(b"no scan")
    write(tmp_path / "export" / f"d_t1{ending}", SPINE.scan)
    assert inventory(tmp_path / "export") == 0
    first, second, third, fourth = read(tmp_path / "inventory.csv")
    assert (first["chosen"], first["plane"], first["slices"]) == ("yes", "sagittal", "5")
    assert first["spacing_mm"] == "1.5 x 1.5 x 6"
    assert (second["chosen"], second["plane"], second["slices"]) == ("no", "axial", "5")
    assert "axial" in second["reason"]
    assert (third["chosen"], third["plane"]) == ("yes", "")  # its voxels are not looked at
    assert (fourth["chosen"], fourth["plane"], fourth["contrast"]) == ("no", "sagittal", "t1")


def test_an_edited_inventory_is_not_replaced_unasked(export, capsys):
    assert inventory(export) == 0
    assert inventory(export) == 2
    assert "may have been edited" in capsys.readouterr().err
    assert inventory(export, "--overwrite") == 0


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig")])
def test_the_users_choice_and_patients_are_taken(export, delimiter, encoding):
    def only_annas_t1_and_bert_is_anna(row):
        row["chosen"] = "no" if row["patient"] != "bert" and "t1" not in row["description"] else "YES"
        row["patient"] = "Müller"

    inventory(export)
    edit(export.parent / "inventory.csv", only_annas_t1_and_bert_is_anna, delimiter, encoding)
    assert scans(export) == 2  # the damaged file is still one
    data = DataSet(export.parent / "out")
    assert len(set(data.patient)) == 1
    assert len(set(data.scan)) == 2


def test_an_inventory_that_is_not_edited_changes_nothing(export, capsys):
    inventory(export)
    main(["scans", str(export), "--masks", str(export.parent / "masks"), "--out", str(export.parent / "plain")])
    assert scans(export, "--key", export.parent / "plain.key") == 2
    for path in (export.parent / "plain").iterdir():
        assert (export.parent / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_chosen_series_that_is_gone_or_unreadable_is_refused_by_name(export, capsys):
    inventory(export)
    edit(export.parent / "inventory.csv", lambda row: row.update(chosen="yes" if row["file"] != "x" else "no"))
    for path in (export / "bert" / "t2").iterdir():
        path.unlink()
    capsys.readouterr()
    assert scans(export) == 2
    said = capsys.readouterr().err
    assert re.search(r"line \d: \S+: is not there any more", said)
    assert re.search(r"line \d: damaged: cannot be read", said)
    assert not (export.parent / "out" / "manifest.json").exists()


def test_faults_of_an_inventory_are_listed(export, capsys):
    inventory(export)
    edit(export.parent / "inventory.csv", lambda row: row.update(chosen="perhaps" if row["patient"] else "no"))
    assert scans(export) == 2
    assert capsys.readouterr().err.count("expected yes or no") == 3
    edit(export.parent / "inventory.csv", lambda row: row.update(chosen="yes" if row["key"] else "no", patient=""))
    assert scans(export) == 2
    assert capsys.readouterr().err.count("has no patient") == 3


def test_new_and_changed_series_are_noted(export, capsys):
    inventory(export)
    carla = series(export / "carla" / "t2", SPINE.scan, patient="carla")
    write_mha(export.parent / "masks" / f"{carla[0].SeriesInstanceUID}.mha", SPINE.mask)
    first = sorted((export / "bert" / "t2").iterdir())[0]
    one = pydicom.dcmread(first)
    one.PatientComments = "touched"
    save(one, first)
    capsys.readouterr()
    assert scans(export) == 2
    said = capsys.readouterr().err
    assert re.search(r"note: 1 series are not in .*inventory.csv, and left out: t2, series", said)
    assert re.search(rf"note: .*{first.name} changed after .*inventory.csv was written", said)
    assert len(set(DataSet(export.parent / "out").patient)) == 2


def test_a_series_that_lost_a_file_is_noted(export, capsys):
    inventory(export)
    sorted((export / "bert" / "t2").iterdir())[0].unlink()
    capsys.readouterr()
    scans(export)
    assert re.search(r"has 4 files, and had 5 when .*inventory.csv was written", capsys.readouterr().err)


def test_zeros_that_a_spreadsheet_drops_make_no_new_patient(tmp_path):
    """https://github.com/incf-nidash/PyNIDM/pull/84"""
    root = tmp_path / "export"
    for number in (7, 8):
        write_mha_of(root / f"000{number}_t2.mha", number)
        write_mha_of(tmp_path / "masks" / f"000{number}_t2.mha", number, SPINE.mask)
    inventory(root)
    edit(tmp_path / "inventory.csv", lambda row: row.update(patient=row["patient"].lstrip("0")))
    assert scans(root) == 0
    again = tmp_path / "again"
    command = ["scans", str(root), "--masks", str(tmp_path / "masks"), "--out", str(again)]
    assert main([*command, "--key", str(tmp_path / "out.key")]) == 0
    assert sorted(DataSet(again).patient) == sorted(DataSet(tmp_path / "out").patient)


@pytest.mark.parametrize("cell", ["1.23457E+17", "1,23457E+17", "123456789012346000"])
def test_two_long_numbers_that_a_spreadsheet_rounds_are_not_one_patient(export, capsys, cell):
    """https://github.com/DFE-Digital/register-trainee-teachers/pull/3229: ids of 17 digits, as Excel saves them."""
    for patient, number in (("anna", "123456789012345678"), ("bert", "123456789012345999")):
        for path in (export / patient).glob("*/*"):
            one = pydicom.dcmread(path)
            one.PatientID = number
            save(one, path)
    inventory(export)
    assert scans(export) == 2  # the damaged file; both patients are there
    assert len(set(DataSet(export.parent / "out").patient)) == 2
    edit(export.parent / "inventory.csv", lambda row: row.update(patient=cell if row["patient"] else ""), ";")
    assert scans(export) == 2
    assert capsys.readouterr().err.count("which a spreadsheet made of 1234567890123") == 2


def write_mha_of(path, number, scan=SPINE.scan):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mha(path, scan if scan is SPINE.mask else Scan(scan.voxels + np.float32(number), scan.affine, ""))


def test_cells_are_no_formulas(export):
    for path in (export / "bert" / "t2").iterdir():
        one = pydicom.dcmread(path)
        one.SeriesDescription, one.PatientID = "=HYPERLINK(1)", "-1"
        save(one, path)
    inventory(export)
    (row,) = [row for row in read(export.parent / "inventory.csv") if "HYPERLINK" in row["description"]]
    assert (row["description"][0], row["patient"]) == ("'", "'-1")
    assert scans(export) == 2
    assert len(set(DataSet(export.parent / "out").patient)) == 2


@pytest.mark.parametrize("name", ["M\udcfcller", "two\nlines", "esc\x1b[2J"])
def test_names_that_are_not_utf_8_or_have_control_characters_come_back(tmp_path, capsys, name):
    root = tmp_path / "export"
    write_mha_of(root / f"{name}_t2.mha", 1)
    write_mha_of(tmp_path / "masks" / f"{name}_t2.mha", 1, SPINE.mask)
    (root / f"{name}.dcm").write_bytes(bytes(128) + b"DICM" + b"junk" * 9)
    log = tmp_path / "log.json"
    assert inventory(root, "--html", tmp_path / "page.html") == 0
    assert len(read(tmp_path / "inventory.csv")) == 2
    assert not {"\n", "\x1b"} & set("".join("".join(row.values()) for row in read(tmp_path / "inventory.csv")))
    assert scans(root, "--log", log) == 2
    assert len(DataSet(tmp_path / "out")) == 4
    assert json.loads(log.read_text())["failed"][0]["files"][0].encode()  # no lone surrogate


# Headers that are kept -----------------------------------------------------------------------------------------------


def found_with(export, cache):
    return find_series([export], headers=cache.read)


def test_headers_are_read_once(export, monkeypatch):
    inventory(export)
    monkeypatch.setattr(header_cache, "read_header", lambda path: pytest.fail(f"{path} was read again"))
    (export / "anna" / "damaged").unlink()  # what could not be read is tried again
    kept = HeaderCache(export.parent / "inventory.headers.json")
    found = found_with(export, kept)
    monkeypatch.undo()
    for ours, again in zip(found.series, find_series([export]).series, strict=True):
        assert (ours.key, ours.files, ours.facts, ours.evidence) == (
            again.key,
            again.files,
            again.facts,
            again.evidence,
        )
        np.testing.assert_array_equal(ours.read()[0].voxels, again.read()[0].voxels)
        np.testing.assert_array_equal(ours.read()[0].affine, again.read()[0].affine)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_damaged_headers_are_ignored(export, damage):
    inventory(export)
    path = export.parent / "inventory.headers.json"
    content = bytearray(path.read_bytes())
    place = content.index(b"spacing_mm")
    content[place + 40] ^= 1  # a digit of a spacing, perhaps
    path.write_bytes(content if damage is None else damage)
    assert HeaderCache(path).changed([export]) == []
    assert len(found_with(export, HeaderCache(path)).series) == 2


def test_a_file_that_changed_is_read_again(export):
    inventory(export)
    path = sorted((export / "bert" / "t2").iterdir())[0]
    one = pydicom.dcmread(path)
    one.PatientID = "berta"
    save(one, path)
    assert any(
        "2 patients" in one.reason
        for one in found_with(export, HeaderCache(export.parent / "inventory.headers.json")).failed
    )


def test_a_header_that_cannot_be_read_comes_back_from_a_worker(export):
    import pickle

    error = header_of(export / "anna" / "damaged")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.series) == (str(error), error.series)


def test_headers_by_workers_are_the_same(export, monkeypatch, capsys):
    monkeypatch.setattr("data_prep.sources.search._FEW", 1)
    inventory(export)
    alone = (export.parent / "inventory.csv").read_bytes()
    (export.parent / "inventory.headers.json").unlink()
    inventory(export, "--overwrite", "--workers", "2")
    assert (export.parent / "inventory.csv").read_bytes() == alone
    assert "16 of 16 files" in capsys.readouterr().err


# Doubts about who the patient is -------------------------------------------------------------------------------------


@pytest.fixture
def doubtful(tmp_path):
    """Two PatientIDs that each have two names and two dates of birth."""
    for number, (patient, name, birth) in enumerate(
        [("A", "Ann", "1950"), ("A", "Bob", "1960"), ("B", "Cid", "1970"), ("B", "Dora", "1980")]
    ):
        scan = Scan(SPINE.scan.voxels + np.float32(number), SPINE.scan.affine, "")
        for image in series(tmp_path / "export" / name, scan, patient=patient, name=f"t2 {name}"):
            image.PatientName, image.PatientBirthDate = name, f"{birth}0101"
            image.StudyInstanceUID = f"1.2.{number}"
            save(image)
    return tmp_path / "export"


def found_by(inventory, by="auto"):
    reading = Reading(paths=[inventory.parent / "export"], patients_by=by)
    found = reading.search(HeaderCache(None), num_workers=1, everyone=True)
    doubt_again(found, choose(found, inventory, lambda files: []), reading.paths, reading.patients_by)
    return found


def test_a_name_settles_the_doubts_about_its_own_series_alone(doubtful):
    def bob(row):
        row["patient"] = "A2" if row["folder"].endswith("Bob") else row["patient"]

    assert inventory(doubtful) == 0
    table = doubtful.parent / "inventory.csv"
    assert [line.partition(":")[0] for line in found_by(table).contradictions] == ["PatientID 'A'", "PatientID 'B'"]
    edit(table, bob)
    found = found_by(table)
    assert [line.partition(":")[0] for line in found.contradictions] == ["PatientID 'B'"]
    assert sorted(one.patient for one in found.series) == ["A", "A2", "B", "B"]


def test_leaving_out_a_series_settles_the_doubts_that_it_gave(doubtful):
    def without_two(row):
        row["chosen"] = "no" if row["folder"].endswith(("Bob", "Dora")) else "yes"

    assert inventory(doubtful) == 0
    edit(doubtful.parent / "inventory.csv", without_two)
    assert found_by(doubtful.parent / "inventory.csv").contradictions == []


def test_patients_that_are_joined_are_noted(doubtful):
    assert inventory(doubtful) == 0
    edit(doubtful.parent / "inventory.csv", lambda row: row.update(patient="P"))
    found = found_by(doubtful.parent / "inventory.csv")
    assert "'A', 'B' are one patient, 'P', by the inventory." in found.notes
    assert found.contradictions == []


@pytest.mark.parametrize(("given", "cell"), [("1.10", "1.1"), ("1.0", "1"), ("2e3", "2000")])
def test_a_decimal_that_a_spreadsheet_shortened_is_refused(tmp_path, given, cell):
    series(tmp_path / "export" / "a", SPINE.scan, patient=given)
    assert inventory(tmp_path / "export") == 0
    edit(tmp_path / "inventory.csv", lambda row: row.update(patient=cell))
    with pytest.raises(SpinejaxError, match=f"{cell}, which a spreadsheet made of {given}"):
        found_by(tmp_path / "inventory.csv")


@pytest.mark.parametrize("by", ["auto", "folder:1", "study", "name"])
def test_patients_may_all_be_named(doubtful, by):
    assert inventory(doubtful, "--patients-by", by) == 0
    edit(doubtful.parent / "inventory.csv", lambda row: row.update(patient=f"P of {row['key']}"))
    found = found_by(doubtful.parent / "inventory.csv", by)
    assert found.contradictions == []
    assert len({one.patient for one in found.series}) == 4
