"""One saved step: a folder of two Orbax items and a record, sealed with a sha256 a file.

    variables/         Orbax: params and constants, what `SpineNet.apply` takes, and all that other code needs
    optimiser/         Orbax: the rest of the training state
    record/metadata    JSON: the network, the task table, what data it learned from, its error, a sha256 per array
    SHA256SUMS         a sha256 per file

Orbax keeps no checksum of what it stores, and a flipped byte would come back as a wrong weight: every file and every
array is checked when it is read.
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

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from typing_extensions import TypedDict

from spinejax.config import MOST_WIDTH
from spinejax.errors import SpinejaxError
from spinejax.files import checksums

CHECKPOINTS = "checkpoints"

Unlogged = list[dict[str, float]]
"""Figures of the steps since the last line of the log, a dictionary a step."""


class Model(TypedDict):
    """`SpineNet`'s arguments but for the tasks."""

    branch_point: str | None
    width: Annotated[float, pydantic.Field(gt=0, le=MOST_WIDTH)]
    dropout: float
    num_slices: Annotated[int, pydantic.Field(gt=0)]
    initialiser: str
    fill_slices: NotRequired[bool]
    dtype: Literal["float32", "bfloat16", "float16"]


class Record(TypedDict):
    """The JSON beside a checkpoint's arrays.

    Args:
        version: of this form; 1 had no `SHA256SUMS`.
        model: the network's arguments.
        tasks: its task table, as `tasks.to_json` gives it.
        data: digest of the data set that it learns from.
        step: steps taken.
        error: validation error; None for a step at which the run was told to stop, between two evaluations.
        unlogged: there, what the log does not say yet.
        sha256: a digest for each array, by its path in the tree.
    """

    version: Literal[1, 2]
    model: Model
    tasks: list[dict[str, Any]]
    data: str
    step: int
    error: float | None
    unlogged: NotRequired[Unlogged]
    sha256: dict[str, str]


def write(folder: Path, variables: Mapping, optimiser: Mapping, record: Record) -> None:
    """Write and seal one step in a folder that is there.

    Raises:
        OSError: the system refuses it: a full disk, a quota.
    """
    _hush_closed_loops()
    said = logging.getLogger("absl")
    level = said.level
    said.setLevel(logging.CRITICAL)  # Orbax logs a traceback a thread for the one error that it then raises
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as writer:
            for item, tree in (("variables", variables), ("optimiser", optimiser)):
                writer.save(folder / item, tree)
                writer.wait_until_finished()
        (folder / "record").mkdir()
        (folder / "record" / "metadata").write_text(json.dumps(record))
        checksums.seal(folder)
    except OSError:
        raise
    except Exception as error:  # TensorStore has types of its own for what the system refuses
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
    finally:
        said.setLevel(level)


def read_item(folder: Path, item: str) -> dict:
    """The arrays of "variables" or "optimiser", as numpy. Raises SpinejaxError if they cannot be read."""
    _hush_closed_loops()
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
            return reader.restore(folder / item)
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        fault = f"damaged or incomplete ({type(error).__name__})"
        raise SpinejaxError(f"{folder / item}: {fault}. {way_back(folder)}") from error


def read_record(folder: Path) -> Record:
    """The record of one checkpoint's folder.

    Raises:
        SpinejaxError: it is missing or damaged, or of a later version.
    """
    path = folder / "record" / "metadata"
    try:
        return pydantic.TypeAdapter(Record).validate_json(path.read_bytes())
    except OSError as error:
        raise SpinejaxError(f"{path}: missing ({error.strerror}). {way_back(folder)}") from error
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise SpinejaxError(
            f"{path}: damaged, or of a later version: {where}: {fault['msg']}. {way_back(folder)}"
        ) from error


def checked_record(folder: Path) -> Record:
    """The record of one checkpoint, once every file of it was found to be what was saved."""
    if (folder / checksums.SUMS).is_file() or read_record(folder)["version"] > 1:
        fault = checksums.fault_of(folder)
        if fault:
            raise SpinejaxError(f"{folder}: {fault}. {way_back(folder)}")
    return read_record(folder)


def check_arrays(folder: Path, record: Record, parts: Mapping) -> None:
    """Raises SpinejaxError unless every array of the items in `parts` is what the record says."""
    found = digests(parts)
    expected = {name: digest for name, digest in record["sha256"].items() if name.split("/")[0] in parts}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise SpinejaxError(f"{folder}: {name} is not what was saved: its sha256 differs. {way_back(folder)}")


def digests(tree: Mapping) -> dict[str, str]:
    """Path of each array in a tree → its sha256."""
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest() for name, leaf in leaves.items()}


def steps_of(root: Path) -> dict[int, Path]:
    """The finished steps, oldest first: a folder gets its plain number only when it is whole."""
    folders = {int(p.name): p for p in root.glob("[0-9]*") if p.name.isdigit()}
    return dict(sorted(folders.items()))


def best_step(run: str | Path) -> int | None:
    """The saved step of least validation error, the latest of equals; None if nothing is saved.

    A step without an error, at which a run was told to stop, is the best only if there is no other.
    """
    steps = steps_of(Path(run).absolute() / CHECKPOINTS)
    found = {step: read_record(steps[step])["error"] for step in steps}
    errors = {step: math.inf if error is None else error for step, error in found.items()}
    return min(reversed(errors), key=lambda step: errors[step], default=None)


def way_back(folder: Path) -> str:
    """What to do about a damaged checkpoint: if it is one of a run's steps, which other one is whole."""
    if not _is_step(folder):
        return "Restore it from a copy, or start its run's command again, which exports the best step anew."
    others = [other for other in reversed(steps_of(folder.parent).values()) if other != folder]
    whole = next((other.name for other in others if not checksums.fault_of(other)), None)
    if whole is None:
        return "No other saved step is whole: restore it from a copy, or begin again in another --workdir."
    return f"Restore it from a copy; or delete this folder to go back to step {whole}."


def _is_step(folder: Path) -> bool:
    return folder.parent.name == CHECKPOINTS and folder.name.isdigit()


def _alone() -> ocp.options.MultiprocessingOptions:
    """Have Orbax work in this process alone, without waiting for the other ones of a run."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


@functools.cache
def _hush_closed_loops() -> None:
    """After a first fault, TensorStore's other reads and writes report to an event loop that is closed by then.

    That would be hundreds of lines around the one that matters. They may come before the fault itself is raised, so
    they are hushed ahead of any reading or writing.
    """
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = show_others
