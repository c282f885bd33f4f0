"""Grades in bfloat16 against float32. For each task: how many grades differ, and by how much the probabilities.

python -m benchmarks.precision --checkpoint runs/quickstart/run --data runs/quickstart/discs [--split test] [--tta]
"""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import spinejax
from benchmarks.running import start
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.inference import predict
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.parallel import devices, runtime

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Arguments:
    """Grade discs in float32 and in bfloat16 with the same weights."""

    checkpoint: Path
    """Run or exported network."""
    data: Path
    """Data set."""
    split: str = "test"
    """Split to grade."""
    tta: bool = False
    """Average over 54 views."""
    batch_size: int = 24
    """Discs per batch."""


def main(arguments: Arguments) -> None:
    """Print the table."""
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
    Console().print(table)


if __name__ == "__main__":
    start("precision", Arguments, main)
