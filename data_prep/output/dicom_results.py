"""An evaluation's results as DICOM, for the patients they are about: the key finds each scan's source series again."""

import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.anatomy.discs import extract_discs
from data_prep.anatomy.vertebrae import VertebralBody
from data_prep.dataset.job import Job, Located
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.output.dicom_images import BY_CORNERS, BY_DETECTOR, BY_MASK, Origin, write_picture, write_segmentation
from data_prep.output.dicom_objects import DISCLAIMER, read_source, write_map, write_report
from data_prep.output.pictures import PlacedDisc, hotspot_picture, hotspot_slices, spine_picture
from data_prep.output.read_evaluation import (
    DiscMaps,
    GradedDisc,
    provenance_of,
    read_maps,
    read_places,
    read_predictions,
)
from data_prep.read.csv_tables import some
from data_prep.read.dicom_files import is_dicom
from data_prep.read.found import Series
from data_prep.read.scan import Scan
from data_prep.read.series import find_series
from data_prep.sources.scan_files import Cutting, scan_jobs
from spinejax.errors import SpinejaxError
from spinejax.geometry import WINDOW_SHAPE, window_affine

_SAME_DISC_MM = 15.0  # from the graded disc to the one located now; neighbours are 25 mm and more apart


@dataclass
class Returned:
    """What was written: numbers of scans and objects, and the files; notes on what was left out."""

    scans: int = 0
    maps: int = 0
    pictures: int = 0
    segmentations: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # series → reason
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Graded:
    """One scan, its source series, and what the evaluation has of it. `places` is level → affine of the window."""

    series: Series
    job: Job
    origin: Origin
    discs: Sequence[GradedDisc]
    maps: dict[str, DiscMaps]
    places: dict[str, np.ndarray]


def results_as_dicom(
    evaluation: Path,
    sources: Sequence[Path],
    pseudonyms: Pseudonyms,
    out: Path,
    *,
    masks: Path | None = None,
    corners: Path | None = None,
    cutting: Cutting = Cutting(),
) -> Returned:
    """Write each graded scan's results as DICOM, into a folder named by its pseudonym.

    Args:
        evaluation: the folder that `evaluate.py` wrote.
        sources: files and folders with the DICOM series that were graded.
        pseudonyms: made with the data set's key.
        out: the folder. Its files name patients, so others cannot read it.
        masks, corners, cutting: where the vertebrae are, as for `scan_jobs`. By default they are detected.

    Returns:
        What was done. A scan without its source series is noted; one that cannot be read or written has failed.

    Raises:
        SpinejaxError: the evaluation cannot be read; no series is one of its scans; `out` is inside it.
    """
    if out.resolve().is_relative_to(evaluation.resolve()):
        raise SpinejaxError(f"--out {out}: lies inside the evaluation, which names no patient. Give another folder.")
    provenance = provenance_of(evaluation)
    discs: dict[str, list[GradedDisc]] = defaultdict(list)
    for disc in read_predictions(evaluation):
        discs[disc.scan].append(disc)
    places: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for (scan, level), affine in read_places(evaluation).items():
        places[scan][level] = affine
    found = find_series(sources, weighting="any", exclude=[masks] if masks else [], burned_in=True)
    found.series = [one for one in found.series if is_dicom(one.files[0]) and pseudonyms.scan(one.key) in discs]
    returned = Returned(failures=dict(found.failures))
    if not found.series:
        raise SpinejaxError(
            f"None of the {len(discs)} scans of {evaluation} is among the sagittal DICOM series found. "
            "Check that --key is the data set's key, and that the data set was made from --source."
        )
    jobs, _ = scan_jobs(
        found, masks=masks, corners=corners, labels=None, cutting=cutting, seed=0, pseudonyms=pseudonyms
    )
    origin = BY_MASK if masks else BY_CORNERS if corners else BY_DETECTOR
    remaining = {job.scan: (one, job) for one, job in zip(found.series, jobs, strict=True)}
    if missing := sorted(set(discs) - set(remaining)):
        returned.notes.append(
            f"{len(missing)} of {len(discs)} scans have no source series here: {some(missing)}",
        )
        returned.notes += [f"left out: {line}" for line in found.left_out]
    try:
        # A folder that exists keeps its mode: each scan's own folder in it is closed to others.
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SpinejaxError(f"--out {out}: the folder cannot be made ({error.strerror}).") from error

    def write(scan: str, maps: dict[str, DiscMaps]) -> None:
        series, job = remaining.pop(scan)
        located = places[scan] | {level: each.affine for level, each in maps.items()}
        _return_scan(out / scan, _Graded(series, job, origin, discs[scan], maps, located), provenance, returned)

    # Maps come in the order of the discs, so only one scan's are in memory.
    for scan, each in itertools.groupby(read_maps(evaluation), key=lambda each: each[0]):
        if scan in remaining:
            write(scan, {level: maps for _, level, maps in each})
    for scan in list(remaining):
        write(scan, {})
    return returned


def _return_scan(folder: Path, graded: _Graded, provenance: Sequence[str], returned: Returned) -> None:
    """Write one scan's objects, all or none: what is wrong with it is its own failure, not the next one's."""
    name = graded.series.name
    counts = Returned()
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as unfinished:
            _write_objects(Path(unfinished), graded, provenance, counts)
            folder.mkdir(mode=0o700, exist_ok=True)
            for path in sorted(Path(unfinished).iterdir()):
                os.replace(path, folder / path.name)
                counts.files.append(folder / path.name)
    except SpinejaxError as error:
        returned.failures[name] = str(error)
        return
    except OSError as error:
        if not error.filename or Path(error.filename).is_relative_to(folder.parent):
            raise  # a full disk, which is no fault of this scan
        returned.failures[name] = f"{name}: {error.filename}: {error.strerror}."
        return
    except Exception as error:  # of pydicom and highdicom, which may raise any for what an archive may hold
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        returned.failures[name] = f"{name}: its results cannot be written as DICOM ({type(error).__name__}: {reason})."
        return
    returned.notes += counts.notes
    returned.files += counts.files
    returned.scans += 1
    returned.maps += counts.maps
    returned.pictures += counts.pictures
    returned.segmentations += counts.segmentations


def _write_objects(folder: Path, graded: _Graded, provenance: Sequence[str], counts: Returned) -> None:
    series, maps = graded.series, graded.maps
    images = read_source(series.files, series.name, counts.notes)
    scan, _ = series.read()
    for level, affine in graded.places.items():
        _refuse_outside(affine, scan, f"{series.name}, {level}")
    write_report(folder / "grades.dcm", images, [(disc, maps.get(disc.level)) for disc in graded.discs], provenance)
    mapped = [(disc, task) for disc in graded.discs if disc.level in maps for task in maps[disc.level].tasks]
    several = len(images) > 1 and any(int(image.get("NumberOfFrames") or 1) > 1 for image in images)
    if several:
        mapped = []
        counts.notes.append(
            f"{series.name}: no maps and no segmentation, because they cannot refer to several multi-frame files: the "
            f"series has {len(images)}."
        )
    for counts.maps, (disc, task) in enumerate(mapped, start=1):
        path = folder / f"{disc.level}_{task.name}.dcm"
        write_map(path, images, disc, maps[disc.level], task, provenance, counts.maps)
    located, places = _located(graded, counts.notes)
    placed = [
        PlacedDisc(disc, places[disc.level], maps.get(disc.level)) for disc in graded.discs if disc.level in places
    ]
    if not placed:
        return
    bodies = located.bodies if located else []
    for counts.pictures, (stem, about, pixels) in enumerate(_pictures(scan, placed, bodies), start=1):
        write_picture(folder / f"{stem}.dcm", images, pixels, about, provenance, counts.pictures)
    if located and not several:
        write_segmentation(folder / "vertebrae.dcm", images, series.files, located, graded.origin, provenance)
        counts.segmentations = 1


def _pictures(
    scan: Scan, placed: Sequence[PlacedDisc], bodies: Sequence[VertebralBody]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name of the file, what it shows, and pixels of each picture, one at a time."""
    yield "spine", "Levels and grades", spine_picture(scan, placed, bodies, DISCLAIMER)
    mapped = [disc for disc in placed if disc.maps]
    tasks = dict.fromkeys(task for disc in mapped if disc.maps for task in disc.maps.tasks)
    for task, index in itertools.product(tasks, hotspot_slices(scan, mapped)):
        about = f"Hotspots of {task.name}, slice {index + 1} of {scan.voxels.shape[2]}"
        yield f"{task.name}_slice-{index + 1:02d}", about, hotspot_picture(scan, index, mapped, task, DISCLAIMER)


def _located(graded: _Graded, notes: list[str]) -> tuple[Located | None, dict[str, np.ndarray]]:
    """The scan's vertebral bodies, if they are those that were graded, and each level's window.

    An evaluation has the windows of its discs, or at least their levels, but no bodies: those are located again. With
    other options than the data set was made with, their names could be off by one.
    """
    name, places = graded.series.name, graded.places
    try:
        located = graded.job.locate()
        discs = extract_discs(located.scan, located.bodies, notes=[])
    except SpinejaxError as error:
        notes.append(f"{name}: no segmentation, because its vertebrae were not located again: {error}")
        return None, places
    found = {disc.level: window_affine(disc.affine) for disc in discs}
    middle = [*(size / 2 for size in WINDOW_SHAPE), 1]
    apart_mm = {
        level: float(np.linalg.norm(((found[level] - places[level]) @ middle)[:3]))
        for level in found
        if level in places
    }
    graded_levels = {disc.level for disc in graded.discs}
    wrong = sorted(level for level, mm in apart_mm.items() if mm > _SAME_DISC_MM)
    if not places and set(found) != graded_levels:
        wrong = sorted(set(found) ^ graded_levels)
    if wrong or (places and not apart_mm):
        notes.append(
            f"{name}: no segmentation, because the vertebrae located now are not those that were graded "
            f"({', '.join(wrong) or 'no level is the same'}). Give --masks, --corners or --lowest-level as for the "
            "data set."
        )
        return None, places
    return located, places or found


def _refuse_outside(affine: np.ndarray, scan: Scan, name: str) -> None:
    """A disc outside the series belongs to another one."""
    place = np.linalg.solve(scan.affine, affine @ [*((size - 1) / 2 for size in WINDOW_SHAPE), 1])[:3]
    if (place < -0.5).any() or (place > np.array(scan.voxels.shape) - 0.5).any():
        raise SpinejaxError(f"{name}: the disc is outside this series. Give the series that was graded.")
