"""Cross-validation: a data set's patients dealt to folds, and the data set written again for one fold."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from data_prep.dataset.resuming import only_writer
from data_prep.dataset.splits import split_patients
from spinejax.data.dataset import DataSet
from spinejax.data.manifest import MANIFEST, write_manifest
from spinejax.data.shards import SPLITS, shard_name, write_shard
from spinejax.errors import SpinejaxError

VALIDATION_SHARE = Fraction(1, 8)
"""Share of validation among the patients that are not in the test fold: with five folds 70:10:20."""


def write_fold(data: DataSet, out: Path, fold: str, *, seed: int) -> dict[str, int]:
    """Write a data set again, split for one fold.

    Args:
        data: the data set. Its own splits are ignored.
        out: the new folder. The files of an interrupted run there are overwritten.
        fold: "2/5" is the second of five.
        seed: as for `fold_of_patients`.

    Returns:
        Number of discs per split.

    Raises:
        SpinejaxError: there is no such fold; `out` holds a data set.
    """
    number, num_folds = parse_fold(fold)
    splits = fold_of_patients(labels_by_patient(data), number, num_folds, seed=seed)
    with only_writer(out):
        if (out / MANIFEST).exists():
            raise SpinejaxError(f"--out {out}: holds a data set already. Give another folder.")
        stops = np.cumsum([entry["discs"] for entry in data.manifest["files"]])
        rows_of_file = np.split(np.arange(len(data)), stops[:-1])
        summaries = []
        for index, rows in enumerate(rows_of_file):
            discs = (data.disc(int(row)) for row in rows)
            in_fold = (dataclasses.replace(disc, split=splits[disc.patient]) for disc in discs)
            path = out / shard_name(index, len(rows_of_file))
            summaries.append(write_shard(path, in_fold, data.tasks, data.masks))
        preprocessing = data.manifest["preprocessing"] | {"fold": fold, "fold_seed": seed}
        write_manifest(out, summaries, data.tasks, preprocessing, data.masks)
    return {split: sum(summary.discs[split] for summary in summaries) for split in SPLITS}


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
