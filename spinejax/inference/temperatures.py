"""A checkpoint's temperatures: fitted on validation discs, stored beside the weights, put to use when asked for.

`calibration.json` lies in the checkpoint's folder, with `variables` and `record`, and in the run's export if that has
the same weights. It holds a fit for every way of grading (number of views, what is averaged), because each has a
calibration of its own. It names the weights that it was fitted to, and carries its own sha256: temperatures of other
weights, or with a digit flipped, are refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from typing_extensions import TypedDict

from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.inference.graded import Graded
from spinejax.metrics import calibration
from spinejax.tasks import UNLABELLED
from spinejax.training import checkpoint
from spinejax.training.checkpoint import CALIBRATION
from spinejax.training.saved_step import weights_digest


class Fit(TypedDict):
    """One way of grading, and the temperatures that mend it.

    Args:
        num_views, average: the way.
        data: digest of the data set whose validation discs it was fitted on.
        discs: labelled discs of each task there; with none, the temperature is 1.
        temperatures: task name → what its scores are divided by.
    """

    num_views: Annotated[int, pydantic.Field(ge=1)]
    average: Literal["probabilities", "logits"]
    data: str
    discs: dict[str, int]
    temperatures: dict[str, Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]]


class _File(TypedDict):
    version: Literal[1]
    weights: str
    fits: list[Fit]
    sha256: str


def fit(graded: Graded, *, num_views: int, average: Literal["probabilities", "logits"]) -> Fit:
    """Fit each task's temperature to graded validation discs."""
    temperatures, discs = {}, {}
    for task in graded.tasks:
        labels = graded.labels[task.name]
        usable = labels != UNLABELLED
        discs[task.name] = int(usable.sum())
        temperatures[task.name] = calibration.fit_temperature(graded.probabilities[task.name][usable], labels[usable])
    return Fit(num_views=num_views, average=average, data=graded.data.digest, discs=discs, temperatures=temperatures)


def apply(graded: Graded, temperatures: Mapping[str, float]) -> Graded:
    """The same discs, every task's probabilities at its temperature; no grade changes."""
    return graded.with_probabilities(
        {name: calibration.at_temperature(each, temperatures[name]) for name, each in graded.probabilities.items()}
    )


def effect(graded: Graded, temperatures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Task name → `calibration.before_and_after`, of the tasks that have labels; `graded` is without temperatures."""
    changed = {}
    for task in graded.tasks:
        labels = graded.labels[task.name]
        judged = labels != UNLABELLED
        if judged.any():
            changed[task.name] = calibration.before_and_after(
                graded.probabilities[task.name][judged], labels[judged], temperatures[task.name]
            )
    return changed


def store(path: str | Path, found: Fit) -> Path:
    """Store a fit with a checkpoint, beside those of other ways of grading; one of the same way is replaced.

    Args:
        path: a run, an exported folder or one step's folder, as for `checkpoint.load`.
        found: the fit.

    Returns:
        The file in the checkpoint's folder.

    Raises:
        SpinejaxError: no checkpoint there, or its file of temperatures is damaged.
        OSError: it cannot be written.
    """
    folder = checkpoint.find(path)
    others = [other for other in _read(folder) if _way(other) != _way(found)]
    content = {"version": 1, "weights": weights_digest(folder), "fits": [*others, found]}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"
    export = Path(path).absolute() / checkpoint.EXPORT
    same = export.is_dir() and weights_digest(export) == content["weights"]
    for target in [folder, export] if same else [folder]:
        write_atomically(target / CALIBRATION, lambda temporary: temporary.write_text(text))
    return folder / CALIBRATION


def read(path: str | Path, *, num_views: int, average: str) -> Fit | None:
    """The temperatures stored with a checkpoint for one way of grading; None if there are none.

    Raises:
        SpinejaxError: no checkpoint there, or its temperatures are damaged or of other weights.
    """
    fits = _read(checkpoint.find(path))
    return next((each for each in fits if _way(each) == (num_views, average)), None)


def _read(folder: Path) -> list[Fit]:
    path = folder / CALIBRATION
    if not path.is_file():
        return []
    again = f"Delete it, and `evaluate.py --calibrate` fits it again: {path}"
    try:
        file = pydantic.TypeAdapter(_File).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise SpinejaxError(f"{path}: damaged, or of a later version: {where}: {fault['msg']}. {again}") from error
    if _digest({name: value for name, value in file.items() if name != "sha256"}) != file["sha256"]:
        raise SpinejaxError(f"{path}: not what was stored: its sha256 differs. {again}")
    if file["weights"] != weights_digest(folder):
        raise SpinejaxError(f"{path}: the temperatures are of other weights than this checkpoint's. {again}")
    return file["fits"]


def _way(found: Fit) -> tuple[int, str]:
    return found["num_views"], found["average"]


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
