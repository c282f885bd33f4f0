"""The library as other JAX code uses it: import, load, grade, explain, export."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spinejax
from spinejax.config import Config
from spinejax.data.dataset import DataSet
from spinejax.geometry import INTENSITY_STEP, central_window
from spinejax.inference import hotspots, predict
from spinejax.network import views
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.training import checkpoint, train_step
from tests.conftest import TASKS

ROOT = Path(__file__).parents[1]
FEW = spinejax.Method(num_views=2)


@pytest.fixture(scope="module")
def volumes(tiny):
    return DataSet(tiny).volumes(np.arange(5))


# The package ---------------------------------------------------------------------------------------------------------


def test_importing_it_takes_no_jax():
    code = """
import sys, time
started = time.process_time()
import spinejax
dir(spinejax)
assert "jax" not in sys.modules
assert time.process_time() - started < 0.3
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_dir_shows_every_name_and_every_name_is_there():
    names = {"load", "grade", "explain", "export", "views", "SpineNet", "Task", "Method", "SpinejaxError"}
    assert names <= set(spinejax.__all__) <= set(dir(spinejax))
    assert all(getattr(spinejax, name) is not None for name in spinejax.__all__)
    assert spinejax.views is views
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        spinejax.lode  # noqa: B018


# Load ----------------------------------------------------------------------------------------------------------------


def test_a_loaded_network_is_on_the_device(network, tmp_path):
    model, variables = network
    config = Config(width=0.02, initialiser="he")
    state = train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoint.save(checkpoints, state, model, data_digest="", error=0.5)
    checkpoints.close()
    loaded, arrays = spinejax.load(tmp_path)
    assert loaded == model
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays))
    jax.tree.map(np.testing.assert_array_equal, arrays, variables)


# Grade ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", [False, True])
def test_grades_are_the_predict_steps_whatever_the_batch(network, volumes, tta):
    expected = predict.predict_step(network[1], volumes, predict.view_set(tta), model=network[0], grid=tta)
    found = spinejax.grade(*network, volumes, tta=tta, batch_size=2)
    for got, part in zip(found, expected, strict=True):
        assert list(got) == [task.name for task in TASKS]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, part)
    assert found.probabilities["brightness"].shape == (5, 3)


def test_no_discs_have_no_grades(network, volumes):
    probabilities, spread = spinejax.grade(*network, volumes[:0], tta=False)
    assert probabilities["side"].shape == (0, 2)
    assert spread["side"].shape == (0,)
    assert spinejax.explain(*network, volumes[:0])["side"].shape == (0, 112, 224, 9)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 192, 320, 15), np.float32),
        np.zeros((192, 320, 15), np.uint16),
        np.zeros((1, 112, 224, 9), np.uint16),
    ],
)
def test_other_volumes_are_refused(network, bad):
    for ask in (spinejax.grade, spinejax.explain):
        with pytest.raises(spinejax.SpinejaxError, match=r"volumes are .*: expected uint16\[N, 192, 320, 15\]"):
            ask(*network, bad)


# Explain -------------------------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_command(network, tiny, volumes):
    data = DataSet(tiny)
    model, variables = with_cpu_kernels(network[0]), network[1]
    maps = spinejax.explain(*network, volumes[:2], {"brightness": [2, 0], "side": 1}, method=FEW, seed=3)
    for row, grades in enumerate([[2, 1], [0, 1]]):
        batch = {
            "volume": volumes[[row]],
            "slices": data.slices[[row]].astype(np.int32),
            "grades": np.array([grades], np.int32),
            "row": np.array([row], np.int32),
        }
        expected = hotspots.hotspot_step(jax.random.key(3), variables, batch, model=model, method=FEW)[0]
        for column, task in enumerate(TASKS):
            np.testing.assert_array_equal(maps[task.name][row], expected[column])


def test_without_a_grade_the_most_probable_one_is_explained(network, volumes):
    given = {name: each.argmax(1) for name, each in spinejax.grade(*network, volumes[:1]).probabilities.items()}
    explicit = spinejax.explain(*network, volumes[:1], given, method=FEW)
    jax.tree.map(np.testing.assert_array_equal, spinejax.explain(*network, volumes[:1], method=FEW), explicit)


@pytest.mark.parametrize(
    ("grades", "fault"),
    [
        ({"modic": 1}, "unknown task modic; the network grades brightness, side"),
        ({"brightness": 3}, "brightness is .* from 0 to 2"),
        ({"side": [0, -1, 0, 0, 0]}, "side is .* from 0 to 1"),
        ({"side": [0, 1]}, r"side is int64\[2\], expected one grade, or one per disc"),
        ({"side": 0.5}, "side is float64"),
    ],
)
def test_grades_that_are_not_the_networks_are_refused(network, volumes, grades, fault):
    with pytest.raises(spinejax.SpinejaxError, match=fault):
        spinejax.explain(*network, volumes, grades)


# Export --------------------------------------------------------------------------------------------------------------

WITHOUT_THE_LIBRARY = """
import sys, pathlib
sys.modules |= {"spinejax": None, "data_prep": None, "flax": None}
import jax, jax.export, numpy as np
exported = jax.export.deserialize(pathlib.Path("network.jax").read_bytes())
assert exported.platforms == ("cpu", "cuda", "tpu")
windows = np.load("windows.npy")
np.savez("found.npz", **{f"{name}/{n}": p for n in (1, 2, 5) for name, p in exported.call(windows[:n]).items()})
"""


def test_an_exported_network_grades_without_this_library(network, volumes, tmp_path):
    windows = np.stack([central_window(volume) for volume in volumes]).astype(np.float32) * INTENSITY_STEP
    np.save(tmp_path / "windows.npy", windows)
    assert spinejax.export(*network, tmp_path / "network.jax") == tmp_path / "network.jax"
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_THE_LIBRARY], cwd=tmp_path, check=True, timeout=300)
    expected = spinejax.grade(*network, volumes, tta=False).probabilities
    with np.load(tmp_path / "found.npz") as found:
        for name, probabilities in expected.items():
            for number in (1, 2, 5):
                np.testing.assert_allclose(found[f"{name}/{number}"], probabilities[:number], atol=1e-5)


def test_without_flatbuffers_the_export_says_what_to_install(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(spinejax.NotInstalledError, match=r"needs flatbuffers.*\[export\]"):
        spinejax.export(*network, tmp_path / "network.jax")
    assert not list(tmp_path.iterdir())


# Views ---------------------------------------------------------------------------------------------------------------


def other(**changes):
    return jax.tree.map(lambda leaf: leaf[None], views.identity()._replace(**changes))


@pytest.mark.parametrize(
    "view",
    [
        other(angle_deg=jnp.float32(5)),
        other(scale=jnp.float32(1.1)),
        other(intensity=jnp.float32(0.1)),
        other(shift_px=jnp.float32([0, 0.5])),
        other(shift_px=jnp.float32([0, 49])),
        other(shift_slices=jnp.int32(4)),
    ],
)
def test_views_that_would_be_ignored_are_refused(network, volumes, view):
    with pytest.raises(spinejax.SpinejaxError, match="expected only shifts by whole pixels"):
        predict.predict_step(network[1], volumes, view, model=network[0])
    with pytest.raises(spinejax.SpinejaxError, match="expected only shifts by whole pixels"):
        views.crop(volumes[0], jax.tree.map(lambda leaf: leaf[0], view))


def test_the_grid_is_the_papers_grid_or_is_refused(network, volumes):
    shuffled = jax.tree.map(lambda leaf: leaf[::-1], views.grid())
    for view_set in (shuffled, predict.view_set(tta=False)):
        with pytest.raises(spinejax.SpinejaxError, match=r"expected the views of `views.grid\(\)`"):
            predict.predict_step(network[1], volumes, view_set, model=network[0], grid=True)
