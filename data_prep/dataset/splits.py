"""Train, validation and test: whole patients, 80:10:10 (paper, Sect. 5), each split with its share of every grade."""

from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np

from spinejax.errors import SpinejaxError
from spinejax.tasks import UNLABELLED

PAPER_FRACTIONS = {"train": Fraction(8, 10), "validation": Fraction(1, 10), "test": Fraction(1, 10)}


def split_patients(
    patients: Mapping[str, Iterable[Mapping[str, int]]],
    *,
    seed: int,
    fractions: Mapping[str, float | Fraction] = PAPER_FRACTIONS,
) -> dict[str, str]:
    """Deal patients to splits so that each split has its share of patients and of every grade of every task.

    Patients are dealt one by one, those with the rarest grades first, each to the split that is then closest to its
    share, by the sum over all grades of (discs it has - discs it should have)² / discs it should have.

    Args:
        patients: name → the labels (task → grade) of each of the patient's discs; none for an ungraded patient.
        seed: breaks ties and deals ungraded patients.
        fractions: split → its share. They add up to 1.

    Returns:
        Patient → split. It depends on the set of patients and the seed, not on their order. Every split has a patient
        if there are as many patients as splits.

    Raises:
        SpinejaxError: the fractions are not positive, or do not add up to 1.
    """
    shares = [float(share) for share in fractions.values()]
    if sum(fractions.values()) != 1 or min(shares) <= 0:
        raise SpinejaxError(f"Split fractions {dict(fractions)}: expected positive shares that add up to 1.")
    names = sorted(patients)
    discs = {name: _count_grades(patients[name]) for name in names}
    total = sum(discs.values(), Counter())
    grades = sorted(total)
    counts = np.array([discs[name][grade] for name in names for grade in grades], float)
    counts = counts.reshape(len(names), len(grades))
    total_of_grade = counts.sum(0)

    room = np.array(_sizes(len(names), shares))
    target = np.outer(room / max(len(names), 1), total_of_grade)
    rarity = (counts / np.maximum(total_of_grade, 1)).sum(1)
    tie = np.random.default_rng(seed).permutation(len(names))
    # Chance decides between splits of equal cost, as they all are for an ungraded patient.
    chance = np.random.default_rng([seed, 1]).random((len(names), len(room))) * 1e-9

    have = np.zeros_like(target)
    placed = {}
    for patient in np.lexsort((tie, -rarity)):
        more = counts[patient]
        growth = ((2 * (have - target) + more) * more / np.maximum(target, 1e-9)).sum(1)
        growth = np.where(room > 0, growth + chance[patient], np.inf)
        split = int(np.argmin(growth))
        have[split] += more
        room[split] -= 1
        placed[names[patient]] = list(fractions)[split]
    return dict(sorted(placed.items()))


def _count_grades(discs: Iterable[Mapping[str, int]]) -> Counter:
    return Counter((task, label) for disc in discs for task, label in disc.items() if label != UNLABELLED)


def _sizes(number: int, shares: list[float]) -> list[int]:
    """Number of patients per split: its share, rounded by largest remainder, and at least one if there are enough."""
    exact = [number * share for share in shares]
    sizes = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda split: sizes[split] - exact[split])
    for split in by_remainder[: number - sum(sizes)]:
        sizes[split] += 1
    if number >= len(shares):
        while 0 in sizes:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[sizes.index(0)] += 1
    return sizes
