"""The SPIDER dataset (van der Graaf et al., Scientific Data 11, 264, 2024; doi:10.5281/zenodo.10159290) as jobs.

ROOT holds `images/`, `masks/`, `radiological_gradings.csv` and `overview.csv`, as in the official download: 447 series
of 218 patients, T1 and T2 with slices of 3 to 10 mm, and T2 SPACE with slices of 0.9 mm. Gradings are per patient;
scans and masks are per series, named `<patient>_<series>.mha`. A data set can be made of several series. It then has
each disc of a patient once per series, all in the same split.

The tables do not define "UP endplate" and "LOW endplate". We assume that they are the endplates above and below the
disc, as in the paper's task names.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

from data_prep.dataset.job import Job
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.dataset.splits import PAPER_FRACTIONS, split_patients
from data_prep.detector.doubt import MAX_DOUBT
from data_prep.detector.weights import member_without
from data_prep.read.csv_tables import read_table, refuse, some
from data_prep.read.found import Facts, Series
from data_prep.read.names import canonical
from data_prep.read.volume_files import read_volume, stem_of
from data_prep.sources.labels import Column, labels_of_row
from data_prep.sources.scan_files import Cutting, job_of
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS, Task

SOURCE = "spider"

_ABSENT_PRESENT = ("absent", "present")
_NORMAL_ABNORMAL = ("normal", "abnormal")
_BINARY = {"0": 0, "1": 1}

COLUMNS = {
    "Pfirrman grade": Column(Task("pfirrmann", ("1", "2", "3", "4", "5")), {str(g): g - 1 for g in range(1, 6)}),
    "Disc narrowing": Column(Task("narrowing", _ABSENT_PRESENT), _BINARY),
    "UP endplate": Column(Task("upper_endplate", _NORMAL_ABNORMAL), _BINARY),
    "LOW endplate": Column(Task("lower_endplate", _NORMAL_ABNORMAL), _BINARY),
    # Modic types 1 to 3 differ in kind, not in severity, and types 1 and 3 are rare.
    "Modic": Column(Task("modic", _ABSENT_PRESENT), {"0": 0, "1": 1, "2": 1, "3": 1}),
    "Disc bulging": Column(Task("bulging", _ABSENT_PRESENT), _BINARY),
    "Disc herniation": Column(Task("herniation", _ABSENT_PRESENT), _BINARY),
    "Spondylolisthesis": Column(Task("spondylolisthesis", _ABSENT_PRESENT), _BINARY),
}
"""SPIDER's gradings by column, in SPIDER's spelling. Narrowing is binary, and Modic is not split by endplate."""

SPIDER_TASKS = tuple(column.task for column in COLUMNS.values())

_GRADINGS, _OVERVIEW = "radiological_gradings.csv", "overview.csv"
_SUBSETS = ("training", "validation")


def spider_jobs(
    root: Path,
    *,
    series: Sequence[str],
    seed: int,
    pseudonyms: Pseudonyms,
    slices: Literal["slabs", "native"] = "slabs",
    detect_missing: bool = False,
    keep_doubtful: bool = False,
    max_doubt: float = MAX_DOUBT,
    subset: str = "all",
) -> tuple[list[Job], list[str]]:
    """One job for each scan of the given series, and a note on patients without any of these.

    Patients without gradings are kept as unlabelled.

    The patients of SPIDER's official validation subset, if there are any, become the test split.

    Args:
        root: the folder of the dataset.
        series: the endings of the file names: "t2_SPACE", "t2", "t1".
        seed, pseudonyms: seed of the split, and pseudonyms for patients and scans.
        slices: what is done with thin slices (`Cutting.slices`).
        detect_missing: detect the vertebral bodies of scans without a mask.
        keep_doubtful: keep scans whose levels are doubtful.
        max_doubt: the probability of wrong levels above which they are (`Cutting.max_doubt`).
        subset: "training" or "validation" for the patients of one official subset only; or "all".

    Raises:
        SpinejaxError: a file or folder of the dataset is missing; a table has faults (all are listed); a scan has no
            mask, without `detect_missing`.
    """
    scans = {key: image for each in series for key, image in _images(root, each, detect_missing).items()}
    patients = {patient for patient, _ in scans}
    labels = read_gradings(root / _GRADINGS)
    subsets = _read_subsets(root / _OVERVIEW)
    unknown = sorted(patients - set(subsets))
    if unknown:
        raise SpinejaxError(
            f"{root / _OVERVIEW}: no row for {len(unknown)} patients with scans ({some(unknown)}), so their "
            "subset is unknown. Complete the table or remove their scans."
        )
    if labels and not patients & set(labels):
        raise SpinejaxError(
            f"{root / _GRADINGS}: none of its {len(labels)} patients has a scan of the series {', '.join(series)}: it "
            f"names {some(sorted(labels))}, the scans are of {some(sorted(patients))}. Make the ids agree."
        )
    patients = {patient for patient in patients if subset in ("all", subsets[patient])}
    if not patients:
        raise SpinejaxError(f"--subset {subset}: no scan under {root} is of a patient of this subset. Choose another.")
    splits = _splits({patient: labels.get(patient, {}) for patient in patients}, subsets, seed)
    # SPIDER counts discs from the lowest, the detector from the sacrum. A doubtful sacrum makes the grades doubtful.
    cutting = Cutting(convention="spider", slices=slices, max_doubt=max_doubt)
    others = {patient for patient, own in subsets.items() if subset in ("all", own)} - patients
    others &= {path.name.split("_")[0] for path in _scans(root, "*")}
    notes = [f"{len(others)} patients have no scan of the series {', '.join(series)}: {some(sorted(others))}"]
    jobs = [
        job_of(
            Series(
                canonical(image.name),
                stem_of(image),
                patient,
                (image,),
                partial(read_volume, image),
                Facts(contrast="t1" if own == "t1" else "t2"),
            ),
            mask if (mask := root / "masks" / image.name).is_file() else None,
            cutting,
            labels=labels.get(patient, {}),
            split=splits[patient],
            pseudonyms=pseudonyms,
            refuse_doubtful=not keep_doubtful,
            source=SOURCE,
            member=member_without(SOURCE, patient),  # so that the network did not learn this patient's discs
        )
        for (patient, own), image in scans.items()
        if patient in patients
    ]
    return jobs, notes if others else []


def read_gradings(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Read the gradings: patient → level → task → label.

    `IVD label` 1 is the lowest disc (L5-S1), 9 the highest (T9-T10). Rows of label 0 match no disc and are dropped.

    Raises:
        SpinejaxError: the table is missing or has faults: columns, values out of range, a disc twice. All are listed.
    """
    faults = []
    gradings: dict[str, dict[str, dict[str, int]]] = {}
    for line, row in read_table(path, {"Patient", "IVD label", *COLUMNS}, exact=True).rows:
        patient, disc = row["Patient"], row["IVD label"]
        if not patient:
            faults.append(f"line {line}: no patient")
        if disc not in map(str, range(len(LEVELS) + 1)):
            faults.append(f"line {line}: IVD label {disc!r}, expected 0 to {len(LEVELS)}")
            continue
        labels = labels_of_row(row, COLUMNS, line, faults)
        if disc == "0":
            continue
        if LEVELS[-int(disc)] in gradings.setdefault(patient, {}):
            faults.append(f"line {line}: patient {patient}, IVD label {disc} occurs twice")
        gradings[patient][LEVELS[-int(disc)]] = labels
    refuse(path, faults)
    return gradings


def _read_subsets(path: Path) -> dict[str, str]:
    """Patient → "training" or "validation", from the table of series."""
    subsets: dict[str, str] = {}
    faults = []
    for line, row in read_table(path, {"new_file_name", "subset"}).rows:
        patient, subset = row["new_file_name"].split("_")[0], row["subset"]
        if subset not in _SUBSETS:
            faults.append(f"line {line}: subset {subset!r}, expected {' or '.join(_SUBSETS)}")
        elif subsets.setdefault(patient, subset) != subset:
            faults.append(f"line {line}: patient {patient} is in both subsets")
    refuse(path, faults)
    return subsets


def _splits(labels: dict[str, dict], subset: dict[str, str], seed: int) -> dict[str, str]:
    held_out = {patient: "test" for patient in labels if subset[patient] == "validation"}
    graded = {patient: levels.values() for patient, levels in labels.items() if patient not in held_out}
    eight_to_one = {"train": Fraction(8, 9), "validation": Fraction(1, 9)}
    return held_out | split_patients(graded, seed=seed, fractions=eight_to_one if held_out else PAPER_FRACTIONS)


def _images(root: Path, series: str, detect_missing: bool) -> dict[tuple[str, str], Path]:
    """Find the scans of one series: (patient, series) → file. Without `detect_missing`, each must have a mask."""
    folders = ["images"] if detect_missing else ["images", "masks"]
    missing = [name for name in folders if not (root / name).is_dir()]
    missing += [name for name in (_GRADINGS, _OVERVIEW) if not (root / name).is_file()]
    if missing:
        raise SpinejaxError(
            f"{root}: no {', no '.join(missing)} in it. Give the folder that holds SPIDER's images/, masks/, "
            f"{_GRADINGS} and {_OVERVIEW}."
        )
    # `*_t2.mha` also matches `200_x_t2.mha`, which is of another series: a patient's name has no underscore.
    found = {path.name.removesuffix(f"_{series}.mha"): path for path in _scans(root, f"*_{series}")}
    images = {(patient, series): path for patient, path in found.items() if "_" not in patient}
    if not images:
        series_there = Counter(path.stem.partition("_")[2] for path in _scans(root, "*"))
        there = ", ".join(f"{name} ({count})" for name, count in sorted(series_there.items())) or "no .mha file"
        raise SpinejaxError(f"--series {series}: no images/*_{series}.mha under {root}; found {there}.")
    unmasked = [path.name for path in images.values() if not (root / "masks" / path.name).is_file()]
    if unmasked and not detect_missing:
        raise SpinejaxError(
            f"{root / 'masks'}: no mask for {len(unmasked)} of {len(images)} {series} scans ({some(unmasked)}). Add "
            "the masks, remove those scans from images/, choose another --series, or --detect-missing."
        )
    return images


def _scans(root: Path, pattern: str) -> list[Path]:
    """The scans whose names match, without the hidden files that macOS adds to a copy."""
    return sorted(path for path in root.glob(f"images/{pattern}.mha") if path.name[0] != ".")
