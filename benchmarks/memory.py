"""Peak memory of reading and training with 1× and 10× the discs: it must not grow with the data set.

    python -m benchmarks.memory [--discs 120] [--json FILE]

It makes two data sets of noise in a temporary folder. On each it trains a narrow network for the same number of steps,
in a separate process, which prints its peak resident memory.
"""

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.running import start
from spinejax.data.manifest import write_manifest
from spinejax.data.shards import Disc, shard_name, write_shard
from spinejax.geometry import VOLUME_SHAPE
from spinejax.tasks import PAPER_TASKS

STEPS = 30
BATCH_SIZE = 16


@dataclass(frozen=True)
class Arguments:
    """Compare peak memory at 1× and 10× the discs."""

    discs: int = 120
    """Number of training discs of the smaller data set, 1.8 MB each."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""
    measure: Path | None = None
    """Internal: train on this data set and print the peak memory."""


def main(arguments: Arguments) -> None:
    """Make both data sets, train on each, and compare."""
    if arguments.measure:
        print(train(arguments.measure))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for factor in (1, 10):
            data = write(Path(folder) / str(factor), factor * arguments.discs)
            command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(data)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures[f"{factor}x"] = {"discs": factor * arguments.discs, "peak_mb": int(output.split()[-1])}
            print(f"{factor:2}×: {factor * arguments.discs:5} discs, peak {figures[f'{factor}x']['peak_mb']} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


def write(folder: Path, num_discs: int) -> Path:
    """Write a data set of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 65535, VOLUME_SHAPE, dtype=np.uint16)

    def disc(number: int) -> Disc:
        return Disc(
            volume=np.roll(noise, number, axis=0),
            affine=np.eye(4),
            slices=(0, VOLUME_SHAPE[2]),
            labels={task.name: int(rng.integers(task.num_grades)) for task in PAPER_TASKS},
            level="L4-L5",
            patient=f"p{number}",
            scan=f"s{number}",
            split="train",
        )

    num_shards = 4
    summaries = [
        write_shard(folder / shard_name(i, num_shards), map(disc, range(i, num_discs, num_shards)), PAPER_TASKS)
        for i in range(num_shards)
    ]
    write_manifest(folder, summaries, PAPER_TASKS, {}, ())
    return folder


def train(folder: Path) -> int:
    """Peak memory in MB of a process that takes `STEPS` steps."""
    import jax

    from spinejax.config import Config
    from spinejax.data.batches import train_batches
    from spinejax.data.dataset import DataSet
    from spinejax.network import losses
    from spinejax.training import train_step

    data, options = DataSet(folder), Config(width=0.05, batch_size=BATCH_SIZE)
    model = train_step.make_model(options, data.tasks)
    key = jax.random.key(0)
    state = train_step.init(key, model, options, data.slice_mean)
    weights = losses.class_weights(data.labels, data.tasks)
    batches = train_batches(data, list(range(6)), batch_size=BATCH_SIZE, seed=0)
    for _ in range(STEPS):
        state, _ = train_step.train_step(key, state, next(batches), weights, model=model, config=options)
    jax.block_until_ready(state)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    start("memory", Arguments, main)
