"""Which scans there are in files and folders, of whatever format, and what was left out and why."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.read.csv_tables import some
from data_prep.read.dicom import in_order, read_series
from data_prep.read.dicom_headers import DamagedHeaderError, DicomFile, is_dicom, read_header, weighting_in_text
from data_prep.read.metaimage import read_mha
from data_prep.read.nifti import read_nifti
from data_prep.read.scan import MAX_OFF_SAGITTAL_DEG, NotSagittalError, Scan, refuse_non_sagittal
from spinejax.errors import SpinejaxError

_READERS = {".mha": read_mha, ".mhd": read_mha, ".nii": read_nifti, ".nii.gz": read_nifti}
# Usual words for a mask: what follows the last "_" of its name, or a part of it.
MASK_WORDS = re.compile("d?seg(mentation)?|msk|masks?|labels?|pred|vert(ebrae)?", re.IGNORECASE)


@dataclass(frozen=True)
class Series:
    """A scan that was found.

    Masks, corners and label tables name it by its `key`: its file's name without the suffix, after its folder's name if
    patients are identified by folder; or its SeriesInstanceUID.
    """

    name: str  # for messages: its file, or its DICOM folder
    key: str
    patient: str  # the patient's own identifier, which enters no data set
    files: tuple[Path, ...]
    read: Callable[[], tuple[Scan, list[str]]]  # the scan, and notes on what is doubtful; picklable


@dataclass
class Found:
    """The scans of some paths, and notes on what was left out or is doubtful."""

    series: list[Series] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # name → reason
    unreadable: set[str] = field(default_factory=set)  # failed files and folders that may or may not be scans

    def cannot_read(self, path: str | Path, error: SpinejaxError | OSError) -> None:
        """Record a file or folder that cannot be read."""
        reason = f"{path}: cannot be read ({error.strerror})." if isinstance(error, OSError) else str(error)
        self.failures[str(path)] = reason
        self.unreadable.add(str(path))


def read_scan(path: str | Path, dtype) -> Scan:
    """Read a NIfTI or MetaImage file, as `read_nifti` and `read_mha` do; raises SpinejaxError if it is neither."""
    reader = _READERS.get(suffix_of(Path(path)))
    if reader is None:
        raise SpinejaxError(f"{path}: expected a name that ends in {', '.join(_READERS)}.")
    return reader(path, dtype)


def suffix_of(path: Path) -> str:
    """The suffix in lower case; `.nii.gz` counts as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """A file's name without its suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def volume_files(folder: Path) -> list[Path]:
    """Every NIfTI and MetaImage file of a tree. Raises SpinejaxError if a part of it cannot be read."""
    found = Found()
    files = [path for path in _files([folder], (), found) if suffix_of(path) in _READERS]
    for reason in found.failures.values():
        raise SpinejaxError(reason)
    return files


def find_series(
    paths: Sequence[Path], *, weighting: str = "t2", patients_by: str = "name", exclude: Sequence[Path] = ()
) -> Found:
    """Search files and whole trees for sagittal series.

    Args:
        paths: files and folders. Every file of a folder is examined, whatever its name; but a volume file whose name
            ends in `_seg` or the like is a mask: masks are often kept beside their scans.
        weighting: "t2", "t1" or "any". Series known to have a different contrast are left out.
        patients_by: "name": a DICOM file's PatientID, or the part of a volume file's name before its first "_" or "."
            (`sub-07_T2w.nii.gz` is of `sub-07`); "folder": the name of the series' folder.
        exclude: folders that are not searched (masks).

    Raises:
        SpinejaxError: a path does not exist, or two series have the same key.
    """
    found = Found()
    dicom: dict[str, list[DicomFile]] = defaultdict(list)
    damaged: dict[str, Path] = {}
    masks: list[Path] = []
    others: list[Path] = []
    for path in _files(paths, exclude, found):
        try:
            if suffix_of(path) in _READERS and MASK_WORDS.fullmatch(stem_of(path).rpartition("_")[2]):
                masks.append(path)
            elif suffix_of(path) in _READERS:
                _take_volume(path, found, weighting, patients_by)
            elif is_dicom(path):
                header = read_header(path)
                dicom[header.series].append(header)
            else:
                others.append(path)
        except (SpinejaxError, OSError) as error:
            found.cannot_read(path, error)
            if isinstance(error, DamagedHeaderError):
                damaged[error.series] = path
    patients = {one.patient for one in found.series}
    if patients_by == "name" and len(found.series) > 1 and len(patients) == 1:  # or files are named after the study
        found.notes.append(
            f"{len(found.series)} scans are all of patient {patients.pop()!r}, by the part of their names before the "
            "first _ or .: use --patients-by folder, or rename them, if they are of several."
        )
    if masks:
        what = f"{len(masks)} files are masks by the end of their names: {some([path.name for path in masks])}"
        found.left_out.append(f"{what}. Rename those that are scans.")
    if others:
        found.left_out.append(f"{len(others)} files are not scans: {some([path.name for path in others])}")
    for key in sorted(dicom):
        _take_dicom(key, dicom[key], damaged.get(key), found, weighting, patients_by)
    keys: dict[str, Series] = {}
    for one in found.series:
        if (other := keys.setdefault(one.key, one)) is not one:
            raise SpinejaxError(
                f"{one.files[0]} and {other.files[0]}: both are called {one.key!r}, so masks and labels cannot tell "
                "them apart. Rename one, or process them in separate runs."
            )
    return found


def _files(paths: Sequence[Path], exclude: Sequence[Path], found: Found) -> Iterator[Path]:
    """Every file once, in an order that does not depend on the file system. `found` records what cannot be read."""
    hidden = {path.resolve() for path in exclude}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise SpinejaxError(f"{path}: no such file or folder.")
        for file in [path] if path.is_file() else _walk(path, hidden, found):
            try:
                new = file.is_file() and file.resolve() not in seen  # a reader would wait for ever on a pipe or socket
            except OSError as error:  # in a folder whose names may be read, but not its files
                found.cannot_read(file, error)
                continue
            if new:
                seen.add(file.resolve())
                yield file


def _walk(root: Path, hidden: set[Path], found: Found) -> Iterator[Path]:
    """All files of a tree, except system files and folders, whose name begins with a dot.

    Linked folders come last, so that a file that is there twice is found in its own folder.
    """
    seen: set[Path] = set()
    tops = [root]
    for top in tops:
        for folder, folders, names in os.walk(top, onerror=lambda error: found.cannot_read(error.filename, error)):
            here = [Path(folder, name) for name in sorted(folders) if name[0] != "."]
            here = [path for path in here if path.resolve() not in hidden]
            folders[:] = [] if Path(folder).resolve() in seen else [path.name for path in here]
            seen.add(Path(folder).resolve())  # links may lead in a circle
            tops += [path for path in here if path.is_symlink()]
            yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _take_volume(path: Path, found: Found, weighting: str, patients_by: str) -> None:
    own = weighting_in_text(stem_of(path))
    if weighting != "any" and own not in (None, weighting):
        found.left_out.append(f"{path.name}: {own} by its name, {weighting} was asked for")
        return
    name, key, patient = path.name, stem_of(path), re.split(r"[_.]", path.name)[0]
    if patients_by == "folder":  # where each patient has a folder, files often have the same name
        patient = path.parent.name
        name, key = f"{patient}/{path.name}", f"{patient}/{key}"
    found.series.append(Series(name, key, patient, (path,), partial(read_volume, path)))


def read_volume(path: Path) -> tuple[Scan, list[str]]:
    """`Series.read` of one volume file: the scan, and no notes."""
    return read_scan(path, np.float32), []


def _take_dicom(
    key: str, files: list[DicomFile], damaged: Path | None, found: Found, weighting: str, patients_by: str
) -> None:
    """Record one DICOM series as a scan, left out or failed. `damaged` is a file of it that cannot be read."""
    folder = files[0].path.parent
    name = f"{folder.name or folder}, series {key}"
    images = [file for file in files if not file.not_a_scan]
    reasons = sorted({file.not_a_scan for file in files if file.not_a_scan})
    if reasons:
        found.left_out.append(f"{name}: {len(files) - len(images)} of {len(files)} files: {', '.join(reasons)}")
    if not images:
        return
    own = images[0].weighting
    if weighting != "any" and own not in (None, weighting):
        found.left_out.append(f"{name}: {own} by its header, {weighting} was asked for")
        return
    patients = {file.patient for file in images}
    patient = folder.name if patients_by == "folder" else images[0].patient
    try:
        if not key:
            raise SpinejaxError(f"{name}: no SeriesInstanceUID, which tells series apart. Export it again.")
        if len(patients) > 1:
            raise SpinejaxError(f"{name}: files of {len(patients)} patients, expected one. Export it again.")
        if not patient:
            raise SpinejaxError(
                f"{name}: PatientID is empty. Give --patients-by folder, with a folder for each patient."
            )
        _refuse_other_planes(images, name)
        if damaged:
            raise SpinejaxError(f"{name}: {damaged.name} of it cannot be read. Copy it again, or leave the series out.")
    except NotSagittalError as error:
        found.left_out.append(str(error))
    except SpinejaxError as error:
        found.failures[name] = str(error)
    else:
        paths = tuple(file.path for file in images)
        found.series.append(Series(name, key, patient, paths, partial(read_series, images, name, np.float32)))


def _refuse_other_planes(images: list[DicomFile], name: str) -> None:
    """Raises NotSagittalError for a series of another plane, by its headers, and SpinejaxError for a broken one."""
    normals = np.array([frame.normal for file in images for frame in file.frames]).reshape(-1, 3)
    off_deg = np.degrees(np.arccos(np.clip(abs(normals[:, 0]), 0, 1)))
    if len(off_deg) and off_deg.min() > MAX_OFF_SAGITTAL_DEG:
        # Axial images are often in blocks, each along its disc: they make no volume, and need not.
        plane = ("a coronal", "an axial")[int(np.argmax(abs(normals[:, 1:]).mean(0)))]
        raise NotSagittalError(f"{name}: {plane} series, {off_deg.min():.0f}° or more off the sagittal plane")
    if len(np.unique(np.round(normals, 2), axis=0)) == 3 and len(images) <= 30:
        raise NotSagittalError(f"{name}: {len(images)} images in three planes: a localiser")
    frames, affine = in_order(images, name)
    refuse_non_sagittal((*frames[0].shape, len(frames)), affine, name)
