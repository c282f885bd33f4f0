"""Addresses of buckets and servers: refused by every command, in one line, before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main
from spinejax.errors import SpinejaxError
from spinejax.files.addresses import local_path

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
        ("scans", "in", "--out", "{}/discs"),
        ("scans", "in", "--out", "discs", "--masks={}/masks"),
        ("phantom", "--patients", "1", "--out", "{}/discs"),
        ("verify", "{}/discs"),
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
        ("train.py", "quickstart", "--data", "discs", "--workdir", "gs://spines/run"),
        ("train.py", "quickstart", "--data", "s3://spines/discs", "--workdir", "run"),
        ("evaluate.py", "--checkpoint", "run", "--data", "gs://spines/discs"),
        ("evaluate.py", "--checkpoint", "run", "--scan", "https://spines/scan"),
    ],
)
def test_train_and_evaluate_refuse_addresses(tmp_path, words):
    command = [sys.executable, ROOT / words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "local or mounted disk" in done.stderr
    assert [*tmp_path.iterdir()] == []
