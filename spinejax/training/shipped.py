"""The network that ships: two files, made from a run, that the commands read like a checkpoint.

    spinenet.npz     the weights as float16, by name (`params/trunk/conv1/kernel`); constants as float32; and, if it is
                     known, what is usual for the network: `usual/mean`, `usual/precision`, `usual/threshold`
    spinenet.json    `About`: the network and its tasks, what it learned from, its temperatures and raters, the sha256

Rounding to float16 halves the file, and moves a probability by less than a thousandth.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import numpy as np
import pydantic
from typing_extensions import TypedDict

from spinejax import config
from spinejax.errors import SpinejaxError
from spinejax.files.arrays import read_arrays, write_arrays
from spinejax.files.checksums import sha256_of
from spinejax.files.json_files import read_json, write_json
from spinejax.metrics.calibration import Fit
from spinejax.metrics.usual import Usual
from spinejax.network.views import ViewRanges
from spinejax.tasks import from_json
from spinejax.training import saved_step
from spinejax.training.saved_step import CHECKPOINTS, OPTIONS, Record

FOLDER = Path(__file__).parents[1] / "weights"
"""Where the network lies in the package."""
WEIGHTS, ABOUT = FILES = ("spinenet.npz", "spinenet.json")
_VERSION: Literal[1] = 1
_USUAL = "usual/"


class Provenance(TypedDict):
    """Where a network comes from. Further entries may be added: patients, commit, command."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]

    name: str
    """As results and reports call it."""
    trained_on: str
    """The data, in a few words: "SPIDER and Sudirman's scans"."""
    attribution: list[str]
    """A line for each source: its authors and licence."""


class About(TypedDict):
    """The JSON beside the weights.

    Args:
        version: of this format.
        sha256: of the weights' file.
        record: of the checkpoint that the weights are from: the network's arguments, its tasks, the data set's digest.
        views: ranges of the random views that it was trained with; hotspots draw theirs from these.
        contrasts: of the scans that it learned from, as `data_prep.read.contrast` names them: "t1", "t2".
        temperatures: one fit for each way of grading that has one, with the raters that the network knows.
        provenance: where it comes from.
    """

    version: Literal[1]
    sha256: str
    record: Record
    views: ViewRanges
    contrasts: list[str]
    temperatures: list[Fit]
    provenance: Provenance


class _Versioned(TypedDict):
    version: int


def write(
    run: str | Path,
    out: str | Path,
    *,
    provenance: Provenance,
    contrasts: Sequence[str],
    temperatures: Sequence[Fit] = (),
    usual: Usual | None = None,
) -> Path:
    """Write a run's best step as the two files, and return their folder. The same run gives the same bytes.

    Args:
        run: the run's folder.
        out: the folder for the files, made if missing.
        provenance, contrasts, temperatures: as in `About`.
        usual: by which unusual discs are told, from `inference.unusual.fit`.

    Raises:
        SpinejaxError: the run has no whole checkpoint or no options; or a weight is too large for float16.
    """
    run, out = Path(run).absolute(), Path(out)
    if (best := saved_step.best_step(run)) is None:
        raise SpinejaxError(f"{run}: not a run that has saved a step.")
    record, items = saved_step.read(run / CHECKPOINTS / str(best), "variables")
    leaves = flax.traverse_util.flatten_dict(items["variables"], sep="/")
    stored = {name: _rounded(name, leaf) for name, leaf in sorted(leaves.items())}
    if usual:
        stored |= {f"{_USUAL}{name}": np.asarray(each, np.float32) for name, each in usual._asdict().items()}
    out.mkdir(parents=True, exist_ok=True)
    write_arrays(out / WEIGHTS, stored)
    about: About = {
        "version": _VERSION,
        "sha256": sha256_of(out / WEIGHTS),
        "record": record,
        "views": config.load(run / OPTIONS).views,
        "contrasts": [name.lower() for name in contrasts],
        "temperatures": list(temperatures),
        "provenance": provenance,
    }
    write_json(out / ABOUT, pydantic.TypeAdapter(About).dump_python(about, mode="json"))
    return out


def is_one(folder: Path) -> bool:
    """Whether a folder holds a network in this form; `FOLDER` should, even if its files are gone."""
    return folder == FOLDER or (folder / ABOUT).is_file()


def about(folder: Path = FOLDER) -> About:
    """What is known of a network.

    Raises:
        SpinejaxError: its JSON is missing, damaged or of a later version.
    """
    path = folder / ABOUT
    try:
        version = read_json(path, _Versioned, _way_back(folder))["version"]
        if version > _VERSION:
            raise SpinejaxError(
                f"{path}: of version {version}; this release reads version {_VERSION}. Install a later spinejax."
            )
        known = read_json(path, About, _way_back(folder))
        _check_raters(path, known)
        return known
    except OSError as error:
        raise SpinejaxError(f"{path}: cannot be read ({error.strerror}). {_way_back(folder)}") from error


def _check_raters(path: Path, known: About) -> None:
    """Raises SpinejaxError if a rater has a task that the network lacks, or another number of grades."""
    num_grades = {task.name: task.num_grades for task in from_json(known["record"]["tasks"])}
    for fit in known["temperatures"]:
        for rater, contrasts in fit.get("raters", {}).items():
            for name, each in itertools.chain.from_iterable(tasks.items() for tasks in contrasts.values()):
                if {len(each["shifts"]), len(each["frequencies"])} != {num_grades.get(name)}:
                    raise SpinejaxError(f"{path}: rater {rater} does not fit the task {name}. {_way_back(path.parent)}")


def read(folder: Path = FOLDER) -> tuple[Record, dict[str, Any]]:
    """The record and the variables of a network, verified, as float32 arrays.

    Raises:
        SpinejaxError: a file is missing, damaged or of a later version.
    """
    known = about(folder)
    leaves = _leaves(folder, known)
    floats = {name: leaf.astype(np.float32) for name, leaf in leaves.items() if not name.startswith(_USUAL)}
    return known["record"], flax.traverse_util.unflatten_dict(floats, sep="/")


def read_usual(folder: Path = FOLDER) -> Usual | None:
    """What is usual for a network; None if it was written without. Raises SpinejaxError as `read`."""
    leaves = _leaves(folder, about(folder))
    found = {name.removeprefix(_USUAL): leaf for name, leaf in leaves.items() if name.startswith(_USUAL)}
    return Usual(found["mean"], found["precision"], float(found["threshold"])) if found else None


def _leaves(folder: Path, known: About) -> dict[str, np.ndarray]:
    """The arrays of the weights' file, verified."""
    path = folder / WEIGHTS
    try:
        fault = None if sha256_of(path) == known["sha256"] else f"damaged: its sha256 is not the one in {ABOUT}"
        leaves = {} if fault else read_arrays(path)
    except (OSError, ValueError) as error:
        fault = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if fault:
        raise SpinejaxError(f"{path}: {fault}. {_way_back(folder)}")
    return leaves


def _rounded(name: str, leaf: np.ndarray) -> np.ndarray:
    """A weight as float16. What is no weight keeps its precision: the mean of a slice is a few numbers."""
    leaf = np.asarray(leaf)
    if not name.startswith("params/"):
        return leaf
    if not (np.abs(leaf) <= np.finfo(np.float16).max).all():
        raise SpinejaxError(f"{name}: a weight of {np.abs(leaf).max():.3g} is too large for float16.")
    return leaf.astype(np.float16)


def _way_back(folder: Path) -> str:
    return "Install spinejax again." if folder == FOLDER else "Write it again, or restore it from a copy."
