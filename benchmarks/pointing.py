"""How well do hotspots point, and what makes them? One table: ways of making maps, against planted lesions.

`python benchmarks/pointing.py --checkpoint RUN --data PHANTOMS`, with phantoms that the network was not trained on.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from spinejax import checkpoint, config, devices, hotspots, pipeline, pointing, predict, report
from spinejax.config import ViewRanges
from spinejax.dataset import DataSet
from spinejax.hotspots import ONE_PLACE, PLAIN_GRADIENT, Method
from spinejax.shards import central_window

WEAK = ViewRanges(angle_deg=5, shift_rows_px=8, shift_columns_px=10, shift_slices=0, scale=0.03, intensity=0.03)
WILD = ViewRanges(angle_deg=25, shift_rows_px=36, shift_columns_px=48, shift_slices=3, scale=0.2, intensity=0.15)

AS_TRAINED = "32 random views, as in training"

METHODS = {
    AS_TRAINED: Method(),
    "paper's ranges": Method(),
    "plain gradient, one view": PLAIN_GRADIENT,
    "SmoothGrad: 32 times noise of 0.1": Method(ranges=ONE_PLACE, noise=0.1),
    "weak augmentation": Method(ranges=WEAK),
    "wilder than the paper's": Method(ranges=WILD),
    "adjoint warp": Method(warp="adjoint"),
    "1 random view": Method(num_views=1),
    "4 random views": Method(num_views=4),
    "8 random views": Method(num_views=8),
    "16 random views": Method(num_views=16),
    "128 random views": Method(num_views=128),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare ways of making hotspots on discs with lesion masks."""

    checkpoint: Path
    """A trained run."""
    data: Path
    """Phantoms; all splits are used."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    num_discs: int | None = None
    """Only so many of the discs with a lesion."""


def main(arguments: Arguments) -> None:
    devices.keep_compiled()
    mesh = devices.make_mesh()
    model, variables = checkpoint.load(arguments.checkpoint)
    data = DataSet(arguments.data)
    local = [task for task in model.tasks if task.name.split("_")[0] in pointing.SIDES]
    columns = [data.tasks.index(task) for task in local]
    rows = np.flatnonzero((data.labels[:, columns] > 0).any(1))[: arguments.num_discs]
    batches = pipeline.eval_batches(data, rows, [], batch_size=8)
    graded = list(predict.predict(model, variables, batches, mesh))
    probabilities = {name: np.concatenate([part[name] for _, part in graded]) for name in graded[0][1]}
    grades = np.zeros((len(data), len(model.tasks)), np.int64)
    grades[rows] = hotspots.choose_grades(model.tasks, probabilities)

    for name in arguments.methods:
        started = time.perf_counter()
        measures = {task.name: [] for task in local}
        batches = pipeline.eval_batches(data, rows, [], batch_size=mesh.size)
        key = jax.random.key(0)
        method = METHODS[name]
        if name == AS_TRAINED:
            method = dataclasses.replace(method, ranges=config.load(arguments.checkpoint / config.FILE).views)
        stream = hotspots.stream(key, model, variables, batches, data.slices, grades, mesh, method=method)
        for found, maps in stream:
            for row, disc in zip(found, maps, strict=True):
                mask, region = data.mask("lesion", row), central_window(data.mask("region", row))
                for task in local:
                    column = data.tasks.index(task)
                    if data.labels[row, column] <= 0:
                        continue
                    map = disc[model.tasks.index(task)]
                    measure = pointing.point(map, pointing.lesion_of(mask, column), data.affine[row], data.slices[row])
                    side = pointing.own_side(task.name, map, region)
                    seen = float(grades[row, model.tasks.index(task)] > 0)
                    measures[task.name].append(measure | {"own_side": side, "seen": seen, "row": row})
        table = Table(title=f"{name} ({time.perf_counter() - started:.0f} s)", title_justify="left")
        for header in ("task", "discs", "hit, %", "by chance", "energy inside", "even map", "precision", "own side"):
            table.add_column(header)
        for kind in ("all", "rightly graded"):
            for task in local:
                each = [m for m in measures[task.name] if kind == "all" or m["seen"]]
                summary = pointing.summarise(each, [data.patient[m["row"]] for m in each])
                order = ("hit", "hit_by_chance", "energy_inside", "lesion_share", "average_precision", "own_side")
                cells = [report.percent(summary.estimates[n]) for n in order] if summary.n else []
                table.add_row(f"{task.name}, {kind}", str(summary.n), *cells)
        Console(width=170).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
