"""Speed of the network against PyTorch: the same weights in both, in one process, in turn.

    taskset -c 0 python -m benchmarks.peers [--width 1.0] [--batch-sizes 1 8 32] [--parts forward train tta hotspots]
        [--json FILE]

PyTorch runs `benchmarks/torch_twin.py` in channels_last, eager and through `torch.compile`; each row compares spinejax
with the faster of the two. Outputs must agree to 1e-4 before anything is timed. spinejax is set up as by its commands;
both keep freed memory. Each has as many threads as the process has cores. The process's CPU time is measured, because
other work on the machine does not change it; on one core it equals the time without other work. A figure is the median
of its turns; a ratio is the median of the turns' ratios, with the least and the greatest. Needs the extra `bench`.

    forward     windows → scores
    train       SGD with momentum and weight decay on windows, with dropout; PyTorch's fused SGD
    tta         the mean over 54 views; both take the same number of views at once
    hotspots    6 tasks × 32 views of one disc: windows → input gradients, without the warps, which PyTorch lacks. More
                discs repeat the same work, so there is one row
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.running import peer, start
from benchmarks.torch_twin import (
    Twin,
    input_gradients,
    loss_of,
    mean_of_grid,
    optimiser_of,
    volumes_of,
    windows_of,
)
from spinejax.config import Config
from spinejax.geometry import VOLUME_SHAPE
from spinejax.inference import hotspots as hotspots_of
from spinejax.inference import predict
from spinejax.network import losses, views
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import runtime
from spinejax.tasks import PAPER_TASKS
from spinejax.training import train_step

torch = peer("torch")
Part = Literal["forward", "train", "tta", "hotspots"]
NUM_VIEWS = 32
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Arguments:
    """Time spinejax and PyTorch side by side."""

    width: float = 1.0
    """Width multiplier of every layer; 1 is the paper's network."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Numbers of discs per batch."""
    parts: tuple[Part, ...] = ("forward", "train", "tta", "hotspots")
    """Parts to time."""
    rounds: int = 5
    """Number of turns of each."""
    compile: bool = True
    """Time `torch.compile` beside eager PyTorch."""
    json: Path | None = None
    """Also write the rows to this file: a list of name, width, ours, theirs (discs/s), ratio, low, high, peer."""


def main(arguments: Arguments) -> None:
    """Print one row per part and batch size, and write each as soon as it is complete."""
    runtime.set_up()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    model = with_cpu_kernels(SpineNet(PAPER_TASKS, width=arguments.width))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 112, 224, 9)))
    twin = Twin(model, variables).to(memory_format=torch.channels_last)
    rows = []
    table = Table(title=f"discs per second of CPU time at width {arguments.width:g}, {cores} cores")
    for header in ("part", "spinejax", "PyTorch", "ratio", "least to greatest"):
        table.add_column(header)
    for part in arguments.parts:
        for size in (1,) if part == "hotspots" else arguments.batch_sizes:
            ours, theirs = PARTS[part](model, variables, twin, size, arguments.compile)
            times = interleaved([ours, *theirs], arguments.rounds)
            best = min(range(1, len(times)), key=lambda peer: np.median(times[peer]))
            ratios = np.array(times[best]) / np.array(times[0])
            row = {
                "name": f"{part}, batch {size}",
                "width": arguments.width,
                "ours": size / float(np.median(times[0])),
                "theirs": size / float(np.median(times[best])),
                "ratio": float(np.median(ratios)),
                "low": float(ratios.min()),
                "high": float(ratios.max()),
                "peer": ("eager", "compiled")[best - 1],
            }
            rows.append(row)
            cells = [f"{row[key]:.2f}" for key in ("ours", "theirs", "ratio")]
            table.add_row(row["name"], *cells, f"{ratios.min():.2f} to {ratios.max():.2f}")
            print(f"{row['name']}: {', '.join(cells)}, {row['peer']}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    Console().print(table)


def interleaved(calls: Sequence[Callable], rounds: int) -> list[list[float]]:
    """CPU seconds of each call in each turn. The first turn, which compiles, is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            started = time.process_time()
            call()
            if turn:
                times.append(time.process_time() - started)
    return seconds


def forward(model, variables, twin, size, compiled):
    """Windows → scores."""
    windows = _windows(size)
    theirs = windows_of(windows)
    apply = jax.jit(model.apply)
    twin.eval()
    with torch.no_grad():
        for name, scores in twin(theirs).items():
            agree(apply(variables, windows)[name], scores, f"forward, {name}")

    def run(module):
        def call():
            with torch.no_grad():
                module(theirs)

        return call

    return lambda: jax.block_until_ready(apply(variables, windows)), _eager_and_compiled(run, twin, compiled)


def train(model, variables, twin, size, compiled):
    """One step of SGD on windows; the loss without dropout must agree first."""
    options = Config(width=model.width)
    state = train_step.init(jax.random.key(0), model, options, np.zeros(9, np.float32))
    state = state.replace(params=jax.tree.map(jnp.array, variables["params"]))
    windows = _windows(size)
    labels = np.random.default_rng(1).integers(0, 2, (size, len(model.tasks))).astype(np.int32)
    weights = losses.class_weights(np.tile(labels, (2, 1)), model.tasks)
    theirs, targets = windows_of(windows), torch.tensor(labels).long()
    class_weights = {name: torch.tensor(np.asarray(each), dtype=torch.float32) for name, each in weights.items()}

    by_name = {task.name: labels[:, column] for column, task in enumerate(model.tasks)}
    ours, _ = losses.multi_task_loss(jax.jit(model.apply)(variables, windows), by_name, weights, {})
    twin.eval()
    agree(ours, loss_of(twin(theirs), targets, class_weights), "train, loss")
    learner = Twin(model, variables).to(memory_format=torch.channels_last).train()
    optimiser = optimiser_of(learner, options)

    def run(module):
        def call():
            optimiser.zero_grad(set_to_none=True)
            loss_of(module(theirs), targets, class_weights).backward()
            optimiser.step()

        return call

    def step():
        nonlocal state
        state, figures = train_step.update(
            jax.random.key(0), state, windows, labels, weights, model=model, config=options
        )
        jax.block_until_ready((state, figures))

    return step, _eager_and_compiled(run, learner, compiled)


def tta(model, variables, twin, size, compiled):
    """The mean over 54 views of stored discs, crops included."""
    volumes = np.random.default_rng(0).integers(0, 65536, (size, *VOLUME_SHAPE), dtype=np.uint16)
    theirs, grid = volumes_of(volumes), views.grid()  # converted once, and not timed

    def run(module):
        def call():
            with torch.no_grad():
                return mean_of_grid(module, theirs)

        return call

    def ours():
        return jax.block_until_ready(predict.predict_step(variables, volumes, grid, model=model, grid=True))

    twin.eval()
    expected = run(twin)()
    for name, probabilities in ours()[0].items():
        agree(probabilities, expected[name], f"tta, {name}")
    return ours, _eager_and_compiled(run, twin, compiled)


def hotspots(model, variables, twin, size, compiled):
    """Input gradients of one score per task over 32 views of one disc: one forward pass, one backward pass per task."""
    windows = _windows(NUM_VIEWS)

    grades = jnp.zeros(len(model.tasks), jnp.int32)

    @jax.jit
    def gradients(variables, windows):
        return hotspots_of.input_gradients(variables, windows, grades, model)

    theirs = windows_of(windows)
    twin.eval()
    torch._functorch.config.donated_buffer = False  # otherwise a compiled graph could not be kept for the next task
    expected = input_gradients(twin, theirs).movedim(2, -1)
    agree(gradients(variables, windows), expected, "hotspots")

    def run(module):
        return lambda: input_gradients(module, theirs)

    return lambda: jax.block_until_ready(gradients(variables, windows)), _eager_and_compiled(run, twin, compiled)


PARTS = {"forward": forward, "train": train, "tta": tta, "hotspots": hotspots}


def agree(ours, theirs: torch.Tensor, where: str) -> None:
    """Raises SystemExit if the two differ by more than `TOLERANCE` of the greatest value."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    off = float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))
    if not off <= TOLERANCE:
        raise SystemExit(f"{where}: spinejax and PyTorch differ by {off:.1e}, more than {TOLERANCE:.0e}.")


def _windows(size: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (size, 112, 224, 9))


def _eager_and_compiled(run, module, compiled: bool) -> list[Callable]:
    return [run(module), *([run(torch.compile(module))] if compiled else [])]


if __name__ == "__main__":
    start("peers", Arguments, main)
