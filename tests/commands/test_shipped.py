"""Grading with the network that ships: nothing to train first, and every result says which network it was."""

import csv
import dataclasses
import json
import re
import shutil

import h5py
import numpy as np
import pytest

from data_prep.read.metaimage import write_mha
from spinejax.commands import evaluate
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import shard_name, write_shard
from spinejax.errors import SpinejaxError
from spinejax.inference import unusual
from spinejax.inference.hotspots import Method
from spinejax.metrics import calibration, grading
from spinejax.parallel import runtime
from spinejax.training import shipped
from tests.block_spine import block_spine
from tests.conftest import TASKS
from tests.training.test_shipped import FIT, PROVENANCE, RATERS, VIEWS, change, make_run


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def made(run):
    return shipped.write(run, run.parent / "network", provenance=PROVENANCE, contrasts=["t2"], temperatures=[FIT])


@pytest.fixture
def network(made, tmp_path, monkeypatch):
    """A small network in the place of the one that ships; the current folder is empty."""
    folder = tmp_path / "package"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(shipped, "FOLDER", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_results_are_here_and_say_which_network(network, tiny, tmp_path, capsys):
    evaluate.main(evaluate.Arguments(data=tiny, tta=True, batch_size=8, report=tmp_path / "page"))
    out = tmp_path / "here" / "evaluation-test-54-views"
    digest = shipped.about(network)["sha256"]
    results = json.loads((out / "results.json").read_text())
    assert results["network"] == {"name": "squares", "weights": digest, "trained_on": "bright squares"}
    assert {row["network"] for row in rows(out / "predictions.csv")} == {f"squares ({digest[:12]})"}
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"Network: squares ({digest[:12]}), trained on bright squares" in page
    printed = capsys.readouterr().out
    assert "Network: squares, trained on bright squares. Research use only" in printed
    assert "Results are in evaluation-test-54-views." in printed
    assert str(network) not in page + printed


def test_its_own_temperatures_calibrate_it(network, tiny, tmp_path):
    """And grades are referred to a rater by their calibrated probabilities."""

    def graded(name, **options):
        evaluate.main(evaluate.Arguments(data=tiny, tta=True, batch_size=8, out=tmp_path / name, **options))
        return rows(tmp_path / name / "predictions.csv")

    before = graded("as it is")
    surest = max(float(row[f"side_p_{grade}"]) for row in before for grade in ("front", "back"))
    after = graded("calibrated", calibrate=True, refer_below=surest - 0.001)  # temperature 2 brings all of them below
    assert {row["side_refer"] for row in after} == {"yes"}
    for task in TASKS:
        columns = [f"{task.name}_p_{grade}" for grade in task.grades]
        probabilities = np.array([[float(row[column]) for column in columns] for row in before])
        expected = calibration.at_temperature(probabilities, FIT["temperatures"][task.name])
        found = np.array([[float(row[column]) for column in columns] for row in after])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(SpinejaxError, match=r"no temperatures for 1 view and prob.* only: 54 views and prob"):
        evaluate.main(evaluate.Arguments(data=tiny, calibrate=True, out=tmp_path / "one view"))
    assert not (tmp_path / "one view").exists()


def numbers(found, task):
    return np.array([[float(row[f"{task.name}_p_{grade}"]) for grade in task.grades] for row in found])


@pytest.fixture
def raters(network, run):
    """The network with raters."""
    shipped.write(run, network, provenance=PROVENANCE, contrasts=["t2"], temperatures=[FIT | {"raters": RATERS}])


def with_contrast(tiny, folder, contrast):
    """The data set with scans of a contrast."""
    shutil.copytree(tiny, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    scans = {str(scan): {"source": "somewhere", "contrast": contrast} for scan in DataSet(tiny).scan}
    path.write_text(json.dumps(manifest | {"scans": scans}))
    return folder


@pytest.mark.parametrize(
    ("contrast", "habits"),
    [("t2", "t2"), ("fat-saturated", "t2"), ("", "t2"), ("t1 or t2", "t2"), ("t1 fat-saturated", "t1")],
)
def test_it_grades_as_its_first_rater_does_on_the_contrast_of_the_scan(
    raters, tiny, tmp_path, capsys, contrast, habits
):
    data = with_contrast(tiny, tmp_path / "data", contrast)

    def graded(name, **options):
        evaluate.main(evaluate.Arguments(data=data, tta=True, batch_size=8, out=tmp_path / name, **options))
        return rows(tmp_path / name / "predictions.csv")

    before, after = graded("as it is"), graded("as a rater", calibrate=True, refer_below=0.4, report=tmp_path / "page")
    for task in TASKS:
        rater = RATERS["careful"][habits][task.name]
        expected = calibration.as_rater(numbers(before, task), rater)
        np.testing.assert_allclose(numbers(after, task), expected, atol=1e-5)
        given = grading.decide(expected, frequencies=np.array(rater["frequencies"]))
        assert [row[f"{task.name}_grade"] for row in after] == [task.grades[grade] for grade in given]
        low = expected[np.arange(len(given)), given] < 0.4
        assert [row[f"{task.name}_refer"] == "yes" for row in after] == low.tolist()
    results = json.loads((tmp_path / "as a rater" / "results.json").read_text())
    assert results["rater"] == "careful"
    assert results["borrowed_from_other_raters"] == ["brightness"]
    assert set(results["calibration"]["side"]) == {
        *(f"calibration_error_{when}" for when in ("before", "after")),
        *(f"brier_{when}" for when in ("before", "after")),
    }
    assert "54 views each, as careful's raters grade" in capsys.readouterr().out
    page = (tmp_path / "page" / "index.html").read_text()
    assert "to the grades of careful's raters" in page
    assert "of Brightness, which they did not grade, other raters'" in page


def test_a_rater_is_chosen_and_discs_that_it_does_not_know_have_a_temperature(raters, tiny, tmp_path):
    def graded(name, data, **options):
        evaluate.main(evaluate.Arguments(data=data, tta=True, batch_size=8, out=tmp_path / name, **options))
        return rows(tmp_path / name / "predictions.csv")

    before = graded("as it is", tiny)
    brightness, side = TASKS
    cooled = calibration.at_temperature(numbers(before, brightness), FIT["temperatures"]["brightness"])
    as_hasty = calibration.as_rater(numbers(before, side), RATERS["hasty"]["t2"]["side"])
    after = graded("hasty", tiny, calibrate=True, rater="hasty")
    np.testing.assert_allclose(numbers(after, side), as_hasty, atol=1e-5)
    np.testing.assert_allclose(numbers(after, brightness), cooled, atol=1e-5)  # it has graded no disc's brightness
    after = graded("hasty on t1", with_contrast(tiny, tmp_path / "t1", "t1"), calibrate=True, rater="hasty")
    cooled = calibration.at_temperature(numbers(before, side), FIT["temperatures"]["side"])
    np.testing.assert_allclose(numbers(after, side), cooled, atol=1e-5)


def test_a_rater_that_it_does_not_know_is_one_line(raters, run, tiny, tmp_path):
    def graded(**options):
        evaluate.main(evaluate.Arguments(data=tiny, tta=True, out=tmp_path / "out", **options))

    with pytest.raises(SpinejaxError, match=r"--rater nobody: .* its raters are careful and hasty"):
        graded(calibrate=True, rater="nobody")
    with pytest.raises(SpinejaxError, match="--rater hasty: give --calibrate too"):
        graded(rater="hasty")
    with pytest.raises(SpinejaxError, match=r"--rater hasty: .* it has no raters"):
        graded(checkpoint=run, calibrate=True, rater="hasty")
    assert not (tmp_path / "out").exists()


def test_discs_that_look_unlike_those_it_learned_from_are_told_and_graded(run, network, tiny, tmp_path, capsys):
    data = DataSet(tiny)
    usual = unusual.fit(data)
    usual = usual._replace(threshold=2 * usual.threshold)  # six unseen discs are few
    *others, last = (data.disc(row) for row in data.rows("test"))
    negative = np.where(last.volume > 0, 65535 - last.volume, 0).astype(np.uint16)
    discs = [*others, dataclasses.replace(last, volume=negative)]
    (tmp_path / "data").mkdir()
    summary = write_shard(tmp_path / "data" / shard_name(0, 1), discs, TASKS)
    write_manifest(tmp_path / "data", [summary], TASKS, {}, ())

    def graded(name):
        page = tmp_path / f"page of {name}"
        evaluate.main(evaluate.Arguments(data=tmp_path / "data", batch_size=8, out=tmp_path / name, report=page))
        results = json.loads((tmp_path / name / "results.json").read_text())
        return rows(tmp_path / name / "predictions.csv"), results, (page / "index.html").read_text()

    before, results, _ = graded("before")
    assert results["unusual_discs"] is None
    assert not {"unusual", "distance"} & set(before[0])
    shipped.write(run, network, provenance=PROVENANCE, contrasts=["t2"], usual=usual)
    capsys.readouterr()
    after, results, page = graded("after")
    assert [row["unusual"] for row in after] == ["no"] * 5 + ["yes"]
    assert [float(row["distance"]) > 1 for row in after] == [False] * 5 + [True]
    assert [row["side_p_front"] for row in after] == [row["side_p_front"] for row in before]
    assert results["unusual_discs"] == 1
    told = "1 of 6 discs look unlike those that the network learned from"
    assert told in capsys.readouterr().out
    assert told in page
    assert re.findall(r'"unusual": ?(\w+)', page) == ["false"] * 5 + ["true"]


def test_hotspots_are_drawn_from_the_views_that_it_was_trained_with(network, tiny, tmp_path):
    options = {"hotspots": True, "hotspot": Method(num_views=1), "batch_size": 8}
    evaluate.main(evaluate.Arguments(data=tiny, out=tmp_path / "out", **options))
    with h5py.File(tmp_path / "out" / "hotspots" / "hotspots.h5") as file:
        assert json.loads(file.attrs["method"])["ranges"]["angle_deg"] == VIEWS.angle_deg


def test_a_task_that_it_lacks_or_that_means_something_else_is_one_line(network, tiny, tmp_path):
    options = {"data": tiny, "out": tmp_path / "out", "batch_size": 8}
    with pytest.raises(SpinejaxError, match="unknown task modic; the network grades brightness, side"):
        evaluate.main(evaluate.Arguments(hotspots=True, hotspot_grades=(("modic", "1"),), **options))
    record = shipped.about(network)["record"]
    record["tasks"][0]["grades"] = ["low", "middle", "high"]
    change(network, record=record)
    with pytest.raises(SpinejaxError, match="the grades dark, grey, bright; the network learned low, middle, high"):
        evaluate.main(evaluate.Arguments(**options))


def test_a_damaged_network_grades_nothing(network, tiny, tmp_path):
    (network / shipped.WEIGHTS).unlink()
    with pytest.raises(SpinejaxError, match=r"spinenet.npz: cannot be read .* Install spinejax again\."):
        evaluate.main(evaluate.Arguments(data=tiny, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scan", "learned", "weighting", "said"),
    [
        ("one_t2", ["t2"], None, ""),
        ("one", ["t2"], None, ""),  # nothing tells its contrast
        ("one_t1", ["t1", "t2"], None, ""),
        ("one_t1", ["t2"], "t1", "it is graded, but it is t1, and the network has learned t2."),
        ("one_stir", ["t1", "t2"], "any", "it is graded, but it is stir, and the network has learned t1 and t2."),
        ("one_t1", ["t2"], None, None),
    ],
)
def test_a_scan_of_a_contrast_that_it_has_not_learned_is_told(
    network, tmp_path, capsys, scan, learned, weighting, said
):
    change(network, contrasts=learned)
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
    for folder, image in (("images", spine.scan), ("masks", spine.mask)):
        (tmp_path / folder).mkdir()
        write_mha(tmp_path / folder / f"{scan}.mha", image)
    places = {"masks": tmp_path / "masks", "out": tmp_path / "out", "report": tmp_path / "page"}
    arguments = evaluate.Arguments(scan=(tmp_path / "images",), weighting=weighting, batch_size=8, **places)
    if said is None:
        with pytest.raises(SpinejaxError, match=r"No sagittal scan was found\.\s+one_t1.mha: t1 by its name, t2 was"):
            evaluate.main(arguments)
        return
    evaluate.main(arguments)
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 4
    printed = capsys.readouterr().out
    assert said in printed
    assert ("it is graded, but" in printed) == bool(said)
    assert "4 discs of 1 patients, raw scans, 1 view each" in printed
    assert "split" not in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["raw_scans"]
    page = re.sub(
        r"<style>.*?</style>|<script.*?</script>", "", (tmp_path / "page" / "index.html").read_text(), flags=re.DOTALL
    )
    assert "raw scans" in page
    assert "No rater has graded these discs" in page
    assert "split" not in page
