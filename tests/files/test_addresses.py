"""Addresses of buckets and servers: refused by every command, in one line, before anything is written."""

import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import tyro

from data_prep.__main__ import main
from spinejax.commands import evaluate, train
from spinejax.errors import SpinejaxError, status_of
from spinejax.files.addresses import PATHS, local_path

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "text", ["gs://spines/discs", "S3://a", "http://host/x", "https://host", "file:///data", "gs:/a"]
)
def test_addresses_are_no_paths(text):
    with pytest.raises(SpinejaxError, match="local or mounted disk"):
        local_path(text)


@pytest.mark.parametrize("text", ["discs", "/data/discs", "a:b", "C:/discs", "./gs:/a", "runs/2026-01-01T10:00", ""])
def test_paths_are_unchanged(text):
    assert local_path(text) == Path(text)


@pytest.mark.parametrize(
    "words",
    [
        ("scans", "{}/in", "--out", "discs"),
        ("scans", "in", "--out", "discs", "--masks={}/masks"),
        ("inventory", "in", "--out", "{}/table.csv"),
        ("overlay", "in", "--out", "{}/page.png"),
    ],
)
def test_data_prep_refuses_addresses(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main([word.format("gs://spines") for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: gs://spines/")
    assert said.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "quickstart", "--data", "discs", "--workdir", "run", "--init-from", "nosuch://spines/run"),
        ("train.py", "--config", "nosuch://spines/run/config.json", "--data", "discs", "--workdir", "run"),
        ("train.py", "quickstart", "--data", "nosuch://spines/discs", "--workdir", "run"),
        ("train.py", "quickstart", "--data", "discs", "--workdir", "run", "--cache-dir", "gs://spines/cache"),
        ("evaluate.py", "--checkpoint", "run", "--scan", "https://spines/scan"),
    ],
)
def test_train_and_evaluate_refuse_addresses(tmp_path, words):
    command = [sys.executable, ROOT / words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search("local or mounted disk|no object store is known by nosuch://", done.stderr)
    assert [*tmp_path.iterdir()] == []


def run(words):
    """The exit status of a command in this process; of training its words alone are read."""
    if words[0] == "data_prep":
        return main(list(words[1:]))
    arguments = {"train.py": train.Arguments, "evaluate.py": evaluate.Arguments}[words[0]]
    return status_of(lambda: tyro.cli(arguments, args=words[1:], registry=PATHS))


TAKE_STORES = [
    ("train.py", "--data", "{}", "--workdir", "run"),
    ("train.py", "--data", "discs", "--workdir", "{}"),
    ("evaluate.py", "--data", "{}"),
    ("evaluate.py", "--checkpoint", "{}", "--data", "discs"),
    ("evaluate.py", "--data", "discs", "--out", "{}"),
    ("evaluate.py", "--data", "discs", "--report", "{}"),
    ("evaluate.py", "--data", "discs", "--niivue", "{}"),
    ("evaluate.py", "--compare", "one", "{}"),
    ("data_prep", "verify", "{}"),
    ("data_prep", "stats", "{}"),
    ("data_prep", "inspect", "{}", "--out", "page.png"),
    ("data_prep", "phantom", "--patients", "1", "--out", "{}"),
    ("data_prep", "scans", "in", "--out", "{}"),
    ("data_prep", "fold", "{}", "--out", "fold", "--fold", "1/5"),
    ("data_prep", "fold", "discs", "--out", "{}", "--fold", "1/5"),
]


@pytest.mark.parametrize("words", TAKE_STORES, ids=" ".join)
@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("nosuch://spines/a", "nosuch://spines/a: no object store is known by nosuch://"),
        ("memory://spines/a", "memory://spines/a: no object store is known by memory://"),
        ("gs:/spines/a", "gs:/spines/a: not the address of a folder. Expected gs://BUCKET/FOLDER"),
        ("s3://", "s3://: not the address of a folder"),
        ("s3://spines/../a", "s3://spines/../a: not the address of a folder"),
    ],
)
def test_what_is_no_folder_in_a_store_is_refused_by_name(tmp_path, monkeypatch, capsys, words, address, fault):
    monkeypatch.chdir(tmp_path)
    assert run([word.format(address) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {fault}")
    assert said.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("words", TAKE_STORES, ids=" ".join)
@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("s3://spines/a", r"s3://spines/a needs s3fs. Run `pip install -e '.\[cloud\]'` in this project's folder."),
        ("gs://spines/a", r"gs://spines/a needs gcsfs. Run `pip install -e '.\[cloud\]'` in this project's folder."),
        ("az://spines/a", r"az://spines/a: the library for az:// is missing. Install it."),
    ],
)
def test_without_the_extra_a_store_is_refused_by_name(tmp_path, monkeypatch, capsys, words, address, fault):
    def not_installed(scheme):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", not_installed)
    monkeypatch.chdir(tmp_path)
    assert run([word.format(address) for word in words]) == 2
    assert re.fullmatch(f"error: {fault}\n", capsys.readouterr().err)
    assert [*tmp_path.iterdir()] == []
