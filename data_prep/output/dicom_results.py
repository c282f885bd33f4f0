"""An evaluation's results as DICOM, for the patients they are about: the key finds each scan's source series again."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.output.dicom_objects import read_source, write_map, write_report
from data_prep.output.read_evaluation import DiscMaps, GradedDisc, provenance_of, read_maps, read_predictions
from data_prep.read.csv_tables import some
from data_prep.read.dicom_headers import is_dicom
from data_prep.read.scan import Scan
from data_prep.read.series import Series, find_series
from spinejax.errors import SpinejaxError


@dataclass
class Returned:
    """What was written: numbers of scans and maps; notes on what was left out."""

    scans: int = 0
    maps: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # series → reason
    notes: list[str] = field(default_factory=list)


def results_as_dicom(evaluation: Path, sources: Sequence[Path], pseudonyms: Pseudonyms, out: Path) -> Returned:
    """Write each graded scan's results as DICOM, into a folder named by its pseudonym.

    Args:
        evaluation: the folder that `evaluate.py` wrote.
        sources: files and folders with the DICOM series that were graded.
        pseudonyms: made with the data set's key.
        out: the folder. Its files name patients, so others cannot read it.

    Returns:
        What was done. A scan without its source series is noted; one whose series cannot be read has failed.

    Raises:
        SpinejaxError: the evaluation cannot be read; no series is one of its scans; `out` is inside it.
    """
    if out.resolve().is_relative_to(evaluation.resolve()):
        raise SpinejaxError(f"--out {out}: lies inside the evaluation, which names no patient. Give another folder.")
    provenance = provenance_of(evaluation)
    discs: dict[str, list[GradedDisc]] = defaultdict(list)
    for disc in read_predictions(evaluation):
        discs[disc.scan].append(disc)
    found = find_series(sources, weighting="any", patients_by="folder")
    series = {pseudonyms.scan(one.key): one for one in found.series if is_dicom(one.files[0])}
    remaining = {scan: series[scan] for scan in discs if scan in series}
    if not remaining:
        raise SpinejaxError(
            f"None of the {len(discs)} scans of {evaluation} is among the {len(series)} sagittal DICOM series found. "
            "Check that --key is the data set's key, and that the data set was made from --source."
        )
    returned = Returned(failures=dict(found.failures))
    if missing := sorted(set(discs) - set(remaining)):
        returned.notes.append(
            f"{len(missing)} of {len(discs)} scans have no source series here: {some(missing)}",
        )
    try:
        # A folder that exists keeps its mode: each scan's own folder in it is closed to others.
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SpinejaxError(f"--out {out}: the folder cannot be made ({error.strerror}).") from error
    # Maps come in the order of the discs, so only one scan's are in memory.
    for scan, maps in itertools.groupby(read_maps(evaluation), key=lambda each: each[0]):
        if scan in remaining:
            by_level = {level: each for _, level, each in maps}
            _return_scan(out / scan, remaining.pop(scan), discs[scan], by_level, provenance, returned)
    for scan, one in remaining.items():
        _return_scan(out / scan, one, discs[scan], {}, provenance, returned)
    return returned


def _return_scan(
    folder: Path,
    series: Series,
    discs: Sequence[GradedDisc],
    maps: dict[str, DiscMaps],
    provenance: Sequence[str],
    returned: Returned,
) -> None:
    try:
        images = read_source(series.files, series.name)
        scan, _ = series.read()
        for level, each in maps.items():
            _refuse_outside(each, scan, f"{series.name}, {level}")
    except SpinejaxError as error:
        returned.failures[series.name] = str(error)
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    write_report(folder / "grades.dcm", images, [(disc, maps.get(disc.level)) for disc in discs], provenance)
    mapped = [(disc, task) for disc in discs if disc.level in maps for task in maps[disc.level].tasks]
    for number, (disc, task) in enumerate(mapped, start=1):
        path = folder / f"{disc.level}_{task.name}.dcm"
        write_map(path, images, disc, maps[disc.level], task, provenance, number)
    returned.scans += 1
    returned.maps += len(mapped)


def _refuse_outside(maps: DiscMaps, scan: Scan, name: str) -> None:
    """A disc outside the series belongs to another one."""
    centre = maps.affine @ [*(size / 2 for size in maps.maps.shape[1:]), 1]
    place = np.linalg.solve(scan.affine, centre)[:3]
    if (place < -0.5).any() or (place > np.array(scan.voxels.shape) - 0.5).any():
        raise SpinejaxError(f"{name}: the disc is outside this series. Give the series that was graded.")
