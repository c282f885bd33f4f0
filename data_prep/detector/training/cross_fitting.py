"""Cross-fitting: five detectors, each trained without one fifth of the patients.

A patient's fold is a property of his id alone: it stays the same in any subset, on any machine, in any data set that
has him. So every scan that the detectors have learned from can be measured, and cut, with the one that has not seen it.
"""

import hashlib

NUM_FOLDS = 5


def fold_of(source: str, patient: str) -> int:
    """The fold of a patient, in [0, `NUM_FOLDS`): detector k has never seen the patients of fold k.

    Args:
        source: the data set that the id belongs to, "spider" or "sudirman": two hospitals' patient 5 are two people.
        patient: the id, as the data set's file names have it.
    """
    digest = hashlib.sha256(f"{source}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * NUM_FOLDS >> 64
