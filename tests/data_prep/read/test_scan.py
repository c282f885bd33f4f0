import itertools
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

from data_prep.read.metaimage import read_mha, write_mha
from data_prep.read.scan import Scan, reorient, require_same_grid
from spinejax.errors import SpinejaxError
from tests.block_spine import sagittal_affine

HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 0 0 -1 0 1 0 1 0 0
Offset = 0 0 0
ElementSpacing = 1 1 4
DimSize = 6 5 4
ElementType = MET_UCHAR
ElementDataFile = LOCAL
"""


@pytest.fixture
def scan():
    voxels = np.random.default_rng(0).uniform(0, 900, (6, 5, 4)).astype(np.float32)
    return Scan(voxels, sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0)), "scan")


def turned(scan, order, flips):
    """The same image with its axes permuted and flipped, every voxel in its place in the patient."""
    turn = np.eye(4)[:, [*order, 3]]
    for axis, flip in enumerate(flips):
        if flip:
            turn[:, 3] += turn[:, axis] * (scan.voxels.shape[order[axis]] - 1)
            turn[:, axis] *= -1
    voxels = scan.voxels.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return Scan(voxels, scan.affine @ turn, scan.name)


def write(path, header=HEADER, data=bytes(range(120))):
    path.write_bytes(header.encode() + data)
    return path


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_and_direction_of_axes_ends_as_the_same_scan(tmp_path, scan, order):
    for flips in itertools.product((False, True), repeat=3):
        other = turned(scan, order, flips)
        write_mha(tmp_path / "other.mha", other)
        for read in (reorient(other.voxels, other.affine, "other"), read_mha(tmp_path / "other.mha", np.float32)):
            np.testing.assert_array_equal(read.voxels, scan.voxels)
            np.testing.assert_allclose(read.affine, scan.affine, atol=1e-9)


def test_standard_orientation_is_superior_anterior_right_first():
    scan = reorient(np.zeros((2, 3, 4), np.float32), sagittal_affine((1, 1, 4)), "scan")
    to_patient = scan.affine[:3, :3] @ np.eye(3)
    assert to_patient[2, 0] < 0  # rows run down
    assert to_patient[1, 1] > 0  # columns run to the back
    assert to_patient[0, 2] > 0  # slices run to the left
    np.testing.assert_allclose(scan.spacing_mm, (1, 1, 4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_round_trip_keeps_every_voxel(tmp_path, dtype):
    voxels = np.arange(60, dtype=dtype).reshape(5, 4, 3)
    write_mha(tmp_path / "scan.mha", Scan(voxels, sagittal_affine((0.8, 0.7, 4.0)), "scan"))
    read = read_mha(tmp_path / "scan.mha", dtype)
    assert read.voxels.dtype == dtype
    np.testing.assert_array_equal(read.voxels, voxels)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.mha"]


def test_hand_written_file_is_read_as_the_format_says(tmp_path):
    read = read_mha(write(tmp_path / "scan.mha"), np.float32)
    row, column, index = np.mgrid[:6, :5, :4]
    np.testing.assert_array_equal(read.voxels, row + 6 * column + 30 * index)
    np.testing.assert_array_equal(read.affine, [[0, 0, 4, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("= LOCAL", "= /etc/hostname"), "/etc/hostname.*ElementDataFile = LOCAL"),
        (("= LOCAL", "= LIST"), "LIST"),
        (("ElementDataFile = LOCAL", "ElementDataFile : /etc/hostname"), "not a MetaImage header"),
        (("ElementDataFile = LOCAL\n", ""), "not a MetaImage header"),
        (("DimSize = 6 5 4", "DimSize = 6 5 4\nDimSize = 1 1 1"), "not a MetaImage header"),
        (("DimSize = 6 5 4", "DimSize = 60000 60000 60000"), "at most 134217728 voxels"),
        (("DimSize = 6 5 4", "DimSize = 600 500 400"), "declares 120000000 bytes.*stores 120"),
        (("DimSize = 6 5 4", "DimSize = 6 5 5"), "declares 150 bytes.*truncated"),
        (("DimSize = 6 5 4", "DimSize = 6 5 3"), "holds 120 bytes"),
        (("DimSize = 6 5 4", "DimSize = 30 4"), "expected one 3-D volume"),
        (("DimSize = 6 5 4", "DimSize = 6 5 x"), "DimSize is '6 5 x'"),
        (("DimSize = 6 5 4", "DimSize = 6 5 inf"), "DimSize is '6 5 inf'; expected whole numbers"),
        (("DimSize = 6 5 4", "DimSize = 6 5 nan"), "DimSize is '6 5 nan'; expected whole numbers"),
        (("DimSize = 6 5 4", "DimSize = 6 5 3.7"), "DimSize is '6 5 3.7'; expected whole numbers"),
        (("DimSize = 6 5 4", "DimSize = -6 5 -4"), "expected positive"),
        (("ElementSpacing = 1 1 4", "ElementSpacing = 1 0 4"), "expected positive"),
        (("ElementSpacing = 1 1 4", "ElementSpacing = 1 nan 4"), "expected positive"),
        (("MET_UCHAR", "MET_UCHAR_ARRAY"), "ElementType"),
        (("MET_UCHAR", "MET_UCHAR\nElementNumberOfChannels = 3"), "3-D volume of scalars"),
        (("NDims = 3", "NDims = 3\nHeaderSize = 7"), "at an offset"),
        (("0 0 -1 0 1 0 1 0 0", "0 0 -1 0 1 1 1 0 0"), "damaged|right angles|cannot read"),
    ],
)
def test_false_header_is_refused(tmp_path, change, message):
    assert change[0] in HEADER
    path = write(tmp_path / "scan.mha", HEADER.replace(*change))
    with pytest.raises(SpinejaxError, match=message) as error:
        read_mha(path, np.float32)
    assert "scan.mha" in str(error.value)


def test_voxels_in_a_file_beside_the_header(tmp_path):
    """As ITK writes `.mhd`; any other place is refused, a link too."""
    (tmp_path / "scan.raw").write_bytes(bytes(range(120)))
    (tmp_path / "link.raw").symlink_to(tmp_path / "scan.raw")
    whole = read_mha(write(tmp_path / "whole.mha"), np.float32)
    read = read_mha(write(tmp_path / "scan.mhd", HEADER.replace("LOCAL", "scan.raw"), b""), np.float32)
    np.testing.assert_array_equal(read.voxels, whole.voxels)
    for name in ("../scan.raw", "link.raw", "none.raw", str(tmp_path / "scan.raw"), "scan.mhd", "slice%d.raw 1 4 1"):
        with pytest.raises(SpinejaxError, match="said to be in"):
            read_mha(write(tmp_path / "scan.mhd", HEADER.replace("LOCAL", name), b""), np.float32)
    (tmp_path / "scan.raw").write_bytes(bytes(range(100)))
    with pytest.raises(SpinejaxError, match="truncated"):
        read_mha(write(tmp_path / "scan.mhd", HEADER.replace("LOCAL", "scan.raw"), b""), np.float32)


@pytest.mark.parametrize("flag", ["True", "true", "1"])
@pytest.mark.parametrize("size", ["", "0", "20", "1000", "right"])
@pytest.mark.parametrize("where", ["LOCAL", "scan.zraw"])
def test_compressed_voxels_are_read_whatever_size_the_header_declares(tmp_path, flag, size, where):
    """SimpleITK alone returns other voxels, without an error, if the size is missing, 0 or too small."""
    data = zlib.compress(bytes(range(120)), 9)
    header = HEADER.replace("CompressedData = False", f"CompressedData = {flag}").replace("LOCAL", where)
    if size:
        declared = len(data) if size == "right" else size
        header = header.replace("TransformMatrix", f"CompressedDataSize = {declared}\nTransformMatrix")
    if where == "LOCAL":
        path = write(tmp_path / "scan.mha", header, data + b"\n")
    else:
        (tmp_path / where).write_bytes(data)
        path = write(tmp_path / "scan.mhd", header, b"")
    whole = read_mha(write(tmp_path / "whole.mha"), np.float32)
    np.testing.assert_array_equal(read_mha(path, np.float32).voxels, whole.voxels)


@pytest.mark.parametrize("change", [("NDims = 3", "NDims = 3\nHeaderSize = -1"), ("= LOCAL", "= Local")])
def test_headers_of_other_writers(tmp_path, change):
    """HeaderSize -1 says that the voxels are the end of the file (deepali #148)."""
    whole = read_mha(write(tmp_path / "whole.mha"), np.float32)
    read = read_mha(write(tmp_path / "scan.mha", HEADER.replace(*change)), np.float32)
    np.testing.assert_array_equal(read.voxels, whole.voxels)


@pytest.mark.parametrize("declares_size", [True, False])
@pytest.mark.parametrize("fault", ["truncated", "damaged", "bomb"])
def test_damaged_compressed_data_are_refused(tmp_path, declares_size, fault):
    header, data = HEADER.replace("CompressedData = False", "CompressedData = True"), zlib.compress(bytes(range(120)))
    if fault == "truncated":
        data = data[:-20]
    elif fault == "damaged":
        data = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    else:
        data = zlib.compress(bytes(10_000_000))
    if declares_size:
        header = header.replace("ElementDataFile", f"CompressedDataSize = {len(data)}\nElementDataFile")
    with pytest.raises(SpinejaxError, match=r"truncated|damaged|holds"):
        read_mha(write(tmp_path / "scan.mha", header, data), np.float32)


def test_truncated_file_is_refused_at_every_length(tmp_path, scan):
    write_mha(tmp_path / "whole.mha", scan)
    whole = (tmp_path / "whole.mha").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.mha").write_bytes(whole[:length])
        with pytest.raises(SpinejaxError):
            read_mha(tmp_path / "cut.mha", np.float32)


def test_missing_file(tmp_path):
    with pytest.raises(SpinejaxError, match="no such file"):
        read_mha(tmp_path / "none.mha", np.float32)


def test_infinite_voxels_are_refused(tmp_path, scan):
    """NaN is for `plausible` to judge, in images; no mask may have it."""
    scan.voxels[1, 2, 3] = np.inf
    write_mha(tmp_path / "scan.mha", scan)
    with pytest.raises(SpinejaxError, match="1 voxels are infinite"):
        read_mha(tmp_path / "scan.mha", np.float32)
    scan.voxels[:] = 1
    for value in (np.inf, np.nan):
        scan.voxels[1, 2, 3] = value
        write_mha(tmp_path / "scan.mha", scan)
        with pytest.raises(SpinejaxError, match="whole numbers"):
            read_mha(tmp_path / "scan.mha", np.uint8)


@pytest.mark.parametrize("value", [0.5, 300.0, -1.0])
def test_labels_must_fit_the_mask(tmp_path, scan, value):
    write_mha(tmp_path / "mask.mha", Scan(np.full_like(scan.voxels, value), scan.affine, "mask"))
    with pytest.raises(SpinejaxError, match="whole numbers"):
        read_mha(tmp_path / "mask.mha", np.uint8)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (sagittal_affine((4.0, 0.7, 0.7)), "an axial series"),
        (sagittal_affine((0.7, 4.0, 0.7)), "a coronal series"),
        (sagittal_affine((0.7, 0.7, 4.0), (0.0, 43.0)), "43° off the sagittal plane"),
        (
            sagittal_affine((0.7, 0.7, 4.0)) @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            "angles",
        ),
        (np.diag([0.0, 1, 1, 1]), "zero spacing"),
        (np.diag([np.nan, 1, 1, 1]), "not finite"),
    ],
)
def test_only_sagittal_series_pass(affine, message):
    with pytest.raises(SpinejaxError, match=f"bad: .*{message}"):
        reorient(np.zeros((5, 6, 7), np.float32), affine, "bad")


def test_isotropic_volume_is_sagittal_enough():
    reorient(np.zeros((5, 6, 7), np.float32), np.eye(4), "volume")


def test_mask_on_another_grid_is_refused(scan):
    require_same_grid(scan, scan)
    with pytest.raises(SpinejaxError, match="voxels"):
        require_same_grid(scan, Scan(scan.voxels[1:], scan.affine, "mask"))
    shifted = scan.affine.copy()
    shifted[2, 3] += 2
    with pytest.raises(SpinejaxError, match=re.escape("mask: up to 2.0 mm away from scan")):
        require_same_grid(scan, Scan(scan.voxels, shifted, "mask"))


def test_missing_simpleitk_says_how_to_get_it(tmp_path):
    code = (
        "import sys; sys.modules['SimpleITK'] = None\n"
        "from data_prep.read.metaimage import read_mha\n"
        "try: read_mha('x.mha', float)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "NotInstalledError" in run.stdout
    assert "Run `pip install -e '.[scans]'` in this project's folder." in run.stdout


def test_only_mha_is_written(tmp_path, scan):
    with pytest.raises(SpinejaxError, match=r"\.mha"):
        write_mha(tmp_path / "scan.nii", scan)
