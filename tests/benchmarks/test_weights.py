"""The network that ships: pooled grades, baselines, discs that nobody graded, and continuing after an interruption."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from benchmarks import decisions, goals, graded_folds, intensity_baseline, mistakes, own_side, referring, weights
from benchmarks.graded_folds import Missed, Pool
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.detector.training.cross_fitting import NUM_FOLDS, fold_of
from data_prep.sources.pooled import POOLED_TASKS, Patient
from data_prep.sources.spider import COLUMNS
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.geometry import INTENSITY_STEP, VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.inference.graded import Graded, labels_of
from spinejax.metrics import grading
from spinejax.tasks import Task, select

KEY = Pseudonyms(bytes(32))
TASKS = select(POOLED_TASKS, ("pfirrmann", "narrowing", "upper_endplate", "lower_endplate", "modic"))
LEVELS = ("L4-L5", "L5-S1")


def spider_labels(patient, level):
    """The worse the Pfirrmann grade, the more is found."""
    worse = int(patient) + LEVELS.index(level)
    return {"pfirrmann": worse % 5, **{column.task.name: int(worse % 5 > 2) for column in list(COLUMNS.values())[1:]}}


def write_roots(folder):
    """Both sources' tables, and files with the scans' names."""
    spider, sudirman = folder / "spider", folder / "sudirman"
    (spider / "images").mkdir(parents=True)
    sudirman.mkdir()
    rows, series = [], []
    for patient in map(str, range(1, 13)):
        (spider / "images" / f"{patient}_t2.mha").touch()
        (spider / "images" / f"{patient}_t1.mha").touch()
        (spider / "images" / f"{patient}_t2_SPACE.mha").touch()
        known = {
            "sex": "F" if int(patient) % 2 else "M",
            "Manufacturer": "A" * (int(patient) % 3),
            "MagneticFieldStrength": "3.0",
        }
        series += [{"new_file_name": f"{patient}_t2", "subset": "training", **known}]
        for disc, level in enumerate(reversed(LEVELS), 1):
            labels = spider_labels(patient, level)
            cells = {name: str(labels[column.task.name]) for name, column in COLUMNS.items()}
            cells["Pfirrman grade"] = str(labels["pfirrmann"] + 1)
            rows.append({"Patient": patient, "IVD label": str(disc), **cells})
    write_csv(spider / "radiological_gradings.csv", rows)
    write_csv(spider / "overview.csv", series)
    boxes = []
    for patient, (place, level) in itertools.product(range(1, 13), enumerate(LEVELS)):
        edges = {"row_min": 40 * place, "row_max": 40 * place + 30, "col_min": 10, "col_max": 60}
        finding = ("Normal IVD", "Lumbar Disc Bulge (LDB)", "Degenerative Disc Disease (DDD)")[(patient + place) % 3]
        boxes.append({"patient": patient, "scan": f"{patient}_t2", "class": finding, "level": level, **edges})
    write_csv(sudirman / "boxes.csv", boxes)
    grades = [
        {"patient": p, "scan": f"{p}_t2", "level": level, "pfirrmann": 1 + (p + place) % 5}
        for p, (place, level) in itertools.product(range(1, 13), enumerate(LEVELS))
    ]
    write_csv(sudirman / "labels.csv", grades)
    return spider, sudirman


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def a_disc(rng, job, level, place):
    """The worse a disc's Pfirrmann grade, the darker its nucleus; SPIDER's stacks have masks."""
    grade = job.labels[level]["pfirrmann"]
    volume = rng.integers(30000, 34000, VOLUME_SHAPE, dtype=np.uint16)
    volume[84:108, 100:220] = 40000 - 8000 * grade
    region = np.zeros(VOLUME_SHAPE, np.uint8)
    stack = "SPACE" in job.name
    if stack:
        region[:84], region[108:] = 1, 3
    else:
        volume[:, :, :7] = volume[:, :, 8:] = 0
    return Disc(
        volume=volume,
        affine=np.eye(4),
        slices=(0, 15) if stack else (7, 8),
        labels=dict(job.labels[level]),
        level=level,
        patient=job.patient,
        scan=job.scan,
        split=job.split,
        region=region,
    )


def write_discs(folder, arguments):
    """The data set of both sources, in which one disc of three of SPIDER's scans is missing."""
    rng = np.random.default_rng(0)
    jobs, _ = weights.pooled_jobs(
        arguments.spider,
        arguments.sudirman,
        series=weights.SERIES,
        held_out=arguments.patients_held_out(),
        pseudonyms=KEY,
        cutting=weights.Cutting(convention="spider"),
    )
    discs = [
        a_disc(rng, job, level, place)
        for job in jobs
        for place, level in enumerate(LEVELS)
        if (job.patient, level) != (KEY.patient("3"), "L4-L5")
    ]
    folder.mkdir(parents=True)
    summary = write_shard(folder / shard_name(0, 1), discs, POOLED_TASKS, ("region",))
    scans = {job.scan: {"source": job.source, "contrast": job.contrast} for job in jobs}
    write_manifest(folder, [summary], POOLED_TASKS, {}, ("region",), {"scans": scans})


def finished_weights(folder):
    """Both sources' tables, and the folder of `benchmarks.weights` with its discs and its key."""
    spider, sudirman = write_roots(folder)
    made = weights.Arguments(spider, sudirman, folder / "weights", held_out=())
    write_discs(made.out / "discs", made)
    (made.out / "discs.key").touch(mode=0o600)
    (made.out / "discs.key").write_bytes(bytes(32))
    return made


def grade_perfectly(discs, out):
    data = DataSet(discs)
    rows = data.rows("test")
    labels = labels_of(data, rows, POOLED_TASKS)
    sure = {task.name: np.eye(task.num_grades)[np.maximum(labels[task.name], 0)] for task in POOLED_TASKS}
    right = {name: 0.9 * each + 0.1 / each.shape[1] for name, each in sure.items()}
    nothing = {task.name: np.zeros(len(rows)) for task in POOLED_TASKS}
    out.mkdir(parents=True)
    Graded(data, rows, POOLED_TASKS, labels, right, nothing).write(out / "predictions.csv")


@pytest.fixture
def arguments(tmp_path):
    spider, sudirman = write_roots(tmp_path)
    return weights.Arguments(spider, sudirman, tmp_path / "runs", jobs=2, options=("--epochs", "3"))


@pytest.fixture
def commands(monkeypatch, arguments):
    """The commands that are run, replaced by functions that make their results; and what was shipped."""
    seen = []

    def pretend(*command):
        words = [str(word) for word in command]
        after = dict(itertools.pairwise(words))
        seen.append(words)
        if words[:3] == ["-m", "data_prep", "pooled"]:
            write_discs(Path(after["--out"]), arguments)
        elif words[:3] == ["-m", "data_prep", "phantom"]:
            Path(after["--out"]).mkdir(parents=True)
        elif words[0] == "train.py":
            (Path(after["--workdir"]) / "export").mkdir(parents=True)
        else:
            grade_perfectly(after["--data"], Path(after["--out"]))

    def no_hotspots(data, folder):
        shares = [{"task": "upper_endplate", "patient": str(data.patient[0]), "own_side": 0.75}]
        (folder / "own_side.json").write_text(json.dumps(shares))

    def keep(run, out, **options):
        seen.append(["ship", str(run), options])

    monkeypatch.setattr(weights, "run_script", pretend)
    monkeypatch.setattr(weights, "point_in_stacks", no_hotspots)
    monkeypatch.setattr(weights.shipped, "write", keep)
    monkeypatch.setattr(weights.runtime, "set_up", lambda **_: None)
    monkeypatch.setattr("benchmarks.subgroups._FEWEST", 10)
    return seen


def test_every_patient_is_graded_once_by_a_network_trained_on_others(arguments, commands):
    weights.main(arguments)
    found = json.loads((arguments.out / "weights.json").read_text())
    groups = found["groups"]
    assert {name: tasks["pfirrmann"]["spinejax"]["n"] for name, tasks in groups.items()} == {
        "SPIDER T1": 23,
        "SPIDER T2": 46,
        "Sudirman T2": 24,
    }
    for tasks in groups.values():
        for task in tasks.values():
            assert task["spinejax"]["mean_per_class_accuracy"]["value"] == 1
    assert "narrowing" not in groups["Sudirman T2"]
    assert "stenosis" not in groups["SPIDER T2"]
    assert found["own_side"]["upper_endplate"]["n"] == NUM_FOLDS
    assert {value: found["subgroups"]["sex"][value]["modic"]["n"] for value in "FM"} == {"F": 22, "M": 24}
    assert set(found["subgroups"]["scanner"]) == {"A", "AA"}  # of four patients it is not known
    assert found["subgroups"]["level"]["L4-L5"]["pfirrmann"]["n"] == 22
    table = (arguments.out / "weights.md").read_text()
    assert "| sex: M | 24 | 100.0 [100.0, 100.0] |" in table
    assert "| Sudirman T2 | pfirrmann | 24 | mean per-class accuracy, % | 100.0 [100.0, 100.0] |" in table
    assert "| upper_endplate | 5 | 75.0 [75.0, 75.0] |" in table
    assert len(found["goals"]) == len(goals.GOALS)
    line = next(
        line for line in table.splitlines() if "| narrowing | mean per-class accuracy, % | balance | 87 |" in line
    )
    assert line.startswith("| SPIDER T2 |")
    assert "| 46 | 100.0 [100.0, 100.0] |" in line


def test_the_worst_mistakes_are_drawn_and_titled(arguments, tmp_path, monkeypatch):
    write_discs(tmp_path / "discs", arguments)
    data = DataSet(tmp_path / "discs")
    labels = data.labels[:, 0].astype(int)
    sure = np.full((len(data), 5), 0.05) + 0.75 * np.eye(5)[labels]
    sure[7] = 0.05 + 0.75 * np.eye(5)[(labels[7] + 2) % 5]
    scans = data.manifest["scans"]
    groups = np.array([graded_folds.group(scans[s]["source"], scans[s]["contrast"]) for s in data.scan.tolist()])
    pool = dataclasses.replace(
        a_pool(labels, sure, sure), rows=np.arange(len(data)), groups=groups, patients=data.patient, tasks=POOLED_TASKS
    )
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda ax, text, **options: titles.append(text))
    mistakes.draw_mistakes(pool, data, POOLED_TASKS[0], tmp_path / "mistakes.png")
    assert (tmp_path / "mistakes.png").read_bytes()[:4] == b"\x89PNG"
    wrong = f"rater {labels[7] + 1}, network {(labels[7] + 2) % 5 + 1} (80%)"
    assert [title for title in titles if wrong in title] == [f"{groups[7]}, {data.level[7]}\n{wrong}"]
    assert next(title for title in titles if groups[7] in title) == f"{groups[7]}, {data.level[7]}\n{wrong}"  # first


def test_the_folds_are_those_of_the_detectors_and_the_held_out_patient_is_in_test_alone(arguments, commands):
    weights.main(arguments)
    names = weights.everyone(arguments, KEY)
    assert names[KEY.patient("sudirman/7")] == Patient("sudirman", "7")
    for number in range(NUM_FOLDS):
        data = DataSet(arguments.out / f"fold-{number}" / "discs")
        for name, split in zip(data.patient, data.split, strict=True):
            of_fold = fold_of(*names[str(name)]) == number
            assert (split == "test") == (of_fold or names[str(name)] == Patient("spider", "7"))
    whole = DataSet(arguments.out / "discs")
    assert {names[str(name)] for name in whole.patient[whole.rows("test")]} == {Patient("spider", "7")}
    assert not list(arguments.out.glob("fold-*/discs/*.h5"))  # folds share the discs


def test_every_training_starts_from_the_phantoms_and_takes_the_options(arguments, commands):
    weights.main(arguments)
    phantoms, *trainings = [words for words in commands if words[0] == "train.py"]
    assert phantoms[1] == "quickstart"
    start = phantoms[phantoms.index("--workdir") + 1]
    assert len(trainings) == NUM_FOLDS + 1
    for words in trainings:
        assert words[1] == "pooled"
        assert words[words.index("--init-from") + 1] == start
        assert words[-2:] == ["--epochs", "3"]


def test_finished_parts_are_not_run_again(arguments, commands):
    weights.main(arguments)
    first = len(commands)
    (arguments.out / "fold-2" / "graded" / "predictions.csv").unlink()
    (arguments.out / "fold-2" / "graded").rmdir()
    (arguments.out / "fold-2" / "run" / "export").rmdir()
    (arguments.out / "fold-2" / "run").rmdir()
    weights.main(arguments)
    assert [words[0] for words in commands[first:]] == ["train.py", "evaluate.py", "ship"]


def test_what_ships_names_its_patients_but_not_the_one_held_out(arguments, commands):
    weights.main(arguments)
    _, run, options = commands[-1]
    assert run == str(arguments.out / "last" / "run")
    patients = options["provenance"]["patients"]
    assert "spider/7" not in patients
    assert {name.partition("/")[0] for name in patients} == {"spider", "sudirman"}
    (fit,) = options["temperatures"]
    assert fit["num_views"] == 54
    assert set(fit["temperatures"]) == {task.name for task in POOLED_TASKS}
    assert max(fit["temperatures"].values()) < 0.7  # every grade was right, and none was certain


def test_what_ships_knows_a_rater_for_each_source_and_contrast(arguments, commands):
    weights.main(arguments)
    (fit,) = commands[-1][2]["temperatures"]
    assert {name: set(contrasts) for name, contrasts in fit["raters"].items()} == {
        "spider": {"t1", "t2"},
        "sudirman": {"t1", "t2"},
    }
    spider, sudirman = fit["raters"]["spider"]["t2"], fit["raters"]["sudirman"]["t2"]
    assert set(spider) == set(sudirman) == {task.name for task in POOLED_TASKS}
    # Sudirman's readers alone told whether a disc is degenerated.
    assert spider["degenerated"] == sudirman["degenerated"] | {"borrowed": True}
    assert not sudirman["degenerated"]["borrowed"]
    assert spider["pfirrmann"] != sudirman["pfirrmann"]
    assert fit["raters"]["sudirman"]["t1"]["pfirrmann"] == fit["raters"]["spider"]["t1"]["pfirrmann"] | {
        "borrowed": True
    }
    data = DataSet(arguments.out / "discs")
    labelled = data.labels[:, [task.name for task in data.tasks].index("narrowing")] >= 0
    assert fit["discs"]["narrowing"] == (labelled & (data.split != "test")).sum() < labelled.sum()


def test_discs_that_nobody_graded_are_counted_as_wrong(arguments, commands):
    """The disc L4-L5 of SPIDER's patient 3: label 3 of Pfirrmann, in each of three scans."""
    weights.main(arguments)
    found = json.loads((arguments.out / "weights.json").read_text())["groups"]
    of_t2 = found["SPIDER T2"]["pfirrmann"]["with missed discs as wrong"]
    assert of_t2["missed"] == 2
    assert of_t2["n"] == 48
    per_class = of_t2["per_class"]["4"]
    assert per_class["recall"]["value"] == pytest.approx((per_class["n"] - 2) / per_class["n"])
    assert of_t2["confusion"][3][0] == 2
    assert found["SPIDER T1"]["pfirrmann"]["with missed discs as wrong"]["missed"] == 1
    assert found["Sudirman T2"]["pfirrmann"]["with missed discs as wrong"]["missed"] == 0


def a_pool(labels, network, regression, missed=()):
    task = Task("pfirrmann", ("1", "2", "3"))
    num = len(labels)
    given = {graded_folds.NETWORK: {task.name: network}, graded_folds.REGRESSION: {task.name: regression}}
    patients = np.array([f"p{row // 2}" for row in range(num)])
    groups, folds = np.full(num, "SPIDER T2"), np.arange(num) // 2 % 5
    return Pool([task], np.arange(num), groups, patients, {task.name: labels}, given, folds, missed)


def test_goals_are_measured_with_the_grades_that_their_measure_asks_for(monkeypatch):
    """Against scikit-learn, over all folds and over those whose patients did not choose the recipe."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 100)
    given = [rng.dirichlet(np.ones(3), 100) for _ in range(2)]
    pool = a_pool(labels, *given)
    wanted = [("within_one", rule) for rule in ("balance", "distance")] + [("kappa", "distance")]
    of_pool = [goals.Goal("SPIDER T2", "pfirrmann", getattr(grading, name), 0.8, rule) for name, rule in wanted]
    monkeypatch.setattr(goals, "GOALS", (*of_pool, goals.Goal("Sudirman T2", "pfirrmann", grading.kappa, 0.8)))
    found = goals.against_goals(pool)
    assert [(each["measure"], each["decide_by"]) for each in found] == wanted  # nobody graded Sudirman's discs here

    def measured(name, rule, probabilities, inside):
        expected = probabilities @ np.abs(np.arange(3)[:, None] - np.arange(3))
        grades = (probabilities.argmax(1) if rule == "balance" else expected.argmin(1))[inside]
        if name == "within_one":
            return np.mean(np.abs(grades - labels[inside]) <= 1)
        return cohen_kappa_score(labels[inside], grades, weights="quadratic")

    for each, (name, rule) in zip(found, wanted, strict=True):
        for folds, inside in (("all folds", pool.folds >= 0), ("folds 2 to 4", pool.folds >= 2)):
            network, regression = (measured(name, rule, probabilities, inside) for probabilities in given)
            assert each[folds]["n"] == inside.sum()
            assert each[folds]["reached"]["value"] == pytest.approx(network)
            assert each[folds]["better than the regression by"]["value"] == pytest.approx(network - regression)


def test_the_difference_to_the_regression_is_paired():
    """Where both graders agree on every disc it is 0 in every resample; each alone has a wide interval."""
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
    found = a_pool(labels, probabilities, probabilities).results()["groups"]["SPIDER T2"]["pfirrmann"]
    for estimate in found["better than the regression by"].values():
        assert estimate == {"value": 0, "low": 0, "high": 0}
    interval = found["spinejax"]["mean_per_class_accuracy"]
    assert interval["high"] - interval["low"] > 0.1


def test_temperatures_come_from_the_other_folds():
    """One fold's labels are the opposite of what the network says; its own discs do not soften its probabilities."""
    labels = np.tile([0, 1, 2], 20)
    network = np.full((60, 3), 0.1) + 0.7 * np.eye(3)[labels]
    pool = a_pool(labels, network, network)
    before = pool.results()["groups"]["SPIDER T2"]["pfirrmann"]["calibration"]
    assert before["error_before"] == pytest.approx(0.2)
    assert before["error_after"] < 0.05  # always right: the others say so
    wrong = np.where(pool.folds == 0, (labels + 1) % 3, labels)
    after = a_pool(wrong, network, network).results()["groups"]["SPIDER T2"]["pfirrmann"]["calibration"]
    assert after["error_after"] > 0.15  # certain, and wrong in a fifth


def test_raters_come_from_the_other_folds_of_their_source():
    """Two sources whose raters say the opposite of each other, and of one in the first fold, who is taken back."""
    labels = np.tile([0, 1, 2], 80)
    rng = np.random.default_rng(0)
    likely = np.array([[0.8, 0.15, 0.05], [0.25, 0.7, 0.05], [0.05, 0.15, 0.8]])
    network = 0.1 * rng.dirichlet(np.ones(3), 240) + 0.9 * likely[labels]
    milder = np.arange(240) >= 120  # gives the first grade to discs of the second
    groups = np.where(milder, "Sudirman T2", "SPIDER T2")
    pool = dataclasses.replace(a_pool(labels.copy(), network, network), groups=groups)
    pool.labels["pfirrmann"][milder & (labels == 1)] = 0
    pool.labels["pfirrmann"][~milder & (pool.folds == 0)] = 2
    for inside, often in ((milder, 2 / 3), (~milder, 1 / 3)):
        at, frequencies = pool.as_rater(pool.tasks[0], inside)
        mine = pool.folds[inside] == 0
        np.testing.assert_allclose(frequencies[mine][:, 0], often, atol=0.02)
        expected = np.where(milder & (labels == 1), 0, labels)[inside]
        np.testing.assert_array_equal(at[mine].argmax(1), expected[mine])  # as the other folds' raters say
    found = pool.results()["groups"]["Sudirman T2"]["pfirrmann"]["calibration"]
    assert found["brier_as_rater"] < found["brier_after"] < found["brier_of_frequencies"]
    assert found["error_as_rater"] < found["error_after"]


def test_referring_keeps_the_discs_that_a_rater_of_the_other_folds_is_sure_of(tmp_path):
    """The network is right where it is sure, and a coin where it is not: half of the discs."""
    labels = np.tile([0, 1, 2, 0, 1, 2], 40)
    sure = np.arange(240) % 6 < 3
    says = np.where(sure | (np.arange(240) % 4 < 2), labels, (labels + 1) % 3)
    certainty = np.where(sure, 0.8, 0.4)[:, None]
    network = np.where(np.eye(3)[says] == 1, certainty, (1 - certainty) / 2)
    found = referring.by_group(a_pool(labels, network, network))
    right = found["SPIDER T2"]["pfirrmann"]["accuracy_at_coverage"]
    assert [right[share]["value"] for share in ("1", "0.5")] == [0.75, 1]
    kept = found["SPIDER T2"]["pfirrmann"]["below"]
    assert kept["0.3"]["share_kept"]["value"] == 1
    assert kept["0.9"]["share_kept"]["value"] == 0.5  # a rater fitted to the other folds knows how sure to be
    assert kept["0.9"]["accuracy_of_kept"] == {"value": 1, "low": 1, "high": 1}
    share, accuracy = np.transpose(found["SPIDER T2"]["pfirrmann"]["curve"])
    np.testing.assert_allclose(accuracy[share <= 0.5], 1)
    assert accuracy[-1] == 0.75
    (line,) = [line for line in referring.markdown(found).splitlines() if "| pfirrmann |" in line]
    assert line.startswith("| SPIDER T2 | pfirrmann | 75.0 [")
    assert line.endswith("| 50, 100.0 |")
    referring.draw(found, tmp_path / "referring.png")
    assert (tmp_path / "referring.png").read_bytes()[:4] == b"\x89PNG"


def test_each_decision_is_measured_of_the_network_and_of_the_rater():
    """A rater who gives the first grade to two discs of three, and a network that is as sure of either grade."""
    labels = np.tile([0, 0, 2], 40)
    network = np.where((np.arange(120) % 3 == 2)[:, None], [0.3, 0.1, 0.6], [0.4, 0.3, 0.3])
    pool = a_pool(labels, network, network)
    found = decisions.by_group(pool, pool.tasks[0])["SPIDER T2"]
    assert list(found["network"]) == ["balance", "distance"]
    assert list(found["rater"]) == ["balance", "probability", "distance"]
    agreed = {rule: each["exact_agreement"]["value"] for rule, each in found["network"].items()}
    assert agreed == {"balance": 1, "distance": pytest.approx(1 / 3)}  # the median of 0.4, 0.3, 0.3 is the middle grade
    assert found["network"]["distance"]["within_one"]["value"] == 1
    as_rater, frequencies = pool.as_rater(pool.tasks[0], pool.groups == "SPIDER T2")
    for rule, each in found["rater"].items():
        grades = grading.decide(as_rater, rule, frequencies)
        assert each["exact_agreement"]["value"] == pytest.approx(np.mean(grades == labels))
        assert each["kappa"]["value"] == pytest.approx(cohen_kappa_score(labels, grades, weights="quadratic"))
    assert "| SPIDER T2 | network | balance | 100.0 [100.0, 100.0] |" in decisions.markdown({"SPIDER T2": found})


def test_what_the_raters_grades_gain_has_the_right_sign():
    """The network sees the last grade in half of the discs that the rater gives the first one."""
    labels = np.tile([0, 0, 2], 40)
    network = np.where((labels == 2)[:, None], [0.1, 0.1, 0.8], [0.45, 0.05, 0.5])
    pool = a_pool(labels, network, network)
    gain = pool.results()["groups"]["SPIDER T2"]["pfirrmann"]["calibration"]["better as the rater by"]
    assert gain["mean_per_class_accuracy"]["value"] == pytest.approx(0.5)
    assert gain["kappa"]["value"] == pytest.approx(1)


def test_a_missed_disc_has_the_farthest_grade():
    labels = np.array([0, 1, 2, 0, 1, 2])
    right = np.eye(3)[labels]
    missed = [Missed("SPIDER T2", "p9", {"pfirrmann": 0}), Missed("SPIDER T1", "p9", {"pfirrmann": 0})]
    found = a_pool(labels, right, right, missed).results()["groups"]["SPIDER T2"]["pfirrmann"]
    assert found["with missed discs as wrong"]["confusion"] == [[2, 0, 1], [0, 2, 0], [0, 0, 2]]


def test_hotspots_are_made_for_discs_graded_abnormal(arguments, tmp_path):
    write_discs(tmp_path / "discs", arguments)
    data = DataSet(tmp_path / "discs")
    row = int(np.flatnonzero([data.mask("region", row).any() for row in range(len(data))])[0])
    maps = np.zeros((len(TASKS), *WINDOW_SHAPE), np.float32)
    maps[:, 10], maps[:, -10] = 3, 1  # three quarters of the energy lie in the upper body
    sided = [task for task in TASKS if "endplate" in task.name]
    graded = {"upper_endplate": [0.4, 0.6], "lower_endplate": [0.3, 0.7]}
    shares = own_side.shares_of_disc(data, row, sided, TASKS, maps, graded)
    assert {share["task"]: share["own_side"] for share in shares} == {"upper_endplate": 0.75, "lower_endplate": 0.25}
    graded["lower_endplate"] = [0.7, 0.3]
    assert len(own_side.shares_of_disc(data, row, sided, TASKS, maps, graded)) == 1


def test_the_mean_of_a_slice_is_over_the_discs_that_have_it(arguments, tmp_path):
    write_discs(tmp_path / "discs", arguments)
    data = DataSet(tmp_path / "discs")
    windows = {row: central_window(data.volume(row)) * INTENSITY_STEP for row in data.rows("train")}
    stacks = [window for row, window in windows.items() if data.slices[row, 1] == 15]
    expected = np.mean(stacks, axis=(0, 1, 2), dtype=np.float64)
    expected[4] = np.mean([*windows.values()], axis=(0, 1, 2), dtype=np.float64)[4]
    np.testing.assert_allclose(data.mean_of_filled_slices(), expected, rtol=1e-4)
    assert data.slice_mean[0] < 0.6 * expected[0]


# The baselines -------------------------------------------------------------------------------------------------------


def test_the_regression_learns_intensities_from_its_fold_alone(arguments, tmp_path):
    write_discs(tmp_path / "discs", arguments)
    data = DataSet(tmp_path / "discs")
    labels = data.labels[:, :2].astype(int)
    found = intensity_baseline.all_features(data)
    train = np.arange(len(data)) % 3 > 0
    grades = {"pfirrmann": 5, "narrowing": 2}
    given = intensity_baseline.probabilities(found, labels, grades, train)
    assert np.mean(np.abs(given["pfirrmann"][~train].argmax(1) - labels[~train, 0])) < 0.5  # guessing gives 1.6
    graded = ~train & (labels[:, 1] >= 0)
    assert np.mean(given["narrowing"][graded].argmax(1) == labels[graded, 1]) > 0.8
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


def test_a_task_with_one_grade_alone_is_certain_and_one_without_any_says_nothing():
    rng = np.random.default_rng(0)
    labels = np.stack([np.ones(20, int), np.full(20, -1)], axis=1)
    given = intensity_baseline.probabilities(rng.random((20, 4)), labels, {"one": 2, "none": 2}, np.ones(20, bool))
    np.testing.assert_array_equal(given["one"], np.tile([0, 1], (20, 1)))
    assert not given["none"].any()
