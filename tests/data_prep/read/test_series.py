"""Which series are found in DICOM files, and what is said of those that are not read."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from data_prep.read.found import Facts
from data_prep.read.scan import Scan
from data_prep.read.series import find_series
from data_prep.read.series_rule import one_of_each_patient
from spinejax.errors import SpinejaxError
from tests.block_spine import block_spine, sagittal_affine
from tests.dicom_files import enhanced, group, save, series, small_scan_voxels

OBLIQUE = sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0))


@pytest.fixture
def scan():
    return Scan(small_scan_voxels(), OBLIQUE, "scan")


def other(slices, prefix="x", **values):
    """Other images with these attributes beside a series' own, under the same SeriesInstanceUID."""
    slices = copy.deepcopy(slices)
    for number, one in enumerate(slices):
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        one.PixelData = (one.pixel_array // 2).tobytes()
        one.filename = f"{one.filename.rpartition('/')[0]}/{prefix}{number:05d}"
    return change(slices, **values)


def change(slices, **values):
    for one in slices:
        for name, value in values.items():
            setattr(one, name, value(one) if callable(value) else value)
        save(one)
    return slices


def assert_same(series, expected, atol=0.07):
    scan, notes = series.read()
    np.testing.assert_allclose(scan.voxels, expected.voxels, atol=atol)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-5)
    return notes


def ends(found):
    """What the keys of the scans found end with, after the SeriesInstanceUID."""
    return sorted(one.key.partition("/")[2] for one in found.series)


def told(records):
    return "\n".join(map(str, records))


# What is told of each -------------------------------------------------------------------------------------------------


def test_facts_are_told_of_what_is_read_left_out_and_failed(tmp_path, scan):
    for folder, values in (
        ("read", {}),
        ("t1", {"EchoTime": 10, "RepetitionTime": 500, "SeriesDescription": "SAG T1"}),
        ("failed", {}),
    ):
        slices = series(tmp_path / folder, scan, patient=folder)
        change(slices, **{"SeriesDescription": "SAG T2", "SeriesDate": "20260102"} | values)
    (tmp_path / "failed" / "00002").unlink()
    found = find_series([tmp_path])
    (read,) = found.series
    np.testing.assert_allclose(read.facts.spacing_mm, (0.8, 0.7, 4.0), rtol=1e-6)
    facts = Facts(plane="sagittal", contrast="t2", description="SAG T2", date="20260102", num_slices=6)
    assert replace(read.facts, spacing_mm=()) == facts
    assert [(one.facts.contrast, one.facts.description) for one in found.left_out] == [("t1", "SAG T1")]
    (failed,) = found.failed
    assert failed.facts.num_slices == 5
    assert failed.facts.plane == "sagittal"
    np.testing.assert_allclose(failed.facts.spacing_mm, (0.8, 0.7, 4.0), rtol=1e-3)


def test_each_part_has_the_description_of_its_own_images(tmp_path, scan):
    slices = change(series(tmp_path / "a", scan), SeriesDescription="SAG T2")
    other([slices[0]], "!", SeriesDescription="ADC")
    found = find_series([tmp_path])
    assert [one.facts.description for one in found.series] == ["SAG T2"]
    assert [one.facts.description for one in found.left_out] == ["ADC"]


def test_what_was_left_out_can_be_read_if_it_is_chosen(tmp_path, scan):
    change(series(tmp_path / "a", scan), EchoTime=10, RepetitionTime=500, SeriesDescription="")
    (left_out,) = find_series([tmp_path]).left_out
    assert_same(left_out.series, scan)


def test_missing_end_slice_is_noted_by_the_count(tmp_path, scan):
    series(tmp_path / "a", scan)
    (tmp_path / "a" / "00005").unlink()
    (one,) = find_series([tmp_path]).series
    read_back, notes = one.read()
    assert read_back.voxels.shape[2] == 5
    assert notes == [f"{one.name}: 5 of the 6 images that it declares. Is an end slice missing?"]


# Parts of a series ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["a", "z"])
@pytest.mark.parametrize("layout", ["classic", "enhanced"])
def test_echoes_are_parted_whichever_comes_first(tmp_path, scan, prefix, layout):
    slices = series(tmp_path / "a", scan)
    pd = other(slices, prefix if layout == "classic" else "z", EchoTime=20)
    if layout == "enhanced":
        whole = enhanced(pd + slices if prefix == "a" else slices + pd)
        del whole.SharedFunctionalGroupsSequence[0].MREchoSequence
        for number, frame in enumerate(whole.PerFrameFunctionalGroupsSequence):
            late = (number < 6) == (prefix == "z")
            frame.MREchoSequence = group(EffectiveEchoTime=100.0 if late else 20.0)
            frame.MRTimingAndRelatedParametersSequence = group(RepetitionTime=3500.0)
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()
        save(whole, tmp_path / "a" / "IM0")
    found = find_series([tmp_path])
    assert ends(found) == ["TE100"]
    assert found.series[0].alias == str(slices[0].SeriesInstanceUID)
    notes = assert_same(found.series[0], scan)
    assert "has 2 parts: 6 images /TE100, 6 images /TE20" in told(notes)
    assert "pd by its header" in told(found.left_out)
    assert ends(find_series([tmp_path], weighting="any")) == ["TE100", "TE20"]


@pytest.mark.parametrize(
    ("name", "values", "end"),
    [
        ("TemporalPositionIdentifier", ("1", "2"), "time"),
        ("AcquisitionNumber", ("1", "2"), "acquisition"),
        ("TriggerTime", ("10", "520"), "trigger"),
        (
            "ImageType",
            (["ORIGINAL", "PRIMARY", "M", "NORM"], ["ORIGINAL", "PRIMARY", "M", "ND"]),
            "original-primary-m-n",
        ),
    ],
)
def test_repetitions_are_asked_about_and_any_reads_them_apart(tmp_path, scan, name, values, end):
    """Time-resolved series, repeated ones, and pairs with and without a filter: which one is meant?"""
    slices = change(series(tmp_path / "a", scan), **{name: values[0]})
    other(slices, **{name: values[1]})
    found = find_series([tmp_path])
    assert found.series == []
    assert "show the same places, and each may be t2. Choose one in an inventory" in told(found.failed)
    assert len(found.failures) == 1
    found = find_series([tmp_path], weighting="any")
    assert len(found.series) == 2
    assert all(each.startswith(end) for each in ends(found))
    assert any(np.allclose(one.read()[0].voxels, scan.voxels, atol=0.07) for one in found.series)


@pytest.mark.parametrize(
    "values", [{"ImageType": ["DERIVED", "SECONDARY"]}, {"AcquisitionNumber": 9}, {"EchoTime": None}]
)
def test_one_image_too_many_does_not_spoil_a_series(tmp_path, scan, values):
    """At the place of a slice, and unlike all others in one respect."""
    slices = change(series(tmp_path / "a", scan), AcquisitionNumber=1)
    other([slices[2]], **values)
    found = find_series([tmp_path])
    assert_same(found.series[0], scan)
    assert "1 of another kind than the other 6 images (x00000)" in told(found.left_out)


def test_a_gap_is_not_hidden_by_acquisition_numbers(tmp_path, scan):
    """Odd and even slices are acquired apart: with a slice missing, they must not pass for two whole stacks."""
    slices = series(tmp_path / "a", scan)
    for number, one in enumerate(slices):
        change([one], AcquisitionNumber=1 + number % 2)
    assert [one.key.count("/") for one in find_series([tmp_path]).series] == [0]
    (tmp_path / "a" / "00004").unlink()
    found = find_series([tmp_path])
    assert found.series == []
    assert "1 slices are missing" in told(found.failed)


def test_upper_and_lower_stack_of_one_series_are_two_scans(tmp_path, scan):
    down = -200 * OBLIQUE[:3, 0]
    slices = series(tmp_path / "a", scan)
    other(slices, ImagePositionPatient=lambda one: [*(np.array(one.ImagePositionPatient, float) + down).round(6)])
    found = find_series([tmp_path])
    assert ends(found) == ["place1", "place2"]
    assert [one.alias for one in found.series] == ["", ""]


@pytest.mark.parametrize("twice", ["folder", "file", "new name"])
def test_copies_are_read_once(tmp_path, scan, twice):
    slices = series(tmp_path / "a", scan)
    if twice == "folder":
        shutil.copytree(tmp_path / "a", tmp_path / "a (1)")
    elif twice == "file":
        shutil.copy(tmp_path / "a" / "00002", tmp_path / "a" / "copy")
    else:
        for one in slices:
            one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
            save(one, tmp_path / "a" / f"{one.InstanceNumber}.dcm")
    (one,) = find_series([tmp_path]).series
    assert "there twice" in told(assert_same(one, scan))


def test_two_images_of_one_instance_are_refused(tmp_path, scan):
    slices = series(tmp_path / "a", scan)
    slices[2].PixelData = bytes(len(slices[2].PixelData))
    save(slices[2], tmp_path / "a" / "copy")
    found = find_series([tmp_path])
    assert found.series == []
    assert "have one SOPInstanceUID but differ" in told(found.failed)


# Images that are no scans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}, "an ADC map by its ImageType"),
        ({"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"]}, "a diffusion image"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "a reformat"),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, "a projection"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SUB"]}, "a subtraction"),
        ({"ImageType": ["DERIVED", "PRIMARY", "M", "T2 MAP"]}, "a parameter map"),
        ({"ImageType": ["DERIVED", "PRIMARY", "FAT_FRACTION"]}, "a fat fraction map"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "a mosaic"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, "a phase image"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localiser by its ImageType"),
        ({"SeriesDescription": "ep2d_diff_sag_ADC"}, "an ADC map by its description"),
        ({"SeriesDescription": "3-plane loc"}, "a localiser by its description"),
        ({"ScanningSequence": "EP"}, "an echo-planar"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "Secondary Capture Image Storage, not an MR scan"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a picture"),
    ],
)
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_derived_images_are_left_out_by_name(tmp_path, scan, values, reason, which):
    slices = series(tmp_path / "a", scan)
    if which == "all":
        change(slices, **values)
        found = find_series([tmp_path], weighting="any")
        assert found.series == []
    else:
        other([slices[3]], "!" if which == "first" else "x", **values)
        found = find_series([tmp_path])
        assert ends(found) == [""]
        assert_same(found.series[0], scan)
    assert reason in told(found.left_out)
    assert found.failed == []


@pytest.mark.parametrize("values", [{"ImageOrientationPatient": None}, {"ImagePositionPatient": None}])
def test_image_without_a_place_does_not_spoil_a_series(tmp_path, scan, values):
    slices = series(tmp_path / "a", scan)
    other([slices[3]], **values)
    found = find_series([tmp_path])
    assert_same(found.series[0], scan)
    assert "1 of 7 files: no position in the patient (x00000)" in told(found.left_out)
    shutil.rmtree(tmp_path / "a")
    slices = change(series(tmp_path / "a", scan), **values)
    assert "no position in the patient in any of its 6 files" in told(find_series([tmp_path]).failed)
    change(slices, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    found = find_series([tmp_path])
    assert "6 of 6 files: a screen save by its ImageType" in told(found.left_out)
    assert found.failed == []


AXIAL, CORONAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]


@pytest.mark.parametrize(("counts", "left"), [((3, 1, 1), 0), ((6, 5, 0), 0), ((6, 6, 6), 0), ((6, 1, 0), 1)])
def test_localisers_of_any_size_are_known_by_their_planes(tmp_path, scan, counts, left):
    """And a single image of another plane beside a stack is only left out itself."""
    slices = series(tmp_path / "a", scan)
    for one in slices[counts[0] :]:
        (tmp_path / "a" / one.filename.rpartition("/")[2]).unlink()
    for plane, axes, count, step in (("cor", CORONAL, counts[1], [0, 6, 0]), ("ax", AXIAL, counts[2], [0, 0, 6])):
        for number in range(count):
            place = [*(number * np.array(step, float))]
            other([slices[number]], f"{plane}{number}", ImageOrientationPatient=axes, ImagePositionPatient=place)
    found = find_series([tmp_path], weighting="any")
    assert len(found.series) == left
    assert ("a localiser in " in told(found.left_out)) == (not left)
    assert ("1 of another kind than the other 6 images (cor000000)" in told(found.left_out)) == bool(left)


def test_slices_far_apart_are_a_localiser(tmp_path, scan):
    series(tmp_path / "a", Scan(scan.voxels, sagittal_affine((0.8, 0.7, 15.0)), "scan"))
    assert "a localiser: its 6 slices are 15 mm apart" in told(find_series([tmp_path]).left_out)


# Contrasts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "contrast"),
    [
        ({"EchoTime": 900, "RepetitionTime": 8000}, "myelogram"),
        ({"EchoTime": 210, "RepetitionTime": 1500, "MRAcquisitionType": "3D"}, "t2"),
        ({"EchoTime": 45, "RepetitionTime": 4000, "SeriesDescription": "t2_tirm_sag"}, "stir"),
        ({"EchoTime": 70, "ScanningSequence": ["SE", "IR"], "SeriesDescription": "STIR"}, "stir"),
        ({"EchoTime": 70, "ScanningSequence": ["SE", "IR"]}, "stir or t2-flair"),
        ({"EchoTime": 70, "SequenceName": "*tir2d1_9"}, "stir or t2-flair"),
        ({"EchoTime": 110, "RepetitionTime": 9000, "InversionTime": 2500}, "t2-flair"),
        ({"EchoTime": 12, "RepetitionTime": 2200, "InversionTime": 860}, "t1"),
        ({"EchoTime": 12, "RepetitionTime": 2000, "SeriesDescription": "SAG T1 +C"}, "t1"),
        ({"EchoTime": 12, "RepetitionTime": 2000}, "pd or t1"),
        ({"EchoTime": 20, "RepetitionTime": 3500}, "pd"),
        ({"EchoTime": 10, "RepetitionTime": 600, "ContrastBolusAgent": "Gd"}, "t1 with contrast agent"),
        ({"EchoTime": 18, "RepetitionTime": 600, "ScanningSequence": "GR"}, "t2*"),
        ({"EchoTime": 18, "ScanningSequence": "GR", "SeriesDescription": "SAG T2 MEDIC"}, "t2*"),
        ({"EchoTime": 2, "RepetitionTime": 5, "ScanningSequence": "GR", "SequenceVariant": "SS"}, "steady-state"),
        ({"EchoTime": 100, "ScanOptions": "FS"}, "t2 fat-saturated"),
        ({"EchoTime": 100, "SeriesDescription": "t2_tse_fs_sag"}, "t2 fat-saturated"),
        ({"EchoTime": 100, "ImageType": ["DERIVED", "PRIMARY", "DIXON", "WATER"]}, "water"),
        ({"EchoTime": 100, "ImageType": ["ORIGINAL", "PRIMARY", "F", "F"]}, "fat"),
        ({"EchoTime": 100, "SeriesDescription": "t2_tse_dixon_sag_opp"}, "opposed-phase"),
        ({"EchoTime": 100, "SeriesDescription": "SAG T2 Dixon (fat)"}, "fat"),
        ({"EchoTime": 60, "SeriesDescription": "series 4", "ProtocolName": "STIR SAG"}, "stir"),
        ({"EchoTime": 100, "SeriesDescription": "t2_tse_dixon_sag_in"}, "t2 in phase"),
    ],
)
def test_contrasts_are_told_apart(tmp_path, scan, values, contrast):
    change(series(tmp_path / "a", scan), **{"SeriesDescription": "sag"} | values)
    found = find_series([tmp_path])
    assert [one.facts.contrast for one in [*found.series, *found.left_out]] == [contrast]
    assert len(found.series) == (contrast.partition(" ")[0] == "t2")
    if contrast.partition(" ")[2] and found.series:
        assert contrast in told(found.series[0].read()[1])
    assert len(find_series([tmp_path], weighting="any").series) == 1


@pytest.mark.parametrize(
    ("values", "clash"),
    [
        ({"EchoTime": 100, "SeriesDescription": "SAG T1"}, "t2 by its header (TE 100 ms, TR 3500 ms), but t1 by"),
        ({"EchoTime": 10, "RepetitionTime": 500, "SeriesDescription": "SAG T2"}, "t1 by its header"),
        ({"EchoTime": 90, "SeriesDescription": "SAG PD"}, "t2 by its header"),
    ],
)
def test_header_and_description_that_contradict_each_other_are_asked_about(tmp_path, scan, values, clash):
    change(series(tmp_path / "a", scan), **values)
    found = find_series([tmp_path])
    assert found.series == []
    assert clash in told(found.failed)  # status 2: this may be all that there is of a patient
    assert "--weighting any" in told(found.failed)
    assert len(find_series([tmp_path], weighting="any").series) == 1


def test_secondary_images_are_read_with_a_note(tmp_path, scan):
    change(series(tmp_path / "a", scan), ImageType=["DERIVED", "SECONDARY", "OTHER"])
    assert "SECONDARY by their ImageType" in told(assert_same(find_series([tmp_path]).series[0], scan))


def test_unknown_contrast_is_read_and_noted(tmp_path, scan):
    change(series(tmp_path / "a", scan), EchoTime=None, SeriesDescription="lumbar")
    assert "its header does not tell its contrast" in told(assert_same(find_series([tmp_path]).series[0], scan))


# Positions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [lambda mm: f"{mm:.1f}", lambda mm: f"{mm:.4g}"], ids=["0.1 mm", "4 digits"])
def test_rounded_positions_make_a_line_and_a_gap_in_it_is_found(tmp_path, scan, rounded):
    scan = Scan(scan.voxels, sagittal_affine((0.8, 0.7, 3.37), (7.0, -5.0)), "scan")
    slices = series(tmp_path / "a", scan)
    change(slices, ImagePositionPatient=lambda one: [rounded(float(mm)) for mm in one.ImagePositionPatient])
    read_back, _ = find_series([tmp_path]).series[0].read()
    corners = np.array([[0, 0, 0, 1], [39, 35, 5, 1]])
    assert abs((read_back.affine - scan.affine) @ corners.T).max() < 0.08
    (tmp_path / "a" / "00003").unlink()
    assert "1 slices are missing between" in told(find_series([tmp_path]).failed)


# Pixels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 12])
@pytest.mark.parametrize("signed", [0, 1])
def test_monochrome1_is_inverted(tmp_path, scan, bits, signed):
    slices = series(tmp_path / "a", scan)
    for one in slices:
        values = one.pixel_array.astype(int) >> (16 - bits)
        one.RescaleSlope = float(one.RescaleSlope) * (1 << (16 - bits))
        one.RescaleIntercept = float(one.RescaleIntercept) + signed * float(one.RescaleSlope) * (1 << (bits - 1))
        values -= signed << (bits - 1)
        one.BitsStored, one.HighBit, one.PixelRepresentation = bits, bits - 1, signed
        one.PhotometricInterpretation = "MONOCHROME1"
        one.PixelData = ((-1 if signed else (1 << bits) - 1) - values).astype("<i2" if signed else "<u2").tobytes()
        save(one)
    assert_same(find_series([tmp_path]).series[0], scan, atol=3)


@pytest.mark.parametrize("limit", [None, 65535])
@pytest.mark.parametrize("syntax", ["explicit", "implicit"])
def test_padding_becomes_background(tmp_path, scan, limit, syntax):
    slices = series(tmp_path / "a", scan)
    for one in slices:
        values = one.pixel_array.copy() // 2
        values[:8] = 65000
        one.PixelData = values.tobytes()
        one.add_new("PixelPaddingValue", "US", 65000)
        if limit:
            one.add_new("PixelPaddingRangeLimit", "US", limit)
        one.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + ".1" * (syntax == "explicit")
        pydicom.dcmwrite(one.filename, one, implicit_vr=syntax == "implicit", little_endian=True)
    read_back, _ = find_series([tmp_path]).series[0].read()
    np.testing.assert_allclose(read_back.voxels[8:], scan.voxels[8:] / 2, atol=0.14)
    assert (read_back.voxels[:8] == read_back.voxels[8:].min()).all()


def test_margin_without_data_becomes_background(tmp_path, scan):
    for one in series(tmp_path / "a", scan):
        values = (one.pixel_array // 64).astype("<i2")
        values[:, :3] = -32768
        one.PixelRepresentation, one.PixelData = 1, values.tobytes()
        save(one)
    read_back, notes = find_series([tmp_path]).series[0].read()
    assert (read_back.voxels[:, :3] == read_back.voxels[:, 3:].min()).all()
    assert "8% of its voxels hold a value far from all others" in told(notes)


def test_overlays_are_ignored(tmp_path, scan):
    """A plane of group 60xx, and one in the unused high bits."""
    for one in series(tmp_path / "a", scan):
        values = one.pixel_array >> 4
        one.RescaleSlope = float(one.RescaleSlope) * 16
        one.BitsStored, one.HighBit = 12, 11
        values[5:9, 5:9] |= 1 << 12
        one.PixelData = values.tobytes()
        for element, vr, value in ((0x10, "US", 40), (0x11, "US", 36), (0x40, "CS", "G"), (0x102, "US", 12)):
            one.add_new((0x6000, element), vr, value)
        save(one)
    assert_same(find_series([tmp_path]).series[0], scan, atol=3)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_are_read(tmp_path, scan, implicit):
    for one in series(tmp_path / "a", scan):
        bare = pydicom.Dataset(one)
        pydicom.dcmwrite(one.filename, bare, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert_same(find_series([tmp_path]).series[0], scan)


@pytest.mark.parametrize("charset", [b"ISO_IR 999", b"ISO 2022 IR 87", b"\\\\ISO 2022 IR 149", b"GB18030", b"latin1"])
def test_odd_character_sets_stop_nothing(tmp_path, scan, charset):
    for one in series(tmp_path / "a", scan):
        one.SpecificCharacterSet, one.PatientName = "ISO_IR 100", "M\xfcller^" + "x" * 22
        save(one)
        content = Path(one.filename).read_bytes()
        content = content.replace(b"CS\x0a\x00ISO_IR 100", b"CS\x12\x00" + charset.ljust(18)).replace(
            b"^xxx", b"^\xff\x1b$"
        )
        Path(one.filename).write_bytes(content)
    assert_same(find_series([tmp_path]).series[0], scan)


def test_names_that_are_no_utf_8(tmp_path, scan):
    folder = tmp_path / b"M\xfcller".decode(errors="surrogateescape")
    series(folder, scan)
    (folder / "00000").rename(folder / b"\xff\xfe".decode(errors="surrogateescape"))
    (one,) = find_series([tmp_path], patients_by="folder").series
    assert_same(one, scan)
    (one.name + one.patient).encode()


def test_burned_in_text_is_refused_unless_allowed(tmp_path, scan):
    change(series(tmp_path / "a", scan), BurnedInAnnotation="YES")
    assert "--burned-in" in told(find_series([tmp_path]).failed)
    assert len(find_series([tmp_path], burned_in=True).series) == 1


# Enhanced files and other ways to store a series ----------------------------------------------------------------------


def write_enhanced(folder, slices, edit=lambda whole: None):
    """One enhanced file of a classic series' slices, in place of them."""
    whole = enhanced(slices)
    edit(whole)
    shutil.rmtree(folder)
    folder.mkdir()
    save(whole, folder / "IM0")


def test_frame_without_its_place_is_left_out_of_an_enhanced_file(tmp_path, scan):
    slices = series(tmp_path / "a", scan)

    def drop(whole):
        del whole.PerFrameFunctionalGroupsSequence[5].PlanePositionSequence

    write_enhanced(tmp_path / "a", slices, drop)
    (one,) = find_series([tmp_path]).series
    read_back, notes = one.read()
    assert read_back.voxels.shape[2] == 5
    assert "1 of the 6 frames of IM0 have no position in the patient" in told(notes)


@pytest.mark.parametrize("by", ["StackID", "DimensionIndexValues", "TemporalPositionIndex"])
def test_stacks_and_times_of_an_enhanced_file_are_parted(tmp_path, scan, by):
    slices = series(tmp_path / "a", scan)
    again = other(slices)

    def mark(whole):
        for number, frame in enumerate(whole.PerFrameFunctionalGroupsSequence):
            value = {"StackID": f"{1 + number // 6}", "TemporalPositionIndex": 1 + number // 6}
            value["DimensionIndexValues"] = [1 + number // 6, 1 + number % 6]
            frame.FrameContentSequence = group(**{by: value[by]})

    write_enhanced(tmp_path / "a", [*slices, *again], mark)
    assert "show the same places" in told(find_series([tmp_path]).failed)
    found = find_series([tmp_path], weighting="any")
    ending = {"StackID": "stack", "DimensionIndexValues": "dimension1", "TemporalPositionIndex": "time"}[by]
    assert ends(found) == [f"{ending}{number}" for number in ("1", "2")]
    assert_same(found.series[0], scan)


def test_enhanced_localiser_in_three_planes_is_no_scan(tmp_path, scan):
    """https://github.com/rordenlab/dcm2niix/issues/894: the frames of three planes were stacked into one volume."""
    slices = series(tmp_path / "a", scan)

    def turn(whole):
        del whole.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        for number, frame in enumerate(whole.PerFrameFunctionalGroupsSequence):
            axes = (slices[0].ImageOrientationPatient, CORONAL, AXIAL)[number // 2]
            frame.PlaneOrientationSequence = group(ImageOrientationPatient=axes)

    write_enhanced(tmp_path / "a", slices, turn)
    found = find_series([tmp_path], weighting="any")
    assert found.series == []
    assert "6 of 6 images: a localiser in 3 planes (axial, coronal, sagittal)" in told(found.left_out)


def test_concatenated_enhanced_files_are_one_scan(tmp_path, scan):
    """A large enhanced image is stored as several (PS3.3, C.7.6.16.2.2.4)."""
    slices = series(tmp_path / "a", scan)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    for number, part in enumerate((slices[:2], slices[2:5], slices[5:]), start=1):
        whole = enhanced(part)
        whole.ConcatenationUID, whole.InConcatenationNumber = "1.2.3", number
        whole.SOPInstanceUID = whole.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        save(whole, tmp_path / "a" / f"IM{number}")
    assert_same(find_series([tmp_path]).series[0], scan)


def test_pairs_of_means_under_one_uid_are_asked_about(tmp_path, scan):
    """https://github.com/rordenlab/dcm2niix/issues/300: two computed images of one series were stacked together."""
    slices = change(series(tmp_path / "a", scan), ImageType=["DERIVED", "PRIMARY", "M", "RMS"])
    other(slices, ImageType=["DERIVED", "PRIMARY", "M", "RMS", "RMS"])
    assert "its parts /derived-primary-m-rms, /derived-primary-m-rms-rms show the same places" in told(
        find_series([tmp_path]).failed
    )


def test_dynamic_series_is_not_stacked(tmp_path, scan):
    """https://github.com/ivmartel/dwv/issues/1490: repetitions at one place, told apart by TriggerTime alone."""
    slices = series(tmp_path / "a", scan)
    for number in range(3):
        other(slices, f"t{number}", TriggerTime=str(1000 * number), ImageType=["ORIGINAL", "SECONDARY", "M_FFE", "M"])
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
    for one in slices:
        Path(one.filename).unlink()
    found = find_series([tmp_path])
    assert found.series == []
    assert len(found.failed) == 3


def test_philips_private_scale_does_not_matter(tmp_path, scan):
    """Only Rescale Slope and Intercept are applied: a real-world value differs from it by one factor for all voxels."""
    slices = series(tmp_path / "a", scan)
    for one in slices:
        one.add_new(0x20050010, "LO", "Philips MR Imaging DD 001")
        one.add_new(0x2005100E, "FL", 0.0125)
        item = pydicom.Dataset()
        item.RealWorldValueSlope, item.RealWorldValueIntercept = 80.0, 0.0
        one.RealWorldValueMappingSequence = pydicom.Sequence([item])
        save(one)
    assert_same(find_series([tmp_path]).series[0], scan)


def test_wrong_number_of_images_in_the_header_is_only_noted(tmp_path, scan):
    """GE counts the images of all echoes or phases there."""
    change(series(tmp_path / "a", scan), ImagesInAcquisition=60)
    assert "6 of the 60 images that it declares" in told(assert_same(find_series([tmp_path]).series[0], scan))
    change([pydicom.dcmread(path) for path in (tmp_path / "a").iterdir()], ImagesInAcquisition=3)
    assert assert_same(find_series([tmp_path]).series[0], scan) == []


def test_sheared_stack_is_refused(tmp_path, scan):
    """Slices that are shifted along themselves from one to the next, as with a tilted gantry."""
    slices = series(tmp_path / "a", scan)
    for number, one in enumerate(slices):
        place = np.array(one.ImagePositionPatient, float) + number * 1.5 * OBLIQUE[:3, 0] / 0.8
        change([one], ImagePositionPatient=[*place.round(6)])
    found = find_series([tmp_path])
    assert "not at right angles" in told(found.failed)


def test_bits_beyond_those_declared_are_refused_unless_an_overlay_owns_them(tmp_path, scan):
    for one in series(tmp_path / "a", scan):
        one.BitsStored, one.HighBit = 12, 11  # while 16 are used
        save(one)
    (one,) = find_series([tmp_path]).series
    with pytest.raises(SpinejaxError, match="values above the 12 bits that BitsStored declares"):
        one.read()


# One of several ------------------------------------------------------------------------------------------------------


def test_series_rule_chooses_one_series_of_each_patient(tmp_path, scan):
    thick = Scan(scan.voxels, sagittal_affine((0.8, 0.7, 5.0)), "scan")
    change(series(tmp_path / "a", scan, name="a"), SeriesDate="20240101", SeriesTime="090000")
    change(series(tmp_path / "b", scan, name="b"), SeriesDate="20240101", SeriesTime="100000")
    change(series(tmp_path / "c", thick, name="c"), SeriesDate="20230101", SeriesTime="110000")
    change(series(tmp_path / "d", scan, name="d", patient="p2"), SeriesDate="20220101")
    assert len(one_of_each_patient(find_series([tmp_path]), "all").series) == 4
    for rule, chosen in (("newest", "b"), ("thickest", "c")):
        found = one_of_each_patient(find_series([tmp_path]), rule)
        assert {one.files[0].parent.name for one in found.series} == {chosen, "d"}
        assert told(found.left_out).count(f"--series-rule {rule}: {chosen}, series") == 2
    for path in (tmp_path / "a").iterdir():
        one = pydicom.dcmread(path)
        del one.SeriesDate
        save(one)
    assert "not every series of its patient has a date" in told(
        one_of_each_patient(find_series([tmp_path]), "newest").failed
    )


def test_one_series_identifier_in_two_studies_is_refused(tmp_path, scan):
    """By an anonymiser that writes one SeriesInstanceUID for all: they may be two people."""
    for number, name in enumerate(("Doe^John", "Roe^Jane")):
        own = Scan(scan.voxels, scan.affine + np.array([[0, 0, 0, 300.0 * number], *3 * [[0] * 4]]), "scan")
        uids = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": f"1.2.{number}"}
        change(series(tmp_path / name, own, patient=name), PatientID="", PatientName=name, **uids)
    found = find_series([tmp_path])
    assert found.series == []
    assert "files of 2 studies (1.2.0, 1.2.1), expected one" in told(found.failed)


def test_a_scan_to_which_an_axial_stack_was_added_is_read(tmp_path):
    """By an archive, or an anonymiser, that gives all stacks of a study one SeriesInstanceUID."""
    scan = block_spine(num_slices=12, spacing_mm=(1.5, 1.5, 4.0)).scan
    sagittal = series(tmp_path / "a", scan)
    axial = series(tmp_path / "b", scan, patient="axial")
    change(
        axial,
        PatientID=sagittal[0].PatientID,
        SeriesInstanceUID=sagittal[0].SeriesInstanceUID,
        StudyInstanceUID=sagittal[0].StudyInstanceUID,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=lambda one: [-80, -80, float(one.ImagePositionPatient[0])],
    )
    found = find_series([tmp_path])
    assert_same(found.series[0], scan)
    assert "an axial series" in told(found.left_out)


@pytest.mark.parametrize("tag", ["SliceThickness", "SpacingBetweenSlices"])
def test_a_decimal_comma_where_the_positions_tell_is_no_fault(tmp_path, scan, tag):
    with pydicom.config.disable_value_validation():
        for path in sorted((tmp_path / "a").iterdir()) if series(tmp_path / "a", scan) else ():
            one = pydicom.dcmread(path)
            one.add_new(tag, "LO", "4,0")
            one[tag].VR = "DS"
            one.save_as(path, enforce_file_format=True)
    assert_same(find_series([tmp_path]).series[0], scan)
