"""A data set, a run and an evaluation that were made before the packages had folders still read, and give the same."""

import csv
import json
import tarfile

import numpy as np
import pytest

from tests.running import ROOT

PACKED = ROOT / "tests" / "data" / "before_the_rooms.tar.xz"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    return folder / "before_the_rooms"


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_old_run_grades_the_old_discs_as_it_did(made, launcher):
    out = made / "again"
    command = ["evaluate.py", "--checkpoint", str(made / "run"), "--data", str(made / "discs"), "--out", str(out)]
    ended = launcher.run([*command, "--split", "test", "--tta", "--calibrate"])
    assert ended.status == 0, ended.stderr
    before, after = rows(made / "evaluation" / "predictions.csv"), rows(out / "predictions.csv")
    assert [row["level"] for row in after] == [row["level"] for row in before] == ["L4-L5", "L5-S1"]
    for old, new in zip(before, after, strict=True):
        assert old.keys() <= new.keys()
        for column, value in old.items():
            if "_p_" in column or column.endswith("_spread"):
                np.testing.assert_allclose(float(new[column]), float(value), atol=2e-6)
            else:
                assert new[column] == value
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (made / "evaluation", out))
    assert new["step"] == old["step"]
    assert new["data"] == old["data"]
    assert new["tasks"].keys() == old["tasks"].keys()


def test_the_old_run_goes_on(made, launcher):
    command = ["train.py", "quickstart", "--data", str(made / "discs"), "--workdir", str(made / "run")]
    ended = launcher.run([*command, "--width", "0.01", "--epochs", "5", "--eval-epochs", "1", "--batch-size", "2"])
    assert ended.status == 0, ended.stderr
    assert "is finished: step 10" in ended.stdout
