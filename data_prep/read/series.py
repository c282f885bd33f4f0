"""Which scans there are in files and folders, of whatever format, and what was left out and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_prep.read.contrast import weighting_in_text
from data_prep.read.csv_tables import some
from data_prep.read.dicom_headers import DamagedHeaderError, DicomFile
from data_prep.read.dicom_series import take_series
from data_prep.read.found import Facts, Found, LeftOut, Series
from data_prep.read.header_cache import Header, headers_of
from data_prep.read.patient_tags import Evidence
from data_prep.read.patients import tell_apart
from data_prep.read.tree import files_below
from data_prep.read.volume_files import files_of, is_mask, is_volume, read_volume, stem_of, suffix_of, whole_files
from spinejax.errors import SpinejaxError


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
        take_series(key, dicom[key], damaged.get(key), found, weighting, burned_in)
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


def doubt_again(found: Found, series: Sequence[Series], paths: Sequence[Path], patients_by: str) -> None:
    """Renew what is doubtful about patients after a choice: it may concern these series alone, which keep theirs."""
    found.patient_notes, found.contradictions = [], []
    if series:
        people = tell_apart([one.evidence or Evidence(path=one.files[0]) for one in series], paths, patients_by)
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
