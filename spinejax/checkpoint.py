"""Checkpoints: what a run has learned, kept so that it can be trusted and read without this library.

A run keeps its latest and its best step, each a folder of three Orbax items:

    variables/   params and constants: what `SpineNet.apply` takes, and all that other code needs
    optimiser/   the rest of the training state
    record/      JSON: the network, the task table, what data it learned from, its error, a sha256 per array

All arrays are saved as numpy, so that a checkpoint from any number of devices loads on any other. Orbax keeps no
checksum of what it stores, and a flipped byte would come back as a wrong weight: every array is checked against the
record when it is read.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from typing_extensions import TypedDict

from spinejax import config
from spinejax import tasks as task_tables
from spinejax.config import Config
from spinejax.devices import to_host
from spinejax.errors import SpinejaxError
from spinejax.model import SpineNet
from spinejax.shards import WINDOW_SHAPE
from spinejax.training import TrainState

CHECKPOINTS = "checkpoints"
EXPORT = "export"
CALIBRATION = "calibration.json"
LOCK = ".lock"
OPTIONS = "config.json"

_ITEMS = ("variables", "optimiser", "record")


class _Model(TypedDict):
    """`SpineNet`'s arguments but for the tasks."""

    branch_point: str | None
    width: Annotated[float, pydantic.Field(gt=0, le=64)]
    dropout: float
    num_slices: Annotated[int, pydantic.Field(gt=0)]
    initialiser: str
    dtype: Literal["float32", "bfloat16", "float16"]


class Record(TypedDict):
    """The JSON beside a checkpoint's arrays.

    Args:
        version: of this form.
        model: the network's arguments.
        tasks: its task table, as `tasks.to_json` gives it.
        data: digest of the data set that it learns from.
        step: steps taken.
        error: validation error.
        sha256: a digest for each array, by its path in the tree.
    """

    version: Literal[1]
    model: _Model
    tasks: list[dict[str, Any]]
    data: str
    step: int
    error: float
    sha256: dict[str, str]


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


def settle(options: Config, run: Path) -> None:
    """Write a new run's options into its folder, or hold those of a run that goes on against what it began with.

    Raises:
        SpinejaxError: an option differs that changes what a step computes, or the options are gone but steps are there.
    """
    path = run / OPTIONS
    if path.is_file():
        before = config.load(path)
        changed = [
            f"{field.name} was {getattr(before, field.name)}, now {getattr(options, field.name)}"
            for field in dataclasses.fields(Config)
            if field.name not in config.CHANGEABLE_ON_RESUME
            and getattr(before, field.name) != getattr(options, field.name)
        ]
        if changed:
            raise SpinejaxError(f"{run} holds a run of other options ({'; '.join(changed)}). Choose another --workdir.")
    elif _steps(run / CHECKPOINTS):
        raise SpinejaxError(f"{run} holds checkpoints, but not the options they were made with ({OPTIONS} is missing).")
    config.save(options, path)


def save(
    checkpoints: ocp.CheckpointManager, state: TrainState, model: SpineNet, *, data_digest: str, error: float
) -> None:
    """Save a state under its step. The call returns while the files are still being written.

    Args:
        checkpoints: from `open_checkpoints`.
        state: what to save.
        model: goes into the record, so that a reader can build the network.
        data_digest: `DataSet.digest` of the data that it learns from.
        error: the validation error, by which the best step is chosen.
    """
    variables, optimiser = _split(to_host(state))
    record: Record = {
        "version": 1,
        "model": _arguments(model),
        "tasks": task_tables.to_json(model.tasks),
        "data": data_digest,
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


def restore(
    checkpoints: ocp.CheckpointManager, template: TrainState, step: int, *, model: SpineNet, data_digest: str
) -> TrainState:
    """Read a state back to go on from, every array checked.

    Args:
        checkpoints: from `open_checkpoints`.
        template: a state of the same network and optimiser; only its structure, shapes and dtypes matter.
        step: which.
        model, data_digest: the network and the data that the run goes on with.

    Returns:
        The state, with numpy leaves.

    Raises:
        SpinejaxError: a file is damaged or missing, or the checkpoint is of another network or data set.
    """
    folder = Path(checkpoints.directory) / str(step)
    record = read_record(folder)
    if record["data"] != data_digest:
        raise SpinejaxError(
            f"{folder}: this run learned from another data set than the one given, or that has changed since. Going on "
            "would mix the two, and could train on test patients. Give the same --data, or another --workdir."
        )
    parts = {name: _read_item(folder, name) for name in ("variables", "optimiser")}
    _check(folder, record, parts)
    found = parts["optimiser"] | parts["variables"]
    template = to_host(template)
    _check_same_shapes(folder, found, flax.serialization.to_state_dict(template))
    if record["tasks"] != task_tables.to_json(model.tasks):
        raise SpinejaxError(f"{folder}: a checkpoint of another task table than the data set's.")
    return flax.serialization.from_state_dict(template, found)


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
    folder = find(path)
    record = read_record(folder)
    variables = _read_item(folder, "variables")
    _check(folder, record, {"variables": variables})
    arguments: dict[str, Any] = {**record["model"], "dtype": jnp.dtype(record["model"]["dtype"])}
    model = SpineNet(tasks=task_tables.from_json(record["tasks"]), **arguments)
    windows = jnp.zeros((1, *WINDOW_SHAPE[:2], model.num_slices))
    _check_same_shapes(folder, variables, jax.eval_shape(model.init, jax.random.key(0), windows))
    return model, variables


def export(run: str | Path) -> Path:
    """Copy a run's best step, without its optimiser, to `RUN/export`, and return that folder.

    `export/variables` is a plain Orbax checkpoint of numpy arrays.
    """
    source = find(run)
    target = Path(run).absolute() / EXPORT
    temporary = target.with_name(EXPORT + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for item in ("variables", "record"):
        shutil.copytree(source / item, temporary / item)
    if (source / CALIBRATION).is_file():
        shutil.copy(source / CALIBRATION, temporary / CALIBRATION)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def best_step(run: str | Path) -> int | None:
    """The saved step of least validation error, the latest of equals; None if nothing is saved."""
    steps = _steps(Path(run).absolute() / CHECKPOINTS)
    return min(reversed(steps), key=lambda step: read_record(steps[step])["error"], default=None)


def find(path: str | Path) -> Path:
    """The folder of one checkpoint: of a run its best step, and else the folder itself.

    Raises:
        SpinejaxError: no checkpoint there.
    """
    path = Path(path).absolute()
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


def read_record(folder: Path) -> Record:
    """The record of one checkpoint's folder.

    Raises:
        SpinejaxError: it is missing or damaged, or of a later version.
    """
    path = folder / "record" / "metadata"
    try:
        return pydantic.TypeAdapter(Record).validate_json(path.read_bytes())
    except OSError as error:
        raise SpinejaxError(f"{path}: missing ({error.strerror}), so this checkpoint cannot be trusted.") from error
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise SpinejaxError(f"{path}: damaged, or of a later version: {where}: {fault['msg']}.") from error


def _read_item(folder: Path, item: str) -> dict:
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder / item)
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        raise SpinejaxError(f"{folder / item}: damaged or incomplete ({type(error).__name__}). {_WAY_BACK}") from error


def _check(folder: Path, record: Record, parts: Mapping) -> None:
    found = _digests(parts)
    expected = {name: digest for name, digest in record["sha256"].items() if name.split("/")[0] in parts}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise SpinejaxError(f"{folder}: {name} is not what was saved: its sha256 differs. {_WAY_BACK}")


_WAY_BACK = (
    "Restore it from a copy; or delete this folder, if it is one of a run's steps, to go back to the other saved step."
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


def _arguments(model: SpineNet) -> _Model:
    return {
        "branch_point": model.branch_point,
        "width": model.width,
        "dropout": model.dropout,
        "num_slices": model.num_slices,
        "initialiser": model.initialiser,
        "dtype": jnp.dtype(model.dtype).name,
    }


def _digests(tree: Mapping) -> dict[str, str]:
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest() for name, leaf in leaves.items()}


def _error(metrics: Mapping[str, float]) -> float:
    return metrics["error"]
