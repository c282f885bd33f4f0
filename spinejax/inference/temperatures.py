"""A checkpoint's temperatures: fitted on validation discs, stored beside the weights, applied when asked for.

`calibration.json` is in the checkpoint's folder, beside `variables` and `record`, and in the run's export if that has
the same weights. It holds a fit for each way of grading, because each has a calibration of its own. It names the
weights that it was fitted to and carries its own sha256: temperatures of other weights, or with a flipped digit, are
refused. The network that ships has its fits in its own file (`training.shipped`), with its raters.
"""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from typing_extensions import TypedDict

from spinejax.errors import SpinejaxError
from spinejax.files.json_files import read_json, write_json
from spinejax.inference.graded import Graded
from spinejax.metrics import calibration
from spinejax.metrics.calibration import Fit
from spinejax.training import checkpoint, shipped
from spinejax.training.checkpoint import CALIBRATION
from spinejax.training.saved_step import weights_digest


class _File(TypedDict):
    version: Literal[1]
    weights: str
    fits: list[Fit]
    sha256: str


def fit(graded: Graded, *, num_views: int, average: Literal["probabilities", "logits"]) -> Fit:
    """Fit each task's temperature to graded validation discs."""
    labelled = {task.name: graded.labelled(task) for task in graded.tasks}
    return Fit(
        num_views=num_views,
        average=average,
        data=graded.data.digest,
        discs={name: len(discs.labels) for name, discs in labelled.items()},
        temperatures={
            name: calibration.fit_temperature(discs.probabilities, discs.labels) for name, discs in labelled.items()
        },
    )


def apply(graded: Graded, temperatures: Mapping[str, float]) -> Graded:
    """The same discs with every task's probabilities at its temperature; no grade changes."""
    at = {name: calibration.at_temperature(each, temperatures[name]) for name, each in graded.probabilities.items()}
    return dataclasses.replace(graded, probabilities=at)


def as_rater(graded: Graded, found: Fit, rater: str) -> Graded:
    """The same discs with the probabilities of a rater's grades, on scans of their contrasts.

    Scans that are not known to be T1 count as T2. What a fit lacks has the task's temperature only.
    """
    by_contrast = found["raters"][rater]
    described = {scan: known["contrast"] for scan, known in graded.data.manifest.get("scans", {}).items()}
    contrasts = np.array([_contrast(described.get(scan, "")) for scan in graded.scans.tolist()])
    probabilities = dict(apply(graded, found["temperatures"]).probabilities)
    frequencies = {name: np.full_like(each, 1 / each.shape[1]) for name, each in probabilities.items()}
    for contrast, by_task in by_contrast.items():
        discs = contrasts == contrast
        for name, each in by_task.items():
            probabilities[name][discs] = calibration.as_rater(graded.probabilities[name][discs], each)
            frequencies[name][discs] = each["frequencies"]
    used = [by_contrast[contrast] for contrast in set(contrasts.tolist()) & set(by_contrast)]
    others = {name for by_task in used for name, each in by_task.items() if each["borrowed"]}
    return dataclasses.replace(
        graded,
        probabilities=probabilities,
        rater=rater,
        frequencies=frequencies,
        borrowed=[task.name for task in graded.tasks if task.name in others],
    )


def _contrast(described: str) -> str:
    words = set(described.split())
    return "t1" if "t1" in words and "t2" not in words else "t2"


def effect(before: Graded, after: Graded) -> dict[str, dict[str, float]]:
    """Task name → `calibration.before_and_after`, of the tasks that have labels."""
    found = {}
    for task in before.tasks:
        labels, probabilities, *_ = before.labelled(task)
        if len(labels):
            found[task.name] = calibration.before_and_after(probabilities, after.labelled(task).probabilities, labels)
    return found


def store(path: str | Path, found: Fit, *, weights: str | None = None) -> Path:
    """Add a fit to a checkpoint's file of temperatures, and return the file.

    Args:
        path: a run, an exported folder or one step's folder, as for `checkpoint.load`.
        found: the fit; it replaces one of the same way.
        weights: `weights_digest` of the weights that it was fitted to, if `path` is a step's folder that training may
            delete or replace. Default: those that are there now.

    Raises:
        SpinejaxError: there is no checkpoint, or its file of temperatures is damaged.
        OSError: the file cannot be written, or the folder no longer has these weights.
    """
    folder, weights = _resolved(path, weights)
    export = [folder.parents[1] / checkpoint.EXPORT] if folder.parent.name == checkpoint.CHECKPOINTS else []
    targets = [each for each in (folder, *export) if each.is_dir() and weights_digest(each) == weights]
    if folder not in targets:
        raise FileNotFoundError(errno.ENOENT, "training has deleted or replaced it", str(folder))
    others = [other for other in _read(folder, weights) if _way(other) != _way(found)]
    content = {"version": 1, "weights": weights, "fits": [*others, found]}
    for target in targets:
        write_json(target / CALIBRATION, content | {"sha256": _digest(content)})
    return folder / CALIBRATION


def read(path: str | Path, *, num_views: int, average: str, weights: str | None = None) -> Fit | None:
    """The temperatures stored with a checkpoint for one way of grading; None if there are none.

    Args:
        path, weights: as for `store`.
        num_views, average: the way.

    Raises:
        SpinejaxError: there is no checkpoint, or its temperatures are damaged or were fitted to other weights.
    """
    folder, weights = _resolved(path, weights)
    fits = shipped.about(folder)["temperatures"] if shipped.is_one(folder) else _read(folder, weights)
    return next((each for each in fits if _way(each) == (num_views, average)), None)


def _resolved(path: str | Path, weights: str | None) -> tuple[Path, str]:
    folder = Path(path) if weights else checkpoint.find(path)
    return folder, weights or checkpoint.identify(folder)[1]


def _read(folder: Path, weights: str) -> list[Fit]:
    path = folder / CALIBRATION
    if not path.is_file():
        return []
    again = f"Delete it, and `evaluate.py --calibrate` fits it again: {path}"
    file = read_json(path, _File, again)
    if _digest({name: value for name, value in file.items() if name != "sha256"}) != file["sha256"]:
        raise SpinejaxError(f"{path}: not what was stored: its sha256 differs. {again}")
    if file["weights"] != weights:
        raise SpinejaxError(f"{path}: the temperatures were fitted to different weights. {again}")
    return file["fits"]


def _way(found: Fit) -> tuple[int, str]:
    return found["num_views"], found["average"]


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
