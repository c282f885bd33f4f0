"""Checkpoints: what a run has learned, kept so that it can be trusted and read without this library.

A run keeps its latest and its best step, each a folder of three Orbax items:

    variables/   params and constants: what `SpineNet.apply` takes, and all that other code needs
    optimiser/   the rest of the training state
    record/      JSON: the network's arguments, the task table, the validation error, a sha256 per array

All arrays are saved as numpy, so that a checkpoint from any number of devices loads on any other. Orbax keeps no
checksum of what it stores, and a flipped byte would come back as a wrong weight: every array is checked against the
record when it is read.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from spinejax import tasks as task_tables
from spinejax.devices import to_host
from spinejax.errors import SpinejaxError
from spinejax.model import SpineNet
from spinejax.training import TrainState

RECORD_VERSION = 1
CHECKPOINTS = "checkpoints"
EXPORT = "export"
LOCK = ".lock"

_ITEMS = ("variables", "optimiser", "record")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be, so that no second trainer writes into it.

    Raises:
        SpinejaxError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError as error:
            raise SpinejaxError(
                f"{run}: another trainer is writing into this folder. Choose another --workdir."
            ) from error
        yield


def open_checkpoints(run: str | Path, *, read_only: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a run folder: saving into them keeps the latest and the one of least validation error."""
    best = BestN(get_metric_fn=_error, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
        best_fn=_error,
        best_mode="min",
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
    )
    root = Path(run).absolute() / CHECKPOINTS
    return ocp.CheckpointManager(root, options=options, item_names=_ITEMS)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, model: SpineNet, error: float) -> None:
    """Save a state under its step. The call returns while the files are still being written.

    Args:
        checkpoints: from `open_checkpoints`.
        state: what to save.
        model: goes into the record, so that a reader can build the network.
        error: the validation error, by which the best step is chosen.
    """
    variables, optimiser = _split(to_host(state))
    record = {
        "version": RECORD_VERSION,
        "model": _arguments(model),
        "tasks": task_tables.to_json(model.tasks),
        "step": int(state.step),
        "error": error,
        "sha256": _digests({"variables": variables, "optimiser": optimiser}),
    }
    items = ocp.args.Composite(
        variables=ocp.args.StandardSave(variables),
        optimiser=ocp.args.StandardSave(optimiser),
        record=ocp.args.JsonSave(record),
    )
    checkpoints.save(int(state.step), args=items, metrics={"error": error})


def restore(checkpoints: ocp.CheckpointManager, template: TrainState, step: int) -> TrainState:
    """Read a state back, every array checked.

    Args:
        checkpoints: from `open_checkpoints`.
        template: a state of the same network and optimiser; only its structure, shapes and dtypes matter.
        step: which.

    Returns:
        The state, with numpy leaves.

    Raises:
        SpinejaxError: a file is damaged or missing, or the checkpoint is of another network.
    """
    folder = Path(checkpoints.directory) / str(step)
    parts = {name: _read_item(folder, name) for name in ("variables", "optimiser")}
    _check(folder, _read_record(folder), parts)
    found = parts["optimiser"] | parts["variables"]
    expected = flax.serialization.to_state_dict(to_host(template))
    _check_same_shapes(folder, found, expected)
    return flax.serialization.from_state_dict(to_host(template), found)


def load(path: str | Path) -> tuple[SpineNet, dict]:
    """The network of a run, ready to apply: `model.apply(variables, windows)`.

    Args:
        path: a run (its best step is loaded), an exported folder, or one step's folder.

    Returns:
        The module, and its variables as numpy arrays: `params` and `constants`.

    Raises:
        SpinejaxError: no checkpoint there, or it is damaged, or made by a later version.

    Example:
        >>> model, variables = load("runs/quickstart/run")  # doctest: +SKIP
        >>> logits = model.apply(variables, windows)  # doctest: +SKIP
    """
    folder = _find(Path(path).absolute())
    record = _read_record(folder)
    variables = _read_item(folder, "variables")
    _check(folder, record, {"variables": variables})
    arguments = record["model"] | {"dtype": jnp.dtype(record["model"]["dtype"])}
    return SpineNet(tasks=task_tables.from_json(record["tasks"]), **arguments), variables


def export(run: str | Path) -> Path:
    """Copy a run's best step, without its optimiser, to `RUN/export`, and return that folder.

    `export/variables` is a plain Orbax checkpoint of numpy arrays.
    """
    source = _find(Path(run).absolute())
    target = Path(run).absolute() / EXPORT
    temporary = target.with_name(EXPORT + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for item in ("variables", "record"):
        shutil.copytree(source / item, temporary / item)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def best_step(run: str | Path) -> int | None:
    """The saved step of least validation error, the latest of equals; None if nothing is saved."""
    steps = _steps(Path(run).absolute() / CHECKPOINTS)
    return min(reversed(steps), key=lambda step: _read_record(steps[step])["error"], default=None)


def _find(path: Path) -> Path:
    if (path / "variables").is_dir():
        return path
    best = best_step(path)
    if best is not None:
        return path / CHECKPOINTS / str(best)
    raise SpinejaxError(f"{path}: no checkpoint there. Expected a run of `python train.py`, or its `{EXPORT}` folder.")


def _steps(root: Path) -> dict[int, Path]:
    """The finished steps, oldest first: Orbax gives a folder its plain number only when it is whole."""
    folders = {int(p.name): p for p in root.glob("[0-9]*") if p.name.isdigit() and (p / "record").is_dir()}
    return dict(sorted(folders.items()))


def _read_record(folder: Path) -> dict:
    path = folder / "record" / "metadata"
    try:
        record = json.loads(path.read_text())
        version = record["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpinejaxError(f"{path}: missing or damaged, so this checkpoint cannot be trusted.") from error
    if version != RECORD_VERSION:
        raise SpinejaxError(f"{path}: record version {version}; this spinejax reads {RECORD_VERSION}.")
    return record


def _read_item(folder: Path, item: str) -> dict:
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder / item)
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        raise SpinejaxError(
            f"{folder / item}: damaged or incomplete ({type(error).__name__}). Delete {folder} to go back to the other "
            "saved step, or train again."
        ) from error


def _check(folder: Path, record: Mapping, parts: Mapping) -> None:
    for name, digest in _digests(parts).items():
        if record["sha256"].get(name) != digest:
            raise SpinejaxError(
                f"{folder}: {name} is not what was saved: its sha256 differs. Delete {folder} to go back to the other "
                "saved step, or train again."
            )
    expected = {name for name in record["sha256"] if name.split("/")[0] in parts}
    missing = expected - set(_digests(parts))
    if missing:
        raise SpinejaxError(
            f"{folder}: {min(missing)} is missing. Delete {folder} and go back to the other saved step."
        )


def _check_same_shapes(folder: Path, found: dict, expected: dict) -> None:
    found, expected = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (found, expected))
    for name in sorted(set(found) | set(expected)):
        shapes = [f"{t[name].dtype}{list(t[name].shape)}" if name in t else "absent" for t in (found, expected)]
        if shapes[0] != shapes[1]:
            raise SpinejaxError(
                f"{folder}: a checkpoint of another network or task table: {name} is {shapes[0]}, expected {shapes[1]}."
            )


def _split(state: TrainState) -> tuple[dict, dict]:
    optimiser = flax.serialization.to_state_dict(state)
    return {name: optimiser.pop(name) for name in ("params", "constants")}, optimiser


def _arguments(model: SpineNet) -> dict:
    names = ("branch_point", "width", "dropout", "num_slices", "initialiser")
    return {name: getattr(model, name) for name in names} | {"dtype": jnp.dtype(model.dtype).name}


def _digests(tree: Mapping) -> dict[str, str]:
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest() for name, leaf in leaves.items()}


def _error(metrics: Mapping[str, float]) -> float:
    return metrics["error"]
