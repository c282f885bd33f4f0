"""Cross-validation: a data set's patients dealt to folds. A fold is a manifest that shares the data set's shards."""

import dataclasses
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.resuming import only_writer
from data_prep.dataset.splits import split_patients
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import MANIFEST, write_manifest
from spinejax.data.shards import SPLITS, ShardSummary
from spinejax.errors import SpinejaxError, printable
from spinejax.files.stores import Address

VALIDATION_SHARE = Fraction(1, 8)
"""Share of validation among the patients that are not in the test fold: with five folds 70:10:20."""


def write_fold(data: DataSet, out: Path, fold: str, *, seed: int, home: Path | Address | None = None) -> dict[str, int]:
    """Write the manifest of one fold. Every disc is read once, for the mean of the training discs.

    Args:
        data: the data set, or a fold of it. Its own splits are ignored.
        out: the fold's folder. It finds the data set by its place relative to this folder.
        fold: "2/5" is the second of five.
        seed: as for `fold_of_patients`.
        home: where the folder will be, if that is not `out`: the bucket to which it is copied.

    Returns:
        Number of discs per split.

    Raises:
        SpinejaxError: there is no such fold; `out` holds a data set; a folder's name cannot be in a manifest, or the
            fold and the data set would not be in one bucket or both on this machine.
    """
    number, num_folds = parse_fold(fold)
    splits = fold_of_patients(labels_by_patient(data), number, num_folds, seed=seed)
    return write_split(data, out, splits, {"fold": fold, "fold_seed": seed}, home=home)


def write_split(
    data: DataSet,
    out: Path,
    splits: Mapping[str, str],
    preprocessing: Mapping[str, Any],
    *,
    home: Path | Address | None = None,
) -> dict[str, int]:
    """Write the manifest of the same discs with other splits.

    Args:
        data, out, home: as for `write_fold`.
        splits: patient → split, for every patient.
        preprocessing: what is added to the manifest's entry of this name.

    Returns, raises: as `write_fold`.
    """
    original = _way(home or out, data.shards)
    if "\\" in original or not original.isprintable() or printable(original) != original:
        raise SpinejaxError(f"{printable(original)}: a fold cannot refer to a folder of this name. Rename the folder.")
    data.copy(np.arange(len(data)))
    also = {
        **({"scans": data.manifest["scans"]} if "scans" in data.manifest else {}),
        "schema_version": data.manifest["schema_version"],
        "original": original if original.startswith(".") else f"./{original}",
        "patients": dict(splits),
    }
    with only_writer(out):
        if (out / MANIFEST).exists():
            raise SpinejaxError(f"--out {out}: holds a data set already. Give another folder.")
        rows, summaries = iter(range(len(data))), []
        for entry in data.manifest["files"]:
            summary = ShardSummary(entry["name"], entry["bytes"], entry["sha256"])
            for row in itertools.islice(rows, entry["discs"]):
                disc = data.disc(row, masks=False)
                summary.add(dataclasses.replace(disc, split=splits[disc.patient]))
            summaries.append(summary)
        described = data.manifest["preprocessing"] | dict(preprocessing)
        write_manifest(out, summaries, data.tasks, described, data.masks, also)
    return {split: sum(summary.discs[split] for summary in summaries) for split in SPLITS}


def _way(fold: Path | Address, shards: Path | Address) -> str:
    """The relative path from a fold to its data set. Raises SpinejaxError if there is none."""
    if isinstance(fold, Path) and isinstance(shards, Path):
        return Path(os.path.relpath(shards.resolve(), fold.resolve())).as_posix()
    if isinstance(fold, Address) and isinstance(shards, Address) and fold.bucket == shards.bucket:
        return posixpath.relpath(shards.path, fold.path)
    raise SpinejaxError(
        f"--out {fold}: a fold shares the discs of its data set, {shards}. Give a folder in the same bucket; or "
        "of this machine, if the data set is there."
    )


def parse_fold(fold: str) -> tuple[int, int]:
    """Read "2/5" as (2, 5). Raises SpinejaxError for another form, fewer than two folds, or a number out of range."""
    match = re.fullmatch(r"(\d{1,3})/(\d{1,3})", fold)
    number, num_folds = map(int, match.groups()) if match else (0, 0)
    if num_folds < 2 or not 1 <= number <= num_folds:
        raise SpinejaxError(f"--fold {fold}: expected 1/5 to 5/5, for five folds; two folds or more.")
    return number, num_folds


def fold_of_patients(
    patients: Mapping[str, Iterable[Mapping[str, int]]], number: int, num_folds: int, *, seed: int
) -> dict[str, str]:
    """Patient → split, for one fold: the fold is test, a share of the other patients is validation.

    Both are dealt by `split_patients`, so each has its share of every grade. Over all folds, every patient is in test
    once.

    Args:
        patients: name → the labels of each of the patient's discs.
        number: which fold, from 1.
        num_folds: number of folds.
        seed: as for `split_patients`.

    Raises:
        SpinejaxError: there are too few patients for every split to have one.
    """
    if len(patients) < max(num_folds, 3):
        raise SpinejaxError(f"{len(patients)} patients: too few for {num_folds} folds with a validation split each.")
    patients = {name: list(discs) for name, discs in patients.items()}
    folds = {str(each): Fraction(1, num_folds) for each in range(1, num_folds + 1)}
    dealt = split_patients(patients, seed=seed, fractions=folds)
    others = {name: discs for name, discs in patients.items() if dealt[name] != str(number)}
    shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
    return dict.fromkeys(patients, "test") | split_patients(others, seed=seed, fractions=shares)


def labels_by_patient(data: DataSet) -> dict[str, list[dict[str, int]]]:
    """Patient → the labels, task → grade, of each disc."""
    found: dict[str, list[dict[str, int]]] = {}
    for row, patient in enumerate(data.patient):
        found.setdefault(str(patient), []).append(data.labels_of(row))
    return found
