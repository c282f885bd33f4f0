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
        (set_fields(scl_slope=3e38), "NaN or infinite"),
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_must_be_finite(tmp_path, scan, value):
    scan.voxels[1, 2, 3] = value
    with pytest.raises(SpinejaxError, match="1 voxels are NaN or infinite"):
        read_nifti(save(tmp_path / "scan.nii", scan.voxels), np.float32)


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
