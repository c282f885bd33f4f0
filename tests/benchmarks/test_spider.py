"""SPIDER's cross-validation: pooled grades, baselines, and continuing after an interruption."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import intensity_baseline, spider
from data_prep.sources.spider import SPIDER_TASKS
from spinejax.config import PRESETS
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.geometry import INTENSITY_STEP, VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.inference.graded import Graded, labels_of
from spinejax.metrics.grading import evaluate_task
from spinejax.tasks import Task, select

TASKS = select(SPIDER_TASKS, PRESETS["spider"][1].tasks)


def a_disc(rng, patient, level):
    """The worse a disc's Pfirrmann grade, the darker its nucleus; half of the patients have stacks with masks."""
    grade = int(rng.integers(5))
    volume = rng.integers(30000, 34000, VOLUME_SHAPE, dtype=np.uint16)
    volume[84:108, 100:220] = 40000 - 8000 * grade
    region = np.zeros(VOLUME_SHAPE, np.uint8)
    stack = patient % 2 == 0
    if stack:
        region[:84], region[108:] = 1, 3
    else:
        volume[:, :, :7] = volume[:, :, 8:] = 0
    labels = {"pfirrmann": grade, "narrowing": int(grade > 2), "upper_endplate": int(rng.integers(2))}
    return Disc(
        volume=volume,
        affine=np.eye(4),
        slices=(0, 15) if stack else (7, 8),
        labels=labels | {"lower_endplate": int(rng.integers(2)), "modic": int(rng.integers(2))},
        level=level,
        patient=f"p{patient:02d}",
        scan=f"s{patient:02d}",
        split="train",
        region=region,
    )


def write_discs(folder):
    rng = np.random.default_rng(0)
    discs = [a_disc(rng, patient, level) for patient in range(15) for level in ("L3-L4", "L4-L5")]
    folder.mkdir(parents=True)
    summary = write_shard(folder / shard_name(0, 1), discs, SPIDER_TASKS, ("region",))
    write_manifest(folder, [summary], SPIDER_TASKS, {}, ("region",))


def grade_perfectly(discs, out):
    data = DataSet(discs)
    rows = data.rows("test")
    labels = labels_of(data, rows, TASKS)
    right = {task.name: np.eye(task.num_grades)[labels[task.name]] for task in TASKS}
    nothing = {task.name: np.zeros(len(rows)) for task in TASKS}
    out.mkdir(parents=True)
    Graded(data, rows, TASKS, labels, right, nothing).write(out / "predictions.csv")


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run. Those that do not prepare data are replaced by functions that make their results."""
    seen = []
    really_run = spider.run_script

    def pretend(*command):
        words = [str(word) for word in command]
        after = dict(itertools.pairwise(words))
        seen.append(words)
        if words[:3] == ["-m", "data_prep", "spider"]:
            write_discs(Path(after["--out"]))
        elif words[:3] == ["-m", "data_prep", "phantom"]:
            Path(after["--out"]).mkdir(parents=True)
        elif words[:3] == ["-m", "data_prep", "fold"]:
            really_run(*command)
        elif words[0] == "train.py":
            (Path(after["--workdir"]) / "export").mkdir(parents=True)
        else:
            grade_perfectly(after["--data"], Path(after["--out"]))

    def no_hotspots(data, tasks, folder):
        shares = [{"task": "upper_endplate", "patient": str(data.patient[0]), "own_side": 0.75}]
        (folder / "own_side.json").write_text(json.dumps(shares))

    monkeypatch.setattr(spider, "run_script", pretend)
    monkeypatch.setattr(spider, "point_in_stacks", no_hotspots)
    monkeypatch.setattr(spider.runtime, "set_up", lambda: None)
    return seen


def arguments(tmp_path, **options):
    return spider.Arguments(Path("SPIDER"), tmp_path / "runs", folds=3, **options)


def test_every_patient_is_graded_once_by_a_network_trained_on_others(tmp_path, commands):
    spider.main(arguments(tmp_path, options=("--epochs", "3")))
    found = json.loads((tmp_path / "runs" / "spider.json").read_text())
    for task in TASKS:
        assert found["all"]["spinejax"][task.name]["n"] == 30
        assert found["all"]["spinejax"][task.name]["mean_per_class_accuracy"]["value"] == 1
    assert found["one slice"]["spinejax"]["modic"]["n"] == 14
    assert found["stacks"]["spinejax"]["modic"]["n"] == 16
    tested = [set(DataSet(tmp_path / "runs" / f"fold-{k}" / "discs").patient[rows]) for k, rows in held_out(tmp_path)]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 15
    assert found["hotspots"]["upper_endplate"]["n"] == 3
    table = (tmp_path / "runs" / "spider.md").read_text()
    assert "| pfirrmann | 30 | mean per-class accuracy, % | 100.0 [100.0, 100.0] |" in table
    assert "| 20.0 | 71.2 |" in table  # chance, and the paper
    assert "| upper_endplate | 3 | 75.0 [75.0, 75.0] |" in table


def held_out(tmp_path):
    return [(k, DataSet(tmp_path / "runs" / f"fold-{k}" / "discs").rows("test")) for k in (1, 2, 3)]


def test_each_fold_starts_from_the_phantoms_and_takes_the_options(tmp_path, commands):
    spider.main(arguments(tmp_path, options=("--epochs", "3")))
    phantoms, *folds = [words for words in commands if words[0] == "train.py"]
    assert phantoms[1] == "quickstart"
    start = phantoms[phantoms.index("--workdir") + 1]
    assert len(folds) == 3
    for words in folds:
        assert words[1] == "spider"
        assert words[words.index("--init-from") + 1] == start
        assert words[-2:] == ["--epochs", "3"]
    assert not list((tmp_path / "runs").glob("fold-*/discs/*.h5"))  # folds share the discs


def test_finished_parts_are_not_run_again(tmp_path, commands):
    spider.main(arguments(tmp_path, init_from=tmp_path))
    first = len(commands)
    (tmp_path / "runs" / "fold-2" / "graded" / "predictions.csv").unlink()
    (tmp_path / "runs" / "fold-2" / "graded").rmdir()
    (tmp_path / "runs" / "fold-2" / "run" / "export").rmdir()
    (tmp_path / "runs" / "fold-2" / "run").rmdir()
    spider.main(arguments(tmp_path, init_from=tmp_path))
    again = [words[2] if words[0] == "-m" else words[0] for words in commands[first:]]
    assert again == ["train.py", "evaluate.py"]


def test_chance_is_what_guessing_gives():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3, 4], [10, 20, 30, 25, 15])
    names = np.arange(100).astype(str)
    many = [evaluate_task(TASKS[0], labels, rng.random((100, 5)), names, num_resamples=1) for _ in range(400)]
    for statistic in ("mean_per_class_accuracy", "within_one", "kappa"):
        guessed = np.mean([each.estimates[statistic].value for each in many])
        assert spider.by_chance(many[0], statistic).value == pytest.approx(guessed, abs=0.02)


def test_hotspots_are_made_for_discs_graded_abnormal(tmp_path):
    write_discs(tmp_path / "discs")
    data = DataSet(tmp_path / "discs")
    maps = np.zeros((len(TASKS), *WINDOW_SHAPE), np.float32)
    maps[:, 10], maps[:, -10] = 3, 1  # three quarters of the energy lie in the upper body
    sided = [task for task in TASKS if "endplate" in task.name]
    graded = {"upper_endplate": [0.4, 0.6], "lower_endplate": [0.3, 0.7]}
    shares = spider.shares_of_disc(data, 0, sided, TASKS, maps, graded)
    assert {share["task"]: share["own_side"] for share in shares} == {"upper_endplate": 0.75, "lower_endplate": 0.25}
    graded["lower_endplate"] = [0.7, 0.3]
    assert len(spider.shares_of_disc(data, 0, sided, TASKS, maps, graded)) == 1


def test_the_mean_of_a_slice_is_over_the_discs_that_have_it(tmp_path):
    write_discs(tmp_path / "discs")
    data = DataSet(tmp_path / "discs")
    windows = [central_window(data.volume(row)) * INTENSITY_STEP for row in range(len(data))]
    stacks = [window for window, (first, stop) in zip(windows, data.slices, strict=True) if stop - first == 15]
    expected = np.mean(stacks, axis=(0, 1, 2), dtype=np.float64)
    expected[4] = np.mean(windows, axis=(0, 1, 2), dtype=np.float64)[4]
    np.testing.assert_allclose(data.mean_of_filled_slices(), expected, rtol=1e-4)
    assert data.slice_mean[0] < 0.6 * expected[0]


# The baselines -------------------------------------------------------------------------------------------------------


def test_the_regression_learns_intensities_from_its_fold_alone(tmp_path):
    write_discs(tmp_path / "discs")
    data = DataSet(tmp_path / "discs")
    labels = data.labels[:, :2].astype(int)
    found = intensity_baseline.all_features(data)
    train = np.arange(len(data)) % 3 > 0
    grades = {"pfirrmann": 5, "narrowing": 2}
    given = intensity_baseline.probabilities(found, labels, grades, train)
    assert np.mean(np.abs(given["pfirrmann"][~train].argmax(1) - labels[~train, 0])) < 0.5  # guessing gives 1.6
    assert np.mean(given["narrowing"][~train].argmax(1) == labels[~train, 1]) > 0.8
    np.testing.assert_allclose(given["narrowing"].sum(1), 1)
    wrong = np.where(train[:, None], labels, (labels + 1) % 2)  # labels of the test discs play no part
    again = intensity_baseline.probabilities(found, wrong, grades, train)
    np.testing.assert_array_equal(given["pfirrmann"], again["pfirrmann"])


def test_the_majority_is_that_of_the_training_discs():
    labels = np.array([[0], [1], [1], [-1], [-1], [-1], [0], [0]])
    train = np.arange(8) < 6
    given = intensity_baseline.majority(labels, {"task": 3}, train)
    np.testing.assert_array_equal(given["task"], np.tile([0, 1, 0], (8, 1)))


def test_a_grade_that_was_not_learned_has_no_probability():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (20, 1))
    given = intensity_baseline.probabilities(rng.random((20, 4)), labels, {"task": 3}, np.ones(20, bool))
    assert given["task"].shape == (20, 3)
    assert not given["task"][:, 2].any()


def test_the_task_table_is_the_presets():
    assert TASKS[0] == Task("pfirrmann", ("1", "2", "3", "4", "5"))
    assert [task.name for task in TASKS[1:]] == ["narrowing", "upper_endplate", "lower_endplate", "modic"]
