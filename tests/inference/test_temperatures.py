"""Temperatures that are stored with a checkpoint: where, when they are applied, and when refused."""

import shutil

import numpy as np
import pytest

from spinejax.commands import evaluate
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.inference import temperatures
from spinejax.inference.graded import Graded, labels_of
from spinejax.metrics import calibration
from spinejax.parallel import runtime
from spinejax.training import checkpoint
from spinejax.training.checkpoint import CALIBRATION
from spinejax.training.saved_step import weights_digest
from tests.commands.test_evaluate import grade
from tests.commands.test_evaluate import run as trained  # noqa: F401
from tests.conftest import TASKS, write_tiny


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)


@pytest.fixture
def run(trained, tmp_path):  # noqa: F811
    return shutil.copytree(trained, tmp_path / "run")


def change_weights(folder):
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  variables/_METADATA", "  variables/_metadata"))


def a_fit(**changes):
    parts = {"num_views": 54, "average": "probabilities", "data": "abc", "discs": {"side": 9}}
    return temperatures.Fit(**{**parts, "temperatures": {"brightness": 1.5, "side": 2.0}, **changes})


def test_temperatures_are_stored_for_each_way_of_grading(run):
    temperatures.store(run, a_fit())
    temperatures.store(run, a_fit(num_views=1, temperatures={"brightness": 3.0, "side": 1.0}))
    temperatures.store(run, a_fit(temperatures={"brightness": 1.25, "side": 2.0}))
    for path in (run, run / "export", checkpoint.find(run)):
        assert temperatures.read(path, num_views=54, average="probabilities")["temperatures"]["brightness"] == 1.25
        assert temperatures.read(path, num_views=1, average="probabilities")["temperatures"]["brightness"] == 3
        assert temperatures.read(path, num_views=54, average="logits") is None
    checkpoint.export(run)  # again, from the step
    assert (run / "export" / CALIBRATION).is_file()
    assert checkpoint.load(run)[0].tasks == TASKS  # a checkpoint with temperatures is still a checkpoint


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"side": 2.0', '"side": 2.1', "its sha256 differs"),
        ('"side": 2.0', '"side": -2.0', "greater than 0"),
        ('"version": 1', '"version": 2', "a different version: version"),
        ("{", "", "damaged"),
    ],
)
def test_a_changed_file_is_refused_by_name(run, old, new, fault):
    path = temperatures.store(run, a_fit())
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SpinejaxError, match=rf"calibration\.json.*{fault}.*Delete it"):
        temperatures.read(run, num_views=54, average="probabilities")


def test_temperatures_of_other_weights_are_refused(run):
    path = temperatures.store(run, a_fit())
    change_weights(checkpoint.find(run))
    with pytest.raises(SpinejaxError, match=f"{path}: the temperatures were fitted to different weights"):
        temperatures.read(run, num_views=54, average="probabilities")


def test_a_temperature_changes_the_probabilities_and_no_grade(tiny):
    data = DataSet(tiny)
    rows = data.rows("test")
    rng = np.random.default_rng(0)
    probabilities = {task.name: rng.dirichlet(np.ones(task.num_grades), len(rows)) for task in TASKS}
    spread = {task.name: np.zeros(len(rows)) for task in TASKS}
    graded = Graded(data, rows, TASKS, labels_of(data, rows, TASKS), probabilities, spread)
    found = temperatures.fit(graded, num_views=1, average="probabilities")
    assert found["discs"]["brightness"] == len(rows)
    calibrated = temperatures.apply(graded, found["temperatures"])
    for task in TASKS:
        before, after = graded.probabilities[task.name], calibrated.probabilities[task.name]
        np.testing.assert_allclose(after, calibration.at_temperature(before, found["temperatures"][task.name]))
        np.testing.assert_array_equal(before.argmax(1), after.argmax(1))
    effect = temperatures.effect(graded, calibrated)
    assert effect["brightness"]["brier_after"] != effect["brightness"]["brier_before"]


def test_evaluate_fits_and_stores_once_and_then_needs_no_validation_split(run, tiny, tmp_path, capsys):
    _, plain = grade(run, tiny, tmp_path / "plain")
    assert not list(run.rglob(CALIBRATION))
    results, first = grade(run, tiny, tmp_path / "first", calibrate=True)
    assert "Temperatures are stored in" in capsys.readouterr().out
    assert len(list(run.rglob(CALIBRATION))) == 2  # with the step and with the export
    assert results["calibration"]["side"]["temperature"] != 1
    assert first != plain
    assert [line["side_grade"] for line in first] == [line["side_grade"] for line in plain]
    _, again = grade(run, tiny, tmp_path / "again", calibrate=True)
    assert again == first
    assert "stored" not in capsys.readouterr().out
    _, untouched = grade(run, tiny, tmp_path / "untouched")
    assert untouched == plain  # never put to use unasked
    elsewhere = write_tiny(tmp_path / "elsewhere", num_patients=(0, 0, 2))
    grade(run / "export", elsewhere, tmp_path / "other", calibrate=True)
    with pytest.raises(SpinejaxError, match="cannot be judged there"):
        grade(run, tiny, tmp_path / "judged", calibrate=True, split="validation")


def test_a_read_only_checkpoint_is_calibrated_too(run, tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(evaluate.temperatures, "store", refuse)
    results, _ = grade(run, tiny, tmp_path / "out", calibrate=True)
    assert results["calibration"]["side"]["temperature"] != 1
    assert "cannot be stored with the checkpoint: Read-only file system" in capsys.readouterr().out


def test_temperatures_are_not_stored_with_a_deleted_or_replaced_checkpoint(run, tiny, tmp_path):
    folder = checkpoint.find(run)
    before = weights_digest(folder)
    change_weights(folder)
    with pytest.raises(FileNotFoundError, match="deleted or replaced"):
        temperatures.store(folder, a_fit(), weights=before)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="deleted or replaced"):
        temperatures.store(folder, a_fit(), weights=before)
