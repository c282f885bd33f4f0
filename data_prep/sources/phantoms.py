"""Phantoms as jobs: synthetic patients, split and cut into discs like real ones."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from data_prep.dataset.job import Job, Located
from data_prep.dataset.splits import split_patients
from data_prep.phantom.phantom import phantom, phantom_labels
from data_prep.phantom.write_dicom import write_dicom
from data_prep.read.csv_tables import write_table
from data_prep.read.metaimage import write_mha
from data_prep.read.nifti import write_nifti
from data_prep.read.scan import Scan
from data_prep.sources.labels import write_labels
from data_prep.sources.spider import COLUMNS
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS, PAPER_TASKS, UNLABELLED

FORMATS = ("mha", "nifti", "dicom")
_MAX_PATIENTS = 100_000  # names have five digits


def phantom_jobs(num_patients: int, *, seed: int) -> list[Job]:
    """One job for each of the patients p00000, p00001, …

    Raises:
        SpinejaxError: the number or the seed is out of range.
    """
    names = phantom_names(num_patients, seed)
    labels = {name: phantom_labels(seed, patient) for patient, name in enumerate(names)}
    splits = split_patients({name: levels.values() for name, levels in labels.items()}, seed=seed)
    return [
        Job(
            name=name,
            patient=name,
            scan=name,
            split=splits[name],
            labels=labels[name],
            locate=partial(locate_phantom, seed, patient),
            recipe=f"phantom {seed} {patient}",
        )
        for patient, name in enumerate(labels)
    ]


def phantom_names(num_patients: int, seed: int) -> list[str]:
    """The patients' names, p00000, p00001, … Raises SpinejaxError if the number or the seed is out of range."""
    if not 1 <= num_patients <= _MAX_PATIENTS or seed < 0:
        raise SpinejaxError(
            f"--patients {num_patients}, --seed {seed}: expected 1 to {_MAX_PATIENTS} patients and a seed of 0 or more."
        )
    return [f"p{patient:05d}" for patient in range(num_patients)]


def locate_phantom(seed: int, patient: int) -> Located:
    """Draw a phantom and find its bodies by its mask, as in a real scan."""
    drawn = phantom(seed, patient)
    return Located.by_mask(drawn.scan, drawn.mask, lesions=drawn.lesions)


def write_phantoms(out: Path, num_patients: int, *, seed: int, file_format: str, overwrite: bool) -> None:
    """Draw patients and write their scans, masks and labels.

    Args:
        out: folder to write to.
        num_patients: number of patients, with one scan each.
        seed: seed of all patients.
        file_format: one of `FORMATS`. Masks are NIfTI if the scans are, else MetaImage.
        overwrite: write into `out` even if it holds files.

    Raises:
        SpinejaxError: the number or the seed is out of range, or `out` is a file, or not empty without `overwrite`.
    """
    names = phantom_names(num_patients, seed)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise SpinejaxError(f"--out {out}: expected a new or empty folder; with --overwrite, any folder.")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    labels: list[tuple[str, str, str, Mapping[str, int]]] = []
    for patient, name in enumerate(names):
        drawn = phantom(seed, patient)
        key = _write_scan(out, name, drawn.scan, drawn.mask, file_format)
        labels += [(name, key, level, grades) for level, grades in drawn.grades.items()]
    write_labels(out / "labels.csv", labels, PAPER_TASKS)
    if file_format == "mha":
        _write_spider_tables(out, labels)


def _write_scan(out: Path, name: str, scan: Scan, mask: Scan, file_format: str) -> str:
    """Write a scan and its mask, and return the key by which labels refer to the scan."""
    key = f"{name}_t2"
    if file_format == "nifti":
        write_nifti(out / "images" / f"{key}.nii.gz", scan)
        write_nifti(out / "masks" / f"{key}.nii.gz", mask)
        return key
    if file_format == "dicom":
        key = write_dicom(out / "images" / name, scan, patient=name, series="t2")
    else:
        write_mha(out / "images" / f"{key}.mha", scan)
    write_mha(out / "masks" / f"{key}.mha", mask)
    return key


def _write_spider_tables(out: Path, labels: list[tuple[str, str, str, Mapping[str, int]]]) -> None:
    gradings = [(name, len(LEVELS) - LEVELS.index(level), *_spider_cells(grades)) for name, _, level, grades in labels]
    write_table(out / "radiological_gradings.csv", ["Patient", "IVD label", *COLUMNS], gradings)
    series = [(key, "training") for key in dict.fromkeys(key for _, key, _, _ in labels)]
    write_table(out / "overview.csv", ["new_file_name", "subset"], series)


def _spider_cells(grades: Mapping[str, int]) -> list[str]:
    """A phantom's grades in SPIDER's columns. A marrow change is Modic type 2; other columns are 0."""
    marrow = [grades["upper_marrow"], grades["lower_marrow"]]
    values = {
        "Pfirrman grade": _cell(grades["pfirrmann"], add=1),
        "Disc narrowing": _cell(min(grades["narrowing"], 1)),
        "UP endplate": _cell(grades["upper_endplate"]),
        "LOW endplate": _cell(grades["lower_endplate"]),
        "Modic": "" if UNLABELLED in marrow else str(2 * max(marrow)),
    }
    return [values.get(column, "0") for column in COLUMNS]


def _cell(label: int, *, add: int = 0) -> str:
    return "" if label == UNLABELLED else str(label + add)
