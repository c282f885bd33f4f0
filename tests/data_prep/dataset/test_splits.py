import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_prep.dataset.splits import PAPER_FRACTIONS, split_patients
from spinejax.errors import SpinejaxError
from spinejax.tasks import UNLABELLED


def cohort(num_patients, seed=0):
    """Patients whose six discs share a severity, so that grades come in clumps; one patient in ten is ungraded."""
    rng = np.random.default_rng(seed)
    patients = {}
    for index in range(num_patients):
        severity = rng.normal()
        grade = np.clip(np.floor(severity + rng.normal(0, 0.7, 6) + 1.5), 0, 4).astype(int).tolist()
        rare = (severity + rng.normal(0, 0.7, 6) > 1.8).astype(int).tolist()
        discs = [{"pfirrmann": g, "endplate": r} for g, r in zip(grade, rare, strict=True)]
        patients[f"patient{index:04d}"] = discs if rng.random() > 0.1 else [{"pfirrmann": UNLABELLED}]
    return patients


def imbalance(patients, splits):
    """How far the splits' shares of each grade are from 80:10:10, on average, in shares."""
    total, have = Counter(), Counter()
    for patient, discs in patients.items():
        for disc in discs:
            for item in disc.items():
                if item[1] != UNLABELLED:
                    total[item] += 1
                    have[splits[patient], item] += 1
    return np.mean(
        [
            abs(have[split, item] / total[item] - float(PAPER_FRACTIONS[split]))
            for split in PAPER_FRACTIONS
            for item in total
        ]
    )


@pytest.mark.parametrize("num_patients", [3, 4, 7, 10, 29, 100, 2009])
def test_every_patient_is_in_one_split_and_splits_have_their_share(num_patients):
    patients = cohort(num_patients)
    splits = split_patients(patients, seed=0)
    assert set(splits) == set(patients)
    counts = Counter(splits.values())
    assert set(counts) == set(PAPER_FRACTIONS)
    for split, share in PAPER_FRACTIONS.items():
        assert abs(counts[split] - num_patients * share) < (2 if num_patients < 10 else 1)


def test_few_patients():
    assert split_patients({}, seed=0) == {}
    assert split_patients({"only": [{"a": 1}]}, seed=0) == {"only": "train"}
    assert "train" in split_patients({"one": [], "two": []}, seed=0).values()


def test_split_depends_on_the_set_of_patients_not_on_their_order():
    patients = cohort(60)
    names = list(patients)
    random.Random(1).shuffle(names)
    assert split_patients({name: patients[name] for name in names}, seed=3) == split_patients(patients, seed=3)


def test_split_is_a_function_of_the_seed():
    patients = cohort(60)
    assert split_patients(patients, seed=3) == split_patients(patients, seed=3)
    assert len({tuple(split_patients(patients, seed=seed).values()) for seed in range(5)}) == 5


@pytest.mark.parametrize("cohort_seed", range(5))
def test_grades_are_spread_better_than_by_chance(cohort_seed):
    patients = cohort(150, cohort_seed)
    stratified = imbalance(patients, split_patients(patients, seed=0))
    unstratified = dict.fromkeys(patients, ())
    by_chance = [imbalance(patients, split_patients(unstratified, seed=seed)) for seed in range(20)]
    assert stratified < 0.4 * np.mean(by_chance)
    assert stratified < min(by_chance)


def test_ungraded_patients_are_dealt_evenly():
    splits = split_patients(dict.fromkeys(map(str, range(200)), ()), seed=0)
    assert Counter(splits.values()) == {"train": 160, "validation": 20, "test": 20}
    in_test = [int(name) for name, split in splits.items() if split == "test"]
    assert 50 < np.mean(in_test) < 150


def test_two_splits():
    splits = split_patients(cohort(45), seed=0, fractions={"train": Fraction(8, 9), "validation": Fraction(1, 9)})
    assert Counter(splits.values()) == {"train": 40, "validation": 5}


@pytest.mark.parametrize("shares", [("0.8", "0.1"), ("1.2", "-0.2"), ("1", "0")])
def test_fractions_are_shares_of_one(shares):
    with pytest.raises(SpinejaxError, match="add up to 1"):
        split_patients({}, seed=0, fractions=dict(zip(("train", "validation"), map(Fraction, shares), strict=True)))
