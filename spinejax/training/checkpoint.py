"""Checkpoints of a run: saved so that no kill or full disk loses one, verified when read, readable with Orbax alone.

A run keeps its latest two steps and its best: if the latest is damaged, there is one to go back to. A step is written
into a temporary folder, flushed to disk, and only then named. All arrays are saved as numpy, so that a checkpoint
from any number of devices loads on any other.
"""

import concurrent.futures
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp

from spinejax import config
from spinejax import tasks as task_tables
from spinejax.config import Config
from spinejax.errors import SpinejaxError
from spinejax.files import checksums, lock
from spinejax.files.atomic import flush
from spinejax.files.mirror import Mirror, mirror_of
from spinejax.files.stores import Address, cache_folder, located
from spinejax.geometry import WINDOW_SHAPE
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import processes
from spinejax.parallel.devices import to_host
from spinejax.training import saved_step, shipped
from spinejax.training.log import LOG, METRICS
from spinejax.training.saved_step import (
    CHECKPOINTS,
    OPTIONS,
    Model,
    Record,
    Unlogged,
    best_step,
    read_record,
    steps_of,
    weights_digest,
)
from spinejax.training.train_step import TrainState, initialise_from

EXPORT = "export"
CALIBRATION = "calibration.json"
REPLACED = (f"{CHECKPOINTS}/*", f"{EXPORT}/*")
"""Patterns of the files in a run's folder that training deletes or replaces."""


class Checkpoints:
    """A run's saved steps, each in a folder of `directory` named by its number. One process writes and deletes them.

    Args:
        run: the run's folder.
        read_only: change nothing there.
        name: what messages call the run. Default: its folder.
        saved: called after each save, in the background.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        read_only: bool = False,
        name: str | None = None,
        saved: Callable[[], None] = lambda: None,
    ):
        self.run = Path(run).absolute()
        self.name = name or str(self.run)
        self._saved = saved
        self.directory = self.run / CHECKPOINTS
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: list[concurrent.futures.Future] = []
        self._last_begun: int | None = None
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f"*{checksums.TEMPORARY}"):  # of a save or a deletion that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def all_steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return list(steps_of(self.directory))

    def latest_step(self) -> int | None:
        """The last saved step."""
        return max(self.all_steps(), default=None)

    def write(self, variables: Mapping, optimiser: Mapping, record: Record) -> None:
        """Save one step in the background, and then delete the steps that need not be kept.

        It waits only if two saves are not finished yet, the best step and the latest, whose arrays are in memory.

        Raises:
            SpinejaxError: the disk is too full; an earlier save failed; or another trainer has taken the folder.
        """
        self.check()
        while len(self._saving) > 1:
            self._saving.pop(0).result()
        if record["step"] in (self._last_begun, *self.all_steps()):
            return  # SIGTERM came right after a save: what is there is this state, bit for bit
        lock.refuse_if_lost(self.run)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((variables, optimiser)))
        if shutil.disk_usage(self.directory).free < (1 + len(self._saving)) * _needed(size):
            raise SpinejaxError(self._no_room(record["step"], size, "the disk is too full"))
        before = self._saving[-1] if self._saving else None
        self._saving.append(self._thread.submit(self._write, before, variables, optimiser, record, size))
        self._last_begun = record["step"]

    def _write(
        self,
        before: concurrent.futures.Future | None,
        variables: Mapping,
        optimiser: Mapping,
        record: Record,
        size: int,
    ) -> None:
        if before:
            before.result()  # if the best step could not be saved, no later one may replace what is kept
        target = self.directory / str(record["step"])
        temporary = target.with_name(target.name + checksums.TEMPORARY)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            saved_step.write(temporary, variables, optimiser, record)
            checksums.commit(temporary, target)
        except OSError as error:
            _delete_at_rest(temporary)
            raise SpinejaxError(self._no_room(record["step"], size, error.strerror or str(error))) from error
        for step in set(self.all_steps()[:-2]) - {best_step(self.run)}:
            checksums.discard(self.directory / str(step))
        self._saved()

    def _no_room(self, step: int, size: int, reason: str) -> str:
        latest = self.latest_step()
        kept = f"Step {latest} is kept" if latest is not None else "Nothing was saved before it"
        needed, free = _needed(size) / 1e6, shutil.disk_usage(self.directory).free / 1e6
        return (
            f"{self.directory}: step {step} could not be saved: {reason}. A step needs {needed:.0f} MB, and "
            f"{free:.0f} MB are free. {kept}: make room, and start again to go on."
        )

    def is_saving(self) -> bool:
        """Whether a save is in progress."""
        return any(not saving.done() for saving in self._saving)

    def check(self) -> None:
        """Raises SpinejaxError if a save has failed; waits for none."""
        while self._saving and self._saving[0].done():
            self._saving.pop(0).result()

    def wait(self) -> None:
        """Wait for the saves in progress. Raises SpinejaxError if one fails."""
        while self._saving:
            self._saving.pop(0).result()

    def close(self) -> None:
        """Wait for the saves in progress, and end their thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _delete_at_rest(folder: Path) -> None:
    """Delete a folder, until it stays deleted: TensorStore's other threads write on after one of them has failed."""
    quiet = 0
    for _ in range(100):
        quiet = 0 if folder.exists() else quiet + 1
        if quiet == 5:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _needed(size: int) -> int:
    return math.ceil(1.01 * size) + 2**20  # for the files beside the arrays


def check_options(options: Config, run: Path) -> None:
    """Write a new run's options into its folder; for a resumed run, compare them with those it began with.

    A run that ended before its first save, perhaps because of a mistyped option, starts again.

    Raises:
        SpinejaxError: an option differs that changes what a step computes, or there are steps but no options.
    """
    path = run / OPTIONS
    begun = bool(steps_of(run / CHECKPOINTS))
    if begun and path.is_file():
        before = config.load(path)
        changed = [
            f"{field.name} was {getattr(before, field.name)}, now {getattr(options, field.name)}"
            for field in dataclasses.fields(Config)
            if field.name not in config.CHANGEABLE_ON_RESUME
            and getattr(before, field.name) != getattr(options, field.name)
        ]
        if changed:
            raise SpinejaxError(
                f"{run} holds a run with different options ({'; '.join(changed)}). Choose another --workdir."
            )
    elif begun:
        raise SpinejaxError(f"{run} holds checkpoints, but not the options they were made with ({OPTIONS} is missing).")
    config.save(options, path)


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    model: SpineNet,
    *,
    data_digest: str,
    error: float | None,
    validation_split: str = "validation",
    unlogged: Sequence[Mapping[str, float | None]] = (),
) -> None:
    """Save a state under its step, on the first process; all processes of a run call it together.

    The call returns while the files are still being written. `Record` says what the options mean.

    Raises:
        SpinejaxError: the disk is too full; or the save before this one failed.
    """
    state = to_host(state)

    def write() -> None:
        variables, optimiser = _items(state)
        arguments: Any = {name: getattr(model, name) for name in Model.__annotations__}
        record: Record = {
            "version": 3,
            "model": arguments | {"dtype": jnp.dtype(model.dtype).name},
            "tasks": task_tables.to_json(model.tasks),
            "data": data_digest,
            "validation_split": validation_split,
            "step": int(state.step),
            "error": error,
            "unlogged": [dict(metrics) for metrics in unlogged],
        }
        checkpoints.write(variables, optimiser, record)

    processes.by_first(write)


def resume(
    checkpoints: Checkpoints,
    template: TrainState,
    *,
    model: SpineNet,
    data_digest: str,
    init_from: str | Path | None = None,
    cache_dir: Path | None = None,
) -> tuple[TrainState, Unlogged, list[str]]:
    """The latest saved state; or, for a new run, the template, with weights of another run's network if one is named.

    All processes of a run call it together. The first one reads, and sends what it found: the others may have another
    copy of the same path.

    Returns:
        The state, the metrics of the steps before it that the log lacks, and the layers that began with the weights of
        `init_from`, a run or its exported folder, or the word for the network that ships.
    """
    found = template = to_host(template)

    def read() -> tuple[Unlogged, list[str]] | None:
        nonlocal found
        if (latest := checkpoints.latest_step()) is not None:
            found = restore(checkpoints, template, latest, model=model, data_digest=data_digest)
            return read_record(checkpoints.directory / str(latest)).get("unlogged", []), []
        if init_from is None:
            return None
        source = shipped.FOLDER if init_from == config.SHIPPED else init_from
        found, layers = initialise_from(template, load(source, cache_dir=cache_dir)[1]["params"])
        return [], layers

    result = processes.by_first(read)
    if result is None:
        return template, [], []
    return processes.from_first(found, like=template), *result


def restore(
    checkpoints: Checkpoints, template: TrainState, step: int, *, model: SpineNet, data_digest: str
) -> TrainState:
    """Verify and read a saved state, as numpy arrays.

    Args:
        checkpoints, step: where it was saved.
        template: a state of the same network and optimiser; only its structure, shapes and dtypes matter.
        model, data_digest: of the run that resumes.

    Raises:
        SpinejaxError: a file is damaged or missing, or the checkpoint is of another network or data set.
    """
    folder = checkpoints.directory / str(step)
    record, items = saved_step.read(folder, "variables", "optimiser")
    if record["data"] != data_digest:
        raise SpinejaxError(
            f"{folder}: this run learned from another data set than the one given, or that has changed since. Going on "
            "would mix the two, and could train on test patients. Give the same --data, or another --workdir."
        )
    template = to_host(template)
    for item, expected in zip(("variables", "optimiser"), _items(template), strict=True):
        _check_same_shapes(folder, items[item], expected)
    found = items["variables"] | items["optimiser"] | {"average": {}}
    if template.average:  # what is saved as the network's weights is the average
        found |= {"average": items["variables"]["params"]}
    if record["tasks"] != task_tables.to_json(model.tasks):
        raise SpinejaxError(f"{folder}: its task table is not the data set's. Give the --data that it was trained on.")
    return flax.serialization.from_state_dict(template, found)


def _items(state: TrainState) -> tuple[dict, dict]:
    """A state as the two items of a saved step: what the network needs, and the rest.

    If there is an average of the weights, it is what the network needs; the weights themselves are among the rest.
    """
    rest = flax.serialization.to_state_dict(state)
    average = rest.pop("average")
    variables = {"params": average or rest.pop("params"), "constants": rest.pop("constants")}
    return variables, rest


def load(path: str | Path | Address, *, cache_dir: Path | None = None) -> tuple[SpineNet, dict]:
    """The network of a run, ready to apply: `model.apply(variables, windows)`.

    Args:
        path: a run (its best step is loaded), an exported folder, one step's folder, or a folder of `shipped.write`; on
            a disk, or in an object store (`s3://…`, `gs://…`).
        cache_dir: where a copy of what is in a store is kept. Default: the user's cache.

    Returns:
        The module, and its variables as numpy arrays: `params` and `constants`.

    Raises:
        SpinejaxError: no checkpoint there, or it is damaged, or of another version.

    Example:
        >>> model, variables = load("runs/quickstart/run")  # doctest: +SKIP
        >>> logits = model.apply(variables, windows)  # doctest: +SKIP
    """
    path = located(path)
    if isinstance(path, Address):
        copied = fetch(path, cache_folder(cache_dir))
        with copied.named():
            return load(copied.folder)
    folder = find(path)
    if shipped.is_one(folder):
        record, variables = shipped.read(folder)
    else:
        record, items = saved_step.read(folder, "variables")
        variables = items["variables"]
    arguments: dict[str, Any] = {**record["model"], "dtype": jnp.dtype(record["model"]["dtype"])}
    model = SpineNet(tasks=task_tables.from_json(record["tasks"]), **arguments)
    windows = jnp.zeros((1, *WINDOW_SHAPE[:2], model.num_slices))
    _check_same_shapes(folder, variables, jax.eval_shape(model.init, jax.random.key(0), windows))
    return model, variables


def identify(folder: Path) -> tuple[Record, str]:
    """The record of a checkpoint's folder, from `find`, and a sha256 that identifies its weights."""
    if shipped.is_one(folder):
        known = shipped.about(folder)
        return known["record"], known["sha256"]
    return read_record(folder), weights_digest(folder)


def export(run: str | Path) -> Path:
    """Copy a run's best step, without its optimiser, to `RUN/export`, and return that folder.

    `export/variables` is a plain Orbax checkpoint of numpy arrays.
    """
    source, target = find(run), Path(run).absolute() / EXPORT
    temporary = target.with_name(f"{EXPORT}-new{checksums.TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    if fault := checksums.copy(source, temporary, "variables", "record"):
        shutil.rmtree(temporary)
        raise SpinejaxError(f"{source}: {fault}. {saved_step.way_back(source)}")
    if (source / CALIBRATION).is_file():
        shutil.copy(source / CALIBRATION, temporary / CALIBRATION)
        flush(temporary / CALIBRATION)
    checksums.discard(target)
    checksums.commit(temporary, target)
    return target


def is_needed_to_go_on(name: str) -> bool:
    """Whether a file of a run is needed to resume it, by its name from the run's folder."""
    return name in (OPTIONS, LOG, METRICS) or name.startswith(f"{CHECKPOINTS}/")


def fetch(address: Address, cache: Path) -> Mirror:
    """Copy the network of a run, or of its exported folder, from an object store to this machine.

    Args:
        address: of the run, the exported folder, one step's folder, or a folder of `shipped.write`.
        cache: the folder for copies.

    Returns:
        A mirror, whose `folder` is what `find` takes. It has the best step's weights, and no optimiser.

    Raises:
        SpinejaxError: the store fails, or a file is not what was saved.
    """
    small = (OPTIONS, checksums.SUMS, CALIBRATION, "metadata", *shipped.FILES)

    def is_small(name: str) -> bool:
        return name.rpartition("/")[2] in small and not {"variables", "optimiser"} & set(name.split("/"))

    mirror = mirror_of(address, cache, "networks")
    with lock.waited_for(mirror.folder):  # another process of this machine may fetch the same
        mirror.pull(is_small)
        best = best_step(mirror.folder)
        weights = "variables/" if best is None else f"{CHECKPOINTS}/{best}/variables/"
        mirror.pull(lambda name: is_small(name) or name.startswith(weights))
    return mirror


def find(path: str | Path) -> Path:
    """The folder of one checkpoint: a run's best step, or else the folder itself.

    Raises:
        SpinejaxError: no checkpoint there.
    """
    path = Path(path).absolute()
    if (path / "variables").is_dir() or shipped.is_one(path):
        return path
    if (best := best_step(path)) is not None:
        return path / CHECKPOINTS / str(best)
    found = "not a checkpoint" if path.exists() else "no such folder, so not a checkpoint"
    raise SpinejaxError(f"{path}: {found}. Expected a run of `python train.py`, or its `{EXPORT}` folder.")


def _check_same_shapes(folder: Path, found: dict, expected: dict) -> None:
    found, expected = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (found, expected))
    for name in sorted(set(found) | set(expected)):
        shapes = [f"{t[name].dtype}{list(t[name].shape)}" if name in t else "absent" for t in (found, expected)]
        if shapes[0] != shapes[1]:
            raise SpinejaxError(
                f"{folder}: not of this network and task table: {name} is {shapes[0]}, expected {shapes[1]}."
            )
