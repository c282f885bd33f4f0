"""The network in two files: what `write` makes of a run is read like the run; what is not whole is refused."""

import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spinejax
from spinejax import config
from spinejax.config import Config
from spinejax.errors import SpinejaxError
from spinejax.metrics.usual import Usual
from spinejax.network.views import ViewRanges
from spinejax.training import checkpoint, shipped, train_step
from tests.conftest import TASKS

FIT = {
    "num_views": 54,
    "average": "probabilities",
    "data": "abc",
    "discs": {"side": 9},
    "temperatures": {"brightness": 1.5, "side": 2.0},
}
RATERS = {  # the first one rarely sees a bright front
    "careful": {
        contrast: {
            "brightness": {
                "temperature": 1.2,
                "shifts": [0.1, -0.1, 0.0],
                "frequencies": [0.2, 0.3, 0.5],
                "borrowed": True,
            },
            "side": {"temperature": 1.0, "shifts": [0.0, 0.0], "frequencies": [often, 1 - often], "borrowed": False},
        }
        for contrast, often in (("t1", 0.5), ("t2", 0.05))
    },
    "hasty": {
        "t2": {"side": {"temperature": 0.5, "shifts": [0.2, -0.2], "frequencies": [0.5, 0.5], "borrowed": False}}
    },
}
PROVENANCE = {"name": "squares", "trained_on": "bright squares", "attribution": ["ours"], "commit": "0123"}
VIEWS = ViewRanges(angle_deg=7)


def make_run(folder, **changes):
    """A run of an untrained network that has learned nothing; `changes` replace weights, by name."""
    options = Config(width=0.02, views=VIEWS)
    model = train_step.make_model(options, TASKS)
    state = train_step.init(jax.random.key(0), model, options, np.full(9, 0.3141, np.float32))
    leaves = flax.traverse_util.flatten_dict(state.params, sep="/") | changes
    state = state.replace(params=flax.traverse_util.unflatten_dict(leaves, sep="/"))
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.5)
    checkpoints.close()
    config.save(options, folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run")


def write(run, out):
    return shipped.write(run, out, provenance=PROVENANCE, contrasts=["T2"], temperatures=[FIT])


@pytest.fixture
def folder(run, tmp_path):
    return write(run, tmp_path / "network")


def change(folder, **values):
    path = folder / shipped.ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("task", "shifts"),
    [("side", [0.0, 0.0, 0.0]), ("side", []), ("length", [0.0, 0.0])],
    ids=["long", "empty", "unknown"],
)
def test_a_rater_that_does_not_fit_the_tasks_is_refused(folder, task, shifts):
    rater = {"temperature": 1.0, "shifts": shifts, "frequencies": [0.5, 0.5], "borrowed": False}
    change(folder, temperatures=[FIT | {"raters": {"careful": {"t2": {task: rater}}}}])
    with pytest.raises(SpinejaxError, match=f"rater careful does not fit the task {task}"):
        shipped.about(folder)


def test_the_network_grades_as_the_run_that_it_was_made_from(run, folder):
    (model, expected), (read_model, variables) = checkpoint.load(run), spinejax.load(folder)
    assert read_model == model
    windows = jax.random.uniform(jax.random.key(1), (4, 112, 224, 9))
    for name, scores in model.apply(expected, windows).items():
        same = read_model.apply(variables, windows)[name]
        np.testing.assert_allclose(jax.nn.softmax(same), jax.nn.softmax(scores), atol=1e-3)
    # What is no weight is not rounded.
    np.testing.assert_array_equal(variables["constants"]["slice_mean"], expected["constants"]["slice_mean"])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.float32.dtype}


def test_what_is_known_of_the_network_is_read_back(run, folder):
    about = shipped.about(folder)
    assert about["views"] == VIEWS
    assert about["contrasts"] == ["t2"]
    assert about["temperatures"] == [FIT]
    assert about["provenance"] == PROVENANCE  # entries of its own, too
    assert about["record"] == checkpoint.read_record(checkpoint.find(run))


def test_what_is_usual_for_the_network_is_read_back(run, folder, tmp_path):
    assert shipped.read_usual(folder) is None
    usual = Usual(np.array([1.0, 2.0]), np.array([[2.0, 0.5], [0.5, 1.0]]), 3.5)
    other = shipped.write(run, tmp_path / "other", provenance=PROVENANCE, contrasts=["T2"], usual=usual)
    found = shipped.read_usual(other)
    np.testing.assert_array_equal(found.mean, usual.mean)
    np.testing.assert_array_equal(found.precision, usual.precision)
    assert found.threshold == usual.threshold
    jax.tree.map(np.testing.assert_array_equal, shipped.read(other), shipped.read(folder))
    (other / shipped.WEIGHTS).write_bytes((folder / shipped.WEIGHTS).read_bytes())
    with pytest.raises(SpinejaxError, match=r"spinenet.npz: damaged: its sha256 is not"):
        shipped.read_usual(other)


def test_the_same_run_gives_the_same_bytes(run, folder, tmp_path):
    again = write(run, tmp_path / "again")
    for name in (shipped.WEIGHTS, shipped.ABOUT):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_the_network_of_the_package_is_loaded_by_default():
    model, variables = spinejax.load()
    assert tuple(shipped.about()["record"]["tasks"][0]["grades"]) == model.tasks[0].grades
    scores = model.apply(variables, jnp.zeros((1, 112, 224, model.num_slices)))
    assert {task.name: (1, task.num_grades) for task in model.tasks} == {n: each.shape for n, each in scores.items()}
    assert sum(path.stat().st_size for path in shipped.FOLDER.iterdir()) < 24e6


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: (folder / shipped.WEIGHTS).unlink(), "spinenet.npz: cannot be read .No such file"),
        (lambda folder: (folder / shipped.WEIGHTS).write_bytes(b"PK"), "spinenet.npz: damaged: its sha256 is not"),
        (lambda folder: change(folder, sha256="0" * 64), "spinenet.npz: damaged: its sha256 is not"),
        (lambda folder: change(folder, version=2), "json: of version 2; this release reads version 1. Install a later"),
        (
            lambda folder: change(folder, views={}, contrasts="t2"),
            "json: damaged, or of a different version: contrasts",
        ),
        (lambda folder: (folder / shipped.ABOUT).write_text("{"), "json: damaged"),
        (lambda folder: change(folder, record={}), "json: damaged, or of a different version: record"),
    ],
)
def test_what_is_not_whole_is_refused_in_one_line(folder, harm, fault):
    harm(folder)
    with pytest.raises(SpinejaxError, match=fault) as refused:
        spinejax.load(folder)
    assert "\n" not in str(refused.value)


def test_a_package_without_its_network_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", folder)
    assert spinejax.load()[0].tasks == TASKS
    shutil.rmtree(folder)
    with pytest.raises(SpinejaxError, match=r"spinenet.json: cannot be read .*\. Install spinejax again\."):
        spinejax.load()


def test_only_a_run_can_be_written(run, tmp_path):
    with pytest.raises(SpinejaxError, match="not a run that has saved a step"):
        write(tmp_path, tmp_path / "out")
    bias = {"head_side/fc8/bias": np.array([0, 1e5], np.float32)}
    with pytest.raises(SpinejaxError, match=r"head_side/fc8/bias: a weight of 1e\+05 is too large for float16"):
        write(make_run(tmp_path / "large", **bias), tmp_path / "out")
    nan = {"head_side/fc8/bias": np.array([0, np.nan], np.float32)}
    with pytest.raises(SpinejaxError, match="too large"):
        write(make_run(tmp_path / "nan", **nan), tmp_path / "out")
    assert not (tmp_path / "out").exists()
