"""Grades in bfloat16 against float32.

    python -m benchmarks.precision --checkpoint runs/quickstart/run --data runs/quickstart/discs [--split test] [--tta]
    python -m benchmarks.precision --train runs/precision --data runs/quickstart/discs [--preset quickstart]
        [--init-from RUN] [--seeds 0 1 2]

With the same weights: for each task how many grades differ, and by how much the probabilities. With `--train`, networks
that were trained and evaluated in each precision, once for each seed, which decides initial weights, order and views:
their accuracy, and the mean difference between the two with its 95 % interval over seeds (Student's t, paired).
Finished runs are kept.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

import spinejax
from benchmarks.running import require_trained, run_script, start
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.inference import predict
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.parallel import devices, runtime

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Arguments:
    """Grade discs in float32 and in bfloat16."""

    data: Path
    """Data set."""
    checkpoint: Path | None = None
    """Run or exported network whose weights grade in both."""
    train: Path | None = None
    """Folder for runs in both precisions, to compare instead."""
    preset: str = "quickstart"
    """Preset of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs; at least two."""
    epochs: int = 150
    """Epochs of the runs."""
    init_from: Path | None = None
    """Run whose weights they start from, so that few epochs are enough."""
    split: str = "test"
    """Split to grade."""
    tta: bool = False
    """Average over 54 views."""
    batch_size: int = 24
    """Discs per batch."""


def main(arguments: Arguments) -> None:
    """Print the table."""
    if (arguments.train is None) == (arguments.checkpoint is None) or len(arguments.seeds) < 2:
        sys.exit("precision: expected one of --checkpoint and --train, and at least two seeds.")
    Console(width=160).print(table_of_runs(arguments) if arguments.train else table_of_weights(arguments))


def table_of_weights(arguments: Arguments) -> Table:
    """Differences between the grades of one network's weights in both precisions."""
    runtime.set_up()
    data, (model, variables) = DataSet(arguments.data), spinejax.load(arguments.checkpoint)
    rows, mesh = data.rows(arguments.split), devices.make_mesh()

    def graded(dtype: str) -> dict[str, np.ndarray]:
        network = with_cpu_kernels(model).clone(dtype=jnp.dtype(dtype))
        batches = eval_batches(data, rows, [0], batch_size=arguments.batch_size)
        found = [each for _, each, _ in predict.predict(network, variables, batches, mesh, tta=arguments.tta)]
        return {task.name: np.concatenate([each[task.name] for each in found]) for task in model.tasks}

    table = Table(title=f"{len(rows)} discs, the same weights in {' and '.join(DTYPES)}")
    for name in ("task", "another grade", "probability off by at most"):
        table.add_column(name)
    plain, rounded = map(graded, DTYPES)
    for task in model.tasks:
        one, other = plain[task.name], rounded[task.name]
        changed = int((one.argmax(1) != other.argmax(1)).sum())
        table.add_row(task.name, f"{changed} of {len(one)}", f"{np.abs(one - other).max():.3f}")
    return table


def table_of_runs(arguments: Arguments) -> Table:
    """Accuracy of networks trained in each precision: the mean over seeds, the least and the greatest."""
    found = {dtype: [accuracies(arguments, dtype, seed) for seed in arguments.seeds] for dtype in DTYPES}
    tasks = found[DTYPES[0]][0]
    table = Table("mean per-class accuracy, %", *tasks, "mean")
    about = f"{arguments.preset}, {arguments.epochs} epochs, {len(arguments.seeds)} seeds"
    table.title = f"{about}: mean, least to greatest"
    with_mean = {}
    for dtype, runs in found.items():
        by_task = 100 * np.array([[run[name] for name in tasks] for run in runs])
        with_mean[dtype] = np.column_stack([by_task, by_task.mean(1)])
    for dtype, each in with_mean.items():
        table.add_row(dtype, *(f"{one.mean():.1f} ({one.min():.1f} to {one.max():.1f})" for one in each.T))
    difference = with_mean["bfloat16"] - with_mean["float32"]
    cells = []
    for one in difference.T:
        around = stats.t.ppf(0.975, len(one) - 1) * stats.sem(one)
        cells.append(f"{one.mean():+.1f} [{one.mean() - around:+.1f}, {one.mean() + around:+.1f}]")
    table.add_row("difference", *cells)
    return table


def accuracies(arguments: Arguments, dtype: str, seed: int) -> dict[str, float]:
    """Train and evaluate one network; its mean per-class accuracy by task."""
    assert arguments.train
    run = arguments.train / f"{dtype}-{seed}"
    same = "--data", arguments.data, "--dtype", dtype
    if not (run / "export").is_dir():
        how = ["--seed", seed, "--epochs", arguments.epochs]
        how += ["--init-from", arguments.init_from] if arguments.init_from else []
        run_script("train.py", arguments.preset, *same, "--workdir", run, *how)
        require_trained(run)
    graded = run / "graded"
    if not (graded / "results.json").is_file():
        views = ["--tta"] if arguments.tta else []
        run_script("evaluate.py", *same, "--checkpoint", run, "--split", arguments.split, "--out", graded, *views)
    results = json.loads((graded / "results.json").read_text())["tasks"]
    return {name: each["mean_per_class_accuracy"]["value"] for name, each in results.items()}


if __name__ == "__main__":
    start("precision", Arguments, main)
