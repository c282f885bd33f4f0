"""How fast is each part of a step? Discs a second for reading, views, forward pass, train step and 54-view averaging.

    python benchmarks/step_time.py --data runs/quickstart/discs [--preset quickstart] [--json FILE]

The parts are timed in turn, round after round in one process, and the medians are printed: a machine that slows down
slows all of them. Waiting for data is measured in the real loop: the share of a stretch of training, read, transferred
and computed, in which the step had no batch.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from spinejax import config, devices, losses, pipeline, predict, training, views
from spinejax.dataset import DataSet


@dataclass(frozen=True)
class Arguments:
    """Time the parts of a step."""

    data: Path
    """Data set to read from."""
    preset: Literal["quickstart", "paper"] = "quickstart"
    """Whose network and options."""
    batch_size: int = 32
    """Discs at once."""
    rounds: int = 7
    """Times that each part is timed."""
    steps: int = 40
    """Steps of the loop in which waiting for data is measured."""
    json: Path | None = None
    """Also write the figures here."""


def main(arguments: Arguments) -> None:
    """Print a row per part."""
    options, size = config.PRESETS[arguments.preset][1], arguments.batch_size
    mesh, data = devices.make_mesh(), DataSet(arguments.data)
    model = training.make_model(options, data.tasks)
    columns = list(range(len(data.tasks)))
    rows = data.rows("train")
    key = jax.random.key(0)
    state = devices.put_replicated(training.init(key, model, options, data.slice_mean), mesh)
    weights = devices.put_replicated(losses.class_weights(data.labels[rows], data.tasks), mesh)
    batch = devices.put_batch(next(pipeline.train_batches(data, columns, batch_size=size, seed=0)), mesh)
    variables = jax.tree.map(np.asarray, {"params": state.params, "constants": state.constants})
    drawn = jax.jit(jax.vmap(lambda key: views.sample(key, options.views)))(jax.random.split(key, size))
    take, forward = jax.jit(jax.vmap(views.take)), jax.jit(model.apply)
    windows = take(batch["volume"], drawn)
    grid = predict.view_set(tta=True)
    picks = itertools.cycle(np.array_split(np.random.default_rng(0).permutation(rows), max(1, len(rows) // size)))

    def train_step():
        nonlocal state
        state, figures = training.train_step(key, state, batch, weights, model=model, config=options)
        return figures

    parts = {
        "read": lambda: data.volumes(next(picks)[:size]),
        "views": lambda: take(batch["volume"], drawn),
        "forward": lambda: forward(variables, windows),
        "train step, views included": train_step,
        "54-view average": lambda: predict.predict_step(variables, batch["volume"], grid, model=model),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(arguments.rounds + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            jax.block_until_ready(part())
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - started)

    figures = {name: size / float(np.median(times)) for name, times in seconds.items()}
    table = Table(title=f"{arguments.preset}, batch {size}, {jax.device_count()} × {jax.devices()[0].device_kind}")
    table.add_column("part")
    table.add_column("discs/s", justify="right")
    for name, speed in figures.items():
        table.add_row(name, f"{speed:,.0f}")
    figures["loop"], figures["waiting_for_data"] = loop(key, state, data, columns, arguments, model, options, mesh)
    table.add_row("loop: read, transfer, step", f"{figures['loop']:,.0f}")
    Console().print(table)
    print(f"share of the loop spent waiting for data: {figures['waiting_for_data']:.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def loop(key, state, data, columns, arguments: Arguments, model, options, mesh) -> tuple[float, float]:
    """Discs a second of the training loop, and the share of its time without a batch."""
    weights = devices.put_replicated(losses.class_weights(data.labels[data.rows("train")], data.tasks), mesh)
    batches = pipeline.train_batches(data, columns, batch_size=arguments.batch_size, seed=1)
    waited, started, figures = 0.0, 0.0, None
    for step in range(arguments.steps + 5):
        if step == 5:  # the pipeline is full and the step compiled
            jax.block_until_ready(state)
            waited, started = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, figures = training.train_step(
            key, state, devices.put_batch(batch, mesh), weights, model=model, config=options
        )
    jax.block_until_ready(figures)
    seconds = time.perf_counter() - started
    return arguments.steps * arguments.batch_size / seconds, waited / seconds


if __name__ == "__main__":
    main(tyro.cli(Arguments))
