"""A data set in an S3 bucket: read there, its shards copied once, and checked, through all that a network does."""

import base64
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_prep.__main__ import main
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import read_manifest, write_manifest
from spinejax.data.scan_picture import check_scan_pictures, read_scan_picture, write_scan_picture
from spinejax.data.shards import shard_name, write_shard
from spinejax.errors import SpinejaxError
from spinejax.files import checksums, stores
from spinejax.files.checksums import sha256_of
from spinejax.files.stores import Address
from tests.conftest import TASKS, a_disc
from tests.object_store import (
    bucket,
    cut_short,
    flipped,
    forbidden,
    slow,
    sometimes,
    store,
    unavailable,
)

__all__ = ["bucket", "store"]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(stores, "WAITS_SECONDS", (0, 0, 0))


@pytest.fixture
def there(store, bucket, tiny):
    """The tiny data set in a bucket."""
    store.put(tiny, bucket, "discs")
    return f"s3://{bucket}/discs"


def copies(cache):
    return sorted(path.name for path in (cache / "shards").glob("*.h5"))


def same(found, tiny):
    here = DataSet(tiny)
    assert found.digest == here.digest
    rows = np.arange(len(here))
    np.testing.assert_array_equal(found.labels, here.labels)
    np.testing.assert_array_equal(found.volumes(rows, threads=3), here.volumes(rows))


def test_a_data_set_in_a_bucket_is_the_same_and_is_copied_once(store, there, tiny, tmp_path):
    same(DataSet(there, cache_dir=tmp_path), tiny)
    assert copies(tmp_path) == sorted(f"{entry['sha256']}.h5" for entry in read_manifest(tiny)["files"])
    store.requests.clear()
    said = []
    again = DataSet(there, cache_dir=tmp_path)
    again.copy(again.rows("all"), tell=said.append)
    same(again, tiny)
    assert said == []
    assert not [path for method, path in store.requests if method == "GET" and path.endswith(".h5")]


def test_only_shards_with_discs_that_are_read_are_copied(store, bucket, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "discs"
    folder.mkdir()
    splits = ("train", "train", "validation", "test")
    summaries = [
        write_shard(folder / shard_name(i, 4), [a_disc(rng, f"p{i}", "L4-L5", split)], TASKS, ())
        for i, split in enumerate(splits)
    ]
    write_manifest(folder, summaries, TASKS, {"source": "test"}, ())
    store.put(folder, bucket, "four")
    data, said = DataSet(f"s3://{bucket}/four", cache_dir=tmp_path / "cache"), []
    assert data.split.tolist() == list(splits)
    assert not (tmp_path / "cache").exists()
    data.copy(data.rows("test"), tell=said.append)
    assert copies(tmp_path / "cache") == [f"{summaries[3].sha256}.h5"]
    assert said[0].startswith("Copying 1 of 4 shards, 0.00 GB")
    np.testing.assert_array_equal(data.volume(2), DataSet(folder).volume(2))
    assert len(copies(tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    "fault",
    [slow, sometimes(unavailable), sometimes(cut_short), sometimes(flipped, every=25)],
    ids=["slow", "503", "cut short", "flipped"],
)
def test_a_network_with_faults_gives_the_same_discs(store, there, tiny, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(stores, "BLOCK_BYTES", 2**22)
    with store.faulty(fault):
        same(DataSet(there, cache_dir=tmp_path), tiny)
    assert {sha256_of(path) for path in (tmp_path / "shards").glob("*.h5")} == {n[:-3] for n in copies(tmp_path)}


def test_an_interrupted_copy_goes_on_where_it_stopped(store, there, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK_BYTES", 2**22)
    entry = read_manifest(tiny)["files"][0]
    part = tmp_path / "shards" / f"{entry['sha256']}.h5.part"
    part.parent.mkdir()
    part.write_bytes((tiny / entry["name"]).read_bytes()[: 2**24])
    asked = []

    def noted(environ, answer):
        if environ["PATH_INFO"].endswith(entry["name"]) and "HTTP_RANGE" in environ:
            asked.append(int(environ["HTTP_RANGE"].removeprefix("bytes=").split("-")[0]))
        return answer()

    data = DataSet(there, cache_dir=tmp_path)
    with store.faulty(noted):
        data.copy(np.arange(1))
    assert min(asked) == 2**24
    same(data, tiny)


def test_a_shard_that_is_not_the_manifests_is_refused_and_not_kept(store, there, tiny, tmp_path):
    data = DataSet(there, cache_dir=tmp_path)
    with store.faulty(sometimes(flipped, every=1)), pytest.raises(SpinejaxError, match=r"s3://.*\.h5: its sha256"):
        data.copy(data.rows("all"))
    assert copies(tmp_path) == []
    assert not [*(tmp_path / "shards").glob("*.part")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(forbidden, "no permission"), (unavailable, "the object store fails, or is not reached")],
    ids=["forbidden", "always 503"],
)
def test_a_store_that_refuses_is_named(store, there, tmp_path, fault, reason):
    with store.faulty(fault), pytest.raises(SpinejaxError, match=f"^s3://.*discs/manifest.json: {reason}"):
        DataSet(there, cache_dir=tmp_path)


def test_no_room_is_said_before_anything_is_copied(there, tmp_path, monkeypatch):
    data = DataSet(there, cache_dir=tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SpinejaxError, match=r"--cache-dir: .* has 0\.0 GB free, and 0\.1 GB are to be copied"):
        data.copy(data.rows("train"))
    assert copies(tmp_path) == []


def test_room_is_not_needed_twice_for_what_another_process_is_copying(store, there, tiny, tmp_path, monkeypatch):
    entries = read_manifest(tiny)["files"]
    (tmp_path / "shards").mkdir()
    for entry in entries:  # all but the last byte of each
        part = tmp_path / "shards" / f"{entry['sha256']}.h5.part"
        part.write_bytes((tiny / entry["name"]).read_bytes()[:-1])
    usage = shutil.disk_usage(tmp_path)._replace(free=len(entries))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    same(DataSet(there, cache_dir=tmp_path), tiny)


def test_a_fold_in_a_bucket_has_its_original_there(store, there, bucket, tiny, tmp_path):
    assert main(["fold", str(tiny), "--out", str(tmp_path / "fold"), "--fold", "1/3"]) == 0
    manifest = read_manifest(tmp_path / "fold")
    text = (tmp_path / "fold" / "manifest.json").read_text().replace(manifest["original"], "../discs")
    store.client().put_object(Bucket=bucket, Key="fold/manifest.json", Body=text.encode())
    fold = DataSet(f"s3://{bucket}/fold", cache_dir=tmp_path / "cache")
    assert len(fold) == len(DataSet(tiny))
    assert fold.volume(0).shape == (192, 320, 15)
    text = text.replace("../discs", "../../elsewhere")
    store.client().put_object(Bucket=bucket, Key="fold/manifest.json", Body=text.encode())
    with pytest.raises(SpinejaxError, match="leads out of the bucket"):
        DataSet(f"s3://{bucket}/fold", cache_dir=tmp_path / "cache")


def test_a_fold_is_made_in_the_bucket_of_its_data_set(store, there, bucket, tiny, tmp_path, capsys):
    options = ["--fold", "1/3", "--cache-dir", str(tmp_path / "cache")]
    out = f"s3://{bucket}/folds/one"
    assert main(["fold", str(tiny), "--out", str(tmp_path / "fold"), *options]) == 0
    assert main(["fold", there, "--out", out, *options]) == 0
    assert f"{out}: fold 1/3, discs: train" in capsys.readouterr().out
    assert read_manifest(Address.parse(out)) == read_manifest(tmp_path / "fold") | {"original": "../../discs"}
    assert "folds/one/discs-00000-of-00002.h5" not in store.names(bucket)
    fold, here = (DataSet(folder, cache_dir=tmp_path / "cache") for folder in (out, tmp_path / "fold"))
    assert fold.digest == here.digest
    np.testing.assert_array_equal(fold.volume(3), here.volume(3))
    assert main(["fold", there, "--out", out, *options]) == 2
    assert f"{out}: holds a data set already" in capsys.readouterr().err
    store.client().create_bucket(Bucket=f"{bucket}-other")
    for data, elsewhere in ((there, str(tmp_path / "new")), (str(tiny), out), (there, f"s3://{bucket}-other/fold")):
        assert main(["fold", data, "--out", elsewhere, *options]) == 2
        assert "Give a folder in the same bucket" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_pictures_of_scans_come_from_the_bucket_and_are_checked(store, bucket, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "discs")
    scan = str(DataSet(folder).scan[0])
    picture = {
        "affine": np.eye(4).tolist(),
        "shape": (2, 2),
        "slices": [base64.b64encode(b"a picture").decode()],
        "bodies": [],
        "doubtful_levels": False,
    }
    write_scan_picture(folder, scan, picture)
    checksums.seal(folder)
    store.put(folder, bucket, "pictured")
    data = DataSet(f"s3://{bucket}/pictured", cache_dir=tmp_path / "cache")
    check_scan_pictures(data)
    assert read_scan_picture(data, scan) == picture
    assert read_scan_picture(data, "another") is None
    shutil.rmtree(tmp_path / "cache")
    with store.faulty(sometimes(flipped, every=1)), pytest.raises(SpinejaxError, match=r"s3://.*pictured"):
        check_scan_pictures(data)


def test_data_prep_reads_a_bucket(there, tmp_path, capsys):
    assert main(["verify", there, "--cache-dir", str(tmp_path)]) == 0
    assert f"{there}: 36 discs, no fault" in capsys.readouterr().out
    assert main(["stats", there]) == 0
    assert "brightness" in capsys.readouterr().out


def test_what_is_no_data_set_is_said(bucket, capsys):
    for address in (f"s3://{bucket}/none", "s3://no-such-bucket/discs"):
        assert main(["stats", address]) == 2
        assert capsys.readouterr().err.startswith(f"error: {address}: no manifest.json in it")


@pytest.mark.slow
def test_processes_of_one_machine_share_a_copy(store, there, tmp_path):
    """Both begin at once; each shard is transferred once."""
    code = """
import pathlib, sys
from spinejax.data.dataset import DataSet
data = DataSet(sys.argv[1], cache_dir=pathlib.Path(sys.argv[2]))
data.copy(data.rows("all"))
"""
    store.requests.clear()
    with store.faulty(slow):
        both = [subprocess.Popen([sys.executable, "-c", code, there, str(tmp_path)]) for _ in range(2)]
        assert [process.wait(300) for process in both] == [0, 0]
    assert len(copies(tmp_path)) == 2
