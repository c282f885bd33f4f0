"""EfficientNet-Lite0 in place of the trunk: it sees slices as colours, learns, and is graded as the base is."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from benchmarks import recipe, variants
from benchmarks.graded_folds import predictions
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError
from spinejax.inference.predict import predict, view_set
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import devices
from spinejax.training import epoch, train_step
from tests.benchmarks.test_weights import finished_weights, grade_perfectly

torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
lite = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `bench` is not installed")
stronger_trunk = importlib.import_module("benchmarks.stronger_trunk")
Twin = importlib.import_module("benchmarks.torch_twin").Twin


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The data set of `benchmarks.weights`, and a base that is finished, and always right."""
    folder = tmp_path_factory.mktemp("trunk")
    made = finished_weights(folder)
    asked = stronger_trunk.Arguments(made.out, made.spider, made.sudirman, folder / "out", epochs=4, batch_size=8)
    base = recipe.folder(asked.out, variants.BASE)
    grade_perfectly(recipe.inner_split(asked), base / "graded")
    (base / "own_side.json").write_text("[]")
    return asked


def test_a_slice_counts_like_a_third_of_its_colour():
    tasks = variants.Turned.task, variants.Turned.task
    model = stronger_trunk.Lite0(tasks[:1]).eval()
    weights = stronger_trunk.lite0.EfficientnetLite0ModelFile.get_model_file_path()
    original = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    colours = torch.rand(1, 3, 112, 224)
    with torch.no_grad():
        features = original.extract_features((255 * colours - 127) / 128)
        expected = model.heads["turned"](model.squeeze(features))
        np.testing.assert_allclose(model(colours.repeat_interleave(3, dim=1))["turned"], expected, atol=1e-4)


def test_grading_over_views_is_the_librarys(arguments):
    """Against `predict`, with the same network in JAX and in PyTorch."""
    data = DataSet(recipe.inner_split(arguments))
    model = SpineNet(tasks=data.tasks[:2], width=0.02, fill_slices=True)
    variables = model.init(jax.random.key(0), np.zeros((1, 112, 224, 9), np.float32))
    rows = data.rows("test")[:5]
    found = stronger_trunk.graded_on(Twin(model, variables), data, rows, view_set(tta=True))
    batches = eval_batches(data, rows, [], batch_size=devices.make_mesh().size)
    each = [probabilities for _, probabilities, _ in predict(model, variables, batches, devices.make_mesh(), tta=True)]
    for task in model.tasks:
        expected = np.concatenate([probabilities[task.name] for probabilities in each])
        np.testing.assert_allclose(found[task.name], expected, atol=1e-5)


def test_the_epoch_is_chosen_as_in_the_bases_training(arguments):
    """Against the library's validation error, with the same network in JAX and in PyTorch."""
    data = DataSet(recipe.inner_split(arguments))
    data.tasks = data.tasks[:1]
    model = SpineNet(tasks=data.tasks, width=0.02, fill_slices=True)
    variables = model.init(jax.random.key(0), np.zeros((1, 112, 224, 9), np.float32))
    batches = eval_batches(data, data.rows("validation"), [0], batch_size=8)
    expected, _ = epoch.accuracy([train_step.eval_step(variables, batch, model=model) for batch in batches])
    assert stronger_trunk.validation_error(Twin(model, variables), data) == pytest.approx(expected)


def test_it_learns_is_graded_once_and_compared_with_the_base(arguments, capsys, monkeypatch):
    monkeypatch.setattr(recipe.runtime, "set_up", lambda **_: None)
    grid = view_set(tta=True)
    few = jax.tree.map(lambda leaf: leaf[:2], grid)
    monkeypatch.setattr(stronger_trunk, "view_set", lambda tta: few if tta else view_set(tta=False))
    states = []

    def error(model, data):
        states.append({name: each.clone() for name, each in model.state_dict().items()})
        return (0.5, 0.3, 0.9, 0.9)[len(states) - 1]

    monkeypatch.setattr(stronger_trunk, "validation_error", error)
    stronger_trunk.main(arguments)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(losses) == arguments.epochs
    assert losses[-1] < losses[0]

    data = DataSet(recipe.inner_split(arguments))
    graded = predictions(recipe.folder(arguments.out, stronger_trunk.NAME))
    test = data.rows("test")
    assert set(graded) == {*zip(data.scan[test].tolist(), data.level[test].tolist(), strict=True)}
    first = next(iter(graded.values()))
    assert sum(first["pfirrmann"]) == pytest.approx(1, abs=1e-5)

    kept = torch.load(recipe.folder(arguments.out, stronger_trunk.NAME) / "best.pt", weights_only=True)
    assert all(torch.equal(each, states[1][name]) for name, each in kept.items())
    assert any(not torch.equal(each, states[-1][name]) for name, each in kept.items())
    with pytest.raises(SpinejaxError, match=r"has a training with .*'seed': 0.* Take another --out"):
        stronger_trunk.main(dataclasses.replace(arguments, seed=1))

    def refuse(*_, **__):
        raise AssertionError("a finished training is kept")

    monkeypatch.setattr(stronger_trunk, "train_batches", refuse)
    stronger_trunk.main(arguments)
    found = json.loads((arguments.out / "stronger-trunk.json").read_text())["variants"]
    assert list(found) == [variants.BASE, stronger_trunk.NAME, stronger_trunk.WITH_BASE]
    better = {
        name: each["SPIDER T2"]["Pfirrmann, %"]["better than the base by"]["value"] for name, each in found.items()
    }
    assert better[variants.BASE] == 0
    assert better[stronger_trunk.NAME] < 0, "the base is right about all"
    table = (arguments.out / "stronger-trunk.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| {stronger_trunk.NAME} | {100 * better[stronger_trunk.NAME]:.1f} [" in table
