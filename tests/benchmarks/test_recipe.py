"""Variants of the recipe: what each changes, that all are judged alike, and the learning curve of fine-tuning."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import graded_folds, learning_curve, recipe, variants
from data_prep.dataset.pseudonyms import load_or_make_key
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.sources.pooled import patients_of
from spinejax.config import Config
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.errors import SpinejaxError
from spinejax.geometry import VOLUME_SHAPE
from spinejax.network import losses
from spinejax.network.spinenet import filled
from spinejax.tasks import PAPER_TASKS, UNLABELLED, Task
from spinejax.training import train_step
from tests.benchmarks.test_weights import KEY, finished_weights, grade_perfectly

ENDPLATES_ONLY = "phantoms-for-endplates"


def write_phantoms(folder):
    """Three training discs, which differ, and one for validation, with labels for the tasks of phantoms."""
    folder.mkdir()
    discs = [
        Disc(
            volume=np.full(VOLUME_SHAPE, 1000 * number, np.uint16),
            affine=np.eye(4),
            slices=(0, 15),
            labels={"pfirrmann": number, "narrowing": 3, "upper_endplate": 1, "lower_endplate": 0},
            level="L4-L5",
            patient=KEY.patient(f"phantom {number}"),
            scan=KEY.scan(f"phantom {number}"),
            split="train" if number < 3 else "validation",
        )
        for number in range(4)
    ]
    write_manifest(folder, [write_shard(folder / shard_name(0, 1), discs, PAPER_TASKS, ())], PAPER_TASKS, {}, ())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Both sources' tables, and the folder of `benchmarks.weights` with its discs. Not to be written to."""
    made = finished_weights(tmp_path_factory.mktemp("sources"))
    write_phantoms(made.out / "phantoms")
    return made


@pytest.fixture
def arguments(sources, tmp_path):
    return recipe.Arguments(sources.out, sources.spider, sources.sudirman, tmp_path / "out")


@pytest.fixture
def trained(monkeypatch):
    """The trainings asked for, each with its options and its discs; gradings are right, or as `wrong` says."""
    asked = []

    def run(options, data, folder, stop):
        functions = {"loss": losses.task_loss, "total_loss": losses.multi_task_loss}
        asked.append(SimpleNamespace(options=options, data=data, folder=folder, **functions))
        (folder / "export").mkdir(parents=True)

    def grade(*words):
        after = dict(zip(map(str, words), words[1:], strict=False))
        grade_perfectly(after["--data"], after["--out"])

    def no_hotspots(data, folder):
        tasks = ("upper_endplate", "lower_endplate")
        shares = [{"task": task, "patient": str(data.patient[0]), "own_side": 0.75} for task in tasks]
        (folder / "own_side.json").write_text(json.dumps(shares))

    for module in (recipe, learning_curve):
        monkeypatch.setattr(module, "run_script", grade)

    def grade_upside_down(run, data, rows):
        """The mildest grade for the most severe and so on: of five grades, all labels but the middle one."""
        taught = next(training.data for training in asked if training.folder == run)
        taught = {*taught.patient[taught.rows("train")].tolist()}
        assert ("third" in run.name) == (not taught & {*data.patient[rows].tolist()}), "only teachers have seen them"
        sure = {task.name: np.eye(task.num_grades)[::-1] for task in data.tasks}
        yield rows, {name: sure[name][labels] for name, labels in zip(sure, data.labels[rows].T, strict=True)}

    monkeypatch.setattr(recipe, "graded_by", grade_upside_down)
    monkeypatch.setattr(recipe.train, "run", run)
    monkeypatch.setattr(recipe, "point_in_stacks", no_hotspots)
    monkeypatch.setattr(recipe.runtime, "set_up", lambda **_: None)
    return asked


def differ_as_their_names_say(trained):
    of = {training.folder.parent.name: training for training in trained}
    base = of["base"]
    column = [task.name for task in base.data.tasks].index("pfirrmann")
    t1 = variants._contrasts(base.data) == "t1"
    assert (base.data.labels[t1, column] != UNLABELLED).any()
    assert (of["T1-without-Pfirrmann"].data.labels[t1, column] == UNLABELLED).all()
    np.testing.assert_array_equal(of["T1-without-Pfirrmann"].data.labels[~t1], base.data.labels[~t1])
    columns = [[task.name for task in base.data.tasks].index(name) for name in ("pfirrmann", "lower_endplate")]
    drawn = {name: of[name].data.labels[len(base.data) :, columns] for name in ("phantoms-along", ENDPLATES_ONLY)}
    assert (drawn["phantoms-along"] != UNLABELLED).all()
    assert (drawn[ENDPLATES_ONLY] != UNLABELLED).all(0).tolist() == [False, True]
    assert (drawn[ENDPLATES_ONLY][:, 0] == UNLABELLED).all()
    assert not t1[of["T2-alone"].data.rows("train")].any()
    assert t1[of["T2-alone"].data.rows("test")].any(), "the judges stay the same"
    sources = base.data.manifest["scans"]
    alone = of["SPIDER-alone"].data
    assert {sources[scan]["source"] for scan in alone.scan[alone.rows("train")].tolist()} == {"spider"}
    assert of["distilled-from-five"].total_loss.__module__ == variants.__name__ != base.total_loss.__module__
    assert of["another-seed"].options.seed != base.options.seed
    assert of["hard-labels"].options.soft_labels == 0 < base.options.soft_labels
    assert (base.options.balance, of["class-weights-within-sources"].options.balance) == ("all", "source")
    assert of["bias-of-each-source"].options.balance == "source"
    by_contrast = of["bias-of-each-source-and-contrast"].data
    assert len({*zip(by_contrast.source.tolist(), t1.tolist(), base.data.source.tolist(), strict=True)}) == 3
    assert len(of["T1-beside-T2"].data.rows("train")) > len(base.data.rows("train"))
    assert of["ordinal-loss"].loss is variants._ordinal
    assert base.loss is variants._task_loss is losses.task_loss, "a patch must not outlive its training"


def test_the_patients_of_two_folds_judge_every_variant_and_teach_none(arguments, trained):
    recipe.main(arguments)
    assert len(trained) == len(variants.VARIANTS) + 1 + 3  # one of them trains twice, another three networks more
    key = load_or_make_key(arguments.weights / "discs.key", arguments.weights / "discs")
    everyone = patients_of(arguments.spider, arguments.sudirman, key)
    for training in trained:
        data = training.data
        split = data.split[: len(data.patient)]  # phantoms come after the real discs
        judging = set(data.patient[split == "test"].tolist())
        assert judging == {n for n in data.patient.tolist() if fold_of(*everyone[n]) in recipe.JUDGES}
        assert not judging & {*data.patient[(split == "train") | (split == "validation")].tolist()}
    found = json.loads((arguments.out / "recipe.json").read_text())
    assert set(found["variants"]) == set(variants.VARIANTS)
    assert found["variants"]["mixup"]["SPIDER T2"]["κ"]["better than the base by"]["value"] == 0
    table = (arguments.out / "recipe.md").read_text()
    assert "| hard labels | 0.0 [0.0, 0.0] |" in table
    assert "| base | 75.0 [75.0, 75.0] | 75.0 [75.0, 75.0] |" in table
    differ_as_their_names_say(trained)


def test_what_is_finished_is_kept_and_a_better_variant_is_told(arguments, trained, monkeypatch):
    def grade_nothing_right(*words):
        after = dict(zip(map(str, words), words[1:], strict=False))
        grade_perfectly(after["--data"], after["--out"])
        path = after["--out"] / "predictions.csv"
        header, *rows = path.read_text().splitlines()
        cells = header.split(",")
        first, last = cells.index("pfirrmann_p_1"), cells.index("pfirrmann_p_5")
        for place, row in enumerate(rows):
            values = row.split(",")
            values[first : last + 1] = ["0.6", "0.1", "0.1", "0.1", "0.1"]
            rows[place] = ",".join(values)
        path.write_text("\n".join([header, *rows]) + "\n")

    only = recipe.dataclasses.replace(arguments, only=("base",))
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "run_script", grade_nothing_right)
        recipe.main(only)
    recipe.main(recipe.dataclasses.replace(arguments, only=("base", "another seed")))
    assert [training.folder.parent.name for training in trained] == ["base", "another-seed"]
    found = json.loads((arguments.out / "recipe.json").read_text())
    better = found["variants"]["another seed"]["SPIDER T2"]["Pfirrmann, %"]
    base = found["variants"]["base"]["SPIDER T2"]["Pfirrmann, %"]
    assert better["value"] == 1
    assert better["better than the base by"]["value"] == pytest.approx(1 - base["value"])
    assert "base and another seed" in found["from their grades"]


def test_an_unknown_variant_is_refused(arguments, trained):
    with pytest.raises(SpinejaxError, match=r"--only is mixdown: expected one of base, another seed"):
        recipe.main(recipe.dataclasses.replace(arguments, only=("mixdown",)))
    assert not trained


def example(num, num_grades=5):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, num_grades, num)
    return jnp.asarray(rng.normal(size=(num, num_grades)), jnp.float32), labels, jnp.asarray([1.0, 2, 3, 4, 5])


def test_mixup_is_the_loss_of_both_labels_by_their_shares():
    logits, labels, class_weights = example(8)
    share = np.asarray(variants._shares(8))
    assert ((share >= 0.5) & (share <= 1)).all()
    log_probability = np.log(np.asarray(jax.nn.softmax(logits)))
    expected = 0.0
    for disc in range(8):
        for label, weight in ((labels[disc], share[disc]), (labels[7 - disc], 1 - share[disc])):
            if label != UNLABELLED:
                expected -= weight * float(class_weights[label]) * log_probability[disc, label]
    loss = variants._mixed_loss(logits, jnp.asarray(labels), class_weights)
    np.testing.assert_allclose(loss, expected / (labels != UNLABELLED).sum(), rtol=1e-5)


def test_mixup_mixes_what_the_network_would_see_of_each_disc(monkeypatch):
    """Partners show different slices. The network fills in the others: of each disc, not of the mixture."""
    monkeypatch.setattr(variants, "_change_looks", lambda key, step, windows: windows)
    windows = np.zeros((4, 112, 224, 9), np.float32)
    for disc, place in enumerate((2, 4, 5, 7)):
        windows[disc, ..., place] = np.random.default_rng(disc).random((112, 224))
    share = np.asarray(variants._shares(4))[:, None, None, None]
    seen = np.asarray(filled(windows))
    mixed = filled(variants._mixed_windows(None, None, jnp.asarray(windows)))
    np.testing.assert_allclose(mixed, share * seen + (1 - share) * seen[::-1], atol=1e-6)


def test_the_mean_that_is_subtracted_does_not_follow_a_changed_split(arguments):
    """What a variant leaves out or adds has other slices inside the scan. The stored mean is not of those discs."""
    data = DataSet(recipe.inner_split(arguments))
    expected = data.mean_of_filled_slices()
    for change in (variants.spider_alone, variants.t2_alone, variants.WithPhantoms.added):
        changed = change(DataSet(data.folder), arguments.weights)
        assert len(changed.rows("train")) != len(data.rows("train"))
        np.testing.assert_array_equal(changed.mean_of_filled_slices(), expected)


def test_a_real_step_takes_the_functions_of_each_variant():
    """Traced, not compiled: the library's step with a variant's functions in it is another program."""
    config = Config(width=0.02, contrast=0.4, soft_labels=0.1)
    model = train_step.make_model(config, PAPER_TASKS)
    state = jax.eval_shape(lambda: train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32)))
    batch = {"volume": np.zeros((4, *VOLUME_SHAPE), np.uint16), "labels": np.zeros((4, len(PAPER_TASKS)), np.int32)}
    batch["source"] = np.zeros(4, np.int32)
    programs = {}
    of_sources = ("class weights within sources", "bias of each source")
    names = ("base", "mixup", "ordinal loss", "bounded loss", "mirrored", "worse scans", *of_sources)
    for name in names:
        config = dataclasses.replace(config, balance=variants.VARIANTS[name].options.get("balance", "all"))
        shape = (2,) if config.balance == "source" else ()
        balance = {task.name: np.ones((*shape, task.num_grades), np.float32) for task in PAPER_TASKS}
        with recipe.patched(variants.VARIANTS[name].patches):
            step = train_step.whole_step.lower(jax.random.key(0), state, batch, balance, model=model, config=config)
        programs[name] = step.as_text()
    assert len(set(programs.values())) == len(names)


def test_the_ordinal_loss_grows_with_the_distance():
    sure = 50 * jnp.eye(5)
    ones = jnp.ones(5)
    losses_of_first = [
        float(variants.squared_distance(sure[grade : grade + 1], jnp.array([0]), ones)) for grade in range(5)
    ]
    np.testing.assert_allclose(losses_of_first, [0, 3, 6, 9, 12], atol=1e-5)
    unlabelled = variants.squared_distance(sure[:2], jnp.array([0, UNLABELLED]), ones)
    np.testing.assert_allclose(unlabelled, 0, atol=1e-5)


def test_the_bounded_loss_forgives_what_is_surely_wrong():
    """Against the power form of the definition, (1 - p^q) / q; unlabelled discs do not count."""
    logits, labels, class_weights = example(8)
    probability = np.asarray(jax.nn.softmax(logits))
    each = [
        float(class_weights[label]) * (1 - probability[disc, label] ** 0.5) / 0.5
        for disc, label in enumerate(labels)
        if label != UNLABELLED
    ]
    loss = variants.bounded_loss(logits, jnp.asarray(labels), class_weights)
    np.testing.assert_allclose(loss, np.sum(each) / len(each), rtol=1e-5)
    sure = 50 * jnp.eye(5)
    np.testing.assert_allclose(variants.bounded_loss(sure[:1], jnp.array([3]), jnp.ones(5)), 2.0, rtol=1e-5)


def test_tempered_weights_are_the_square_roots_of_each_source():
    """By hand: a source of 1 and 16 discs of two grades, one of 9 and 1 of two others, and one without labels."""
    labels = np.repeat([0, 1, 2, 3, UNLABELLED], [1, 16, 9, 1, 5])
    sources = np.repeat([0, 1, 2], [17, 10, 5])
    with recipe.patched(variants.TEMPERED):
        found = losses.class_weights(labels[:, None], PAPER_TASKS[:1], sources)["pfirrmann"]
    assert (found.shape, found.dtype) == ((3, 5), np.float32)
    assert found[0, 0] / found[0, 1] == pytest.approx(4)
    assert found[1, 3] / found[1, 2] == pytest.approx(3)
    for source in range(2):
        assert found[source][labels[sources == source]].mean() == pytest.approx(1)
    assert not found[0, 2:].any()
    assert not found[2].any()


def test_a_source_bias_is_the_balanced_softmax_of_its_frequencies():
    """Against its definition with probabilities, n_c e^z_c / Σ n e^z; where a grade does not occur, its n is one."""
    logits, labels, _ = example(12)
    sources = np.arange(12) % 3
    labels = np.where(labels == UNLABELLED, UNLABELLED, np.where(sources == 2, labels % 2, labels))
    frequencies = variants.log_frequencies(labels[:, None], PAPER_TASKS[:1], sources)["pfirrmann"]
    counts = np.array([[np.sum((sources == s) & (labels == c)) + 1 for c in range(5)] for s in range(3)])
    np.testing.assert_allclose(np.exp(frequencies), counts / counts.sum(1, keepdims=True), rtol=1e-6)
    odds = counts[sources] * np.exp(np.asarray(logits, np.float64))
    known = labels != UNLABELLED
    expected = -np.log((odds / odds.sum(1, keepdims=True))[known, labels[known]]).mean()
    arguments = (logits, jnp.asarray(labels), frequencies)
    np.testing.assert_allclose(variants.biased_loss(*arguments, sources=sources), expected, rtol=1e-5)
    by_two = variants.biased_loss(*arguments, 0.0, jnp.int32(2 * known.sum()), sources)
    np.testing.assert_allclose(by_two, expected / 2, rtol=1e-5)


def test_turned_discs_are_turned_as_their_label_says_and_judges_take_no_part(arguments, trained):
    recipe.main(recipe.dataclasses.replace(arguments, only=("base", "turned first")))
    first, then = trained[1:]
    assert first.folder.parent == then.folder.parent
    assert then.options.init_from == first.folder
    assert first.options.init_from == arguments.weights / "phantom-run"
    assert [task.name for task in first.data.tasks] == list(first.options.tasks) == ["turned"]
    np.testing.assert_array_equal(first.data.split, then.data.split)
    rows = np.arange(len(first.data))
    turned, upright = first.data.volumes(rows), then.data.volumes(rows)
    assert {0, 1, 2, 3} == set(first.data.labels[:, 0].tolist())
    for label, one, other in zip(first.data.labels[:, 0].tolist(), turned, upright, strict=True):
        expected = (other, other[::-1], other[:, ::-1], other[::-1, ::-1])[label]
        np.testing.assert_array_equal(one, expected)


def test_contradicted_labels_of_taught_patients_are_left_out(arguments, trained):
    recipe.main(recipe.dataclasses.replace(arguments, only=("base", "contradicted labels left out")))
    base, *thirds, last = trained
    taught = [{*each.data.patient[each.data.rows("train")].tolist()} for each in thirds]
    everyone = {*base.data.patient[base.data.rows("train")].tolist()}
    for patients in taught:
        assert patients < everyone
    assert all(sum(patient in patients for patients in taught) == 2 for patient in everyone), "each is left out once"
    for third in thirds:
        assert third.options.learning_rate == base.options.learning_rate / 2
        assert third.options.epochs == 1.5 * base.options.epochs
    train = base.data.split == "train"
    np.testing.assert_array_equal(last.data.labels[~train], base.data.labels[~train])
    column = [task.name for task in base.data.tasks].index("pfirrmann")
    before, after = (each.data.labels[train, column] for each in (base, last))
    reversed_far = (before != 2) & (before != UNLABELLED)  # 2 stays itself, of all five grades
    assert reversed_far.any()
    assert (before == 2).any()
    assert (after[reversed_far] == UNLABELLED).all()
    np.testing.assert_array_equal(after[~reversed_far], before[~reversed_far])
    counts = json.loads((last.folder.parent / "contradicted.json").read_text())["pfirrmann"]
    assert counts == {"labels": (before != UNLABELLED).sum(), "contradicted": reversed_far.sum()}


def test_a_label_is_contradicted_by_confidence_in_a_grade_that_is_not_its_neighbour():
    labels = np.array([0, 0, 2, 2, 1, 0])
    probabilities = np.array(
        [[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.2, 0.1, 0.7], [0.9, 0.0, 0.1], [0.7, 0.2, 0.1], [0.0, 0.6, 0.4]]
    )
    # Means of the labels' own: 1.4 / 3 for grade 0, 0.2 for 1, 0.4 for 2. The last is confident of 1 and less of 2.
    assert variants.contradicted(labels, probabilities).tolist() == [False, False, False, True, False, False]
    of_two = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    assert variants.contradicted(np.array([0, 1, 1]), of_two).tolist() == [False, False, False]
    assert variants.contradicted(np.array([0, 1, 1]), of_two[[0, 1, 0]]).tolist() == [False, False, True]


def test_a_distilled_network_learns_from_labels_and_from_the_mean_of_its_teachers(arguments, trained, monkeypatch):
    data = DataSet(recipe.inner_split(arguments))
    before, rows = data.labels.copy(), data.rows("train")
    rng = np.random.default_rng(0)
    said = {run: {t.name: rng.dirichlet(np.ones(t.num_grades), len(data)) for t in data.tasks} for run in "ab"}

    def graded(run, data, rows):
        yield rows, {name: each[rows] for name, each in said[run].items()}

    monkeypatch.setattr(recipe, "graded_by", graded)
    data, patches = recipe.distilling(data, ["a", "b"])
    others = np.setdiff1d(np.arange(len(data)), rows)
    np.testing.assert_array_equal(data.labels[others], before[others])
    of = {name: function for _, name, function in patches}
    for name, balance in losses.class_weights(before[rows], data.tasks).items():
        np.testing.assert_array_equal(of["class_weights"](data.labels[rows], data.tasks)[name], balance)

    column = [task.name for task in data.tasks].index("pfirrmann")
    before[rows[:2], column] = UNLABELLED
    data.labels[rows[:2], column] = 16 * (rows[:2] + 1) + UNLABELLED + 1
    some = rows[:6]
    logits, _, balance = example(len(some))
    of_batch = {"pfirrmann": jnp.asarray(data.labels[some, column])}
    total, by_task = of["multi_task_loss"]({"pfirrmann": logits}, of_batch, {"pfirrmann": balance}, {}, 0.1, {})
    mean = (said["a"]["pfirrmann"][some] + said["b"]["pfirrmann"][some]) / 2
    log_probability = np.log(np.asarray(jax.nn.softmax(logits)))
    from_teachers = -(mean * log_probability).sum(1).mean()
    from_labels = losses.task_loss(logits, jnp.asarray(before[some, column]), balance, 0.1)
    np.testing.assert_allclose(total, (from_labels + from_teachers) / 2, rtol=1e-5)
    assert by_task["pfirrmann"] == total


def test_worse_scans_keep_what_is_black_and_differ_from_disc_to_disc(monkeypatch):
    monkeypatch.setattr(variants, "_change_looks", lambda key, step, windows: windows)
    window = np.random.default_rng(0).random((112, 224, 9)).astype(np.float32)
    window[:, :40] = 0
    alone = np.zeros_like(window)
    alone[..., 3] = window[..., 3]
    worse = np.asarray(variants._worse_windows(jax.random.key(0), jnp.int32(5), jnp.stack([window, window, alone])))
    assert (worse[:, :, :40] == 0).all()
    assert (worse[0] != worse[1]).mean() > 0.5
    assert (worse >= 0).all()
    assert (worse <= 1).all()
    assert all(len(np.unique(each)) <= 256 for each in worse)
    np.testing.assert_array_equal(worse[2], np.repeat(worse[2, ..., :1], 9, axis=-1))  # one slice is not thickened
    even = np.full((1, 112, 224, 9), 0.5, np.float32)
    even[:, 0, 0] = 0.4  # a slice of one value would be outside the scan
    field = np.asarray(variants._worse_windows(jax.random.key(0), jnp.int32(5), jnp.asarray(even)))[0, 1:, 1:, 4]
    assert field.max() / field.min() > 1.1
    # The slices of a stack come nearer to each other.
    spread = [np.diff(each, axis=-1).std() / each.mean() for each in (window, worse[0], worse[1])]
    assert max(spread[1:]) < spread[0]


def test_the_grade_of_least_expected_distance_is_the_median():
    graded = {("scan", "L4-L5"): {"pfirrmann": [0.4, 0.15, 0.15, 0.15, 0.15], "modic": [0.3, 0.7]}}
    assert recipe.by_distance(graded) == {("scan", "L4-L5"): {"pfirrmann": [0, 1, 0, 0, 0], "modic": [0, 1]}}


def test_a_mirrored_disc_has_its_endplates_swapped(monkeypatch):
    windows = jnp.asarray(np.random.default_rng(0).random((4, 112, 224, 9)), jnp.float32)
    monkeypatch.setattr(variants, "_change_looks", lambda key, step, windows: windows)
    mirrored = variants._mirrored_windows(None, None, windows)
    np.testing.assert_array_equal(mirrored[1::2], windows[1::2])
    np.testing.assert_array_equal(mirrored[0, 0], windows[0, -1])
    seen = {}
    monkeypatch.setattr(variants, "_multi_task_loss", lambda logits, labels, *options: seen.update(labels))
    labels = {"upper_endplate": jnp.array([0, 0, 1, 1]), "lower_endplate": jnp.array([1, 1, 0, 0]), "modic": None}
    variants._mirrored_loss({}, labels)
    assert seen["upper_endplate"].tolist() == [1, 0, 0, 1]
    assert seen["lower_endplate"].tolist() == [0, 1, 1, 0]


def test_phantoms_teach_beside_real_discs(arguments):
    data, drawn = DataSet(recipe.inner_split(arguments)), DataSet(arguments.weights / "phantoms")
    both = variants.WithPhantoms.added(data, arguments.weights)
    rows = both.rows("train")
    assert len(rows) == len(data.rows("train")) + len(drawn.rows("train"))
    np.testing.assert_array_equal(both.rows("test"), data.rows("test"))
    mixed = rows[[0, -1, 1, -2]]
    volumes, real, phantoms = (
        both.volumes(mixed),
        data.volumes(mixed[::2]),
        drawn.volumes(drawn.rows("train")[[-1, -2]]),
    )
    np.testing.assert_array_equal(volumes[::2], real)
    np.testing.assert_array_equal(volumes[1::2], phantoms)


def test_a_pair_has_the_t1_slice_of_the_same_disc_beside_its_t2_slice(arguments):
    data = DataSet(recipe.inner_split(arguments))
    t1 = variants._contrasts(data) == "t1"
    both, instead = variants.Paired.added(data, arguments.weights), variants.Paired.instead(data)
    np.testing.assert_array_equal(both.rows("test"), data.rows("test"))
    extra = np.arange(len(data), len(both.split))
    assert 0 < len(extra) <= (t1 & (data.split == "train")).sum()
    of_t2 = both._stored[extra]
    assert not t1[of_t2].any()
    assert (data.split[of_t2] == "train").all()
    np.testing.assert_array_equal(both.labels[extra], data.labels[of_t2])
    np.testing.assert_array_equal(both.source[extra], data.source[of_t2])
    first, stop = data.slices[of_t2].T
    np.testing.assert_array_equal(both.slices[extra], np.stack([first, stop + 1], axis=1))
    for pair, row in list(zip(extra, of_t2, strict=True))[:3]:
        (partner,) = np.flatnonzero(t1 & (data.patient == data.patient[row]) & (data.level == data.level[row]))
        expected = data.volume(row)
        place = data.slices[row, 1]
        expected[..., place] = data.volume(partner)[..., data.slices[partner, 0]]
        np.testing.assert_array_equal(both.volumes(np.array([pair]))[0], expected)
        np.testing.assert_array_equal(instead.volume(row), expected)
        np.testing.assert_array_equal(both.volume(row), data.volume(row))
        assert instead.slices[row].tolist() == both.slices[pair].tolist()
    stacks = np.flatnonzero(data.slices[:, 1] - data.slices[:, 0] > 1)
    np.testing.assert_array_equal(instead.volume(stacks[0]), data.volume(stacks[0]))


def test_discs_that_judge_as_pairs_are_written_with_their_names(arguments, tmp_path):
    data = variants.Paired.instead(DataSet(recipe.inner_split(arguments)))
    judging = DataSet(recipe.written(data, tmp_path / "judging"))
    rows = data.rows("test")
    assert set(judging.split) == {"test"}
    for column in ("scan", "level", "labels", "slices"):
        np.testing.assert_array_equal(getattr(judging, column), getattr(data, column)[rows])
    np.testing.assert_array_equal(judging.volumes(np.arange(3)), data.volumes(rows[:3]))


def test_the_learning_curve_adds_patients_and_keeps_the_judges(arguments, trained, monkeypatch):
    monkeypatch.setattr(learning_curve, "NUM_PATIENTS", (3, 6))
    learning_curve.main(arguments)
    first, second = (training.data for training in trained[1:])
    taught = [
        {*data.patient[(data.split == "train") | (data.split == "validation")].tolist()} for data in (first, second)
    ]
    assert [len(patients) for patients in taught] == [3, 6]
    assert taught[0] < taught[1]
    sources = first.manifest["scans"]
    assert {sources[scan]["source"] for scan in second.scan[second.rows("train")].tolist()} == {"sudirman"}
    np.testing.assert_array_equal(first.rows("test"), second.rows("test"))
    assert all(training.options.init_from == trained[0].folder for training in trained[1:])
    table = (arguments.out / "learning-curve.md").read_text().splitlines()
    rows = [row.split(" | ")[0] for row in table if row.startswith("| ")]
    assert rows == ["| patients", "| 0", "| 3", "| 6", "| patients", "| 3", "| 6"]
    assert "100.0 [100.0, 100.0]" in table[3]
    assert table[-1].endswith("| 0.0 [0.0, 0.0] |")


def test_what_fine_tuning_gains_is_paired_and_has_the_right_sign():
    """The network before finds one of two discs of each grade, the fine-tuned one all."""
    labels, patients = np.tile([0, 0, 1, 1], 10), np.repeat(np.arange(10), 4)
    right = np.eye(2)[labels]
    before = np.where(np.arange(40)[:, None] % 2, right, right[:, ::-1])
    bulging = Task("bulging", ("no", "yes"))
    gained = graded_folds.gains(bulging, labels, right.argmax(1), before.argmax(1), patients)
    assert set(gained) == {"mean_per_class_accuracy", "kappa"}  # within ±1 are all
    assert gained["mean_per_class_accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert gained["kappa"]["value"] == 1
