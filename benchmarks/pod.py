r"""Costs of one step per chip of a TPU pod, compiled on a machine without a TPU.

    python -m benchmarks.pod --topology v5e:16x16 [--step train] [--layout split] [--json FILE]
    python -m benchmarks.pod --topology v5e:1x1 v5e:2x2 v5e:4x4 v5e:8x8 v5e:16x16 --layout data split \
        --step train predict hotspots --json docs/scaling.json --plot docs/images/scaling.png

Needs the extra `tpu`: libtpu contains the compiler of Cloud TPUs and the description of each pod. It compiles the
library's own step at full width, with the shardings of a run. The figures are the compiler's, per chip and step:
operations; bytes read and written, in HBM and on the chip; arguments and temporaries in HBM; and the collectives of the
compiled program, with the bytes of their results on one chip. With several slices, what a chip exchanges with its
partners in other slices is counted apart. A loop counts once: nine of 54 views in the predict step.

With several programs the JSON is a list, which keeps the programs of earlier calls, because each takes minutes to
compile.
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Without these, libtpu searches for a TPU on this machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from benchmarks.running import peer, start
from spinejax.config import Config
from spinejax.geometry import VOLUME_SHAPE
from spinejax.inference import hotspots, predict
from spinejax.parallel import devices
from spinejax.parallel import layout as layouts
from spinejax.parallel.layout import Layout
from spinejax.tasks import PAPER_TASKS
from spinejax.training import train_step

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclass(frozen=True)
class Arguments:
    """Compile steps for a pod, and print their costs per chip."""

    topology: tuple[str, ...] = ("v5e:16x16",)
    """Pods, by libtpu's names: v5e:1x1, v5e:2x2, … v5e:16x16. If empty, only show and plot the programs in --json."""
    step: tuple[Literal["train", "predict", "hotspots"], ...] = ("train",)
    """Steps: training with views; the average over 54 views; hotspots of six tasks over 32 views, one disc per chip."""
    slices: int = 1
    """Number of such pods that train together, over the slower network of a data centre."""
    layout: tuple[Literal["data", "split"], ...] = ("split",)
    """Layouts of the parameters on the chips. Hotspots always keep all parameters on each chip."""
    batch_size: int = 256
    """Discs per step, over all chips."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the computation."""
    json: Path | None = None
    """Also write the costs to this file, as JSON."""
    plot: Path | None = None
    """Plot the costs over the number of chips to this file."""
    hlo: Path | None = None
    """Also write the compiled program to this file; for a single program only."""


def main(arguments: Arguments) -> None:
    """Print one row for each program."""
    found = _read(arguments.json) if arguments.json else []
    chosen = programs(arguments)
    if arguments.hlo and len(chosen) != 1:
        sys.exit(f"--hlo: {len(chosen)} programs were asked for, expected one.")
    for step, topology, kind in chosen:
        figures = figures_of(step, topology, kind, arguments)
        found = sorted([*(each for each in found if _place(each) != _place(figures)), figures], key=_place)
        if arguments.json:
            arguments.json.write_text(
                json.dumps(found if len(found) > 1 else figures, indent=1, allow_nan=False) + "\n"
            )
    for step in dict.fromkeys(each["step"] for each in found):
        Console().print(table_of([each for each in found if each["step"] == step]))
    if arguments.plot:
        plot([each for each in found if each["step"] == "train" and each.get("slices", 1) == 1], arguments.plot)


def _read(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text()) if path.exists() else []
    return found if isinstance(found, list) else [found]


def _place(figures: dict[str, Any]) -> tuple:
    """A program's identity, and its order in the tables."""
    names = ("dtype", "batch_size", "chips", "layout")
    return list(STEPS).index(figures["step"]), figures.get("slices", 1), *(figures[name] for name in names)


def programs(arguments: Arguments) -> list[tuple[str, str, str]]:
    """Step, topology and layout of each program. On one chip and for hotspots, nothing is split."""

    def layout_of(step: str, topology: str, kind: str) -> str:
        return "data" if step == "hotspots" or topology.endswith(":1x1") else kind

    chosen = itertools.product(arguments.step, arguments.topology, arguments.layout)
    return list(dict.fromkeys((step, topology, layout_of(step, topology, kind)) for step, topology, kind in chosen))


def figures_of(step: str, topology: str, kind: str, arguments: Arguments) -> dict[str, Any]:
    """Compile one program and return its costs, or that it does not fit."""
    peer("libtpu", "tpu")
    several = {"num_slices": arguments.slices} if arguments.slices > 1 else {}
    chips = topologies.get_topology_desc(topology, "tpu", **several).devices
    mesh = devices.make_mesh(chips)
    devices.check_batch(arguments.batch_size, mesh, "--batch-size")
    started = time.perf_counter()
    which = {
        "topology": topology,
        "slices": arguments.slices,
        "chips": len(chips),
        "step": step,
        "layout": kind,
        "batch_size": len(chips) if step == "hotspots" else arguments.batch_size,
        "dtype": arguments.dtype,
    }
    try:
        compiled = STEPS[step](mesh, kind, arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return which | {"does_not_fit": str(error).splitlines()[0]}
    cost, memory, program = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    if arguments.hlo:
        arguments.hlo.write_text(program)
    collectives = collectives_of(program)
    return which | {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "collective_bytes": sum(each["bytes"] for each in collectives.values()),
        "collectives": collectives,
        "bytes_between_slices": bytes_between_slices(program),
        "seconds_to_compile": round(time.perf_counter() - started),
    }


def collectives_of(program: str) -> dict[str, dict[str, int]]:
    """Kind of collective → their number in a compiled program, and the bytes of their results on one chip.

    Several arrays in one operation are one collective. An asynchronous collective is counted where it ends. One that is
    split into pieces between several computations, which all name it and its chain, is counted once.
    """
    found: dict[str, dict[str, int]] = {}
    chains = set()
    for types, kind, rest in re.findall(rf" = (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-done)?\((.*)", program):
        chain = re.search(r'chain_id="(\d+)"', rest)
        if chain and chain[1] in chains:
            continue
        chains |= {chain[1]} if chain else set()
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += _bytes_of(types)
    return found


def bytes_between_slices(program: str) -> int:
    """What a chip sends to chips of other slices: the host does that, and adds up what they send."""
    sent = re.findall(r" = \((\S+), u32\[\], token\[\]\) send\(.*xla_megascale_runtime", program)
    return sum(map(_bytes_of, sent))


def _bytes_of(types: str) -> int:
    """Bytes of arrays, given their types as the compiler writes them."""
    return sum(
        BYTES[dtype] * int(np.prod([int(size) for size in shape.split(",") if size]))
        for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    )


def train(mesh: Mesh, kind: str, arguments: Arguments) -> jax.stages.Lowered:
    """The train step as one program."""
    config = Config(dtype=arguments.dtype, batch_size=arguments.batch_size)
    model = train_step.make_model(config, PAPER_TASKS)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: train_step.init(key, model, config, np.zeros(9, np.float32)), key)
    layout = layouts.make(kind, mesh, state.params, batch_size=arguments.batch_size)
    weights = {task.name: jax.ShapeDtypeStruct((task.num_grades,), np.float32) for task in PAPER_TASKS}
    volumes = jax.ShapeDtypeStruct((arguments.batch_size, *VOLUME_SHAPE), np.uint16)
    batch = {"volume": volumes, "labels": jax.ShapeDtypeStruct((arguments.batch_size, len(PAPER_TASKS)), np.int32)}
    return train_step.whole_step.lower(
        _placed(key, devices.replicated(mesh)),
        jax.tree.map(_placed, state, layout.shardings(state)),
        _placed(batch, devices.by_disc(mesh)),
        _placed(weights, devices.replicated(mesh)),
        model=layout.on(model),
        config=config,
        layout=layout,
    )


def grade(mesh: Mesh, kind: str, arguments: Arguments) -> jax.stages.Lowered:
    """The predict step over the 54 views."""
    model, variables = _network(arguments)
    layout = layouts.for_grading(mesh, variables["params"]) if kind == "split" else Layout(mesh)
    return jax.jit(predict.predict_step, static_argnames=("model", "grid")).lower(
        jax.tree.map(_placed, variables, layout.shardings(variables)),
        _placed(jax.ShapeDtypeStruct((arguments.batch_size, *VOLUME_SHAPE), np.uint16), devices.by_disc(mesh)),
        _placed(jax.eval_shape(lambda: predict.view_set(tta=True)), devices.replicated(mesh)),
        model=layout.on(model),
        grid=True,
    )


def explain(mesh: Mesh, kind: str, arguments: Arguments) -> jax.stages.Lowered:
    """The hotspot step, with the batch of `evaluate.py`: one disc per chip."""
    model, variables = _network(arguments)
    batch = {
        "volume": jax.ShapeDtypeStruct((mesh.size, *VOLUME_SHAPE), np.uint16),
        "slices": jax.ShapeDtypeStruct((mesh.size, 2), np.int32),
        "grades": jax.ShapeDtypeStruct((mesh.size, len(PAPER_TASKS)), np.int32),
        "row": jax.ShapeDtypeStruct((mesh.size,), np.int32),
    }
    key, variables = _placed((jax.eval_shape(lambda: jax.random.key(0)), variables), devices.replicated(mesh))
    return hotspots.whole_step.lower(key, variables, _placed(batch, devices.by_disc(mesh)), model=model)


STEPS: dict[str, Callable[[Mesh, str, Arguments], jax.stages.Lowered]] = {
    "train": train,
    "predict": grade,
    "hotspots": explain,
}


def _network(arguments: Arguments):
    model = train_step.make_model(Config(dtype=arguments.dtype), PAPER_TASKS)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 112, 224, 9))))


def _placed(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def table_of(found: list[dict[str, Any]]) -> Table:
    """One row for each program of a step, in MB and GFLOP."""
    first = found[0]
    table = Table(title=f"{first['step']} step, {first['dtype']}: per chip")
    for name in (
        "slices",
        "chips",
        "layout",
        "discs",
        "GFLOP",
        "MB accessed",
        "arguments",
        "temporaries",
        "collectives",
        "between slices",
    ):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for each in found:
        which = str(each.get("slices", 1)), str(each["chips"]), each["layout"], str(each["batch_size"])
        if "does_not_fit" in each:
            table.add_row(*which, each["does_not_fit"])
            continue
        names = "bytes_accessed", "argument_bytes", "temp_bytes", "collective_bytes", "bytes_between_slices"
        sizes = (each.get(name, 0) / 1e6 for name in names)
        table.add_row(*which, f"{each['flops'] / 1e9:,.1f}", *(f"{size:,.1f}" for size in sizes))
    return table


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Plot accessed, argument and collective bytes over the number of chips, one line per layout."""
    names = {"bytes_accessed": "accessed", "argument_bytes": "arguments", "collective_bytes": "collectives"}
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3.4), layout="constrained")
    for axis, (key, name) in zip(axes, names.items(), strict=True):
        for kind in dict.fromkeys(each["layout"] for each in found):
            points = [
                (each["chips"], each[key] / 1e6)
                for each in found
                if each.get(key) and (each["layout"] == kind or each["chips"] == 1)
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set(title=f"{name}, MB a chip and step", xlabel="chips", xscale="log", yscale="log")
        axis.set_xticks(ticks := sorted({each["chips"] for each in found}), [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(title="layout")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    start("pod", Arguments, main)
