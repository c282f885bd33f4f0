"""An evaluation goes back to the patients it is of: pseudonyms are found again among the source series, by the key."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.output.dicom_objects import import_highdicom, read_source, write_map, write_report
from data_prep.output.evaluation import DiscMaps, GradedDisc, how_it_was_made, read_maps, read_predictions
from data_prep.read.dicom_headers import is_dicom
from data_prep.read.series import Series, find_series
from data_prep.read.tables import some
from spinejax.errors import SpinejaxError


@dataclass
class Returned:
    """What was written: scans and maps; series that failed, and why; notes on what was left out."""

    scans: int = 0
    maps: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def results_as_dicom(evaluation: Path, sources: Sequence[Path], pseudonyms: Pseudonyms, out: Path) -> Returned:
    """Write each graded scan's results as DICOM, into a folder named by its pseudonym.

    Args:
        evaluation: what `evaluate.py` wrote.
        sources: files and folders with the DICOM series that were graded.
        pseudonyms: by the key that the data set was made with.
        out: the folder. What is written there is about patients, by name: others cannot read it.

    Returns:
        What was done. A scan whose source is not there is noted; one whose series cannot be read has failed.

    Raises:
        SpinejaxError: the evaluation cannot be read; highdicom is not installed; no series is one of its scans.
    """
    import_highdicom()
    if out.resolve().is_relative_to(evaluation.resolve()):
        raise SpinejaxError(f"--out {out}: lies inside the evaluation, which names nobody. Give another folder.")
    made = how_it_was_made(evaluation)
    discs: dict[str, list[GradedDisc]] = defaultdict(list)
    for disc in read_predictions(evaluation):
        discs[disc.scan].append(disc)
    found = find_series(sources, weighting="any", patients_by="folder")
    series = {pseudonyms.scan(one.key): one for one in found.series if is_dicom(one.files[0])}
    known = {scan: series[scan] for scan in discs if scan in series}
    if not known:
        raise SpinejaxError(
            f"None of the {len(discs)} scans of {evaluation} is among the {len(series)} sagittal DICOM series found. "
            "Is --key that of the data set that was graded, and --source what it was made of?"
        )
    returned = Returned(failures=dict(found.failures))
    if len(known) < len(discs):
        missing = some(sorted(set(discs) - set(known)))
        returned.notes.append(f"{len(discs) - len(known)} of {len(discs)} scans have no source series here: {missing}")
    _make_private(out)
    # Maps come in the order of the discs: one scan's are in memory.
    groups = itertools.groupby(read_maps(evaluation), key=lambda each: each[0])
    waiting = dict(known)
    for scan, each in groups:
        if scan in waiting:
            _return_scan(out / scan, waiting.pop(scan), discs[scan], {level: m for _, level, m in each}, made, returned)
    for scan, one in waiting.items():
        _return_scan(out / scan, one, discs[scan], {}, made, returned)
    return returned


def _return_scan(
    folder: Path,
    series: Series,
    discs: Sequence[GradedDisc],
    maps: dict[str, DiscMaps],
    made: Sequence[str],
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
    write_report(folder / "grades.dcm", images, [(disc, maps.get(disc.level)) for disc in discs], made)
    returned.scans += 1
    number = 0
    for disc in discs:
        for task in maps[disc.level].tasks if disc.level in maps else ():
            number += 1
            path = folder / f"{disc.level}_{task.name}.dcm"
            write_map(path, images, disc, maps[disc.level], task, made, number)
    returned.maps += number


def _refuse_outside(maps: DiscMaps, scan, name: str) -> None:
    """A disc that does not lie in the series is of another one."""
    centre = maps.affine @ [*(size / 2 for size in maps.maps.shape[1:]), 1]
    place = np.linalg.solve(scan.affine, centre)[:3]
    if (place < -0.5).any() or (place > np.array(scan.voxels.shape) - 0.5).any():
        raise SpinejaxError(f"{name}: the disc does not lie in this series: the evaluation is of another.")


def _make_private(out: Path) -> None:
    """A folder that is there already keeps its mode: each scan's own folder, below it, is closed to others."""
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SpinejaxError(f"--out {out}: no folder can be made there ({error.strerror}).") from error
