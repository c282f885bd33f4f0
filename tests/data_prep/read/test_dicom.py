import io
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from data_prep.read.choice import judge
from data_prep.read.contrast import weighting_in_text
from data_prep.read.dicom import read_series
from data_prep.read.dicom_files import is_dicom
from data_prep.read.dicom_headers import read_header
from data_prep.read.parts import parts_of, without_copies
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import sagittal_affine
from tests.dicom_files import enhanced, pack_as_jpeg_lossless, save, series, small_scan_voxels

OBLIQUE = sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0))


@pytest.fixture
def scan():
    return Scan(small_scan_voxels(), OBLIQUE, "scan")


def read(folder, dtype=np.float32):
    """The only series of a folder; raises the reason why it is not read."""
    files, _ = without_copies([read_header(path) for path in sorted(folder.iterdir())], "the series")
    parts, notes = parts_of([frame for file in files for frame in file.frames], "the series")
    (judged,) = (one for one in judge(parts, "the series", ["the series"] * len(parts), "any") if not one.left_out)
    if judged.failed:
        raise SpinejaxError(judged.failed)
    (part,) = (part for part in parts if len(part.frames) > 1 or len(parts) == 1)
    return read_series(part.frames, "the series", dtype, notes)


def assert_same(scan, expected, atol=0.07):
    np.testing.assert_allclose(scan.voxels, expected.voxels, atol=atol)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-5)


# What must come out the same -----------------------------------------------------------------------------------------


def test_series_comes_back_with_its_place_and_rescaled(tmp_path, scan):
    series(tmp_path / "a", scan)
    read_back, notes = read(tmp_path / "a")
    assert_same(read_back, scan)
    assert notes == []
    assert is_dicom(tmp_path / "a" / "00000")


def test_highdicom_agrees(tmp_path, scan):
    """An independent reader of the same files: same affine, same values (its slices may run the other way)."""
    import highdicom

    slices = series(tmp_path / "a", scan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = highdicom.get_volume_from_series(slices)
    ours, _ = read(tmp_path / "a")
    for index in np.array([[0, 0, 0, 1], [2, 3, 4, 1]]):
        place = volume.affine @ index
        row, column, slot = np.rint(np.linalg.solve(ours.affine, place)[:3]).astype(int)
        assert volume.array[tuple(index[:3])] == pytest.approx(ours.voxels[row, column, slot], abs=1e-2)


def test_instance_numbers_and_names_are_ignored(tmp_path, scan):
    slices = series(tmp_path / "a", scan)
    for one, number in zip(slices, (4, 1, 6, 2, 5, 3), strict=True):
        one.InstanceNumber = number
        save(one, tmp_path / "a" / f"{number}.renamed")
        (tmp_path / "a" / one.filename.rpartition("/")[2]).unlink()
    assert_same(read(tmp_path / "a")[0], scan)


def test_each_slice_has_its_own_rescaling(tmp_path, scan):
    for index, one in enumerate(series(tmp_path / "a", scan)):
        one.RescaleSlope = f"{float(one.RescaleSlope) * (1 + index):.10g}"
        save(one)
    low = scan.voxels.min()
    expected = Scan((scan.voxels - low) * (1 + np.arange(6, dtype=np.float32)) + low, scan.affine, "")
    assert_same(read(tmp_path / "a")[0], expected, atol=0.41)


@pytest.mark.parametrize("order", [range(6), range(5, -1, -1), (3, 0, 5, 1, 4, 2)])
def test_enhanced_file_equals_classic_series(tmp_path, scan, order):
    slices = series(tmp_path / "a", scan)
    (tmp_path / "b").mkdir()
    save(enhanced([slices[index] for index in order]), tmp_path / "b" / "IM0")
    assert_same(read(tmp_path / "b")[0], scan)
    assert {frame.kind.contrast.names for frame in read_header(tmp_path / "b" / "IM0").frames} == {("t2",)}


@pytest.mark.parametrize(
    "syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.DeflatedExplicitVRLittleEndian,
               uid.ExplicitVRBigEndian, uid.ImplicitVRLittleEndian],
    ids=lambda syntax: syntax.keyword,
)  # fmt: skip
def test_compressed_pixels_come_back_exactly(tmp_path, scan, syntax):
    for one in series(tmp_path / "a", scan):
        if syntax.is_compressed and not syntax.is_deflated:
            one.compress(syntax, generate_instance_uid=False)
            save(one)
        else:
            one.file_meta.TransferSyntaxUID = syntax
            if not syntax.is_little_endian:
                one.PixelData = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
            pydicom.dcmwrite(
                one.filename, one, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian
            )
    assert_same(read(tmp_path / "a")[0], scan)


@pytest.mark.parametrize("syntax", [uid.JPEGLossless, uid.JPEGLosslessSV1], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("whole", [False, True], ids=["classic", "enhanced"])
def test_jpeg_lossless_comes_back_exactly(tmp_path, scan, syntax, whole):
    """As many archives export. The packed files are made by GDCM, not by what reads them back into pixels."""
    slices = series(tmp_path / "a", scan)
    if whole:
        (tmp_path / "b").mkdir()
        save(enhanced(slices), tmp_path / "b" / "IM0")
    folder = tmp_path / ("b" if whole else "a")
    for path in folder.iterdir():
        pack_as_jpeg_lossless(path, syntax)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert_same(read(folder)[0], scan)


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit], ids=lambda syntax: syntax.keyword)
def test_jpeg_of_8_bits_is_read_as_far_as_it_goes(tmp_path, syntax):
    """Lossy: a secondary copy, but some archives have nothing else."""
    smooth = Scan(np.indices((40, 36, 6)).sum(0).astype(np.float32), OBLIQUE, "smooth")
    for one in series(tmp_path / "a", smooth):
        eight = (one.pixel_array >> 8).astype(np.uint8)
        one.BitsAllocated, one.BitsStored, one.HighBit = 8, 8, 7
        one.RescaleSlope = f"{float(one.RescaleSlope) * 256:.10g}"
        packed = io.BytesIO()
        Image.fromarray(eight).save(packed, "JPEG", quality=95)
        one.PixelData = pydicom.encaps.encapsulate([packed.getvalue()])
        one["PixelData"].VR = "OB"
        one.file_meta.TransferSyntaxUID = syntax
        save(one)
    assert_same(read(tmp_path / "a")[0], smooth, atol=2.0)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_packed_frame_that_ends_too_early_is_refused(tmp_path, scan, share):
    for one in series(tmp_path / "a", scan):
        path = Path(one.filename)
        pack_as_jpeg_lossless(path, uid.JPEGLosslessSV1)
        packed = pydicom.dcmread(path)
        (frame,) = pydicom.encaps.generate_frames(packed.PixelData, number_of_frames=1)
        packed.PixelData = pydicom.encaps.encapsulate([frame[: int(len(frame) * share)]])
        save(packed, path)
    with pytest.raises(SpinejaxError, match="ends too early: truncated"):
        read(tmp_path / "a")


def test_one_slice_is_a_scan(tmp_path, scan):
    one = Scan(scan.voxels[:, :, :1], scan.affine, "one")
    series(tmp_path / "a", one)
    assert_same(read(tmp_path / "a")[0], one)


# What is refused -----------------------------------------------------------------------------------------------------


def change(**values):
    def spoil(slices):
        for name, value in values.items():
            setattr(slices[2], name, value)
        return slices

    return spoil


def moved(step_mm):
    def spoil(slices):
        slices[2].ImagePositionPatient = list(np.array(slices[2].ImagePositionPatient, float) + step_mm)
        return slices

    return spoil


def again(one, name):
    """Another image at the same place."""
    copy = deepcopy(one)
    copy.filename = f"{one.filename}{name}"
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    copy.PixelData = bytes(reversed(one.PixelData))
    return copy


def twice(slices):
    return [*slices, again(slices[2], "copy")]


def four_dimensional(slices):
    return slices + [again(one, "b") for one in slices]


NORMAL_MM = OBLIQUE[:3, 2] / 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda slices: slices[:2] + slices[3:], r"1 slices are missing between 0000\d and 0000\d \(8.00 mm apart"),
        (lambda slices: slices[:1] + slices[3:], "2 slices are missing"),
        (twice, "a slice occurs twice.*00002"),
        (four_dimensional, "2 images at each of its 6 positions: the series is 4-D"),
        (moved(1.3 * NORMAL_MM), "unevenly spaced"),
        (moved(2.0 * OBLIQUE[:3, 0]), "shifted against one another"),
        (change(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), r"1 slices are missing between 0000\d and 0000\d"),
        (change(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "00002: ImageOrientationPatient is .*two unit vectors"),
        (change(PixelSpacing=[0.8, 0.8]), "1 slices are missing"),
        (change(PixelSpacing=[0.0, 0.8]), "00002: PixelSpacing is .*expected positive"),
        (change(PixelSpacing=[-0.8, 0.8]), "PixelSpacing is .*expected positive"),
        (change(ImagePositionPatient=None), "1 slices are missing"),
        (change(ImagePositionPatient=[1, 2]), "00002: ImagePositionPatient is .*; expected 3 finite numbers"),
        (change(RescaleSlope="1e38"), "1440 voxels are .*infinite"),
        (change(Rows=60000, Columns=60000), r"declares 1 frames of 60000×60000.*at most"),
        (change(Rows=39), "1 slices are missing"),
        (change(PixelData=b"\0" * 100), "damaged, truncated"),
    ],
)  # fmt: skip
def test_frames_that_make_no_volume_are_refused(tmp_path, scan, spoil, message):
    slices = spoil(series(tmp_path / "a", scan))
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    for one in slices:
        save(one)
    with pytest.raises(SpinejaxError, match=message):
        read(tmp_path / "a")


def test_file_cut_at_any_length_is_refused(tmp_path, scan):
    series(tmp_path / "a", scan)
    whole = (tmp_path / "a" / "00003").read_bytes()
    (tmp_path / "cut").mkdir()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut" / "x").write_bytes(whole[:length])
        with pytest.raises(SpinejaxError, match="x: "):
            read(tmp_path / "cut")


def test_deflate_bomb_is_refused_before_it_is_unpacked(tmp_path, scan, monkeypatch):
    monkeypatch.setattr("data_prep.read.dicom_files._MAX_FILE_BYTES", 1 << 20)
    one = series(tmp_path / "a", scan)[0]
    one.add_new((0x0009, 0x0010), "LO", "spinejax")
    one.add_new((0x0009, 0x1001), "OB", bytes(3 << 20))
    one.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "bomb", one, implicit_vr=False, little_endian=True)
    assert (tmp_path / "bomb").stat().st_size < 1 << 14
    with pytest.raises(SpinejaxError, match="once unpacked"):
        read_header(tmp_path / "bomb")


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless], ids=lambda syntax: syntax.keyword)
def test_packed_frame_of_another_size_is_not_decoded(tmp_path, scan, syntax):
    for one in series(tmp_path / "a", scan):
        one.compress(syntax, generate_instance_uid=False)
        one.Rows = 24
        save(one)
    with pytest.raises(SpinejaxError, match=r"packed frame is \(40, 36\) pixels, its header says \(24, 36\)"):
        read(tmp_path / "a")


def test_encoding_that_is_not_read_says_what_to_do(tmp_path, scan):
    for one in series(tmp_path / "a", scan):
        one.compress(uid.RLELossless, generate_instance_uid=False)
        one.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
        save(one)
    with pytest.raises(SpinejaxError, match=r"packed as JPEG Extended.*gdcmconv --raw"):
        read(tmp_path / "a")


def test_missing_decoder_says_how_to_get_it(tmp_path, scan, monkeypatch):
    for one in series(tmp_path / "a", scan):
        pack_as_jpeg_lossless(Path(one.filename), uid.JPEGLosslessSV1)
    monkeypatch.delitem(pydicom.pixels.get_decoder(uid.JPEGLosslessSV1)._available, "gdcm")
    with pytest.raises(SpinejaxError, match=r"packed as JPEG Lossless.*gdcm.*pip install -e '\.\[scans\]'"):
        read(tmp_path / "a")


# What a header tells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "weighting"),
    [
        ({"EchoTime": 100, "RepetitionTime": 3000}, "t2"),
        ({"EchoTime": 10, "RepetitionTime": 600, "SeriesDescription": "sag"}, "t1"),
        ({"EchoTime": 15, "RepetitionTime": 2000, "InversionTime": 860, "SeriesDescription": "sag"}, "t1"),
        ({"EchoTime": 20, "RepetitionTime": 2500, "SeriesDescription": "sag"}, "pd"),
        ({"EchoTime": 60, "RepetitionTime": 4000, "InversionTime": 160}, "stir"),
        ({"EchoTime": None, "RepetitionTime": None, "SeriesDescription": "Sag T1 TSE"}, "t1"),
        ({"EchoTime": None, "RepetitionTime": None, "SeriesDescription": "lumbar"}, None),
    ],
)
def test_weighting(tmp_path, scan, values, weighting):
    one = series(tmp_path / "a", scan)[0]
    for name, value in values.items():
        setattr(one, name, value)
    save(one)
    (frame,) = read_header(tmp_path / "a" / "00000").frames
    assert frame.kind.contrast.names == ((weighting,) if weighting else ())


@pytest.mark.parametrize(
    ("words", "weighting"),
    [
        ("10_t2", "t2"),
        ("sub-1_T1w", "t1"),
        ("t1_t2", None),
        ("pat123", None),
        ("t2_stir_sag", "stir"),
        ("t20", None),
        ("Stirling_T2", "t2"),
        ("Tirman_t2", "t2"),
        ("Pdiaz_t2", "t2"),
        ("Pdiaz", None),
        ("sag_PDw", "pd"),
        ("PD_fs", "pd"),
        ("SAG PDFS", "pd"),
    ],
)
def test_weighting_in_words(words, weighting):
    assert weighting_in_text(words) == weighting


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"Modality": "CT"}, "modality CT"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "a picture"),
        ({"ImageOrientationPatient": None}, "no position in the patient"),
        ({"ImagePositionPatient": None}, "no position in the patient"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "Secondary Capture Image Storage"),
    ],
)
def test_files_that_are_no_scan(tmp_path, scan, values, reason):
    one = series(tmp_path / "a", scan)[0]
    for name, value in values.items():
        setattr(one, name, value)
    save(one)
    assert reason in read_header(tmp_path / "a" / "00000").not_a_scan
