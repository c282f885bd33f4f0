import gzip
import itertools

import nibabel
import numpy as np
import pytest

from data_prep.read.nifti import read_nifti, write_nifti
from data_prep.read.scan import Scan, reorient
from spinejax.errors import SpinejaxError
from tests.block_spine import sagittal_affine

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture
def scan():
    voxels = np.random.default_rng(0).uniform(0, 900, (6, 5, 4)).astype(np.float32)
    return Scan(voxels, sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0)), "scan")


def save(path, voxels, affine=None, *, version=1, change=None):
    """A NIfTI file as nibabel writes it; `change(header)` comes last."""
    kind = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    image = kind(voxels, LPS_FROM_RAS @ (sagittal_affine((1, 1, 4)) if affine is None else affine))
    data = bytearray(image.to_bytes())
    if change:
        header = type(image.header)(bytes(data[: image.header.sizeof_hdr]), check=False)
        change(header)
        data[: len(header.binaryblock)] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data)) if path.suffix == ".gz" else bytes(data))
    return path


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
def test_any_order_and_direction_of_axes_ends_as_the_same_scan(tmp_path, scan, name, version):
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turn = np.eye(4)[:, [*order, 3]] @ np.diag([*flips, 1])
            turn[:3, 3] = [(scan.voxels.shape[axis] - 1) * (turn[axis, :3].sum() < 0) for axis in range(3)]
            voxels = scan.voxels.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
            read = read_nifti(save(tmp_path / name, voxels, scan.affine @ turn, version=version), np.float32)
            np.testing.assert_array_equal(read.voxels, scan.voxels)
            np.testing.assert_allclose(read.affine, scan.affine, atol=1e-4)


def test_writing_and_reading_is_exact_and_the_same_bytes(tmp_path, scan):
    write_nifti(tmp_path / "a.nii.gz", scan)
    write_nifti(tmp_path / "b.nii.gz", scan)
    read = read_nifti(tmp_path / "a.nii.gz", np.float32)
    np.testing.assert_array_equal(read.voxels, scan.voxels)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    with pytest.raises(SpinejaxError, match=r"ends in \.nii\.gz"):
        write_nifti(tmp_path / "a.mha", scan)


def test_scale_is_applied_and_trailing_axes_of_one_are_dropped(tmp_path, scan):
    def scale(header):
        header["scl_slope"], header["scl_inter"] = 2.0, 10.0

    stored = np.arange(120, dtype=np.int16).reshape(6, 5, 4, 1)
    read = read_nifti(save(tmp_path / "scan.nii", stored, scan.affine, change=scale), np.float32)
    np.testing.assert_allclose(read.voxels, 2.0 * stored[..., 0] + 10.0)


def test_big_endian(tmp_path, scan):
    image = nibabel.Nifti1Image(scan.voxels, LPS_FROM_RAS @ scan.affine, nibabel.Nifti1Header(endianness=">"))
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.nii", np.float32).voxels, scan.voxels)


def set_fields(**values):
    def change(header):
        for name, value in values.items():
            header[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_fields(dim=[4, 6, 5, 2, 2, 1, 1, 1]), r"its size is \(6, 5, 2, 2\); expected one 3-D volume"),
        (set_fields(dim=[2, 30, 4, 1, 1, 1, 1, 1]), "expected one 3-D volume"),
        (set_fields(dim=[3, 6, -5, 4, 1, 1, 1, 1]), "expected one 3-D volume"),
        (set_fields(dim=[3, 32000, 32000, 400, 1, 1, 1, 1]), "declares .32000, 32000, 400. voxels, expected at most"),
        (set_fields(dim=[3, 600, 500, 400, 1, 1, 1, 1]), "its header declares 480000352: truncated"),
        (set_fields(sform_code=0, qform_code=0), "gives no orientation in the patient"),
        (set_fields(datatype=128, bitpix=24), "expected plain numbers"),
        (set_fields(datatype=77), "not a readable NIfTI"),
        (set_fields(vox_offset=1e9), "said to begin at byte"),
        (set_fields(vox_offset=np.nan), "said to begin at byte"),
        (set_fields(srow_x=[0, 0, 0, 0]), "zero spacing|right angles"),
        (set_fields(srow_x=[np.nan, 0, 0, 0]), "not finite"),
        (set_fields(scl_slope=3e38), "voxels are infinite"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_false_header_is_refused(tmp_path, scan, change, message, name):
    path = save(tmp_path / name, scan.voxels, scan.affine, change=change)
    with pytest.raises(SpinejaxError, match=message) as error:
        read_nifti(path, np.float32)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_file_cut_at_any_length_is_refused(tmp_path, scan, name):
    whole = save(tmp_path / name, scan.voxels).read_bytes()
    for length in range(0, len(whole), 13):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(SpinejaxError, match=name):
            read_nifti(tmp_path / name, np.float32)


def test_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path, scan):
    path = save(tmp_path / "scan.nii.gz", scan.voxels)
    bomb = gzip.compress(gzip.decompress(path.read_bytes()) + bytes(300 << 20), compresslevel=1)
    path.write_bytes(bomb)
    with pytest.raises(SpinejaxError, match="unpacks to more than the 832 bytes"):
        read_nifti(path, np.float32)


def test_flipped_bit_in_a_packed_file_is_found(tmp_path, scan):
    path = save(tmp_path / "scan.nii.gz", scan.voxels)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(SpinejaxError, match="truncated or damaged"):
        read_nifti(path, np.float32)


# Where the voxels begin ----------------------------------------------------------------------------------------------


def begin_at(path, scan, stated, *, before=b"\0\0\0\0", after=b""):
    """A file of version 1 whose voxels come right behind the header and `before`; its header says that they are at
    `stated`."""
    content = save(path, scan.voxels, scan.affine, change=set_fields(vox_offset=stated)).read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    data = content[:348] + before + content[352:] + after
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


EXTENSION = b"\1\0\0\0" + (32).to_bytes(4, "little") + (6).to_bytes(4, "little") + bytes(24)  # of 32 bytes


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize(
    ("stated", "before"),
    [
        (352, b"\0\0\0\0"),
        (0, b"\0\0\0\0"),  # left at 0
        (348, b"\0\0\0\0"),  # inside the header's last four bytes
        (348, b""),  # without those four bytes
        (400, b"\0\0\0\0"),  # inside the voxels
        (384, EXTENSION),
        (0, EXTENSION),
        (352, EXTENSION),  # inside the extension
        (352, b"\1\0\0\0"),  # NIFTI-Reader-JS #35: an extension is announced, but there is none
    ],
)
def test_voxels_are_found_where_the_file_leaves_no_doubt(tmp_path, scan, name, stated, before):
    read = read_nifti(begin_at(tmp_path / name, scan, stated, before=before), np.float32)
    np.testing.assert_array_equal(read.voxels, scan.voxels)


def test_voxels_that_could_begin_anywhere_are_refused(tmp_path, scan):
    path = begin_at(tmp_path / "scan.nii", scan, 0, after=bytes(100))
    with pytest.raises(SpinejaxError, match=r"scan\.nii: its voxels are said to begin at byte 0 \(vox_offset\)"):
        read_nifti(path, np.float32)
    path = begin_at(tmp_path / "scan.nii", scan, 352, before=b"")  # mriviewer #249, or the last four bytes are missing
    with pytest.raises(SpinejaxError, match="holds 828 bytes, its header declares 832: truncated"):
        read_nifti(path, np.float32)
    path = begin_at(tmp_path / "scan.nii", scan, 352, after=bytes(100))  # nothing contradicts the header
    np.testing.assert_array_equal(read_nifti(path, np.float32).voxels, scan.voxels)


# Orientation and units -----------------------------------------------------------------------------------------------


def both_forms(path, voxels, sform, qform):
    """A file with both forms, given in LPS."""
    image = nibabel.Nifti1Image(voxels, LPS_FROM_RAS @ sform)
    image.set_qform(LPS_FROM_RAS @ qform, code=1)
    path.write_bytes(image.to_bytes())
    return path


def test_forms_that_agree_are_read_as_the_sform(tmp_path, scan):
    other = scan.affine.copy()
    other[:3, 3] += 0.2  # within half a voxel
    read = read_nifti(both_forms(tmp_path / "scan.nii", scan.voxels, scan.affine, other), np.float32)
    np.testing.assert_allclose(read.affine, scan.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.diag([-1.0, 1, 1, 1]), "mirror image"),  # MRtrix3 #94: opposite left–right order
        (np.diag([1.0, 1, 1, 1.0]) + np.eye(4, k=3) * 5, r"5\.0 mm apart"),
        (np.diag([1.0, 2, 1, 1]), "mm apart"),
    ],
)
def test_forms_that_disagree_are_refused_with_both_named(tmp_path, scan, change, message):
    path = both_forms(tmp_path / "scan.nii", scan.voxels, scan.affine, change @ scan.affine)
    with pytest.raises(SpinejaxError, match=rf"scan\.nii: its sform and its qform .*{message}.*sform is used"):
        read_nifti(path, np.float32)


@pytest.mark.parametrize("longer", [0.0, 3e-7, 1e-6, 1e-4])
def test_a_quaternion_that_is_longer_than_1_by_rounding_is_a_turn_by_180_degrees(tmp_path, scan, longer):
    """spinalcordtoolbox #3703."""

    def change(header):
        header.set_qform(np.diag([-4.0, -0.7, 0.8, 1.0]), code=1)
        header["quatern_d"] = np.sqrt(1 + longer)
        header["sform_code"] = 0

    stored = scan.voxels.transpose(2, 1, 0)[:, :, ::-1]
    read = read_nifti(save(tmp_path / "scan.nii", stored, change=change), np.float32)
    np.testing.assert_array_equal(read.voxels, scan.voxels)
    np.testing.assert_allclose(read.affine[:3, :3], [[0, 0, 4], [0, 0.7, 0], [-0.8, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("longer", [0.01, 3.0, np.nan])
def test_a_quaternion_that_is_none_is_refused(tmp_path, scan, longer):
    change = set_fields(qform_code=1, quatern_b=1 + longer)
    with pytest.raises(SpinejaxError, match="quaternion of its qform has a length of"):
        read_nifti(save(tmp_path / "scan.nii", scan.voxels, scan.affine, change=change), np.float32)


def in_unit(code, factor):
    """The header's spacings and offsets in another unit: `factor` of it make a mm."""

    def change(header):
        for row in ("srow_x", "srow_y", "srow_z"):
            header[row] = header[row] * factor
        header["xyzt_units"] = code

    return change


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (2, 1), (10, 1), (1, 1e-3), (3, 1e3), (8 + 3, 1e3)])
def test_units_are_applied(tmp_path, scan, code, factor):
    """Metre 1, mm 2, micron 3; 8 is the time's second."""
    path = save(tmp_path / "scan.nii", scan.voxels, scan.affine, change=in_unit(code, factor))
    np.testing.assert_allclose(read_nifti(path, np.float32).affine, scan.affine, atol=1e-4)


@pytest.mark.parametrize(("code", "unit"), [(1, "metre"), (3, "micron")])
def test_a_unit_that_cannot_be_is_refused(tmp_path, scan, code, unit):
    path = save(tmp_path / "scan.nii", scan.voxels, scan.affine, change=in_unit(code, 1))
    with pytest.raises(SpinejaxError, match=rf"its unit is the {unit} by its header .* Correct the unit"):
        read_nifti(path, np.float32)


# Pairs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("scan.hdr", "scan.img"), ("SCAN.HDR", "SCAN.IMG"), ("a.b.hdr.gz", "a.b.img.gz")])
def test_a_pair_is_one_scan_by_either_name(tmp_path, scan, names):
    image = nibabel.Nifti1Pair(scan.voxels, LPS_FROM_RAS @ scan.affine)
    nibabel.save(image, tmp_path / "made.img")
    for made, name in zip(("made.hdr", "made.img"), names, strict=True):
        content = (tmp_path / made).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in names:
        read = read_nifti(tmp_path / name, np.float32)
        np.testing.assert_array_equal(read.voxels, scan.voxels)
        np.testing.assert_allclose(read.affine, scan.affine, atol=1e-4)
    (tmp_path / names[1]).unlink()
    with pytest.raises(SpinejaxError, match=rf"{names[1]}: no such file\. It belongs to {names[0]}"):
        read_nifti(tmp_path / names[0], np.float32)


def test_analyze_is_refused_because_it_has_no_orientation(tmp_path, scan):
    nibabel.save(nibabel.AnalyzeImage(scan.voxels, np.eye(4)), tmp_path / "scan.img")
    with pytest.raises(SpinejaxError, match=r"scan\.hdr: a header of Analyze, which gives no orientation"):
        read_nifti(tmp_path / "scan.img", np.float32)


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.999, 1.00001, 1 / 3, 0.0039215686])
def test_a_mask_with_a_scale_is_whole_within_rounding(tmp_path, slope):
    """Labels are stored as multiples of the slope, so 1 may be read as 0.999."""
    labels = np.arange(8).reshape(2, 2, 2)
    stored = np.rint(labels / slope).astype(np.int16)
    path = save(tmp_path / "mask.nii", stored, change=set_fields(scl_slope=slope, scl_inter=0))
    assert np.array_equal(read_nifti(path, np.uint8).voxels, reorient(labels, sagittal_affine((1, 1, 4)), "").voxels)


def test_a_mask_with_values_between_labels_is_refused(tmp_path):
    path = save(tmp_path / "mask.nii", np.arange(8, dtype=np.int16).reshape(2, 2, 2), change=set_fields(scl_slope=0.98))
    with pytest.raises(SpinejaxError, match="whole numbers"):
        read_nifti(path, np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float64])
def test_labels_come_back_exactly(tmp_path, dtype):
    labels = np.arange(120).reshape(6, 5, 4).astype(dtype)
    read = read_nifti(save(tmp_path / "mask.nii.gz", labels), np.uint8)
    assert np.array_equal(read.voxels, labels)
    with pytest.raises(SpinejaxError, match="whole numbers that fit uint8"):
        read_nifti(save(tmp_path / "mask.nii.gz", labels.astype(np.float32) + 200), np.uint8)


def test_missing_file(tmp_path):
    with pytest.raises(SpinejaxError, match="no such file"):
        read_nifti(tmp_path / "none.nii", np.float32)


def test_nibabel_agrees_on_the_place_of_a_voxel(tmp_path):
    """RAS of the file against our LPS, computed from the header alone."""
    voxels = np.zeros((7, 30, 40), np.int16)
    voxels[5, 20, 33] = 1
    affine = np.array([[3.0, 0, 0, -10], [0, 0.9, 0, 20], [0, 0, 0.8, -30], [0, 0, 0, 1]])
    nibabel.Nifti1Image(voxels, affine).to_filename(tmp_path / "scan.nii.gz")
    scan = read_nifti(tmp_path / "scan.nii.gz", np.float32)
    place = scan.affine @ [*np.argwhere(scan.voxels)[0], 1]
    np.testing.assert_allclose(place[:3], [-(3 * 5 - 10), -(0.9 * 20 + 20), 0.8 * 33 - 30], atol=1e-5)
    assert reorient(voxels, LPS_FROM_RAS @ affine, "").voxels.shape == scan.voxels.shape
