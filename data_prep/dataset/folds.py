"""Cross-validation: the patients of a data set dealt to folds, and the data set written anew for one of them."""

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
from spinejax.data.shards import SPLITS, Disc, shard_name, write_shard
from spinejax.errors import SpinejaxError

VALIDATION_SHARE = Fraction(1, 8)
"""Of the patients that are not in the test fold: with five folds 70:10:20."""


def write_fold(data: DataSet, out: Path, fold: str, *, seed: int) -> dict[str, int]:
    """Write a data set again, split for one fold.

    Args:
        data: its own splits play no part.
        out: the new folder; an earlier run that was interrupted there is overwritten.
        fold: "2/5" is the second of five.
        seed: of `fold_of_patients`.

    Returns:
        Discs of each split.

    Raises:
        SpinejaxError: the fold is none; `out` holds a data set already.
    """
    number, num_folds = parse_fold(fold)
    splits = fold_of_patients(labels_by_patient(data), number, num_folds, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        if (out / MANIFEST).exists():
            raise SpinejaxError(f"--out {out}: holds a data set already. Give another folder.")

        def disc_in_fold(row: int) -> Disc:
            return dataclasses.replace(data.disc(row), split=splits[str(data.patient[row])])

        stops = np.cumsum([entry["discs"] for entry in data.manifest["files"]])
        rows_of_file = np.split(np.arange(len(data)), stops[:-1])
        summaries = [
            write_shard(
                out / shard_name(index, len(rows_of_file)),
                (disc_in_fold(int(row)) for row in rows),
                data.tasks,
                data.masks,
            )
            for index, rows in enumerate(rows_of_file)
        ]
        preprocessing = data.manifest["preprocessing"] | {"fold": fold, "fold_seed": seed}
        write_manifest(out, summaries, data.tasks, preprocessing, data.masks)
    return {split: sum(summary.discs[split] for summary in summaries) for split in SPLITS}


def parse_fold(fold: str) -> tuple[int, int]:
    """Read "2/5" as (2, 5).

    Raises:
        SpinejaxError: it is not written so, there are fewer than two folds, or there is no such fold.
    """
    told = re.fullmatch(r"(\d{1,3})/(\d{1,3})", fold)
    number, num_folds = map(int, told.groups()) if told else (0, 0)
    if num_folds < 2 or not 1 <= number <= num_folds:
        raise SpinejaxError(f"--fold {fold}: expected 1/5 to 5/5, for five folds; two folds or more.")
    return number, num_folds


def fold_of_patients(
    patients: Mapping[str, Iterable[Mapping[str, int]]], number: int, num_folds: int, *, seed: int
) -> dict[str, str]:
    """Patient → split, for one fold: test is the fold, validation a share of the others.

    Folds and validation are both dealt by `split_patients`, so each has its share of every grade. Every patient is in
    the test split of exactly one fold.

    Args:
        patients: name → the labels of each of the patient's discs.
        number: which fold, from 1.
        num_folds: of how many.
        seed: as for `split_patients`.

    Raises:
        SpinejaxError: there are too few patients for every split to have one.
    """
    if len(patients) < max(num_folds, 3):
        raise SpinejaxError(f"{len(patients)} patients: too few for {num_folds} folds with a validation split each.")
    patients = {name: list(discs) for name, discs in patients.items()}
    folds = {str(each): Fraction(1, num_folds) for each in range(1, num_folds + 1)}
    dealt = split_patients(patients, seed=seed, fractions=folds)
    test = {name for name, fold in dealt.items() if fold == str(number)}
    rest = {name: discs for name, discs in patients.items() if name not in test}
    shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
    return dict.fromkeys(test, "test") | split_patients(rest, seed=seed, fractions=shares)


def labels_by_patient(data: DataSet) -> dict[str, list[dict[str, int]]]:
    """Patient → the labels, task → grade, of each of his discs."""
    found: dict[str, list[dict[str, int]]] = {}
    for row, patient in enumerate(data.patient):
        found.setdefault(str(patient), []).append(data.labels_of(row))
    return found
