"""`evaluate.py --hotspots` from end to end on a data set with masks, and the gallery's sums and choices."""

import dataclasses
import json
import time

import h5py
import jax
import nibabel
import numpy as np
import pytest
from matplotlib.image import imread

from spinejax.commands import evaluate
from spinejax.config import Config, save
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, write_shard
from spinejax.errors import SpinejaxError
from spinejax.geometry import INTENSITY_STEP, VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.inference.hotspots import Method
from spinejax.network.views import ViewRanges
from spinejax.parallel import runtime
from spinejax.report import gallery
from spinejax.report.gallery import Gallery
from spinejax.tasks import LEVELS, Task
from spinejax.training import checkpoint, train_step
from spinejax.training.checkpoint import OPTIONS

TASKS = (Task("upper_marrow", ("normal", "abnormal")), Task("narrowing", ("1", "2", "3", "4")))
MASKS = ("region", "lesion")
MILD = ViewRanges(angle_deg=2, shift_rows_px=3, shift_columns_px=3)


def masked_disc(rng, patient, level, split):
    """Noise with two bodies; the upper one carries a lesion, bit 0, in slices 6 and 7."""
    volume = rng.integers(20000, 24000, VOLUME_SHAPE, dtype=np.uint16)
    region, lesion = np.zeros(VOLUME_SHAPE, np.uint8), np.zeros(VOLUME_SHAPE, np.uint16)
    region[40:80], region[80:112], region[112:152] = 1, 2, 3
    lesion[60:75, 150:170, 6:8] = 1
    volume[lesion > 0] = 60000
    labels = {"upper_marrow": 1, "narrowing": 2}
    place = {"level": level, "patient": patient, "scan": f"{patient}-t2", "split": split}
    return Disc(volume, np.diag([0.3, 0.3, 4.0, 1.0]), (2, 13), labels, **place, region=region, lesion=lesion)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(0)
    splits = {"p1": "test", "p2": "test", "p3": "validation"}
    discs = [masked_disc(rng, patient, level, splits[patient]) for patient in splits for level in LEVELS[-2:]]
    write_manifest(folder, [write_shard(folder / "discs-00000-of-00001.h5", discs, TASKS, MASKS)], TASKS, {}, MASKS)
    return DataSet(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an untrained network's checkpoint."""
    folder, config = tmp_path_factory.mktemp("run"), Config(width=0.02, initialiser="he", views=MILD)
    save(config, folder / OPTIONS)
    model = train_step.make_model(config, TASKS)
    state = train_step.init(jax.random.key(0), model, config, np.full(9, 0.3, np.float32))
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoint.save(checkpoints, state, model, data_digest="abc", error=0.5)
    checkpoints.close()
    return folder


def evaluated(run, data, out, monkeypatch, **options):
    monkeypatch.setattr(runtime, "set_up", lambda **_: None)  # tests share a process: no cache on disk
    method = Method(num_views=2)
    arguments = {"batch_size": 8, "hotspots": True, "hotspot": method, "out": out}
    evaluate.main(evaluate.Arguments(run, data.folder, **(arguments | options)))
    return out / "hotspots"


def test_evaluate_writes_maps_figures_and_pointing(run, data, tmp_path, monkeypatch, capsys):
    chosen = (("upper_marrow", "abnormal"),)
    folder = evaluated(run, data, tmp_path / "out", monkeypatch, hotspot_grades=chosen, calibrate=True)
    with h5py.File(folder / "hotspots.h5") as file:
        assert file["map"].shape == (4, 2, *WINDOW_SHAPE)
        assert (file["map"][()].max((2, 3, 4)) == 255).all()
        assert (file["grade"][:, 0] == 1).all()
        assert json.loads(file.attrs["method"])["ranges"] == dataclasses.asdict(MILD)  # as in training
        first = file["map"][0, 0] * file["step"][0, 0]
    names = sorted(path.name for path in (folder / "nifti").iterdir())
    assert names[0] == f"p1-t2_{LEVELS[-2]}_narrowing.nii.gz"
    assert len(names) == 8
    image = nibabel.load(folder / "nifti" / f"p1-t2_{LEVELS[-2]}_upper_marrow.nii.gz")
    np.testing.assert_allclose(image.get_fdata(), first, atol=first.max() / 200)
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [-40 * 0.3, -48 * 0.3, 3 * 4.0, 1], rtol=1e-6)
    assert imread(folder / "examples.png").std() > 0.05
    assert imread(folder / "mean-maps.png").std() > 0.05
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for each in results["calibration"].values():  # every disc has the same grade: the surer, the better
        assert each["temperature"] != 1
        assert each["brier_after"] != each["brier_before"]
    assert set(results["calibration"]) == {"upper_marrow", "narrowing"}
    found = results["hotspots"]
    assert set(found) == {"upper_marrow"}  # narrowing has no lesion mask and no side
    assert found["upper_marrow"]["n"] == 4
    assert 0 < found["upper_marrow"]["energy_inside"]["value"] < 1
    assert "Hotspots against lesion masks" in capsys.readouterr().out


def test_any_number_of_threads_writes_the_same_bytes(run, data, tmp_path, monkeypatch):
    written = []
    for threads in (1, 3):
        out, page = (tmp_path / f"{name}-{threads}" for name in ("out", "page"))
        evaluated(run, data, out, monkeypatch, report=page, write_threads=threads)
        files = (path for folder in (out, page) for path in folder.rglob("*") if path.is_file())
        written.append(
            {str(path.relative_to(tmp_path)).replace(f"-{threads}/", "/"): path.read_bytes() for path in files}
        )
    assert {"out/hotspots/hotspots.h5", "page/index.html"} < set(written[0])
    assert written[0] == written[1]


def test_threads_keep_the_order_and_few_items_in_memory():
    taken = []

    def items():
        for number in range(9):
            taken.append(number)
            yield number

    def slow_if_even(number):
        time.sleep(0.02 * (number % 2 == 0))
        return -number

    for count, result in enumerate(gallery.in_threads(slow_if_even, items(), 3)):
        assert result == -count
        assert len(taken) <= count + 4
    with pytest.raises(ZeroDivisionError):
        list(gallery.in_threads(lambda number: 1 // (number - 2), iter(range(5)), 2))


def test_an_unknown_grade_stops_before_anything_is_written(run, data, tmp_path, monkeypatch):
    with pytest.raises(SpinejaxError, match="upper_marrow has no grade '3', only normal, abnormal"):
        evaluated(run, data, tmp_path / "out", monkeypatch, hotspot_grades=(("upper_marrow", "3"),))
    assert not (tmp_path / "out").exists()


def test_calibration_is_not_judged_on_the_discs_it_was_fitted_to(run, data, tmp_path, monkeypatch):
    with pytest.raises(SpinejaxError, match="cannot be judged there"):
        evaluated(run, data, tmp_path, monkeypatch, hotspots=False, calibrate=True, split="validation")


def test_a_perfect_map_has_perfect_measures_and_means_weigh_discs_equally(data, tmp_path):
    """The lesion itself as the map, a thousand times steeper in one disc than in another."""
    grades = np.tile([1, 0], (len(data), 1))
    gallery = Gallery(data, TASKS, grades, np.arange(3))
    for row in range(3):
        lesion = (central_window(data.mask("lesion", row)) & 1).astype(np.float32)
        gallery.add(row, np.stack([lesion * 1000.0**row, np.zeros(WINDOW_SHAPE, np.float32)]))
    found = gallery.pointing()
    assert set(found) == {"upper_marrow"}
    perfect = ("hit", "energy_inside", "average_precision", "own_side")
    assert [found["upper_marrow"].estimates[name].value for name in perfect] == [1, 1, 1, 1]
    gallery.write_figures(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.png", "mean-maps.png"]
    np.testing.assert_allclose(gallery._maps[0] / 3, lesion / lesion.sum(), rtol=1e-5)
    windows = [central_window(data.volume(row)) * INTENSITY_STEP for row in range(3)]
    np.testing.assert_allclose(gallery._windows[0], np.sum(windows, axis=0), rtol=1e-5)


def test_without_an_abnormal_grade_no_figure_is_written(data, tmp_path):
    gallery = Gallery(data, TASKS, np.zeros((len(data), 2), int), np.arange(1))
    gallery.add(0, np.ones((2, *WINDOW_SHAPE), np.float32))
    gallery.write_figures(tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_task_has_an_example_of_its_own(data):
    rightly = np.tile([1, 2], (len(data), 1))
    for seed in range(5):
        one, other = Gallery(data, TASKS, rightly, np.arange(2), seed=seed)._chosen
        assert one != other
    only = Gallery(data, TASKS, rightly, np.arange(1))._chosen
    assert set(only) == {0}  # with one disc there is no other
