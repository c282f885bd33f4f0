import copy
import dataclasses
import json
import shutil

import h5py
import numpy as np
import pytest

from spinejax.data.dataset import DataSet, verify
from spinejax.data.manifest import MANIFEST, write_manifest
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.errors import SpinejaxError
from spinejax.files.checksums import sha256_of
from spinejax.geometry import INTENSITY_ONE, VOLUME_SHAPE, central_window
from spinejax.tasks import UNLABELLED, Task

TASKS = (Task("pfirrmann", ("1", "2", "3", "4", "5")), Task("endplate", ("normal", "abnormal")))
MASKS = ("region", "lesion")


def disc(patient, level, split, seed, slices=(2, 13)):
    random = np.random.default_rng(seed)
    volume = np.zeros(VOLUME_SHAPE, np.uint16)
    # Blocks of one value keep the files small; what is tested does not depend on the picture.
    blocks = random.integers(0, INTENSITY_ONE, (6, 10, slices[1] - slices[0]), dtype=np.uint16)
    volume[:, :, slices[0] : slices[1]] = np.kron(blocks, np.ones((32, 32, 1), np.uint16))
    affine = np.diag([0.3, 0.3, 4, 1]) + seed / 100
    affine[3] = (0, 0, 0, 1)
    labels = {"pfirrmann": seed % 5, "endplate": UNLABELLED if seed % 3 == 0 else 1}
    region = (volume > INTENSITY_ONE // 2).astype(np.uint8)
    return Disc(
        volume, affine, slices, labels, level, patient, f"scan{patient}", split, region, region.astype(np.uint16)
    )


def discs():
    return [
        [disc("a", "L4-L5", "train", 0), disc("a", "L5-S1", "train", 1)],
        [disc("b", "L5-S1", "validation", 2), disc("c", "L5-S1", "test", 3, slices=(7, 8))],
    ]


def write(folder, shards, masks=MASKS):
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [
        write_shard(folder / shard_name(index, len(shards)), part, TASKS, masks) for index, part in enumerate(shards)
    ]
    return write_manifest(folder, summaries, TASKS, {"interpolation": "linear"}, masks)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "set"
    write(folder, discs())
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "set")


def first_shard(folder):
    return folder / shard_name(0, 2)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


# What is written is what is read -------------------------------------------------------------------------------------


def test_round_trip(made):
    data = DataSet(made)
    assert len(data) == 4
    assert data.tasks == TASKS
    for row, original in enumerate([d for shard in discs() for d in shard]):
        np.testing.assert_array_equal(data.volume(row), original.volume)
        np.testing.assert_array_equal(data.mask("region", row), original.region)
        np.testing.assert_array_equal(data.mask("lesion", row), original.lesion)
        np.testing.assert_array_equal(data.affine[row], original.affine)
        assert tuple(data.slices[row]) == original.slices
        assert dict(zip(("pfirrmann", "endplate"), data.labels[row].tolist(), strict=True)) == original.labels
        for name in ("level", "patient", "scan", "split"):
            assert getattr(data, name)[row] == getattr(original, name)
    assert verify(made) == []


def test_same_discs_give_the_same_bytes(made, tmp_path):
    write(tmp_path / "again", discs())
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_bytes_do_not_depend_on_references_to_a_column(made, tmp_path, monkeypatch):
    """A profiler's thread, as Dask's workers have one, keeps objects alive at any moment; so does this list."""
    held, resize = [], h5py.Dataset.resize
    monkeypatch.setattr(h5py.Dataset, "resize", lambda self, *a, **k: (held.append(self), resize(self, *a, **k))[1])
    write(tmp_path / "again", discs())
    assert held
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_nothing_temporary_is_left(made):
    assert sorted(path.name for path in made.iterdir()) == [shard_name(0, 2), shard_name(1, 2), MANIFEST]


def test_manifest_counts_and_means(made):
    manifest = json.loads((made / MANIFEST).read_text())
    assert {split: entry["discs"] for split, entry in manifest["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert manifest["splits"]["train"]["grades"] == {"pfirrmann": [1, 1, 0, 0, 0], "endplate": [0, 1]}
    windows = np.stack([central_window(d.volume) for d in discs()[0]]) / INTENSITY_ONE
    np.testing.assert_allclose(DataSet(made).slice_mean, windows.mean((0, 1, 2)), rtol=1e-5)


def test_rows_of_a_split(made):
    data = DataSet(made)
    np.testing.assert_array_equal(data.rows("train"), [0, 1])
    with pytest.raises(SpinejaxError, match=r"no disc in split 'holdout'.*train: 2"):
        data.rows("holdout")


def test_set_without_masks(tmp_path):
    write(tmp_path / "bare", discs(), masks=())
    data = DataSet(tmp_path / "bare")
    assert data.volume(0).any()
    with pytest.raises(SpinejaxError, match="stores no region masks"):
        data.mask("region", 0)


def test_a_copy_for_a_worker_opens_its_own_files(made):
    data = DataSet(made)
    volume = data.volume(0)
    copied = copy.copy(data)  # by the state that a worker gets
    assert not copied._files
    np.testing.assert_array_equal(copied.volume(0), volume)


def test_volumes_are_read_into_aligned_memory(made):
    data = DataSet(made)
    batch = data.volumes(np.array([3, 0, 3]))
    assert batch.ctypes.data % 64 == 0
    for place, row in enumerate((3, 0, 3)):
        np.testing.assert_array_equal(batch[place], data.volume(row))


def test_central_window_is_the_middle():
    volume = np.zeros(VOLUME_SHAPE)
    window = central_window(volume)
    assert window.shape == (112, 224, 9)
    window[...] = 1
    for axis in range(3):
        np.testing.assert_array_equal(volume, np.flip(volume, axis))


# What is not written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": np.zeros(VOLUME_SHAPE, np.uint8)}, "volume is uint8"),
        ({"volume": np.zeros((112, 224, 9), np.uint16)}, r"\[112, 224, 9\]"),
        ({"region": None}, "region is nothing"),
        ({"lesion": np.zeros(VOLUME_SHAPE, np.uint8)}, "lesion is uint8"),
        ({"level": "L6-S1"}, "unknown level"),
        ({"split": "holdout"}, "unknown level or split 'holdout'"),
        ({"patient": ""}, "patient ''"),
        ({"patient": "Müller"}, "ASCII"),
        ({"scan": "s" * 33}, "1 to 32 ASCII"),
        ({"labels": {"pfirrmann": 5}}, "label 5 for pfirrmann"),
        ({"labels": {"pfirrmann": -2}}, "label -2 for pfirrmann"),
        ({"labels": {"stenosis": 0}}, "labels for stenosis"),
        ({"affine": np.full((4, 4), np.nan)}, "affine"),
        ({"affine": np.zeros((4, 4))}, "not invertible"),
        ({"slices": (3, 3)}, "slice range"),
        ({"slices": (0, 16)}, "slice range"),
    ],
)
def test_disc_that_breaks_the_schema_is_not_written(tmp_path, change, message):
    path = tmp_path / "discs.h5"
    with pytest.raises(SpinejaxError, match=message):
        write_shard(path, [dataclasses.replace(disc("a", "L5-S1", "train", 0), **change)], TASKS, MASKS)
    assert not path.exists()


def test_patient_in_two_splits_is_not_written(tmp_path):
    with pytest.raises(SpinejaxError, match="patient a is in two splits"):
        write(tmp_path / "set", [[disc("a", "L5-S1", "train", 0)], [disc("a", "L4-L5", "test", 1)]])
    assert not (tmp_path / "set" / MANIFEST).exists()


def test_empty_set_is_not_written(tmp_path):
    with pytest.raises(SpinejaxError, match="no disc was found"):
        write(tmp_path / "set", [[], []])


def test_shard_without_discs_is_fine(tmp_path):
    write(tmp_path / "set", [[disc("a", "L5-S1", "train", 0)], []])
    assert len(DataSet(tmp_path / "set")) == 1
    assert verify(tmp_path / "set") == []


# What is not read ----------------------------------------------------------------------------------------------------


def external_link(file):
    file["labels"] = h5py.ExternalLink("elsewhere.h5", "/labels")


def soft_link(file):
    file["labels"] = h5py.SoftLink("/slices")


def external_storage(file):
    file.create_dataset("labels", (2, 2), "i1", external=[("/etc/hostname", 0, 4)])


def virtual(file):
    layout = h5py.VirtualLayout((2, 2), "i1")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "labels", (2, 2))
    file.create_virtual_dataset("labels", layout)


def stored(file, dtype="i1", shape=(2, 2), chunks=(64, 2), values=0, **options):
    options = {"fletcher32": True, "chunks": chunks, "maxshape": (None, *shape[1:])} | options
    column = file.create_dataset("labels", shape, dtype, **options)
    if values is not None:
        column[...] = values


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (external_link, "link to elsewhere"),
        (soft_link, "link to elsewhere"),
        (external_storage, "other files"),
        (virtual, "other files"),
        (lambda file: file.create_group("labels"), "is not an HDF5 dataset"),
        (lambda file: stored(file, dtype="i2"), r"int16\[2, 2\], expected int8"),
        (lambda file: stored(file, shape=(2, 3), chunks=(64, 3)), r"int8\[2, 3\]"),
        (lambda file: stored(file, shape=(3, 2)), r"int8\[3, 2\]"),
        (lambda file: stored(file, dtype=h5py.string_dtype(), values=b"x", fletcher32=False), "object"),
        (lambda file: stored(file, fletcher32=False), "checksums"),
        (lambda file: stored(file, chunks=(64, 1)), "whole rows"),
        (lambda file: stored(file, values=None), "never written"),
        (lambda file: stored(file, values=[[0, 2], [0, 0]]), "label 2 for endplate"),
        (lambda file: stored(file, values=[[-2, 0], [0, 0]]), "label -2 for pfirrmann"),
        (lambda file: None, "expected affine, checksum, labels"),
    ],
)
def test_planted_column_is_refused(folder, plant, message):
    with h5py.File(first_shard(folder), "r+", libver="latest") as file:
        del file["labels"]
        plant(file)
    with pytest.raises(SpinejaxError, match=message) as error:
        DataSet(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", b"test", "patient a is in two splits"),
        ("split", b"holdout", "unknown levels or splits"),
        ("level", b"L9", "unknown levels or splits"),
        ("patient", b"caf\xc3\xa9", "damaged.*ascii"),
        ("affine", np.nan, "not finite"),
        ("slices", 99, "slice range"),
    ],
)
def test_planted_value_is_refused(folder, column, value, message):
    with h5py.File(first_shard(folder), "r+") as file:
        file[column][0] = value
    with pytest.raises(SpinejaxError, match=message):
        DataSet(folder)


def test_unknown_column_is_refused(folder):
    with h5py.File(first_shard(folder), "r+") as file:
        file["name"] = b"A patient"
    with pytest.raises(SpinejaxError, match=r"name, patient.*; expected"):
        DataSet(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_shard_is_refused(folder, share):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SpinejaxError, match="damaged, truncated or not an HDF5 file"):
        DataSet(folder)


def chunk_of(path, name, row):
    """The place of a row in the file, and its bytes there."""
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info(row)
    return slice(chunk.byte_offset, chunk.byte_offset + chunk.size)


def as_version_1(folder):
    """The data set as the first version of the schema had it: HDF5's checksums for volumes too."""
    for name in [shard_name(0, 2), shard_name(1, 2)]:
        with h5py.File(folder / name, "r+", libver="latest") as file:
            volume = file["volume"][()]
            del file["checksum"], file["volume"]
            file.create_dataset(
                "volume",
                data=volume,
                chunks=(1, *VOLUME_SHAPE),
                maxshape=(None, *VOLUME_SHAPE),
                fletcher32=True,
            )
    files = [
        entry | {"sha256": sha256_of(folder / entry["name"])}
        for entry in json.loads((folder / MANIFEST).read_text())["files"]
    ]
    edit_manifest(folder, schema_version=1, files=files)


def test_sets_of_the_first_schema_are_read(made, folder):
    as_version_1(folder)
    assert verify(folder) == []
    old, new = DataSet(folder), DataSet(made)
    np.testing.assert_array_equal(old.volumes(np.arange(4)), new.volumes(np.arange(4)))
    np.testing.assert_array_equal(old.mask("region", 2), new.mask("region", 2))


@pytest.mark.parametrize("version", [1, 2])
def test_flipped_byte_is_found(folder, version):
    if version == 1:
        as_version_1(folder)
    damaged = bytearray(first_shard(folder).read_bytes())
    damaged[chunk_of(first_shard(folder), "volume", 1).start + 12345] ^= 4
    first_shard(folder).write_bytes(damaged)
    data = DataSet(folder)
    data.volume(0)
    with pytest.raises(SpinejaxError, match="damaged"):
        data.volume(1)
    faults = verify(folder)
    assert len(faults) == 2
    assert "sha256" in faults[0]
    assert faults[1].startswith("row 1 (scan scana, L5-S1): ")


def test_swapped_discs_are_found(folder):
    path = first_shard(folder)
    one, other = (chunk_of(path, "volume", row) for row in (0, 1))
    content = bytearray(path.read_bytes())
    content[one], content[other] = content[other], content[one]
    path.write_bytes(content)
    for row in (0, 1):
        with pytest.raises(SpinejaxError, match=f"damaged.*volume of disc {row} does not fit its checksum"):
            DataSet(folder).volumes(np.array([row]))


@pytest.mark.parametrize("name", ["checksum", "labels", "region"])
def test_flipped_byte_of_another_column_is_found(folder, name):
    path = first_shard(folder)
    damaged = bytearray(path.read_bytes())
    damaged[chunk_of(path, name, 0).start + 3] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(SpinejaxError, match="damaged"):
        DataSet(folder).mask("region", 0)


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"fletcher32": True}, {"chunks": (2, *VOLUME_SHAPE)}])
def test_compressed_or_chunked_volumes_are_refused(folder, options):
    with h5py.File(first_shard(folder), "r+", libver="latest") as file:
        volume = file["volume"][()]
        del file["volume"]
        options = {"chunks": (1, *VOLUME_SHAPE), "maxshape": (None, *VOLUME_SHAPE)} | options
        file.create_dataset("volume", data=volume, **options)
    with pytest.raises(SpinejaxError, match="not stored unchanged, disc by disc"):
        DataSet(folder)


def test_missing_shard_is_refused(folder):
    first_shard(folder).unlink()
    with pytest.raises(SpinejaxError, match="the manifest lists this shard, but it is missing"):
        DataSet(folder)


def entry(name="discs-00000-of-00002.h5", discs=2, sha256="0" * 64):
    return {"name": name, "discs": discs, "bytes": 0, "sha256": sha256}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema_version: Input should be 1 or 2"),
        ({"schema_version": 1}, "holds .*checksum.*; expected"),
        ({"files": []}, "a different version: files"),
        ({"files": [entry("../discs.h5")]}, "a different version: files.0.name"),
        ({"files": [entry("/etc/passwd")]}, "a different version: files.0.name"),
        ({"files": [entry("discs-00007-of-00008.h5")]}, "missing"),
        ({"files": [entry(7)]}, "damaged"),
        ({"files": [entry(discs=3)]}, "expected"),
        ({"files": [entry(discs=-2)]}, "damaged"),
        ({"files": [entry(sha256=None)]}, "damaged"),
        ({"files": [entry()] * 2}, "damaged"),
        ({"files": None}, "damaged"),
        ({"slice_mean": [0.5] * 8}, "a different version: slice_mean"),
        ({"slice_mean": [float("nan")] * 9}, "a different version: slice_mean.0"),
        ({"slice_mean": None}, "damaged"),
        ({"masks": ["region"]}, "holds .*lesion.*; expected"),
        ({"masks": ["evil"]}, "damaged"),
        ({"masks": 5}, "damaged"),
        ({"tasks": []}, "damaged"),
        ({"tasks": [{"name": "pfirrmann", "grades": ["1", "2"]}]}, "labels is"),
        ({"tasks": 7}, "damaged|Task table"),
        ({"files": [entry(discs="18")]}, "a different version: files.0.discs"),
        ({"files": [entry(discs=float("inf"))]}, "a different version: files.0.discs"),
        ({"splits": None}, "damaged"),
        ({"splits": {"train": {}, "validation": {}, "test": {}}}, "damaged"),
    ],
)
def test_manifest_with_wrong_content_is_refused(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(SpinejaxError, match=message):
        DataSet(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"schema_version": 1}', "\x00\xff"])
def test_manifest_that_is_no_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(SpinejaxError, match="damaged"):
        DataSet(folder)


def test_folder_without_manifest(tmp_path):
    with pytest.raises(SpinejaxError, match="is not a data set"):
        DataSet(tmp_path)


# What verifying finds ------------------------------------------------------------------------------------------------


def test_one_image_in_two_splits_is_not_written(tmp_path):
    """A patient who came under two names."""
    one = disc("b", "L5-S1", "test", 9)
    other = dataclasses.replace(one, patient="d", scan="scand", split="train")
    with pytest.raises(SpinejaxError, match="one and the same image is in the splits test and train"):
        write(tmp_path / "one", [[one, other]])
    with pytest.raises(SpinejaxError, match="one and the same image is in the splits test and train"):
        write(tmp_path / "two", [[one], [other]])
    assert not (tmp_path / "two" / MANIFEST).exists()
    write(tmp_path / "three", [[one, dataclasses.replace(other, split="test")]])


def test_verify_reports_each_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("spinejax.data.manifest._refuse_shared_images", lambda *_: None)
    same = disc("b", "L5-S1", "test", 9)
    outside = disc("c", "L5-S1", "train", 4)
    outside.volume[0, 0, 0] = 1
    folder = tmp_path / "set"
    write(
        folder,
        [
            [disc("a", "L5-S1", "train", 0), disc("a", "L5-S1", "train", 1), outside],
            [same, dataclasses.replace(same, patient="d", scan="scand", split="validation")],
        ],
    )
    splits = json.loads((folder / MANIFEST).read_text())["splits"]
    splits["train"]["discs"] = 7
    edit_manifest(folder, splits=splits, slice_mean=[0.9] * 9)
    faults = "\n".join(verify(folder))
    assert len(faults.splitlines()) == 5
    for expected in (
        "scan scana: level L5-S1 occurs 2 times",
        "row 2 (scan scanc, L5-S1): voxels outside the valid slices",
        "row 4 (scan scand, L5-S1): the same image is in another split",
        "split train: the manifest's counts",
        "the manifest's slice means are not those of the training discs",
    ):
        assert expected in faults


def test_verify_refuses_what_cannot_be_opened(tmp_path):
    with pytest.raises(SpinejaxError, match="is not a data set"):
        verify(tmp_path)
