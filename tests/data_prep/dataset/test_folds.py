"""Folds of a cross-validation: whose turn it is, and that nothing of a disc changes but its split."""

from collections import Counter

import numpy as np
import pytest

from data_prep.dataset.folds import fold_of_patients, labels_by_patient, parse_fold, write_fold
from spinejax.data.dataset import DataSet, verify
from spinejax.errors import SpinejaxError
from tests.conftest import write_tiny
from tests.data_prep.dataset.test_splits import cohort

FOLDS = range(1, 6)


@pytest.mark.parametrize("num_patients", [6, 29, 179])
def test_every_patient_is_tested_once(num_patients):
    patients = cohort(num_patients)
    splits = [fold_of_patients(patients, number, 5, seed=0) for number in FOLDS]
    assert all(set(split) == set(patients) for split in splits)
    tested = Counter(name for split in splits for name, where in split.items() if where == "test")
    assert tested == Counter(list(patients))
    for split in splits:
        sizes = Counter(split.values())
        assert abs(sizes["test"] - num_patients / 5) < 1
        assert abs(sizes["validation"] - max(1, (num_patients - sizes["test"]) / 8)) < 1


def test_a_fold_depends_on_the_patients_and_the_seed_alone():
    patients = cohort(60)
    turned = dict(reversed(patients.items()))
    assert fold_of_patients(turned, 2, 5, seed=3) == fold_of_patients(patients, 2, 5, seed=3)
    tests = {
        tuple(name for name, where in fold_of_patients(patients, 2, 5, seed=seed).items() if where == "test")
        for seed in range(4)
    }
    assert len(tests) == 4


def test_every_split_of_every_fold_has_its_share_of_grades():
    patients = cohort(150)
    total = Counter(disc["endplate"] for discs in patients.values() for disc in discs if "endplate" in disc)
    for number in FOLDS:
        splits = fold_of_patients(patients, number, 5, seed=0)
        for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
            have = Counter(
                disc["endplate"]
                for name, discs in patients.items()
                if splits[name] == split
                for disc in discs[:6]
                if "endplate" in disc
            )
            assert have[1] / total[1] == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "1", "a/b", "-1/5", "1/5/5"])
def test_what_is_no_fold(fold):
    with pytest.raises(SpinejaxError, match="expected 1/5 to 5/5"):
        parse_fold(fold)


def test_too_few_patients():
    with pytest.raises(SpinejaxError, match="4 patients: too few for 5 folds"):
        fold_of_patients(cohort(4), 1, 5, seed=0)


def test_a_written_fold_holds_the_same_discs_in_other_splits(tmp_path):
    data = DataSet(write_tiny(tmp_path / "discs", masks=()))
    counts = write_fold(data, tmp_path / "fold", "2/5", seed=0)
    fold = DataSet(tmp_path / "fold")
    assert verify(tmp_path / "fold") == []
    splits = fold_of_patients(labels_by_patient(data), 2, 5, seed=0)
    assert list(fold.split) == [splits[patient] for patient in data.patient]
    assert counts == dict(Counter(fold.split.tolist()))
    for name in ("affine", "slices", "labels", "level", "patient", "scan"):
        np.testing.assert_array_equal(getattr(fold, name), getattr(data, name))
    np.testing.assert_array_equal(fold.volume(5), data.volume(5))
    assert fold.manifest["preprocessing"] == data.manifest["preprocessing"] | {"fold": "2/5", "fold_seed": 0}
    with pytest.raises(SpinejaxError, match="holds a data set already"):
        write_fold(data, tmp_path / "fold", "2/5", seed=0)
