"""Speed of each part of a step: discs per second of reading, views, forward pass, train step and 54-view average.

    python -m benchmarks.step_time --data runs/quickstart/discs [--preset quickstart] [--json FILE]

The parts are timed in turn, for several rounds in one process, so that a slower machine slows all of them; the medians
are printed. "Waiting for data" is the time that the real loop (read, transfer, step) takes longer than the same loop
over one batch in memory, as a share of the real loop's time; noise may make it negative. "CPU time for data" is the
same in CPU time, which other work on the machine does not change.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.running import start
from spinejax import config
from spinejax.data.batches import train_batches
from spinejax.data.dataset import DataSet
from spinejax.inference import predict
from spinejax.network import losses, views
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.parallel import devices, runtime
from spinejax.training import train_step


@dataclass(frozen=True)
class Arguments:
    """Time the parts of a step."""

    data: Path
    """Data set to read from."""
    preset: Literal["quickstart", "paper"] = "quickstart"
    """Preset of the network and the options."""
    batch_size: int = 32
    """Discs per batch."""
    rounds: int = 7
    """Number of times that each part is timed."""
    steps: int = 20
    """Number of steps of the loops that measure waiting for data."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""


def main(arguments: Arguments) -> None:
    """Print one row per part."""
    runtime.set_up()
    options, size = config.PRESETS[arguments.preset][1], arguments.batch_size
    mesh, data = devices.make_mesh(), DataSet(arguments.data)
    model = with_cpu_kernels(train_step.make_model(options, data.tasks))
    columns = list(range(len(data.tasks)))
    rows = data.rows("train")
    key = jax.random.key(0)
    state = devices.put_replicated(train_step.init(key, model, options, data.slice_mean), mesh)
    weights = devices.put_replicated(losses.class_weights(data.labels[rows], data.tasks), mesh)
    batch = devices.put_batch(next(train_batches(data, columns, batch_size=size, seed=0)), mesh)
    variables = jax.tree.map(np.asarray, {"params": state.params, "constants": state.constants})
    drawn = jax.jit(jax.vmap(lambda key: views.sample(key, options.views)))(jax.random.split(key, size))
    take, forward = jax.jit(jax.vmap(views.take)), jax.jit(model.apply)
    windows = take(batch["volume"], drawn)
    grid = predict.view_set(tta=True)
    picks = itertools.cycle(np.array_split(np.random.default_rng(0).permutation(rows), max(1, len(rows) // size)))

    def one_step():
        nonlocal state
        state, figures = train_step.train_step(key, state, batch, weights, model=model, config=options)
        return figures

    parts = {
        "read": lambda: data.volumes(next(picks)[:size]),
        "views": lambda: take(batch["volume"], drawn),
        "forward": lambda: forward(variables, windows),
        "train step, views included": one_step,
        "54-view average": lambda: predict.predict_step(variables, batch["volume"], grid, model=model, grid=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(arguments.rounds + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            jax.block_until_ready(part())
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - started)

    figures = {name: size / float(np.median(times)) for name, times in seconds.items()}
    from_disk: list[np.ndarray] = []
    from_memory: list[np.ndarray] = []
    host_batch = jax.tree.map(np.asarray, batch)
    batches = train_batches(data, columns, batch_size=size, seed=1)
    for _ in range(arguments.rounds):
        for source, times in ((batches, from_disk), (itertools.repeat(host_batch), from_memory)):
            started = np.array([time.perf_counter(), time.process_time()])
            for one in itertools.islice(source, arguments.steps):
                on_device = devices.put_batch(one, mesh)
                state, last = train_step.train_step(key, state, on_device, weights, model=model, config=options)
            jax.block_until_ready(last)
            times.append(np.array([time.perf_counter(), time.process_time()]) - started)
    waits, cpu_shares = (1 - np.array(from_memory) / np.array(from_disk)).T
    figures["loop"] = arguments.steps * size / float(np.median(np.array(from_disk)[:, 0]))
    figures["waiting_for_data"] = float(np.median(waits))
    figures["cpu_for_data"] = float(np.median(cpu_shares))

    table = Table(title=f"{arguments.preset}, batch {size}, {jax.device_count()} × {jax.devices()[0].device_kind}")
    table.add_column("part")
    table.add_column("discs/s", justify="right")
    for name in (*parts, "loop"):
        table.add_row("loop: read, transfer, step" if name == "loop" else name, f"{figures[name]:,.0f}")
    Console().print(table)
    for name, shares in (("waiting for data", waits), ("CPU time for data", cpu_shares)):
        print(f"{name}: {np.median(shares):.1%} (from {min(shares):.1%} to {max(shares):.1%})")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    start("step_time", Arguments, main)
