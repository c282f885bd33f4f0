"""`manifest.json`, which makes a folder of shards a data set. It is written last, and validated when it is read.

A fold is a folder with a manifest alone: it names the data set whose shards it shares, and the split of each patient.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from spinejax import tasks as task_tables
from spinejax.data.shards import SCHEMA_VERSION, SPLITS, ShardSummary, refuse_shared_patients
from spinejax.errors import SpinejaxError
from spinejax.files.json_files import read_json, write_json
from spinejax.files.stores import Address
from spinejax.geometry import INTENSITY_ONE, WINDOW_SHAPE
from spinejax.tasks import LEVELS, Task

MANIFEST = "manifest.json"

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**40)]
# A manifest names shards only, of its own folder, or of a data set whose manifest lists the same: any other path in it
# could lead a reader anywhere.
_FileName = Annotated[str, pydantic.Field(pattern=r"^discs-\d{5}-of-\d{5}\.h5$")]
_Folder = Annotated[str, pydantic.Field(pattern=r"^\.\.?(/[^/\\\x00]+)*$", max_length=4096)]
_Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


class _File(TypedDict):
    name: _FileName
    discs: _Count
    bytes: _Count
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class _Split(TypedDict):
    patients: _Count
    discs: _Count
    grades: dict[str, list[_Count]]


class _Task(TypedDict):
    name: str
    grades: list[str]


class _Scan(TypedDict):
    source: str
    contrast: str
    examination: NotRequired[_Count]  # of a patient with several scans: from 1, in the order of time
    days: NotRequired[_Count | None]  # since the patient's first examination; None where that is not known


class Manifest(TypedDict):
    """The content of `manifest.json`. Schema version 1 had no column `checksum` in its shards."""

    schema_version: Literal[1, 2]
    tasks: Annotated[list[_Task], pydantic.Field(min_length=1)]
    levels: list[str]
    masks: list[Literal["region", "lesion"]]
    preprocessing: dict[str, Any]
    splits: Annotated[dict[Literal["train", "validation", "test"], _Split], pydantic.Field(min_length=3)]
    slice_mean: Annotated[list[_Fraction], pydantic.Field(min_length=WINDOW_SHAPE[2], max_length=WINDOW_SHAPE[2])]
    files: Annotated[list[_File], pydantic.Field(min_length=1)]
    scans: NotRequired[dict[str, _Scan]]  # by pseudonym: source, contrast and examination, where they are known
    # Of a fold only:
    original: NotRequired[_Folder]  # the data set that has the shards, relative to the fold's folder
    patients: NotRequired[dict[str, Literal["train", "validation", "test"]]]


def write_manifest(
    folder: Path,
    summaries: Sequence[ShardSummary],
    tasks: Sequence[Task],
    preprocessing: dict,
    masks: Sequence[str],
    also: Mapping[str, Any] = {},
) -> dict:
    """Write `manifest.json`, which makes the folder a data set, and return its contents.

    Args:
        folder: the folder.
        summaries: of its shards.
        tasks, preprocessing, masks: the entries of these names.
        also: further entries: `scans`; of a fold also `original`, `patients`, and the `schema_version` of the shards.

    Raises:
        SpinejaxError: there is no disc; or a patient or an image is in two splits.
    """
    if not any(summary.num_discs for summary in summaries):
        raise SpinejaxError(f"{folder}: no disc was found in any scan, so there is no data set to write.")
    refuse_shared_patients({split: set().union(*(s.patients[split] for s in summaries)) for split in SPLITS}, folder)
    _refuse_shared_images(summaries, folder)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "tasks": task_tables.to_json(tasks),
        "levels": list(LEVELS),
        "masks": list(masks),
        "preprocessing": preprocessing,
        **totals(summaries, tasks),
        "files": [
            {"name": s.file, "discs": s.num_discs, "bytes": s.bytes, "sha256": s.sha256}
            for s in sorted(summaries, key=lambda s: s.file)
        ],
        **also,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def totals(summaries: Sequence[ShardSummary], tasks: Sequence[Task]) -> dict:
    """The manifest's `splits` and `slice_mean`, the mean intensity of each slice of the training windows."""
    discs = sum((s.discs for s in summaries), Counter())
    grades = sum((s.grades for s in summaries), Counter())
    num_pixels = max(discs["train"], 1) * WINDOW_SHAPE[0] * WINDOW_SHAPE[1]
    splits = {
        split: {
            "patients": len(set().union(*(s.patients[split] for s in summaries))),
            "discs": discs[split],
            "grades": {t.name: [grades[split, t.name, g] for g in range(t.num_grades)] for t in tasks},
        }
        for split in SPLITS
    }
    slice_mean = np.sum([s.slice_sum for s in summaries], axis=0) / (num_pixels * INTENSITY_ONE)
    return {"splits": splits, "slice_mean": slice_mean.tolist()}


def _refuse_shared_images(summaries: Sequence[ShardSummary], folder: Path) -> None:
    """A patient who came under two names is in two splits by the image."""
    split_of: dict[str, str] = {}
    for image, split in sorted(each for summary in summaries for each in summary.images):
        if split_of.setdefault(image, split) != split:
            raise SpinejaxError(
                f"{folder}: one and the same image is in the splits {split_of[image]} and {split}: a patient or scan "
                "occurs under two names. Leave one out."
            )


def read_manifest(folder: Path | Address) -> Manifest:
    """`manifest.json` of a data set's folder, unchanged.

    Raises:
        SpinejaxError: it is missing or damaged.
    """
    path = folder / MANIFEST
    if isinstance(folder, Path) and not folder.exists():
        raise SpinejaxError(f"{folder}: no such folder, so it is not a data set. `python -m data_prep` makes one.")
    if not path.is_file():
        raise SpinejaxError(f"{folder}: no {MANIFEST} in it, so it is not a data set. `python -m data_prep` makes one.")
    manifest = read_json(path, Manifest, "Make the data set again.", strict=True)
    names = [entry["name"] for entry in manifest["files"]]
    if len(set(names)) < len(names):
        raise SpinejaxError(f"{path}: damaged: it lists a file twice. Make the data set again.")
    if ("original" in manifest) != ("patients" in manifest):
        raise SpinejaxError(f"{path}: damaged: a fold has the entries original and patients. Make it again.")
    return manifest


def folder_of_shards(folder: Path | Address, manifest: Manifest) -> Path | Address:
    """The folder that has a data set's shards: its own, or for a fold that of the original data set.

    Raises:
        SpinejaxError: the original is not there, or is not the one that the fold was made of.
    """
    if "original" not in manifest:
        return folder
    original: Path | Address
    if isinstance(folder, Address):
        original = folder.relative(manifest["original"])
    else:
        original = Path(os.path.normpath(folder.resolve() / manifest["original"]))
    if not (original / MANIFEST).is_file():
        raise SpinejaxError(
            f"{folder}: is a fold of {original}, where no data set is now. Move it back, or make the fold again."
        )
    found = read_manifest(original)
    if "original" in found or any(found[name] != manifest[name] for name in ("files", "tasks", "schema_version")):
        raise SpinejaxError(f"{folder}: is a fold of {original}, which has changed since. Make the fold again.")
    return original
