"""Folds of a cross-validation: whose turn it is, and that nothing of a disc changes but its split."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.dataset.folds import fold_of_patients, labels_by_patient, parse_fold, write_fold
from spinejax.data.batches import eval_batches, train_batches
from spinejax.data.dataset import DataSet, verify
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import write_shard
from spinejax.errors import SpinejaxError
from tests.conftest import write_tiny
from tests.data_prep.dataset.test_splits import cohort

FOLDS = range(1, 6)


@pytest.mark.parametrize("num_patients", [6, 29, 179])
def test_every_patient_is_tested_once(num_patients):
    patients = cohort(num_patients)
    splits = [fold_of_patients(patients, number, 5, seed=0) for number in FOLDS]
    assert all(set(split) == set(patients) for split in splits)
    tested = Counter(name for split in splits for name, where in split.items() if where == "test")
    assert tested == Counter(list(patients))
    for split in splits:
        sizes = Counter(split.values())
        assert abs(sizes["test"] - num_patients / 5) < 1
        assert abs(sizes["validation"] - max(1, (num_patients - sizes["test"]) / 8)) < 1


def test_a_fold_depends_on_the_patients_and_the_seed_alone():
    patients = cohort(60)
    turned = dict(reversed(patients.items()))
    assert fold_of_patients(turned, 2, 5, seed=3) == fold_of_patients(patients, 2, 5, seed=3)
    tests = {
        tuple(name for name, where in fold_of_patients(patients, 2, 5, seed=seed).items() if where == "test")
        for seed in range(4)
    }
    assert len(tests) == 4


def test_every_split_of_every_fold_has_its_share_of_grades():
    patients = cohort(150)
    total = Counter(disc["endplate"] for discs in patients.values() for disc in discs if "endplate" in disc)
    for number in FOLDS:
        splits = fold_of_patients(patients, number, 5, seed=0)
        for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
            have = Counter(
                disc["endplate"]
                for name, discs in patients.items()
                if splits[name] == split
                for disc in discs[:6]
                if "endplate" in disc
            )
            assert have[1] / total[1] == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "1", "a/b", "-1/5", "1/5/5"])
def test_what_is_no_fold(fold):
    with pytest.raises(SpinejaxError, match="expected 1/5 to 5/5"):
        parse_fold(fold)


def test_too_few_patients():
    with pytest.raises(SpinejaxError, match="4 patients: too few for 5 folds"):
        fold_of_patients(cohort(4), 1, 5, seed=0)


def test_a_written_fold_holds_the_same_discs_in_other_splits(tmp_path):
    data = DataSet(write_tiny(tmp_path / "discs", masks=()))
    counts = write_fold(data, tmp_path / "fold", "2/5", seed=0)
    fold = DataSet(tmp_path / "fold")
    assert verify(tmp_path / "fold") == []
    splits = fold_of_patients(labels_by_patient(data), 2, 5, seed=0)
    assert list(fold.split) == [splits[patient] for patient in data.patient]
    assert counts == dict(Counter(fold.split.tolist()))
    for name in ("affine", "slices", "labels", "level", "patient", "scan"):
        np.testing.assert_array_equal(getattr(fold, name), getattr(data, name))
    np.testing.assert_array_equal(fold.volume(5), data.volume(5))
    assert fold.manifest["preprocessing"] == data.manifest["preprocessing"] | {"fold": "2/5", "fold_seed": 0}
    with pytest.raises(SpinejaxError, match="holds a data set already"):
        write_fold(data, tmp_path / "fold", "2/5", seed=0)


# Folds share the shards of their data set -----------------------------------------------------------------------------


@pytest.fixture
def discs(tmp_path):
    return write_tiny(tmp_path / "discs", masks=())


def copied(data, out, fold):
    """A fold as it was before: every disc written again."""
    splits = fold_of_patients(labels_by_patient(data), *parse_fold(fold), seed=0)
    out.mkdir()
    rows, summaries = iter(range(len(data))), []
    for entry in data.manifest["files"]:
        each = [data.disc(row) for row in itertools.islice(rows, entry["discs"])]
        each = [dataclasses.replace(disc, split=splits[disc.patient]) for disc in each]
        summaries.append(write_shard(out / entry["name"], each, data.tasks, data.masks))
    write_manifest(out, summaries, data.tasks, data.manifest["preprocessing"], data.masks)
    return DataSet(out)


def test_a_fold_trains_as_its_copy_did_and_holds_no_voxels(discs, tmp_path):
    data = DataSet(discs)
    copy = copied(data, tmp_path / "copy", "1/5")
    write_fold(data, tmp_path / "fold", "1/5", seed=0)
    assert [path.name for path in (tmp_path / "fold").iterdir()] == ["manifest.json"]
    fold = DataSet(tmp_path / "fold")
    for name in ("affine", "slices", "labels", "level", "patient", "scan", "split", "slice_mean", "checksum"):
        np.testing.assert_array_equal(getattr(fold, name), getattr(copy, name))
    np.testing.assert_array_equal(fold.mean_of_filled_slices(), copy.mean_of_filled_slices())
    for entry in ("splits", "tasks", "masks", "slice_mean", "schema_version"):
        assert fold.manifest[entry] == copy.manifest[entry]
    for workers in (0, 1):
        options = {"batch_size": 8, "seed": 3, "workers": workers}
        pairs = zip(train_batches(fold, [0, 1], **options), train_batches(copy, [0, 1], **options), strict=True)
        for one, other in itertools.islice(pairs, 6):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    (one,), (other,) = (list(eval_batches(each, each.rows("test"), [0], batch_size=16)) for each in (fold, copy))
    np.testing.assert_array_equal(one["volume"], other["volume"])


def test_folds_and_their_data_set_are_different_data(discs, tmp_path):
    """A run resumes on the data that it was started with: on the same splits, too."""
    data = DataSet(discs)
    for number in (1, 2):
        write_fold(data, tmp_path / f"fold-{number}", f"{number}/5", seed=0)
    digests = [DataSet(tmp_path / name).digest for name in ("discs", "fold-1", "fold-2")]
    assert len(set(digests)) == 3
    write_fold(data, tmp_path / "again", "1/5", seed=0)
    assert DataSet(tmp_path / "again").digest == digests[1]


def test_a_fold_of_a_fold_is_one_of_the_data_set(discs, tmp_path):
    write_fold(DataSet(discs), tmp_path / "fold", "1/5", seed=0)
    write_fold(DataSet(tmp_path / "fold"), discs / "inside", "2/5", seed=0)
    write_fold(DataSet(discs), tmp_path / "fold-2", "2/5", seed=0)
    assert DataSet(discs / "inside").manifest["original"] == ".."
    assert DataSet(discs / "inside").digest == DataSet(tmp_path / "fold-2").digest


def test_folds_are_looked_at_by_the_commands(discs, tmp_path, capsys):
    assert main(["fold", str(discs), "--out", str(tmp_path / "fold"), "--fold", "3/5"]) == 0
    for command in (["verify"], ["stats"], ["inspect", "--out", str(tmp_path / "sheet.png")]):
        assert main([command[0], str(tmp_path / "fold"), *command[1:]]) == 0
    assert "36 discs, no fault" in capsys.readouterr().out


def test_a_data_set_and_its_folds_move_together(discs, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    write_fold(DataSet(discs), tmp_path / "fold", "1/5", seed=0)
    shutil.move(tmp_path / "fold", tmp_path / "new" / "fold")
    assert main(["verify", str(tmp_path / "new" / "fold")]) == 2
    said = capsys.readouterr().err
    assert f"fold: is a fold of {tmp_path / 'new' / 'discs'}, where no data set is now. Move it back, or make" in said
    assert len(said.splitlines()) == 1
    shutil.move(discs, tmp_path / "new" / "discs")
    (tmp_path / "link").symlink_to(tmp_path / "new" / "fold")
    assert len(DataSet(tmp_path / "link")) == 36


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_fold_of_a_data_set_that_changed_is_refused(discs, tmp_path):
    write_fold(DataSet(discs), tmp_path / "fold", "1/5", seed=0)
    shutil.rmtree(discs)
    write_tiny(discs, masks=(), seed=1)
    with pytest.raises(SpinejaxError, match=r"discs, which has changed since\. Make the fold again"):
        DataSet(tmp_path / "fold")


@pytest.mark.parametrize(
    "original", ["/etc", "~", "discs", "..\\discs", "../discs\0", "file:///discs", "../..//discs", "", "s3://bucket", 7]
)
def test_a_folds_original_is_a_relative_folder(discs, tmp_path, original):
    write_fold(DataSet(discs), tmp_path / "fold", "1/5", seed=0)
    edit(tmp_path / "fold", original=original)
    with pytest.raises(SpinejaxError, match=r"manifest\.json: damaged, or of a different version: original"):
        DataSet(tmp_path / "fold")


def test_a_fold_reads_nothing_but_the_shards_that_its_original_lists(discs, tmp_path):
    """Neither a folder that happens to have files of these names, nor a fold of a fold, nor patients of its own."""
    write_fold(DataSet(discs), tmp_path / "fold", "1/5", seed=0)
    good = json.loads((tmp_path / "fold" / "manifest.json").read_text())
    (tmp_path / "bare").mkdir()
    for path in discs.glob("*.h5"):
        shutil.copy(path, tmp_path / "bare")
    write_fold(DataSet(discs), tmp_path / "other", "2/5", seed=0)
    entry = good["files"][0] | {"sha256": "0" * 64}
    some, *others = good["patients"]
    for changes, message in (
        ({"original": "../bare"}, "where no data set is now"),
        ({"original": "../other"}, "has changed since"),
        ({"files": [entry, *good["files"][1:]]}, "has changed since"),
        ({"files": good["files"][:1]}, "has changed since"),
        ({"patients": dict.fromkeys(others, "train")}, "its patients are not those of its discs"),
        ({"patients": good["patients"] | {some: "all"}}, "damaged, or of a different version"),
        ({"patients": good["patients"] | {"nobody": "test"}}, "its patients are not those of its discs"),
    ):
        edit(tmp_path / "fold", **(good | changes))
        with pytest.raises(SpinejaxError, match=message):
            DataSet(tmp_path / "fold")
    del good["original"]
    (tmp_path / "fold" / "manifest.json").write_text(json.dumps(good))
    with pytest.raises(SpinejaxError, match="a fold has the entries original and patients"):
        DataSet(tmp_path / "fold")


def test_verify_reads_the_shards_of_a_folds_original(discs, tmp_path):
    write_fold(DataSet(discs), tmp_path / "fold", "1/5", seed=0)
    path = sorted(discs.glob("*.h5"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("its sha256 is not the manifest's" in fault for fault in verify(tmp_path / "fold"))


def test_a_folder_that_a_manifest_cannot_name_is_refused(discs, tmp_path):
    shutil.copytree(discs, tmp_path / "a\\b")
    with pytest.raises(SpinejaxError, match="Rename the folder"):
        write_fold(DataSet(tmp_path / "a\\b"), tmp_path / "fold", "1/3", seed=0)
    assert not (tmp_path / "fold").exists()
