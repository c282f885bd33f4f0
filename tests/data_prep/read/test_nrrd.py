import gzip

import numpy as np
import pytest
import SimpleITK

from data_prep.read.nrrd import read_nrrd, segment_names
from data_prep.read.scan import Scan
from spinejax.errors import SpinejaxError
from tests.block_spine import sagittal_affine

FIELDS = {
    "type": "uint8",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "6 5 4",
    "space directions": "(0,0,-0.8) (0,0.7,0) (4,0,0)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,3)",
}
AFFINE = np.array([[0, 0, 4, 1], [0, 0.7, 0, 2], [-0.8, 0, 0, 3], [0, 0, 0, 1]])
VOXELS = np.arange(120, dtype=np.uint8).reshape(6, 5, 4)  # rows, columns, slices


def write(path, data=VOXELS, *, pairs=(), end="\n", **changes):
    """A NRRD file by hand; a field of None is left out, and underscores stand for blanks."""
    fields = FIELDS | {key.replace("_", " "): value for key, value in changes.items()}
    content = data if isinstance(data, bytes) else data.tobytes(order="F")
    content = gzip.compress(content) if fields["encoding"] in ("gzip", "gz") else content
    lines = ["NRRD0005", "# a comment"]
    lines += [f"{key}: {value}" for key, value in fields.items() if value is not None]
    lines += [f"{key}:={value}" for key, value in dict(pairs).items()]
    path.write_bytes(end.join([*lines, "", ""]).encode() + content)
    return path


@pytest.mark.parametrize("encoding", ["raw", "gzip", "gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_hand_written_file_is_read_as_the_format_says(tmp_path, encoding, end):
    read = read_nrrd(write(tmp_path / "scan.nrrd", encoding=encoding, end=end), np.float32)
    np.testing.assert_array_equal(read.voxels, VOXELS)
    np.testing.assert_allclose(read.affine, AFFINE)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_file_of_simpleitk_gives_its_voxels_and_geometry(tmp_path, compressed):
    voxels, affine = np.random.default_rng(0).uniform(0, 900, (6, 5, 4)), sagittal_affine((0.8, 0.7, 4.0), (7.0, -5.0))
    image = SimpleITK.GetImageFromArray(voxels.T.astype(np.float32).copy())
    image.SetSpacing((0.8, 0.7, 4.0))
    image.SetDirection((affine[:3, :3] / (0.8, 0.7, 4.0)).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(tmp_path / "scan.nrrd"), compressed)
    read = read_nrrd(tmp_path / "scan.nrrd", np.float32)
    np.testing.assert_array_equal(read.voxels, voxels.astype(np.float32))
    np.testing.assert_allclose(read.affine, affine, atol=1e-9)


@pytest.mark.parametrize(("space", "signs"), [("right-anterior-superior", (-1, -1, 1)), ("LAS", (1, -1, 1))])
def test_other_spaces_give_the_same_place(tmp_path, space, signs):
    vectors = [AFFINE[:3, axis] * signs for axis in range(4)]
    directions = " ".join(f"({','.join(map(str, vector))})" for vector in vectors[:3])
    origin = f"({','.join(map(str, vectors[3]))})"
    path = write(tmp_path / "scan.nrrd", space=space, space_directions=directions, space_origin=origin)
    np.testing.assert_allclose(read_nrrd(path, np.float32).affine, AFFINE)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("cm", 10), ("m", 1000)])
def test_units_are_applied(tmp_path, unit, factor):
    read = read_nrrd(write(tmp_path / "scan.nrrd", space_units=" ".join([f'"{unit}"'] * 3)), np.float32)
    np.testing.assert_allclose(read.affine[:3], factor * AFFINE[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": None, "space_directions": None}, "no orientation in the patient"),
        ({"space": None, "space_dimension": "3"}, "no orientation in the patient"),
        ({"space": "scanner-xyz"}, "no orientation in the patient"),
        ({"space_units": '"inch" "inch" "inch"'}, "its unit is"),
        ({"space_units": '"mm" "mm" "cm"'}, "its unit is"),
        ({"data_file": "/etc/hostname"}, "datafile: /etc/hostname.*one .nrrd file"),
        ({"byte_skip": "-1"}, "byteskip: -1"),
        ({"line_skip": "2"}, "lineskip: 2"),
        ({"encoding": "bzip2"}, "encoding: bzip2"),
        ({"encoding": "ascii"}, "encoding: ascii"),
        ({"type": "block"}, "type: block"),
        ({"type": None}, "type: none"),
        ({"sizes": "30 4"}, "expected one 3-D volume"),
        ({"sizes": "2 3 5 4", "kinds": "domain domain domain time"}, "expected one 3-D volume"),
        ({"sizes": "6 5 x"}, "expected numbers"),
        ({"sizes": "-6 5 -4"}, "expected one 3-D volume"),
        ({"sizes": "60000 60000 60000"}, "at most 134217728"),
        ({"sizes": "6 5 5"}, "holds 120 bytes of voxels, its header declares 150"),
        ({"sizes": "6 5 3"}, "holds 120 bytes of voxels, its header declares 90"),
        ({"endian: little\nendian": "big"}, "damaged header"),
    ],
)
def test_false_header_is_refused(tmp_path, changes, message):
    path = write(tmp_path / "scan.nrrd", **changes)
    with pytest.raises(SpinejaxError, match=message) as error:
        read_nrrd(path, np.float32)
    assert "scan.nrrd" in str(error.value)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_truncated_or_larger_files_are_refused(tmp_path, encoding):
    whole = write(tmp_path / "scan.nrrd", encoding=encoding).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.nrrd").write_bytes(whole[:length])
        with pytest.raises(SpinejaxError, match=r"cut\.nrrd"):
            read_nrrd(tmp_path / "cut.nrrd", np.float32)
    bomb = write(tmp_path / "bomb.nrrd", bytes(100 << 20), encoding=encoding)
    with pytest.raises(SpinejaxError, match="its header declares 120"):
        read_nrrd(bomb, np.float32)


# Segmentations --------------------------------------------------------------------------------------------------------


def segments(*values, layers=None, names=None):
    pairs = {"Segmentation_MasterRepresentation": "Binary labelmap"}
    for number, value in enumerate(values):
        pairs[f"Segment{number}_ID"] = f"Segment_{number + 1}"
        pairs[f"Segment{number}_LabelValue"] = str(value)
        pairs[f"Segment{number}_Layer"] = str(layers[number] if layers else 0)
        pairs[f"Segment{number}_Name"] = names[number] if names else f"Segment_{number + 1}"
    return pairs


def labels(*boxes):
    """A mask with these labels in rows 0, 1, …"""
    mask = np.zeros((6, 5, 4), np.uint8)
    for row, label in enumerate(boxes):
        mask[row] = label
    return mask


def layered(path, *layers, pairs):
    data = np.stack(layers)
    return write(
        path,
        data,
        pairs=pairs,
        dimension="4",
        sizes=f"{len(layers)} 6 5 4",
        kinds="list domain domain domain",
        space_directions=f"none {FIELDS['space directions']}",
    )


def test_one_layer_keeps_its_values(tmp_path):
    path = write(tmp_path / "mask.seg.nrrd", labels(1, 201, 2, 100), pairs=segments(1, 201, 2, 100))
    np.testing.assert_array_equal(read_nrrd(path, np.uint8).voxels, labels(1, 201, 2, 100))
    assert list(segment_names(path)) == [1, 201, 2, 100]


def test_layers_become_one_mask_and_the_first_of_two_that_overlap_is_kept(tmp_path):
    pairs = segments(1, 2, 201, layers=(0, 0, 1))
    path = layered(tmp_path / "mask.seg.nrrd", labels(1, 0, 2), labels(201, 201, 0, 201), pairs=pairs)
    np.testing.assert_array_equal(read_nrrd(path, np.uint8).voxels, labels(1, 201, 2, 201))


def test_layers_that_all_say_1_are_numbered(tmp_path):
    """slicerio #9: LabelValue 1 in each layer; and older files, which give no values."""
    pairs = segments(1, 1, 1, layers=(0, 1, 2), names=("L5", "L4", "sacrum"))
    older = {key: value for key, value in pairs.items() if not key.endswith(("_LabelValue", "_Layer"))}
    for given in (pairs, older):
        path = layered(tmp_path / "mask.seg.nrrd", labels(1), labels(0, 1), labels(0, 0, 1), pairs=given)
        np.testing.assert_array_equal(read_nrrd(path, np.uint8).voxels, labels(1, 2, 3))
        assert segment_names(path) == {1: "L5", 2: "L4", 3: "sacrum"}


def test_an_image_has_no_layers(tmp_path):
    path = layered(tmp_path / "scan.nrrd", labels(1), labels(2), pairs={})
    with pytest.raises(SpinejaxError, match="expected one 3-D volume"):
        read_nrrd(path, np.float32)
    assert segment_names(write(tmp_path / "mask.nrrd")) == {}
    assert isinstance(read_nrrd(write(tmp_path / "mask.nrrd"), np.uint8), Scan)
