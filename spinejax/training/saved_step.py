"""One saved step: a folder of two Orbax items and a record, listed in `SHA256SUMS`.

    variables/         Orbax: params and constants, what `SpineNet.apply` takes, and all that other code needs
    optimiser/         Orbax: the rest of the training state
    record/metadata    JSON: the network, the task table, the data set it learned from, its validation error
    SHA256SUMS         a sha256 for each file

Orbax keeps no checksum of what it stores, and a flipped byte would come back as a wrong weight. So every file is
verified before it is read.
"""

import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import jax
import orbax.checkpoint as ocp
import pydantic
from typing_extensions import TypedDict

from spinejax.config import MAX_WIDTH
from spinejax.errors import SpinejaxError
from spinejax.files import checksums
from spinejax.files.json_files import read_json

CHECKPOINTS = "checkpoints"
OPTIONS = "config.json"
"""A run's subfolder of saved steps, and its options."""

Unlogged = list[dict[str, float | None]]
"""Metrics of the steps since the last line of the log, a dictionary for each step; None for one that is not finite."""


class Model(TypedDict):
    """`SpineNet`'s arguments, without the tasks."""

    branch_point: str | None
    width: Annotated[float, pydantic.Field(gt=0, le=MAX_WIDTH)]
    dropout: float
    num_slices: Annotated[int, pydantic.Field(gt=0)]
    initialiser: str
    fill_slices: NotRequired[bool]
    dtype: Literal["float32", "bfloat16", "float16"]


class Record(TypedDict):
    """The JSON beside a checkpoint's arrays.

    Args:
        version: version of this format. Version 2 also held a sha256 for each array.
        model: the network's arguments.
        tasks: its task table, from `tasks.to_json`.
        data: digest of the data set that it learned from.
        validation_split: the split whose error chose the best step and lowered the learning rate.
        step: steps taken.
        error: validation error; None for a step at which SIGTERM stopped the run between two evaluations.
        unlogged: for such a step, the metrics that the log lacks.
        sha256: only in records of version 2.
    """

    version: Literal[2, 3]
    model: Model
    tasks: list[dict[str, Any]]
    data: str
    validation_split: NotRequired[str]
    step: int
    error: float | None
    unlogged: NotRequired[Unlogged]
    sha256: NotRequired[dict[str, str]]


def write(folder: Path, variables: Mapping, optimiser: Mapping, record: Record) -> None:
    """Write and seal one step in an empty folder.

    Raises:
        OSError: the system refuses it: a full disk, a quota.
    """
    _ignore_closed_loops()
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # Orbax logs a traceback for each thread before it raises one of them
    try:
        alone = _this_process()
        # Weights do not compress: zstd would save a tenth of the disk for four times the time.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
        with (
            checksums.Sums(folder) as sums,
            ocp.AsyncCheckpointer(handler, multiprocessing_options=alone) as writer,
        ):
            for item, tree in (("variables", variables), ("optimiser", optimiser)):
                writer.save(folder / item, args=ocp.args.PyTreeSave(tree))
                writer.wait_until_finished()
                sums.add(item)  # the next item is written meanwhile
            (folder / "record").mkdir()
            (folder / "record" / "metadata").write_text(json.dumps(record, allow_nan=False))
            sums.add("record")
            sums.seal()
    except OSError:
        raise
    except Exception as error:  # TensorStore has its own types for what the system refuses
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
    finally:
        log.setLevel(level)


def read(folder: Path, *items: str) -> tuple[Record, dict[str, dict]]:
    """Verify and read the record of a step, and the named items, "variables" or "optimiser", as numpy arrays.

    Other items are neither read nor verified: a network loads without its optimiser.

    Raises:
        SpinejaxError: a file is missing or damaged, or of another version.
    """
    record = read_record(folder)
    if fault := checksums.fault_of(folder, "record", *items):
        raise SpinejaxError(f"{folder}: {fault}. {way_back(folder)}")
    _ignore_closed_loops()
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_this_process()) as reader:
            return record, {item: reader.restore(folder / item) for item in items}
    except Exception as error:  # its type varies; a trainer may have deleted this step by now
        raise SpinejaxError(f"{folder}: cannot be read ({type(error).__name__}). {way_back(folder)}") from error


def read_record(folder: Path) -> Record:
    """The record of one checkpoint's folder, not verified against its checksum.

    Raises:
        SpinejaxError: it is missing or damaged, or of another version.
    """
    path = folder / "record" / "metadata"
    try:
        return read_json(path, Record, advice="")
    except OSError as error:
        raise SpinejaxError(f"{path}: missing ({error.strerror}). {way_back(folder)}") from error
    except SpinejaxError as error:
        raise SpinejaxError(f"{error}{way_back(folder)}") from error


def weights_digest(folder: Path) -> str:
    """A sha256 that identifies a checkpoint's weights; a run's step and its export have the same."""
    if sums := read_record(folder).get("sha256"):  # version 2: one for each array
        arrays = {name: digest for name, digest in sums.items() if name.startswith("variables/")}
        return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()
    lines = (folder / checksums.SUMS).read_text().splitlines()
    return hashlib.sha256("\n".join(line for line in lines if "  variables/" in line).encode()).hexdigest()


def steps_of(root: Path) -> dict[int, Path]:
    """The finished steps, oldest first. A folder gets its plain number only once it is complete."""
    folders = {int(path.name): path for path in root.glob("[0-9]*") if path.name.isdigit()}
    return dict(sorted(folders.items()))


def best_step(run: str | Path) -> int | None:
    """The saved step of least validation error, the latest of equals; None if nothing is saved.

    A step without an error, at which SIGTERM stopped the run, is the best only if there is no other.
    """
    errors: dict[int, float] = {}
    for step, folder in steps_of(Path(run) / CHECKPOINTS).items():
        try:
            error = read_record(folder)["error"]
        except SpinejaxError:
            if folder.is_dir():
                raise
            continue  # training has deleted it in the meantime
        errors[step] = math.inf if error is None else error
    return min(reversed(errors), key=lambda step: errors[step], default=None)


def way_back(folder: Path) -> str:
    """What to do about a damaged checkpoint; for a step of a run, which other step is whole."""
    if folder.parent.name != CHECKPOINTS or not folder.name.isdigit():
        return "Restore it from a copy, or start its run's command again, which exports the best step again."
    others = [other for other in reversed(steps_of(folder.parent).values()) if other != folder]
    whole = next((other.name for other in others if not checksums.fault_of(other)), None)
    if whole is None:
        return "No other saved step is whole: restore it from a copy, or begin again in another --workdir."
    return f"Restore it from a copy; or delete this folder to go back to step {whole}."


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Have Orbax work in this process alone, without waiting for the other ones of a run."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep TensorStore's follow-up reports off the standard error.

    After a first fault its other reads and writes report to an event loop that is closed by then: hundreds of lines
    around the one that matters. They may come before the fault itself is raised.
    """
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = show_others
