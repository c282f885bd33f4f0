"""Which scans there are in files and folders, of whatever format, and what was left out and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.read.choice import judge
from data_prep.read.contrast import weighting_in_text
from data_prep.read.csv_tables import some
from data_prep.read.dicom import middle_slice, read_series
from data_prep.read.dicom_headers import DamagedHeaderError, DicomFile, Frame
from data_prep.read.header_cache import Header, headers_of
from data_prep.read.image_kind import NO_PLACE
from data_prep.read.names import canonical
from data_prep.read.parts import PLANES, parts_of, step_mm, without_copies
from data_prep.read.patient_tags import Evidence, alike
from data_prep.read.patients import tell_apart
from data_prep.read.scan import Scan
from data_prep.read.tree import files_below, unreadable
from data_prep.read.volume_files import files_of, is_mask, is_volume, read_volume, stem_of, suffix_of, whole_files
from spinejax.errors import SpinejaxError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What headers and names say of a series; an empty field is not known."""

    plane: str = ""  # "sagittal", "axial", "coronal"
    contrast: str = ""  # as of `data_prep.read.contrast`
    description: str = ""
    date: str = ""  # YYYYMMDD
    time: str = ""  # HHMMSS
    num_slices: int = 0
    spacing_mm: tuple[float, ...] = ()  # between rows, columns, slices


@dataclass(frozen=True)
class Series:
    """A scan that was found.

    Masks, corners and label tables name it by its `key`: its SeriesInstanceUID, or its file's name without the suffix,
    after names of its folders where it takes them (`data_prep.read.patients`).
    """

    name: str  # for messages: its file, or its DICOM folder
    key: str
    patient: str  # the patient's own identifier, which enters no data set
    files: tuple[Path, ...]
    read: Callable[[], tuple[Scan, list[str]]]  # the scan, and notes on what is doubtful; picklable
    facts: Facts = Facts()
    evidence: Evidence | None = None  # of its patient; None if the patient is known
    alias: str = ""  # the SeriesInstanceUID, if this is the only part of its series that is read
    look: Callable[[], np.ndarray] | None = None  # reads its middle slice alone, where that is quicker; picklable


@dataclass(frozen=True)
class LeftOut:
    """A series, or some files, that are not read."""

    name: str  # for messages; empty if the reason says it all
    reason: str
    files: tuple[Path, ...] = ()
    facts: Facts = Facts()
    series: Series | None = None  # what could be read if the user chose it

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.name else self.reason


@dataclass
class Found:
    """The scans of some paths, and notes on what was left out or is doubtful."""

    series: list[Series] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    failed: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    patient_notes: list[str] = field(default_factory=list)  # what was assumed of the patients
    contradictions: list[str] = field(default_factory=list)  # to be settled before patients are dealt to splits
    unreadable: set[str] = field(default_factory=set)  # failed files and folders that may or may not be scans

    @property
    def failures(self) -> dict[str, str]:
        """The reasons of what has failed, by name."""
        return {one.name: one.reason for one in self.failed}

    def cannot_read(self, path: str | Path, error: SpinejaxError | OSError) -> None:
        """Record a file or folder that cannot be read."""
        self.failed.append(LeftOut(str(path), unreadable(path, error), (Path(path),)))
        self.unreadable.add(str(path))


def find_series(
    paths: Sequence[Path],
    *,
    weighting: str = "t2",
    patients_by: str = "auto",
    exclude: Sequence[Path] = (),
    burned_in: bool = False,
    everyone: bool = False,
    headers: Callable[[Sequence[Path]], Iterable[Header]] = headers_of,
) -> Found:
    """Search files and whole trees for sagittal series.

    Args:
        paths: files and folders. Every file of a folder is examined, whatever its name; but a volume file whose name
            ends in `_seg` or the like is a mask: masks are often kept beside their scans.
        weighting: "t2", "t1" or "any". Series known to have a different contrast are left out.
        patients_by: how to tell patients apart, as `data_prep.read.patients.tell_apart` has it.
        exclude: folders that are not searched (masks).
        burned_in: read images whose header says that text is burned into them, too.
        everyone: name the patients of series that are left out or failed, too.
        headers: reads the DICOM headers of files, in order.

    Raises:
        SpinejaxError: a path does not exist, `patients_by` is unknown, or two series have the same key.
    """
    found = Found()
    dicom: dict[str, list[DicomFile]] = defaultdict(list)
    damaged: dict[str, Path] = {}
    masks: list[Path] = []
    others: list[Path] = []
    files = list(whole_files(files_below(paths, exclude, found.cannot_read)))
    for path, header in zip(files, headers(files), strict=True):
        if isinstance(header, DicomFile):
            dicom[header.series].append(header)
        elif header:
            found.cannot_read(path, header)
            if isinstance(header, DamagedHeaderError):
                damaged[header.series] = path
        elif is_mask(path):
            masks.append(path)
        elif is_volume(path):
            _take_volume(path, found, weighting)
        else:
            others.append(path)
    if masks:
        what = f"{len(masks)} files are masks by the end of their names: {some([path.name for path in masks])}"
        found.left_out.append(LeftOut("", f"{what}. Rename those that are scans.", tuple(masks)))
    if others:
        reason = f"{len(others)} files are not scans: {some([path.name for path in others])}"
        found.left_out.append(LeftOut("", reason, tuple(others)))
    for key in sorted(dicom):
        _take_dicom(key, dicom[key], damaged.get(key), found, weighting, burned_in)
    _name_patients(found, paths, patients_by, everyone)
    keys: dict[str, Series] = {}
    for one in found.series:
        if (other := keys.setdefault(one.key, one)) is not one:
            raise SpinejaxError(
                f"{one.files[0]} and {other.files[0]}: both are called {one.key!r}, so masks and labels cannot tell "
                "them apart. Rename one, or process them in separate runs."
            )
    return found


def _name_patients(found: Found, paths: Sequence[Path], patients_by: str, everyone: bool) -> None:
    """Give each series its patient and key; a volume file is then called by its key in messages, too."""
    others = [one for one in (*found.left_out, *found.failed) if one.series] if everyone else []
    series = [*found.series, *(one.series for one in others if one.series)]
    known = [one.evidence or Evidence(path=one.files[0]) for one in series]
    people = tell_apart(known, paths, patients_by)
    for place, (one, patient, key) in enumerate(zip(series, people.patients, people.keys, strict=True)):
        name = one.name if known[place].uid else key + suffix_of(one.files[0])
        series[place] = replace(one, name=name, key=key, patient=patient)
    of_others = dict(zip(map(id, others), series[len(found.series) :], strict=True))
    found.series = series[: len(found.series)]
    for listed in (found.left_out, found.failed):
        listed[:] = [replace(one, series=of_others.get(id(one), one.series)) for one in listed]
    found.series = with_aliases(found.series)
    found.patient_notes, found.contradictions = people.notes, people.contradictions


def with_aliases(series: Sequence[Series]) -> list[Series]:
    """Some scans, of which the only parts of DICOM series that are read have the SeriesInstanceUID as an alias."""
    uids = [one.key.partition("/")[0] if one.evidence and one.evidence.uid else "" for one in series]
    parts = Counter(uids)
    aliases = [uid if uid != one.key and parts[uid] == 1 else "" for one, uid in zip(series, uids, strict=True)]
    return [replace(one, alias=alias) for one, alias in zip(series, aliases, strict=True)]


def _take_volume(path: Path, found: Found, weighting: str) -> None:
    own = weighting_in_text(stem_of(path))
    facts, read = Facts(contrast=own or ""), partial(read_volume, path)
    series = Series(path.name, "", "", files_of(path), read, facts, Evidence(path=path))
    if weighting == "any" or own in (None, weighting):
        found.series.append(series)
    else:
        reason = f"{own} by its name, {weighting} was asked for"
        found.left_out.append(LeftOut(path.name, reason, series.files, facts, series))


def _take_dicom(
    key: str, files: list[DicomFile], damaged: Path | None, found: Found, weighting: str, burned: bool
) -> None:
    """Record the parts of one DICOM series as scans, left out or failed. `damaged` is a file that cannot be read."""
    name = _dicom_name(files[0].path, key)
    others = tuple(file for file in files if file.not_a_scan)
    whole = _facts(files[0], [frame for file in files for frame in file.frames] or len(files))
    try:
        if reasons := sorted({file.not_a_scan for file in others}):
            if reasons == [NO_PLACE] and len(others) == len(files):
                raise SpinejaxError(f"{name}: {NO_PLACE} in any of its {len(files)} files. Export it again with it.")
            which = some([file.path.name for file in others])
            reason = f"{len(others)} of {len(files)} files: {', '.join(reasons)} ({which})"
            found.left_out.append(
                LeftOut(name, reason, tuple(file.path for file in others), _facts(others[0], len(others)))
            )
        if len(others) == len(files):
            return
        images, notes = without_copies([file for file in files if not file.not_a_scan], name)
        parts, more = parts_of([frame for file in images for frame in file.frames], name)
        names = [_dicom_name(part.frames[0].path, key + part.suffix) for part in parts]
        judged = judge(parts, name, names, weighting)
        if any(not one.left_out for one in judged):
            _refuse_whole(key, images, damaged, name, burned)
    except SpinejaxError as error:
        found.failed.append(LeftOut(name, str(error), tuple(file.path for file in files), whole))
        return
    total, declared = sum(len(part.frames) for part in parts), max(file.declared for file in images)
    if declared > total:
        more.append(f"{name}: {total} of the {declared} images that it declares. Is an end slice missing?")
    more += [
        f"{name}: {file.placeless} of the {len(file.frames) + file.placeless} frames of {file.path.name} have "
        "no position in the patient, and were left out"
        for file in images
        if file.placeless
    ]
    for part, own, one in zip(parts, names, judged, strict=True):
        facts = replace(_facts(files[0], part.frames), contrast=str(part.contrast))
        paths = tuple(dict.fromkeys(frame.path for frame in part.frames))
        read = partial(read_series, part.frames, own, np.float32, (*notes, *more, *one.notes))
        evidence = _evidence(key + part.suffix, files)
        look = partial(middle_slice, part.frames)
        series = Series(own, key + part.suffix, "", paths, read, facts, evidence, look=look)
        if one.left_out:
            found.left_out.append(LeftOut(own, one.left_out, paths, facts, series))
        elif one.failed:
            of_all = one.failed.startswith(f"{name}: ")
            found.failed.append(LeftOut(name if of_all else own, one.failed, paths, facts, series))
        else:
            found.series.append(series)


def _dicom_name(file: Path, key: str) -> str:
    return f"{canonical(file.parent.name or str(file.parent))}, series {key}"


def _refuse_whole(key: str, images: list[DicomFile], damaged: Path | None, name: str, burned: bool) -> None:
    """Raises SpinejaxError if a series with a scan in it cannot be used, whatever its parts are."""
    patients = {alike(file.patient): file.patient for file in images if file.patient}
    if not key:
        raise SpinejaxError(f"{name}: no SeriesInstanceUID, which tells series apart. Export it again.")
    if len(patients) > 1:
        ids = some(sorted(patients.values()))
        raise SpinejaxError(f"{name}: files of {len(patients)} patients ({ids}), expected one. Export it again.")
    if any(file.burned_in for file in images) and not burned:
        raise SpinejaxError(
            f"{name}: BurnedInAnnotation is YES, so names may be in its pixels. Look at them; `data_prep scans "
            "--burned-in` reads them."
        )
    if damaged:
        raise SpinejaxError(f"{name}: {damaged.name} of it cannot be read. Copy it again, or leave the series out.")


def _facts(file: DicomFile, frames: Sequence[Frame] | int) -> Facts:
    """The facts of some images of a series, or of so many that have no place. The plane is that of most."""
    facts = Facts(description=file.description, date=file.date, time=file.time)
    if isinstance(frames, int):
        return replace(facts, num_slices=frames)
    plane = PLANES[int(np.argmax(np.median([abs(frame.normal) for frame in frames], axis=0)))]
    rows, columns = frames[0].spacing_mm.tolist()
    spacing_mm = (rows, columns, step_mm(frames))
    return replace(facts, plane=plane, num_slices=len(frames), spacing_mm=spacing_mm)


def _evidence(key: str, files: Sequence[DicomFile]) -> Evidence:
    """What the files of one series, called `key`, say of its patient."""
    first = files[0]
    return Evidence(
        path=first.path,
        folders=tuple(sorted({file.path.parent for file in files})),
        uid=key,
        patient_id=next((file.patient for file in files if file.patient), ""),
        patient_name=first.patient_name,
        birth_date=first.birth_date,
        study=first.study,
    )
