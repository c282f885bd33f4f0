"""Where the endplate tasks' hotspots lie on real stacks: in the vertebral body on the task's own side, or the other."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.graded_folds import predictions
from spinejax import config
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.files.atomic import write_atomically
from spinejax.geometry import central_window
from spinejax.inference import hotspots
from spinejax.metrics import grading, pointing
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.parallel import devices
from spinejax.tasks import Task
from spinejax.training import checkpoint


def point_in_stacks(data: DataSet, folder: Path) -> None:
    """Write `own_side.json`: where the endplate tasks' hotspots lie in the fold's test stacks, which have masks.

    Only discs that the network grades abnormal count. The abnormal score is traced back, over views as in training.
    """
    path = folder / "own_side.json"
    if path.is_file():
        return
    graded = predictions(folder)
    key_of_row = [*zip(data.scan.tolist(), data.level.tolist(), strict=True)]
    rows = np.array(
        [row for row, key in enumerate(key_of_row) if key in graded and data.mask("region", row).any()], np.int64
    )
    shares: list[dict] = []
    if len(rows):
        model, variables = checkpoint.load(folder / "run")
        model = with_cpu_kernels(model)
        sided = [task for task in model.tasks if task.name.split("_")[0] in pointing.SIDES]
        mesh = devices.make_mesh()
        method = hotspots.Method(ranges=config.load(folder / "run" / checkpoint.OPTIONS).views)
        grades = np.ones((len(data), len(model.tasks)), np.int64)
        batches = eval_batches(data, rows, [], batch_size=mesh.size)
        stream = hotspots.stream(jax.random.key(0), model, variables, batches, data.slices, grades, mesh, method=method)
        for batch_rows, batch_maps in stream:
            for row, maps in zip(batch_rows, batch_maps, strict=True):
                shares += shares_of_disc(data, int(row), sided, model.tasks, maps, graded[key_of_row[row]])
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(shares, indent=1, allow_nan=False) + "\n"))


def shares_of_disc(
    data: DataSet, row: int, sided: Sequence[Task], tasks: Sequence[Task], maps: np.ndarray, graded: Mapping
) -> list[dict]:
    """One disc's share of energy on the task's own side, for each task of a side on which it is graded abnormal."""
    region = central_window(data.mask("region", row))
    return [
        {
            "task": task.name,
            "patient": str(data.patient[row]),
            "own_side": pointing.own_side(task.name, maps[tasks.index(task)], region),
        }
        for task in sided
        if np.argmax(graded[task.name]) > 0
    ]


def own_sides(folds: Sequence[Path]) -> dict:
    """Task name → n and the mean share with its interval over patients, over all folds."""
    shares = [share for folder in folds for share in json.loads((folder / "own_side.json").read_text())]
    found = {}
    for name in sorted({share["task"] for share in shares}):
        own = [share for share in shares if share["task"] == name]
        values, patients = np.array([s["own_side"] for s in own]), np.array([s["patient"] for s in own])
        found[name] = {"n": len(own), "own_side": grading.mean_over_patients(values, patients).to_json()}
    return found
