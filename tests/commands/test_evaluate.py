"""Evaluation as its users run it, and the manual's two ways to load a checkpoint in other code."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pydicom
import pytest

import spinejax
from data_prep.dataset.resuming import only_writer
from data_prep.phantom.write_dicom import write_dicom
from data_prep.read.dicomweb import store
from data_prep.read.metaimage import write_mha
from spinejax.commands import evaluate
from spinejax.config import Config
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import shard_name, write_shard
from spinejax.errors import SpinejaxError
from spinejax.files import checksums
from spinejax.inference import hotspots, predict
from spinejax.inference.graded import labels_of
from spinejax.inference.hotspots import Method
from spinejax.metrics import grading
from spinejax.parallel import devices, runtime
from spinejax.report import tables
from spinejax.tasks import UNLABELLED, Task
from spinejax.training import checkpoint, saved_step, train_step
from tests import dicom_files
from tests.block_spine import block_spine
from tests.conftest import TASKS, a_disc, write_tiny
from tests.orthanc import PASSWORD, USER, needs_orthanc, running_orthanc

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an untrained network, saved from eight devices."""
    folder = tmp_path_factory.mktemp("run") / "run"
    options = Config(width=0.02)
    model = train_step.make_model(options, TASKS)
    state = train_step.init(jax.random.key(0), model, options, np.full(9, 0.3, np.float32))
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoint.save(
        checkpoints, devices.put_replicated(state, devices.make_mesh()), model, data_digest="abc", error=0.5
    )
    checkpoints.close()
    checkpoint.export(folder)
    return folder


def grade(run, data, out, **options):
    evaluate.main(evaluate.Arguments(checkpoint=run, data=data, out=out, batch_size=8, **options))
    with open(out / "predictions.csv", newline="") as file:
        return json.loads((out / "results.json").read_text()), list(csv.DictReader(file))


def test_results_and_predictions_have_the_promised_form(run, tiny, tmp_path, capsys):
    results, predictions = grade(run, tiny, tmp_path, tta=True)
    assert (results["split"], results["num_views"], results["average"]) == ("test", 54, "probabilities")
    assert results["trained_on_this_data"] is False
    assert set(results["tasks"]) == {"brightness", "side"}
    brightness = results["tasks"]["brightness"]
    assert set(brightness["mean_per_class_accuracy"]) == {"value", "low", "high"}
    assert 0 <= brightness["mean_per_class_accuracy"]["value"] <= 1
    assert {"n", "kappa", "matthews", "auc", "within_one", "normal_abnormal_accuracy", "per_class"} <= set(brightness)
    assert "within_one" not in results["tasks"]["side"]
    assert results["doubt"]["side"]["referring"]["spread"]["accuracy_at_coverage"]["1"]["value"] >= 0
    assert len(results["doubt"]["brightness"]["referring"]["confidence"]["curve"]) == 6
    assert "normal_abnormal_accuracy" in results["tasks"]["side"]
    assert np.sum(brightness["confusion"]) == brightness["n"] == 6
    assert len(predictions) == 6
    data = DataSet(tiny)
    for line, row in zip(predictions, data.rows("test"), strict=True):
        assert (line["patient"], line["level"]) == (data.patient[row], data.level[row])
        assert line["brightness_label"] == TASKS[0].grades[data.labels[row, 0]]
        chances = [float(line[f"brightness_p_{grade}"]) for grade in TASKS[0].grades]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert 0 < float(line["brightness_spread"]) < 0.5
        assert line["brightness_grade"] == TASKS[0].grades[int(np.argmax(chances))]
    for name in ("confusion.png", "trust.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("54 views each", "Mean per-class accuracy", "Matthews", "mean over tasks", "Research use only"):
        assert text in printed


def test_niivue_pages_show_every_scan_with_the_hotspots_that_are_written(run, tiny, tmp_path, capsys):
    hotspots = {"hotspots": True, "hotspot": Method(num_views=1), "trained_views": False}
    grade(run, tiny, tmp_path / "out", niivue=tmp_path / "page", **hotspots)
    assert f"NiiVue's page is {tmp_path / 'page' / 'index.html'}" in capsys.readouterr().out.replace("\n", "")
    scans = sorted(set(DataSet(tiny).scan[DataSet(tiny).rows("test")].tolist()))
    pages = sorted(path.name for path in (tmp_path / "page").iterdir())
    assert pages == ["index.html", *(f"scan-{number:03d}.html" for number in range(1, len(scans) + 1))]
    for page in pages[1:]:
        text = (tmp_path / "page" / page).read_text()
        assert all(f'id="volume-hotspots-{task.name}"' in text for task in TASKS)


def test_too_little_device_memory_names_the_option_that_lowers_it_and_by_how_much(run, tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")

    def said(**options):
        with pytest.raises(SpinejaxError, match=r"^Out of device memory: ") as raised:
            evaluate.main(evaluate.Arguments(checkpoint=run, data=tiny, out=tmp_path / "out", split="train", **options))
        return str(raised.value)

    def lowered(what, option, **options):
        pattern = rf"{what} takes (.+) MB on each device\. `{option}` lowers that to about (.+) MB, to the same results"
        now, then = map(float, re.search(pattern, said(**options)).groups())
        assert 0.4 * now < then < 0.95 * now

    with monkeypatch.context() as grading:
        grading.setattr(predict, "predict_step", full)
        lowered("grading 16 discs at once", "--batch-size 8", batch_size=16, tta=True)
        assert said(batch_size=8, tta=True).endswith("Use --dtype bfloat16, or leave out --tta.")
    monkeypatch.setattr(hotspots, "hotspot_step", full)
    making = "making hotspots with 4 views of a disc at once"
    lowered(making, "--hotspot.views-at-once 2", batch_size=8, hotspots=True, hotspot=Method(num_views=4))
    assert said(batch_size=8, hotspots=True, hotspot=Method(num_views=1)).endswith("Use --dtype bfloat16.")


def test_bfloat16_changes_no_probability_by_more_than_two_hundredths(tiny, tmp_path):
    """Of the network that ships, whose probabilities are far from uniform: a rounding would show."""
    plain, rounded = (grade(None, tiny, tmp_path / dtype, dtype=dtype)[1] for dtype in ("float32", "bfloat16"))
    names = [name for name in plain[0] if re.search("_p_", name)]
    one, other = (np.array([[float(line[name]) for name in names] for line in lines]) for lines in (plain, rounded))
    assert one.max() > 0.8
    assert 0 < np.abs(one - other).max() <= 0.02


def test_an_unknown_precision_is_refused_by_name(run, tiny, tmp_path, capsys, monkeypatch):
    words = ["--checkpoint", str(run), "--data", str(tiny), "--out", str(tmp_path / "out"), "--dtype", "float8"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as ending:
        evaluate.cli()
    assert ending.value.code == 2
    said = capsys.readouterr().err
    assert "--dtype" in said
    assert "float8" in said
    assert "bfloat16" in said
    assert not (tmp_path / "out").exists()


def test_all_splits_are_graded_at_once(run, tiny, tmp_path, capsys):
    results, predictions = grade(run, tiny, tmp_path, split="all", report=tmp_path / "page")
    data = DataSet(tiny)
    assert results["split"] == "all"
    assert results["tasks"]["brightness"]["n"] == len(predictions) == len(data) == 36
    assert [line["patient"] for line in predictions] == data.patient.tolist()
    assert "36 discs of 12 patients, split all" in capsys.readouterr().out
    assert "evaluation of all splits" in (tmp_path / "page" / "index.html").read_text()
    with pytest.raises(SpinejaxError, match="--calibrate fits on the validation split, so it cannot be judged there"):
        grade(run, tiny, tmp_path, split="all", calibrate=True)


def test_the_metrics_are_those_of_the_predictions(run, tiny, tmp_path):
    results, predictions = grade(run, tiny, tmp_path)
    labelled = [line for line in predictions if line["side_label"]]
    labels = np.array([TASKS[1].grades.index(line["side_label"]) for line in labelled])
    grades = np.array([TASKS[1].grades.index(line["side_grade"]) for line in labelled])
    counts = grading.patient_confusions(labels, grades, np.zeros(len(labels)), 2)[0]
    assert results["tasks"]["side"]["confusion"] == counts.tolist()
    assert results["num_views"] == 1


def test_grades_of_least_expected_distance(run, tiny, tmp_path, monkeypatch):
    chances = {"brightness": np.tile([0.4, 0.3, 0.3], (6, 1)), "side": np.tile([0.9, 0.1], (6, 1))}

    def unsure(*_, **__):
        yield np.arange(6), chances, {name: np.zeros(6) for name in chances}

    monkeypatch.setattr(evaluate.predict, "predict", unsure)
    _, plain = grade(run, tiny, tmp_path / "plain")
    results, lines = grade(run, tiny, tmp_path / "out", decide_by="distance", refer_below=0.3)
    assert {line["brightness_grade"] for line in plain} == {"dark"}
    assert {line["brightness_grade"] for line in lines} == {"grey"}
    assert {line["side_grade"] for line in lines} == {"front"}
    assert results["decided_by"] == "distance"
    confusion = np.array(results["tasks"]["brightness"]["confusion"])
    assert confusion[:, 1].sum() == confusion.sum() == 6
    grey = sum(line["brightness_label"] == "grey" for line in lines)
    assert results["referral"]["brightness"]["accuracy_of_kept"]["value"] == pytest.approx(grey / 6)


def test_grades_below_a_probability_are_referred_to_a_rater(run, tiny, tmp_path, capsys):
    _, plain = grade(run, tiny, tmp_path / "plain")
    confidence = {
        task.name: [max(float(line[f"{task.name}_p_{grade}"]) for grade in task.grades) for line in plain]
        for task in TASKS
    }
    below = sorted(confidence["side"])[2]  # two of the six are below; three grades have less than two
    results, predictions = grade(run, tiny, tmp_path / "out", refer_below=below - 5e-7, report=tmp_path / "page")
    assert not any(column.endswith("_refer") for column in plain[0])
    for before, line in zip(plain, predictions, strict=True):
        assert before.items() <= line.items()
    assert [line["side_refer"] for line in predictions] == ["yes" if c < below else "no" for c in confidence["side"]]
    assert {line["brightness_refer"] for line in predictions} == {"yes"}

    side = results["referral"]["side"]
    kept = [line for line in predictions if line["side_refer"] == "no"]
    labelled = [line for line in kept if line["side_label"]]
    assert side["n"] == 6
    assert side["share_kept"]["value"] == pytest.approx(len(kept) / 6) == pytest.approx(4 / 6)
    assert side["labelled_kept"] == len(labelled)
    right = sum(line["side_grade"] == line["side_label"] for line in labelled)
    assert side["accuracy_of_kept"]["value"] == pytest.approx(right / len(labelled))
    brightness = results["referral"]["brightness"]
    assert brightness["share_kept"]["value"] == brightness["labelled_kept"] == 0
    assert brightness["accuracy_of_kept"] == {"value": None, "low": None, "high": None}
    assert "the others are referred to a rater" in capsys.readouterr().out
    page = (tmp_path / "page" / "index.html").read_text()
    assert f'<td class="n">{tables.percent(grading.Estimate(**side["share_kept"]))}</td>' in page


@pytest.mark.parametrize("below", [-0.1, 1.5, float("nan")])
def test_a_probability_to_refer_below_is_in_range(run, tiny, tmp_path, below):
    with pytest.raises(SpinejaxError, match=r"--refer-below is .*: expected a probability, from 0 to 1"):
        grade(run, tiny, tmp_path / "out", refer_below=below)
    assert not (tmp_path / "out").exists()


def test_averaging_logits_differs_from_averaging_probabilities(run, tiny, tmp_path):
    _, probabilities = grade(run, tiny, tmp_path / "p", tta=True)
    _, logits = grade(run, tiny, tmp_path / "l", tta=True, average="logits")
    column = "brightness_p_dark"
    pairs = [(float(a[column]), float(b[column])) for a, b in zip(probabilities, logits, strict=True)]
    assert all(abs(a - b) < 0.05 for a, b in pairs)
    assert any(a != b for a, b in pairs)


def test_discs_without_labels_get_predictions_only(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    discs = [a_disc(rng, f"p{n}", "L5-S1", "test", labels={}) for n in range(3)]
    summary = write_shard(folder / shard_name(0, 1), discs, TASKS)
    write_manifest(folder, [summary], TASKS, {}, ())
    results, predictions = grade(run, folder, tmp_path / "out")
    assert results["tasks"] == {}
    assert [line["brightness_label"] for line in predictions] == ["", "", ""]
    assert "predictions only" in capsys.readouterr().out


def test_the_report_shows_the_metrics_and_no_path(run, tiny, tmp_path, capsys):
    """With hotspots, of a data set that has no masks."""
    page = tmp_path / "page"
    options = {"hotspots": True, "hotspot": Method(num_views=2), "hotspot_grades": (("side", "back"),)}
    results, predictions = grade(run, tiny, tmp_path / "out", report=page, **options)
    assert f"The page is {page / 'index.html'}" in capsys.readouterr().out
    text = (page / "index.html").read_text()
    value = results["tasks"]["side"]["mean_per_class_accuracy"]["value"]
    assert f"{100 * value:.1f} [" in text
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', text, re.S).group(1))
    assert [disc["traced"][1] for disc in facts["discs"]] == [1] * 6
    assert [disc["level"] for disc in facts["discs"]] == [line["level"] for line in predictions]
    assert 'id="maps-5"' in text
    assert "hotspots" not in results  # no mask tells how well they point
    for path in (run, tiny, tmp_path):
        assert str(path) not in text


def test_the_report_works_without_hotspots_and_its_folder_is_made_first(run, tiny, tmp_path):
    grade(run, tiny, tmp_path / "out", report=tmp_path / "page")
    text = (tmp_path / "page" / "index.html").read_text()
    assert 'id="window-5"' in text
    assert 'id="maps-0"' not in text
    (tmp_path / "file").write_text("")
    with pytest.raises(SpinejaxError, match="no folder can be made there"):
        grade(run, tiny, tmp_path / "none", report=tmp_path / "file" / "page")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("chosen", "fault"),
    [(("side", "up"), "side has no grade 'up', only front, back"), (("depth", "1"), "unknown task depth")],
)
def test_an_unknown_task_or_grade_stops_before_the_report(run, tiny, tmp_path, chosen, fault):
    options = {"hotspots": True, "hotspot_grades": (chosen,), "report": tmp_path / "page"}
    with pytest.raises(SpinejaxError, match=fault):
        grade(run, tiny, tmp_path / "out", **options)
    assert not (tmp_path / "page").exists()


def test_a_data_set_of_other_tasks_is_matched_by_name(run, tiny):
    data = DataSet(tiny)
    rows = data.rows("test")
    labels = labels_of(data, rows, (Task("absent", ("a", "b")), TASKS[1]))
    assert (labels["absent"] == UNLABELLED).all()
    np.testing.assert_array_equal(labels["side"], data.labels[rows, 1])
    with pytest.raises(SpinejaxError, match="side has the grades front, back; the network learned left, right"):
        labels_of(data, rows, (Task("side", ("left", "right")),))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"split": "validation"}, "no disc in split 'validation'"),
        ({"checkpoint": Path("nowhere")}, "not a checkpoint"),
        ({"data": Path("nowhere")}, "nowhere: no such folder"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_what_is_missing_is_named(run, tmp_path, changes, fault):
    data = write_tiny(tmp_path / "data", num_patients=(2, 0, 1), levels=("L5-S1",))
    arguments = {"checkpoint": run, "data": data, "out": tmp_path / "out", "batch_size": 8} | changes
    with pytest.raises(SpinejaxError, match=fault):
        evaluate.main(evaluate.Arguments(**arguments))


@pytest.mark.parametrize("missing", [{"data": Path("nowhere")}, {"scan": (Path("nowhere"),)}], ids=str)
def test_where_there_is_nothing_to_grade_nothing_is_made(run, tmp_path, missing):
    with pytest.raises(SpinejaxError, match="nowhere: no such f"):
        evaluate.main(evaluate.Arguments(checkpoint=run, out=tmp_path / "out", report=tmp_path / "page", **missing))
    assert not list(tmp_path.iterdir())


def test_the_command_exits_with_status_2_and_one_line(tiny):
    result = subprocess.run(
        [sys.executable, "evaluate.py", "--checkpoint", "nowhere", "--data", str(tiny)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.strip().count("\n") == 0


def test_results_are_written_into_the_run_or_to_out(run, tiny):
    evaluate.main(evaluate.Arguments(checkpoint=run, data=tiny, batch_size=8))
    assert (run / "evaluation-test-1-view" / "results.json").is_file()
    with pytest.raises(SpinejaxError, match="not a whole run: say with --out"):
        evaluate.main(evaluate.Arguments(checkpoint=run / "export", data=tiny, batch_size=8))


def test_hotspots_of_an_earlier_evaluation_are_removed(run, tiny, tmp_path):
    common = {"checkpoint": run, "data": tiny, "out": tmp_path / "out", "batch_size": 8}
    evaluate.main(evaluate.Arguments(**common, hotspots=True, hotspot=Method(num_views=1)))
    assert (tmp_path / "out" / "hotspots" / "hotspots.h5").is_file()
    evaluate.main(evaluate.Arguments(**common))
    assert not (tmp_path / "out" / "hotspots").exists()
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.fixture
def training(run, tmp_path):
    """A run that still trains: a copy, and a function that saves a step of other weights with a validation error."""
    copy = shutil.copytree(run, tmp_path / "training")
    options = Config(width=0.02)
    model = train_step.make_model(options, TASKS)
    checkpoints = checkpoint.Checkpoints(copy)

    def save(step, error):
        state = train_step.init(jax.random.key(step), model, options, np.full(9, 0.3, np.float32))
        saved = state.replace(step=state.step + step)
        checkpoint.save(checkpoints, saved, model, data_digest="abc", error=error)
        checkpoints.wait()

    yield copy, save
    checkpoints.close()


def as_found(monkeypatch, happens):
    """Let something happen right after the checkpoint was resolved for the first time."""
    find = checkpoint.find

    def find_then(path):
        found = find(path)
        monkeypatch.setattr(checkpoint, "find", find)
        happens(found)
        return found

    monkeypatch.setattr(checkpoint, "find", find_then)


def test_a_better_step_saved_during_the_evaluation_changes_nothing(run, training, tiny, tmp_path, monkeypatch):
    """Results, weights and temperatures are those of the step that was the best when the evaluation began."""
    folder, save = training
    _, expected = grade(run, tiny, tmp_path / "expected")
    as_found(monkeypatch, lambda found: save(3, error=0.1))
    results, predictions = grade(folder, tiny, tmp_path / "out", calibrate=True)
    assert checkpoint.find(folder).name == "3"
    assert results["step"] == 0
    assert [line["side_grade"] for line in predictions] == [line["side_grade"] for line in expected]
    stored = [path.parent.name for path in folder.rglob("calibration.json")]
    assert sorted(stored) == ["0", "export"]
    assert grade(run, tiny, tmp_path / "again", calibrate=True)[1] == predictions
    for path in run.rglob("calibration.json"):
        path.unlink()


def test_a_step_deleted_during_the_search_for_the_best_is_skipped(training, tiny, tmp_path, monkeypatch):
    folder, save = training
    save(3, error=0.1)
    read = saved_step.read_record

    def delete_first(path):
        if path.name == "0" and path.is_dir():
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(saved_step, "read_record", delete_first)
    assert grade(folder, tiny, tmp_path / "out")[0]["step"] == 3


def test_a_step_deleted_while_it_is_read_is_one_message(training, tiny, tmp_path, monkeypatch):
    folder, _ = training
    as_found(monkeypatch, shutil.rmtree)
    with pytest.raises(SpinejaxError, match=r"checkpoints/0: training deleted or replaced .* Evaluate again\."):
        grade(folder, tiny, tmp_path / "out")


def test_a_network_whose_probabilities_are_not_finite_is_refused(tiny, tmp_path):
    options = Config(width=0.02)
    model = train_step.make_model(options, TASKS)
    state = train_step.init(jax.random.key(0), model, options, np.full(9, 0.3, np.float32))
    state = state.replace(params=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), state.params))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.5)
    checkpoints.close()
    with pytest.raises(SpinejaxError, match="checkpoints/0: this network gives probabilities that are not finite"):
        grade(tmp_path / "run", tiny, tmp_path / "out")


@pytest.mark.parametrize(
    ("split", "chosen_on", "same_data", "said"),
    [
        ("test", "test", True, "The test split decided"),
        ("validation", "validation", True, "The validation split decided"),
        ("test", "validation", True, None),
        ("test", "test", False, "trained on another data set"),
        ("train", "validation", True, "trained on the discs of this split"),
        ("all", "validation", True, "trained on the train split of these discs"),
        ("all", "validation", True, "The validation split decided"),
        ("all", "validation", False, "trained on another data set"),
    ],
)
def test_a_split_that_chose_the_step_or_was_trained_on_is_reported(
    training, tiny, tmp_path, capsys, split, chosen_on, same_data, said
):
    folder, _ = training
    path = checkpoint.find(folder) / "record" / "metadata"
    data = DataSet(tiny).digest if same_data else "abc"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_split": chosen_on, "data": data}))
    checksums.seal(path.parents[1])
    results, _ = grade(folder, tiny, tmp_path / "out", split=split, report=tmp_path / "page")
    assert results["validation_split"] == chosen_on
    assert results["split_chose_the_step"] is (same_data and split in (chosen_on, "all"))
    printed, page = capsys.readouterr().out, (tmp_path / "page" / "index.html").read_text()
    for text in (printed, page):
        assert (said is None) == ("decided" not in text and "trained on" not in text)
        assert said is None or said in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "file", "options"),
    [
        (400_000, "hotspots/hotspots.h5", ("--hotspots",)),
        (100_000, "hotspots/nifti/.*nii.gz", ("--hotspots",)),
        (100_000, "page/index.html", ("--report", "page")),
        (15_000, "confusion.png", ()),
        (500, "predictions.csv", ()),
    ],
)
def test_a_full_disk_is_one_message_and_nothing_half_written(run, tiny, tmp_path, launcher, limit, file, options):
    out = tmp_path / "out"
    options = [str(tmp_path / "page") if word == "page" else word for word in options]
    command = ["evaluate.py", "--checkpoint", run, "--data", tiny, "--batch-size", "8", "--out", out, *options]
    end = launcher.run([*command, *(("--hotspot.num-views", "2") if "--hotspots" in options else ())], limit=limit)
    assert end.status == 2, end
    assert len(end.said) == 1, end
    assert re.fullmatch(rf"error: {tmp_path}/(out/)?{file}: File too large", end.said[0]), end
    assert not list(tmp_path.rglob("*.tmp"))
    assert not [path for path in tmp_path.rglob("*") if re.fullmatch(file, path.name)]


def test_raw_scans_have_a_folder_of_their_own(run):
    arguments = evaluate.Arguments(checkpoint=run, scan=(Path("x"),))
    assert evaluate.output_folder(arguments, run) == run / "evaluation-scan-1-view"


@pytest.fixture
def raw(tmp_path):
    """`--scan` and `--masks` of one raw scan."""
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
    for folder, scan in (("images", spine.scan), ("masks", spine.mask)):
        (tmp_path / folder).mkdir()
        write_mha(tmp_path / folder / "one_t2.mha", scan)
    return {"scan": (tmp_path / "images",), "masks": tmp_path / "masks"}


def test_raw_scans_replace_only_results_of_raw_scans(run, tiny, raw, tmp_path):
    out = tmp_path / "out"
    evaluate.main(evaluate.Arguments(checkpoint=run, out=out, batch_size=8, **raw))
    made = {"discs", "levels.png", "predictions.csv", "results.json"}
    assert {path.name for path in out.iterdir()} == made
    assert {path.name for path in tmp_path.iterdir()} == {"images", "masks", "out", "out.key"}
    before = (out / "levels.png").stat().st_mtime_ns
    wrong = {"hotspots": True, "hotspot_grades": (("side", "9"),)}
    with pytest.raises(SpinejaxError, match="9"):  # before anything is replaced
        evaluate.main(evaluate.Arguments(checkpoint=run, out=out, batch_size=8, **raw, **wrong))
    assert {path.name for path in out.iterdir()} == made
    assert (out / "levels.png").stat().st_mtime_ns == before
    shutil.rmtree(out / "discs")
    shutil.copytree(tiny, out / "discs")
    for place in (out / "discs", tmp_path / "out.discs"):
        with pytest.raises(SpinejaxError, match=f"{place.name}: holds what --scan did not make"):
            evaluate.main(evaluate.Arguments(checkpoint=run, out=out, batch_size=8, **raw))
        assert DataSet(place).digest == DataSet(tiny).digest
        (place / "manifest.json").unlink()  # not a data set, but somebody's
        if place.parent == out:
            with pytest.raises(SpinejaxError, match="holds what --scan did not make"):
                evaluate.main(evaluate.Arguments(checkpoint=run, out=out, batch_size=8, **raw))
            shutil.rmtree(place)
            shutil.copytree(tiny, tmp_path / "out.discs")


@pytest.mark.parametrize(
    "changes",
    [
        {"PatientID": "", "PatientName": ""},
        {"PatientID": "ANONYMOUS", "PatientName": "ANONYMOUS"},
        {"PatientID": "", "PatientName": "", "StudyInstanceUID": ""},
        {"StudyInstanceUID": "1.2.3"},  # one study of two patients
    ],
)
def test_raw_scans_need_no_patient(run, tmp_path, capsys, changes):
    """De-identified DICOM is graded as it comes, and without advice that this command has no option for."""
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
    (tmp_path / "masks").mkdir()
    for name in ("one", "two"):
        images = dicom_files.series(tmp_path / "images" / name, spine.scan, patient=name)
        for image in images:
            for tag, value in changes.items():
                setattr(image, tag, value)
            dicom_files.save(image)
        write_mha(tmp_path / "masks" / f"{images[0].SeriesInstanceUID}.mha", spine.mask)
    arguments = {"scan": (tmp_path / "images",), "masks": tmp_path / "masks", "out": tmp_path / "out"}
    evaluate.main(evaluate.Arguments(checkpoint=run, batch_size=8, **arguments))
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert len({row["scan"] for row in rows}) == len({row["patient"] for row in rows}) == 2
    assert all(re.fullmatch("[0-9a-f]{16}", row["patient"]) for row in rows)
    printed = capsys.readouterr()
    assert "patients-by" not in printed.out + printed.err


@needs_orthanc
def test_a_study_of_a_dicomweb_server_is_graded_as_its_files_are_and_leaves_nothing(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("DICOMWEB_USER", USER)
    monkeypatch.setenv("DICOMWEB_PASSWORD", PASSWORD)
    for name in ("temporary", "masks of series", "orthanc"):
        (tmp_path / name).mkdir()
    spine = block_spine(spacing_mm=(1.5, 1.5, 6.0), num_slices=5)
    series = write_dicom(tmp_path / "dicom", spine.scan, patient="p1", series="t2")
    write_mha(tmp_path / "masks of series" / f"{series}.mha", spine.mask)
    files = sorted((tmp_path / "dicom").iterdir())
    common = {"checkpoint": run, "masks": tmp_path / "masks of series", "key": tmp_path / "key", "batch_size": 8}
    with running_orthanc(tmp_path / "orthanc") as server:
        assert store(f"http://{server}", files) == (len(files), {})
        study = Path(f"dicomweb://{server}/studies/{pydicom.dcmread(files[0]).StudyInstanceUID}")
        evaluate.main(evaluate.Arguments(scan=(study,), out=tmp_path / "by server", **common))
    assert not list((tmp_path / "temporary").iterdir())
    evaluate.main(evaluate.Arguments(scan=(tmp_path / "dicom",), out=tmp_path / "by files", **common))
    by_server, by_files = ((tmp_path / f"by {name}" / "predictions.csv").read_text() for name in ("server", "files"))
    assert by_server == by_files


def test_the_key_of_raw_scans_is_not_inside_the_run(run, raw, tmp_path):
    evaluate.main(evaluate.Arguments(checkpoint=run, batch_size=8, **raw))
    assert run.with_name("run.key").is_file()
    assert not list(run.rglob("*.key"))
    evaluate.main(evaluate.Arguments(checkpoint=run, batch_size=8, key=tmp_path / "own", **raw))
    assert (tmp_path / "own").is_file()
    shutil.rmtree(run / "evaluation-scan-1-view")


def test_two_evaluations_into_one_folder_are_refused(run, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"), pytest.raises(SpinejaxError, match="is writing into this folder"):
        grade(run, tiny, tmp_path / "out")
    grade(run, tiny, tmp_path / "out")


def test_published_results_are_shown_for_tasks_of_the_same_grades_only():
    def row(task):
        labels = np.arange(20) % task.num_grades
        result = grading.evaluate_task(task, labels, np.eye(task.num_grades)[labels], np.arange(20), num_resamples=5)
        table = tables.accuracy_table([result], "conv5")
        return [next(column.cells) for column in table.columns]

    assert row(Task("narrowing", ("1", "2", "3", "4")))[-2:] == ["73.9 ± 0.7", "72.0"]
    assert row(Task("narrowing", ("absent", "present")))[-2:] == ["–", "–"]


def test_the_manuals_code_runs_on_one_device(run, tiny, tmp_path):
    """With a checkpoint that was saved on eight devices. The last block reads it without this library."""
    page = (ROOT / "docs" / "jax.md").read_text()
    *ours, plain = re.findall(r"```python\n(.*?)```", page, re.S)
    assert "spinejax" not in plain
    replacements = {
        "spinejax.load()": f"spinejax.load({str(run)!r})",  # whatever network ships
        "runs/quickstart/run": str(run),
        "runs/quickstart/discs": str(tiny),
        '{"pfirrmann": 4}': "{'side': 1}",
    }
    ours = f"{''.join(ours)}\nassert set(probabilities) == set(maps) == set(scores) == {{'brightness', 'side'}}\n"
    plain = (
        f"import sys\nsys.modules['spinejax'] = None\n{plain}\nassert sorted(variables) == ['constants', 'params']\n"
    )
    for code in (ours, plain):
        for manuals, here in replacements.items():
            code = code.replace(manuals, here)
        environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_loaded_variables_equal_what_plain_orbax_reads(run):
    import orbax.checkpoint as ocp

    _, variables = spinejax.load(run)
    with ocp.StandardCheckpointer() as reader:
        plain = reader.restore(run.absolute() / "export" / "variables")
    jax.tree.map(np.testing.assert_array_equal, variables, plain)
