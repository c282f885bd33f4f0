"""One accelerator in six minutes: does it compute what a CPU computes, and how fast is it, beside PyTorch?

    python -m benchmarks.accelerator [--minutes 6] [--json FILE]
    python -m benchmarks.accelerator --tiny [--json FILE]      # a narrow network and few discs, for CPUs

It needs JAX with the device's plugin, Flax, Optax and jaxtyping, and neither Grain, tyro nor pydantic: only the half of
spinejax without files is imported. Beside PyTorch, if it is installed, rows get its speed on the same device: channels
last, bfloat16, eager and through `torch.compile`, the faster of the two.

Agreement: each result of the device, in three precisions, against the CPU's in float32, as |difference| / |CPU's| of
all numbers together. A gradient changes more than a score: where rounding switches a ReLU, or makes another pixel the
largest of a pool, whole terms come and go. `LIMITS` says what is allowed; beyond it, the exit status is 1.

Speed: wall time of a call, the median of several rounds. Utilisation: operations of a step, by XLA's count, over the
device's peak rate (`spinejax/training/speed.py`). Each part is written as soon as it is complete. A part that might not
end in time, because it could take as long as the longest so far, is left out and named.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from spinejax.config import Config
from spinejax.errors import SpinejaxError, status_of
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE
from spinejax.inference import hotspots, predict
from spinejax.inference.hotspots import Method
from spinejax.network import losses, views
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import runtime
from spinejax.tasks import PAPER_TASKS
from spinejax.training import speed, train_step

PRECISIONS = {"float32": ("float32", "float32"), "tf32": ("float32", "tensorfloat32"), "bfloat16": ("bfloat16", None)}
"""Name → the network's dtype, and JAX's precision of float32 products."""

_SMOOTH = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 3e-2}
_JUMPING = {"float32": 1e-2, "tf32": 1e-1, "bfloat16": 3e-1}
LIMITS = {
    **{(each, name): _SMOOTH[each] for each in PRECISIONS for name in ("forward", "loss", "views", "54 views")},
    **{(each, name): _JUMPING[each] for each in PRECISIONS for name in ("gradients", "hotspots")},
}
"""How far each result may be off, by precision and name."""


class Size(NamedTuple):
    """How much is computed."""

    width: float = 1.0
    discs: int = 4  # of which agreement is measured
    hotspot_views: int = 8  # for agreement
    train: tuple[int, ...] = (256, 32)  # discs in a step
    grade: int = 32  # discs in a batch
    explain: int = 32  # views of a disc
    views: int = 256
    rounds: int = 5
    calls: int = 10  # in a round
    compile: bool = True  # PyTorch too
    timed: tuple[str, ...] = ("bfloat16", "tf32")


TINY = Size(
    width=0.02,
    discs=1,
    hotspot_views=1,
    train=(2, 1),
    grade=1,
    explain=2,
    views=2,
    rounds=1,
    calls=1,
    compile=False,
    timed=("bfloat16",),
)


def main(arguments: argparse.Namespace) -> int:
    """Measure every part, print and write it. Returns 1 if the device disagrees with the CPU, or a part failed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the device too
    runtime.set_up()
    size = TINY if arguments.tiny else Size()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "torch": torch_version()}
    found: dict[str, Any] = about | {"width": size.width, "agreement": [], "speed": [], "pytorch": [], "ratio": []}
    found |= {"left_out": [], "failed": []}
    show(about)
    started, longest = time.monotonic(), 0.0
    for part in parts(size):
        begun = time.monotonic()
        if begun + longest >= started + 60 * arguments.minutes:
            found["left_out"].append(part.name)
            continue
        try:
            with jax.default_matmul_precision(PRECISIONS[part.precision][1]):
                for each in part.rows():
                    found[part.kind].append(each)
                    show(each)
        except Exception as error:  # the device may not be lent again: measure what is left
            found["failed"].append(f"{part.name}: {type(error).__name__}: {error}")
        found["ratio"] = ratios(found["speed"], found["pytorch"])
        longest = max(longest, time.monotonic() - begun)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    for each in found["ratio"]:
        show(each)
    for what in ("left_out", "failed"):
        for each in found[what]:
            print(f"{what.replace('_', ' ')}: {each}")
    return int(bool(found["failed"]) or not all(each["agrees"] for each in found["agreement"]))


def show(row: Mapping[str, Any]) -> None:
    """Print a row in a line."""
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )
    sys.stdout.flush()


class Part(NamedTuple):
    """What is measured together, or left out."""

    kind: str  # of its rows: agreement, speed or pytorch
    name: str
    precision: str
    rows: Callable[[], Iterator[dict]]


def parts(size: Size) -> list[Part]:
    """All parts, the most important first."""
    found = [
        Part("agreement", f"agreement in {precision}", precision, functools.partial(agreement, precision, size))
        for precision in PRECISIONS
    ]
    for precision in size.timed:
        functions: dict[str, Callable] = {
            f"train, batch {batch}": functools.partial(train, batch=batch) for batch in size.train
        }
        functions |= {"54 views": grade, "hotspots": explain, "views": take_views}
        for name, function in functions.items():
            rows = functools.partial(function, precision, size)
            found.append(Part("speed", f"{name} in {precision}", precision, rows))
            if precision == "bfloat16" and function is not take_views and torch_version():
                rows = functools.partial(beside, name, size)
                found.append(Part("pytorch", f"{name} in PyTorch", precision, rows))
    return found


# What is computed -----------------------------------------------------------------------------------------------------


def network(precision: str, size: Size) -> SpineNet:
    """The paper's network, in one of `PRECISIONS`."""
    return SpineNet(PAPER_TASKS, width=size.width, dtype=jnp.dtype(PRECISIONS[precision][0]), initialiser="he")


def variables_of(model: SpineNet) -> Mapping[str, Any]:
    """Random weights, the same on every device."""
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *WINDOW_SHAPE)))


def discs(num: int) -> dict[str, np.ndarray]:
    """Random discs, smooth in plane as images are, with labels and what hotspots need."""
    random = np.random.default_rng(0)
    rows, columns, slices = VOLUME_SHAPE
    coarse = random.random((num, rows // 8, columns // 8, slices), np.float32)
    volumes = np.asarray(jax.image.resize(coarse, (num, *VOLUME_SHAPE), "linear"))
    return {
        "volume": (65535 * volumes).astype(np.uint16),
        "labels": random.integers(0, 2, (num, len(PAPER_TASKS)), dtype=np.int32),
        "slices": np.tile(np.int32([0, slices]), (num, 1)),
        "grades": np.zeros((num, len(PAPER_TASKS)), np.int32),
        "row": np.arange(num, dtype=np.int32),
    }


def class_weights() -> dict[str, np.ndarray]:
    """Every grade counts alike."""
    return {task.name: np.ones(task.num_grades, np.float32) for task in PAPER_TASKS}


@functools.partial(jax.jit, static_argnames="model")
def loss_and_gradients(variables, windows, labels, weights, *, model):
    """Scores, loss and its gradients, without dropout."""

    def loss(params):
        scores = model.apply({**variables, "params": params}, windows)
        by_task = {task.name: labels[:, column] for column, task in enumerate(model.tasks)}
        return losses.multi_task_loss(scores, by_task, weights, {})[0], scores

    (total, scores), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return scores, total, gradients


# Agreement ------------------------------------------------------------------------------------------------------------


def agreement(precision: str, size: Size) -> Iterator[dict]:
    """The device's results in one precision against the CPU's in float32."""
    device = jax.devices()[0]
    expected = results_on_cpu(size)
    for name, value in results(precision, size, device).items():
        off, limit = float(difference(value, jax.device_put(expected[name], device))), LIMITS[precision, name]
        yield {"name": name, "precision": precision, "off": off, "limit": limit, "agrees": off <= limit}


@functools.cache
def results_on_cpu(size: Size) -> dict[str, Any]:
    """What the device is compared with."""
    with jax.default_matmul_precision(PRECISIONS["float32"][1]):
        return results("float32", size, cpu())


def cpu() -> jax.Device:
    """JAX's CPU. Raises SpinejaxError if JAX_PLATFORMS leaves it out."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        raise SpinejaxError(f"JAX_PLATFORMS is {platforms}: the CPU is compared with. Unset it, or add cpu.") from error


def results(precision: str, size: Size, device: jax.Device) -> dict[str, Any]:
    """What `LIMITS` names, computed on a device; from the same weights and discs everywhere."""
    model = network(precision, size)
    with jax.default_device(cpu()):
        given = variables_of(model), discs(size.discs), class_weights(), views.grid()
        drawn = jax.vmap(views.sample)(jax.random.split(jax.random.key(1), size.discs))
    (variables, batch, weights, grid), drawn = jax.device_put((given, drawn), device)
    windows = jax.jit(jax.vmap(functools.partial(views.take, dtype=model.dtype)))(batch["volume"], drawn)
    scores, loss, gradients = loss_and_gradients(variables, windows, batch["labels"], weights, model=model)
    averaged, _ = predict.predict_step(variables, batch["volume"], grid, model=model, grid=True)
    method = Method(num_views=size.hotspot_views)
    maps = hotspots.hotspot_step(jax.random.key(2), variables, batch, model=model, method=method)
    smooth = {"forward": scores, "loss": loss, "views": windows, "54 views": averaged}
    return smooth | {"gradients": gradients, "hotspots": maps}


@jax.jit
def difference(ours, theirs) -> jax.Array:
    """|ours - theirs| / |theirs| of all numbers of two trees."""
    apart = jax.tree.map(lambda one, other: jnp.sum(jnp.square(one - other)), ours, theirs)
    whole = jax.tree.map(lambda other: jnp.sum(jnp.square(other)), theirs)
    return jnp.sqrt(sum(jax.tree.leaves(apart)) / sum(jax.tree.leaves(whole)))


# Speed ----------------------------------------------------------------------------------------------------------------


def train(precision: str, size: Size, *, batch: int) -> Iterator[dict]:
    """One step of SGD: on windows, as PyTorch can, and with its views."""
    model, config = network(precision, size), Config(width=size.width, dtype=PRECISIONS[precision][0])
    state = train_step.init(jax.random.key(0), model, config, np.zeros(9, np.float32))
    given, weights, key = jax.device_put((discs(batch), class_weights(), jax.random.key(0)))
    windows, labels = central(given["volume"]), given["labels"]
    lower = functools.partial(train_step.update.lower, key, state, windows, labels, weights, model=model, config=config)
    used = speed.Utilisation(lower, config.dtype)

    def step(update: Callable, *given):
        nonlocal state
        state, metrics = update(key, state, *given, weights, model=model, config=config)
        return metrics

    on_windows = functools.partial(step, train_step.update, windows, labels)
    yield row("train", precision, batch, seconds(on_windows, size), used)
    with_views = functools.partial(step, train_step.whole_step, given)
    yield row("train, views included", precision, batch, seconds(with_views, size), used)


def grade(precision: str, size: Size) -> Iterator[dict]:
    """The mean over 54 views."""
    model, volumes, grid = network(precision, size), jax.device_put(discs(size.grade)["volume"]), views.grid()
    variables = variables_of(model)
    average = functools.partial(predict.predict_step, variables, volumes, grid, model=model, grid=True)
    as_program = jax.jit(functools.partial(predict.predict_step, model=model, grid=True))
    used = speed.Utilisation(lambda: as_program.lower(variables, volumes, grid), PRECISIONS[precision][0])
    # XLA counts the body of the loop once, which takes nine of the views.
    times = views.NUM_TTA_VIEWS // predict.IN_PLANE_VIEWS
    yield row("54 views", precision, size.grade, seconds(average, size), used, times=times)


def explain(precision: str, size: Size) -> Iterator[dict]:
    """Hotspots of one disc: the gradients alone, as PyTorch can, and with random views and their inverse."""
    model, method = network(precision, size), Method(num_views=size.explain)
    variables, batch = variables_of(model), jax.device_put(discs(1))
    windows = jnp.repeat(central(batch["volume"]), method.num_views, axis=0)
    gradients = jax.jit(functools.partial(hotspots.input_gradients, model=model))
    used = speed.Utilisation(lambda: gradients.lower(variables, windows, batch["grades"][0]), str(model.dtype))
    on_windows = functools.partial(gradients, variables, windows, batch["grades"][0])
    yield row("hotspots, gradients alone", precision, 1, seconds(on_windows, size), used)
    whole = functools.partial(hotspots.hotspot_step, jax.random.key(0), variables, batch, model=model, method=method)
    yield row("hotspots", precision, 1, seconds(whole, size), used)


def take_views(precision: str, size: Size) -> Iterator[dict]:
    """Views by gathering taps and by products with matrices; the library takes the latter on TPUs alone."""
    volumes = jax.device_put(discs(size.views)["volume"])
    drawn = jax.vmap(views.sample)(jax.random.split(jax.random.key(1), size.views))
    for form, platform in (("gather", "default"), ("matrix", "tpu")):

        def chosen(*given, platform=platform, **functions):
            return functions[platform](*given)

        take = jax.jit(jax.vmap(functools.partial(views.take, dtype=PRECISIONS[precision][0])))
        with mock.patch.object(jax.lax, "platform_dependent", chosen):
            jax.block_until_ready(take(volumes, drawn))  # compiled with this form, and kept
        yield row(f"views by {form}", precision, size.views, seconds(functools.partial(take, volumes, drawn), size))


@jax.jit
def central(volumes: jax.Array) -> jax.Array:
    """The central windows of discs."""
    return jax.vmap(lambda volume: views.crop(volume, views.identity()))(volumes)


def seconds(call: Callable, size: Size, wait: Callable = jax.block_until_ready) -> float:
    """Wall time of a call: the median of rounds of several calls, of which a round's last is waited for."""
    wait(call())  # compiles
    rounds = []
    for _ in range(size.rounds):
        started = time.perf_counter()
        for _ in range(size.calls):
            last = call()
        wait(last)
        rounds.append((time.perf_counter() - started) / size.calls)
    return float(np.median(rounds))


def row(
    name: str, precision: str, batch: int, took: float, used: speed.Utilisation | None = None, *, times: int = 1
) -> dict[str, Any]:
    """A row of a call that `took` seconds, in which the operations that XLA counts are done `times`."""
    found = {"name": name, "precision": precision, "batch": batch, "ms": 1e3 * took, "discs_per_second": batch / took}
    return found | ({"utilisation": used.at(times / took)} if used else {})


# PyTorch --------------------------------------------------------------------------------------------------------------


def torch_version() -> str | None:
    """None if it is not installed."""
    return importlib.import_module("torch").__version__ if importlib.util.find_spec("torch") else None


def beside(name: str, size: Size) -> Iterator[dict]:
    """The same in PyTorch, eager and compiled; nothing if it lacks this device."""
    from benchmarks import torch_calls

    if not torch_calls.on_device(jax.default_backend()):
        return
    model = network("bfloat16", size)
    what, _, batch = name.partition(", batch ")
    num = int(batch) if batch else {"54 views": size.grade, "hotspots": 1}[what]
    given = discs(num)
    windows = np.repeat(central(given["volume"]), size.explain if what == "hotspots" else 1, axis=0)
    makes = {
        "train": functools.partial(torch_calls.train, windows=windows, labels=given["labels"], config=Config()),
        "54 views": functools.partial(torch_calls.grade, volumes=given["volume"]),
        "hotspots": functools.partial(torch_calls.explain, windows=windows),
    }
    for way, prepare in torch_calls.WAYS.items():
        if way == "eager" or size.compile:
            call = makes[what](torch_calls.twin(model, variables_of(model)), prepare)
            same = {"hotspots": "hotspots, gradients alone"}.get(what, what)
            yield row(same, "bfloat16", num, seconds(call, size, torch_calls.wait)) | {"way": way}


def ratios(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> list[dict]:
    """PyTorch's time over ours, where both were measured; its faster way counts."""
    found = []
    for each in ours:
        which = {key: each[key] for key in ("name", "precision", "batch")}
        same = [other["ms"] for other in theirs if which.items() <= other.items()]
        found += [which | {"times_as_fast": min(same) / each["ms"]}] if same else []
    return found


def arguments() -> argparse.Namespace:
    """The command line, read without tyro."""
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6, help="time for all parts together")
    parser.add_argument("--tiny", action="store_true", help="a narrow network and few discs, for CPUs")
    parser.add_argument("--json", type=Path, help="also write everything to this file, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(arguments())))
