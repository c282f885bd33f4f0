"""Data sets that are written into an S3 bucket."""

import pytest

from data_prep.__main__ import main
from data_prep.commands import make
from spinejax.data.manifest import read_manifest
from spinejax.files import stores
from spinejax.files.checksums import sha256_of
from tests.object_store import bucket, forbidden, is_object, store

__all__ = ["bucket", "store"]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(stores, "WAITS_SECONDS", (0, 0))


def phantom(out, cache, *options):
    words = ["phantom", "--patients", "3", "--out", out, "--shards", "2", "--cache-dir", cache, *options]
    return main([str(word) for word in words])


def digests(folder):
    return {path.name: sha256_of(path) for path in folder.iterdir() if not path.name.startswith(".")}


def brought(store, bucket, folder):
    folder.mkdir()
    for name in store.names(bucket, "discs/"):
        if "/.leases/" not in name:
            store.client().download_file(bucket, name, str(folder / name.rpartition("/")[2]))
    return folder


def test_a_data_set_in_a_bucket_is_the_one_of_a_disk_and_is_replaced_only_when_asked(store, bucket, tmp_path, capsys):
    address, cache = f"s3://{bucket}/discs", tmp_path / "cache"
    assert phantom(tmp_path / "here", cache) == 0
    assert phantom(address, cache) == 0
    assert f"{address}: 18 discs" in capsys.readouterr().out
    assert digests(brought(store, bucket, tmp_path / "first")) == digests(tmp_path / "here")
    assert main(["verify", address, "--cache-dir", str(cache)]) == 0
    assert not [*(cache / "work").glob("*/discs*")]
    assert phantom(address, cache) == 2
    assert f"{address}: holds manifest.json of another run. Give --overwrite" in capsys.readouterr().err
    store.client().put_object(Bucket=bucket, Key="discs/notes", Body=b"the user's own")
    assert phantom(address, cache, "--overwrite", "--shards", "1") == 0
    found = digests(brought(store, bucket, tmp_path / "second"))
    assert set(found) == {"discs-00000-of-00001.h5", "manifest.json", "notes"}


def test_a_bucket_that_vanishes_is_told_and_the_next_start_copies_what_is_here(store, bucket, tmp_path, capsys):
    address, cache = f"s3://{bucket}/discs", tmp_path / "cache"

    def no_shards(environ, answer):
        is_shard = is_object(environ) and environ["PATH_INFO"].endswith(".h5")
        return forbidden(environ, answer) if is_shard and environ["REQUEST_METHOD"] != "GET" else answer()

    with store.faulty(no_shards):
        assert phantom(address, cache) == 2
    (folder,) = (cache / "work").glob("*/discs")
    assert f"Everything is saved in {folder}: start the same command again" in capsys.readouterr().err
    assert "discs/manifest.json" not in store.names(bucket)
    assert phantom(address, cache) == 2  # it copies what is here, and finds it there
    assert "Give --overwrite" in capsys.readouterr().err
    found = brought(store, bucket, tmp_path / "found")
    for entry in read_manifest(found)["files"]:
        assert sha256_of(found / entry["name"]) == entry["sha256"]


def test_a_run_that_was_interrupted_leaves_the_data_set_in_the_bucket_as_it_is(store, bucket, tmp_path, monkeypatch):
    address, cache = f"s3://{bucket}/discs", tmp_path / "cache"
    assert phantom(address, cache) == 0
    before = digests(brought(store, bucket, tmp_path / "before"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for number in range(2):
        monkeypatch.setattr(make, "build", interrupted)
        assert phantom(address, cache, "--overwrite") == 130
        assert digests(brought(store, bucket, tmp_path / f"after{number}")) == before
    monkeypatch.undo()
    assert phantom(address, cache, "--overwrite", "--seed", "1") == 0
    assert set(digests(brought(store, bucket, tmp_path / "new"))) == set(before)
    assert digests(tmp_path / "new") != before


def test_the_key_of_patients_stays_on_this_machine(store, bucket, tmp_path, capsys):
    assert main(["phantom", "--as", "scans", "--patients", "3", "--out", str(tmp_path / "scans")]) == 0
    words = ["scans", str(tmp_path / "scans" / "images"), "--masks", str(tmp_path / "scans" / "masks")]
    words += ["--labels", str(tmp_path / "scans" / "labels.csv"), "--out", f"s3://{bucket}/discs"]
    words += ["--cache-dir", str(tmp_path / "cache")]
    assert main(words) == 2
    assert (
        f"s3://{bucket}/discs is in a bucket: give --key FILE, too. The key of the pseudonyms stays on this machine"
        in capsys.readouterr().err
    )
    assert store.names(bucket) == set()
    assert main([*words, "--key", str(tmp_path / "secret.key")]) == 0
    assert not [name for name in store.names(bucket) if "key" in name]
    assert "discs/manifest.json" in store.names(bucket)


@pytest.mark.parametrize("as_", ["discs", "scans"])
def test_what_cannot_be_written_there_is_refused(store, bucket, tmp_path, capsys, as_):
    address = f"s3://{bucket}/discs"
    with store.faulty(forbidden):
        assert phantom(address, tmp_path / "cache", "--as", as_) == 2
    fault = "no permission" if as_ == "discs" else "scans are written to a folder of this machine alone"
    assert fault in capsys.readouterr().err
    assert store.names(bucket) == set()
