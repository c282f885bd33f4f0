"""Who the patient of each series is, looked at over all series together.

PatientID, PatientName, StudyInstanceUID, file names and the tree can each be missing, be the same for everybody, or
contradict each other. Two faults are never made without a word: one patient taken for two, who could then be in two
splits, and two patients taken for one.
"""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data_prep.read.csv_tables import some
from data_prep.read.names import canonical
from data_prep.read.volume_files import stem_of
from spinejax.errors import SpinejaxError

T = TypeVar("T", bound=Hashable)

# What anonymisers write in place of an identifier.
_PLACEHOLDER = re.compile(
    r"[\W_0]*|x+|an[oó]n\w*([\W_]*(patient|name|id|user|subject))?|(un|not)[\W_]*known|none|null|nil|nan|n[\W_]*a"
    r"|no[\W_]*(id|name)|(de[\W_]*id\w*|removed|deleted|hidden|redacted|empty|patient|name|id|test)([\W_]*patient)?",
    re.IGNORECASE,
)
# Names of files and folders that say what an image is or when it was made, and not whose it is.
_WORDS = (
    "t1w?|t2w?|stir|pdw?|flair|dixon|space|tse|fse|gre|fs|fatsat|water|fat|sag(ittal)?|ax(ial)?|tra|cor(onal)?|mri?|ct"
    "|dicom|dcm|nifti|nii|mha|images?(t[rs])?|imgs?|scans?|vol(ume)?s?|anat|raw|data|derivatives|export|files?|original"
    "|l?spine|lumbar|ls|lws|pre|post|baseline|follow|up"
)
_COUNTED = "ser(ies)?|se|stud(y|ies)|stu?|ses(sion)?|visit|tp|timepoint|run|acq|image|img|im|scan|vol(ume)?"
_NO_PERSONS_FOLDER = re.compile(rf"((({_WORDS})|({_COUNTED})[\W_]?\d*)([\W_]+|$))+", re.IGNORECASE)
_NO_PERSONS_FILE = re.compile(rf"({_WORDS}|{_COUNTED})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a series says of its patient; a field is empty where nothing is known."""

    path: Path  # its first file
    folders: tuple[Path, ...] = ()  # of all its files
    uid: str = ""  # the key of a DICOM series, which has its SeriesInstanceUID; empty for a volume file
    patient_id: str = ""
    patient_name: str = ""
    birth_date: str = ""
    study: str = ""  # StudyInstanceUID


@dataclass
class People:
    """The patient and the key of each series, in order."""

    patients: list[str]
    keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was assumed
    contradictions: list[str] = field(default_factory=list)  # what must be settled before patients are split


def tell_apart(evidence: Sequence[Evidence], paths: Sequence[Path], by: str) -> People:
    """Find each series' patient and key.

    A volume file's key is its name without the suffix, after as many of its folders' names as it takes to tell it from
    all others; or, if folders are patients, its path from the patient's folder on.

    Args:
        evidence: what each series says.
        paths: files and folders that were searched. Levels of folders are counted below the folder that holds them all.
        by: "auto": by PatientID; where it says nothing, by PatientName, by study, or by the tree, with a note. Volume
            files by the part of their name before the first "_" or "."; where that says nothing, by the tree.
            "name": by PatientID, or by that part of the name, whatever they say; "name:2": by the first two parts.
            "folder": by the one level of folders that agrees with all else; "folder:1": by the first level.
            "study": by StudyInstanceUID; volume files as with "auto".

    Raises:
        SpinejaxError: `by` is none of these.
    """
    match = re.fullmatch(r"(auto|study)|(name|folder)(?::([1-9]))?", by)
    if not match:
        raise SpinejaxError(f"--patients-by {by}: expected auto, name, name:2, folder, folder:1, folder:2 or study.")
    kind, number = match[1] or match[2], int(match[3] or 0)
    people, tree = People([""] * len(evidence)), _Tree(evidence, paths)
    dicom = [place for place, one in enumerate(evidence) if one.uid]
    volumes = [place for place, one in enumerate(evidence) if not one.uid]
    if kind == "folder":
        level = tree.use_level(people, dicom + volumes, _by_tags(evidence, dicom), number)
        people.keys = [one.uid or tree.path_below(place, level, people) for place, one in enumerate(evidence)]
        return people
    tags = _by_tags(evidence, dicom)
    if kind == "auto":
        people.notes += tags.notes
        people.contradictions += tags.contradictions
        _use_tags(people, evidence, dicom, tags, tree)
    elif kind == "study":
        _use_studies(people, evidence, dicom, tags)
    else:
        people.notes += tags.contradictions
        _use_patient_ids(people, evidence, dicom)
    _use_file_names(people, evidence, volumes, tree, number if kind == "name" else None)
    stems = [(*_parts(one.path.parent), one.uid or stem_of(one.path)) for one in evidence]
    people.keys = [one.uid or key for one, key in zip(evidence, shortest_suffixes(stems), strict=True)]
    return people


def alike(name: str) -> str:
    """What is left of an identifier without case, accents, blanks and leading zeros: `P 007` and `p7` are alike."""
    plain = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", name).casefold())
    return re.sub(r"\s", "", re.sub(r"(?<!\d)0+(?=\d)", "", plain))


def shortest_suffixes(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each path, or as many of its last parts as tell it from other paths that end alike."""
    found = [""] * len(paths)
    for places in _grouped(range(len(paths)), lambda place: paths[place][-1]).values():
        longest = max(len(paths[place]) for place in places)
        different = len({paths[place] for place in places})
        length = next(n for n in range(1, longest + 1) if len({paths[p][-n:] for p in places}) == different)
        for place in places:
            found[place] = "/".join(paths[place][-length:])
    return found


def _parts(folder: Path) -> tuple[str, ...]:
    return tuple(map(canonical, Path(os.path.abspath(folder)).parts))


def _grouped(values, key: Callable[..., T]) -> dict[T, list]:
    groups = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return dict(groups)


def _says_nothing(identifier: str) -> bool:
    return bool(_PLACEHOLDER.fullmatch(identifier))


# DICOM tags ----------------------------------------------------------------------------------------------------------


@dataclass
class _Tags:
    """Who DICOM series are of by PatientID and PatientName: place → patient; a place is missing where they are silent.

    `contradictory` are those patients who may be two people.
    """

    patient: dict[int, str] = field(default_factory=dict)
    contradictory: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def _by_tags(evidence: Sequence[Evidence], dicom: Sequence[int]) -> _Tags:
    tags = _Tags()
    with_id = [place for place in dicom if not _says_nothing(evidence[place].patient_id)]
    people = {place: _Person.of(evidence[place]) for place in dicom}
    for places in _grouped(with_id, lambda place: alike(evidence[place].patient_id)).values():
        spelt = sorted({evidence[place].patient_id for place in places})
        doubt = _two_people({people[place] for place in places})
        for place in places:
            tags.patient[place] = evidence[place].patient_id if doubt else spelt[0]
        if len(spelt) > 1 and doubt:
            tags.notes.append(f"PatientIDs {some(spelt)} are alike, but {doubt}: they are taken for several people.")
        elif len(spelt) > 1:
            tags.notes.append(
                f"PatientIDs {some(spelt)} are taken for one person, {spelt[0]!r}. Give --patients-by name if they are "
                "several people."
            )
    for patient, places in _grouped(tags.patient, tags.patient.__getitem__).items():
        if doubt := _two_people({people[place] for place in places}):
            tags.contradictory.add(patient)
            tags.contradictions.append(
                f"PatientID {patient!r}: {doubt}. Give --patients-by name if it is one person; --patients-by study, or "
                "--patients-by folder, if the PatientID is wrong."
            )
    studies = _grouped((place for place in dicom if evidence[place].study), lambda place: evidence[place].study)
    for study, places in studies.items():
        found = sorted({tags.patient[place] for place in places if place in tags.patient})
        if len(found) > 1:
            tags.contradictions.append(
                f"StudyInstanceUID {study} has the PatientIDs {some(found)}. Give --patients-by study if each study is "
                "one person, --patients-by name if each PatientID is."
            )
        for place in places if len(found) == 1 else ():
            tags.patient.setdefault(place, found[0])
    _add_names(tags, evidence, [place for place in dicom if place not in tags.patient], people)
    return tags


def _add_names(tags: _Tags, evidence: Sequence[Evidence], places: Sequence[int], people: dict[int, "_Person"]) -> None:
    """Where there is no PatientID, a patient's name and date of birth stand for it."""
    known = _grouped(tags.patient, lambda place: people[place].name)
    for name, namesakes in _grouped(places, lambda place: people[place].name).items():
        if not name:
            continue
        births = {people[place].birth for place in (*namesakes, *known.get(name, ()))} - {""}
        for place in namesakes:
            one, birth = evidence[place], people[place].birth
            same = [other for other in known.get(name, ()) if len(births) < 2 or people[other].birth == birth]
            patients = {tags.patient[other] for other in same}
            stand_in = one.patient_name + (f" {one.birth_date}" if len(births) > 1 else "")
            tags.patient[place] = patients.pop() if len(patients) == 1 else stand_in


@dataclass(frozen=True)
class _Person:
    """A patient's name as its parts in any order, and date of birth; empty where unknown."""

    name: frozenset[str]
    birth: str

    @classmethod
    def of(cls, one: Evidence) -> "_Person":
        parts = frozenset(filter(None, map(alike, re.split(r"[\W_]+", one.patient_name))))
        unknown = _PLACEHOLDER.fullmatch(one.patient_name) or alike(one.patient_name) == alike(one.patient_id)
        birth = re.sub(r"\D", "", one.birth_date)
        return cls(frozenset() if unknown else parts, "" if birth[:4] in ("1900", "0001", "1800") else birth)


def _two_people(people: set[_Person]) -> str:
    """Why these can hardly be one person, in a few words; empty if they can."""
    for a, b in itertools.combinations(people, 2):
        births = {a.birth, b.birth} - {""}
        same_birth = len(births) == 1 and a.birth == b.birth
        if a.name and b.name and a.name != b.name and not same_birth and (len(births) == 2 or not a.name & b.name):
            return "two names and two dates of birth" if len(births) == 2 else "two names with no part in common"
    return ""


def _use_tags(people: People, evidence: Sequence[Evidence], dicom: Sequence[int], tags: _Tags, tree: "_Tree") -> None:
    """By PatientID, and where it says nothing by PatientName, by study, or by the tree."""
    told: dict[str, list[int]] = defaultdict(list)
    for place in dicom:
        one = evidence[place]
        people.patients[place] = tags.patient.get(place) or one.study
        if _says_nothing(one.patient_id):
            way = "PatientName" if place in tags.patient else "StudyInstanceUID" if one.study else "folder"
            told[way].append(place)
    for way, places in told.items():
        if way == "folder":
            tree.use_level(people, places, _Tags(), 0)
        written = some(sorted({repr(evidence[place].patient_id) for place in places}))
        count = len({people.patients[place] for place in places})
        if way == "PatientName":
            doubt = "Give --patients-by folder or study if names are not reliable"
        else:
            doubt = (
                "One with two studies is taken for two: then give --patients-by folder, with a folder for each person"
            )
        people.notes.append(
            f"{len(places)} series have no PatientID that tells patients apart ({written}). By their {way} they are of "
            f"{count} people. {doubt}."
        )
    studies = {evidence[place].study for place in dicom}
    patients = {people.patients[place] for place in dicom}
    if len(patients) == 1 and len(studies) > 1:
        people.notes.append(
            f"{len(dicom)} series of {len(studies)} studies are all of patient {patients.pop()!r}. Give --patients-by "
            "study or folder if they are of several."
        )


def _use_studies(people: People, evidence: Sequence[Evidence], dicom: Sequence[int], tags: _Tags) -> None:
    for place in dicom:
        people.patients[place] = evidence[place].study
    if without := [evidence[place].path for place in dicom if not evidence[place].study]:
        people.contradictions.append(
            f"--patients-by study: {len(without)} series have no StudyInstanceUID, among them that of {without[0]}. "
            "Give --patients-by folder."
        )
    owners = _grouped(tags.patient, tags.patient.__getitem__)
    for patient, places in owners.items():
        studies = {evidence[place].study for place in places}
        if len(studies) > 1 and len(owners) > 1 and patient not in tags.contradictory:
            people.contradictions.append(
                f"--patients-by study: patient {patient!r} has {len(studies)} studies, and would be {len(studies)} "
                "people. Give --patients-by name, or leave out all studies but one."
            )


def _use_patient_ids(people: People, evidence: Sequence[Evidence], dicom: Sequence[int]) -> None:
    """By PatientID as it is."""
    for place in dicom:
        people.patients[place] = evidence[place].patient_id
    if without := [evidence[place].path for place in dicom if not evidence[place].patient_id]:
        people.contradictions.append(
            f"--patients-by name: {len(without)} series have an empty PatientID, among them that of {without[0]}. Give "
            "--patients-by auto, study or folder."
        )


# Names of volume files -----------------------------------------------------------------------------------------------


def _use_file_names(
    people: People, evidence: Sequence[Evidence], volumes: Sequence[int], tree: "_Tree", num_parts: int | None
) -> None:
    """By the first part of the file's name, or the first `num_parts`; None: by the tree where that says nothing."""
    for place in volumes:
        parts = re.split(r"[_.]", stem_of(evidence[place].path))[: num_parts or 1]
        people.patients[place] = "_".join(parts)
    patients = {people.patients[place] for place in volumes}
    if num_parts is None:
        of_nobody = [place for place in volumes if _NO_PERSONS_FILE.fullmatch(people.patients[place] or "image")]
        if len({evidence[place].path.parent for place in of_nobody}) > 1:
            tree.use_level(people, of_nobody, _Tags(), 0)
        named = [place for place in volumes if place not in set(of_nobody)]
        _join_alike(people, named)
        _doubt_namesakes(people, evidence, named)
        patients = {people.patients[place] for place in volumes}
    if len(volumes) > 1 and len(patients) == 1:  # or files are named after the study
        people.notes.append(
            f"{len(volumes)} scans are all of patient {patients.pop()!r}, by the part of their names before the first "
            "_ or .: give --patients-by folder, or name:2, which takes one part more, if they are of several."
        )


def _join_alike(people: People, places: Sequence[int]) -> None:
    for same in _grouped(places, lambda place: alike(people.patients[place])).values():
        spelt = sorted({people.patients[place] for place in same})
        for place in same:
            people.patients[place] = spelt[0]
        if len(spelt) > 1:
            people.notes.append(
                f"Files of {some(spelt)} are taken for one person's, {spelt[0]!r}. Give --patients-by name if they are "
                "several people's."
            )


def _doubt_namesakes(people: People, evidence: Sequence[Evidence], places: Sequence[int]) -> None:
    """Files of one patient in several folders may be of several people."""
    spread = []
    for patient, of_one in _grouped(places, lambda place: people.patients[place]).items():
        folders = sorted({_parts(evidence[place].path.parent) for place in of_one})
        shared = len(Path(os.path.commonpath([os.path.join(*parts) for parts in folders])).parts)
        below = {part for parts in folders for part in parts[shared:]}
        inside = all(patient in parts for parts in folders)
        if len(folders) == 1 or inside or all(_NO_PERSONS_FOLDER.fullmatch(part) for part in below):
            continue
        names = ", ".join("/".join(parts[shared:]) or parts[-1] for parts in folders[:5])
        stems = [stem_of(evidence[place].path) for place in of_one]
        if len(set(stems)) < len(stems):
            people.contradictions.append(
                f"{stems[0]!r} is in {len(folders)} folders ({names}): the scans of one person, or of several? Give "
                "--patients-by name if one person has a name, --patients-by folder if one person has a folder."
            )
        else:
            spread.append(f"{patient} ({names})")
    if spread:
        people.notes.append(
            f"{len(spread)} patients have files in several folders, by their names: {some(spread)}. Give --patients-by "
            "folder if each folder is one person's."
        )


# Folders -------------------------------------------------------------------------------------------------------------


class _Tree:
    """The folders of all series, counted from the one that holds them all."""

    def __init__(self, evidence: Sequence[Evidence], paths: Sequence[Path]):
        tops = [os.path.abspath(path if path.is_dir() else path.parent) for path in paths]
        self._root = Path(os.path.commonpath(tops)) if tops else Path()
        self._root_parts = _parts(self._root)
        self._evidence = evidence

    def _folders(self, place: int) -> set[tuple[str, ...]]:
        one = self._evidence[place]
        return {_parts(folder)[len(self._root_parts) :] for folder in one.folders or (one.path.parent,)}

    def use_level(self, people: People, places: Sequence[int], tags: _Tags, number: int) -> int:
        """Take each folder of one level for a patient: level `number`, or for 0 the one that contradicts nothing.

        Returns:
            The level.
        """
        deepest = min((len(folder) for place in places for folder in self._folders(place)), default=0)
        if number > deepest:
            shallow = next(p for p in places if any(len(folder) < number for folder in self._folders(p)))
            people.contradictions.append(
                f"--patients-by folder:{number}: {self._evidence[shallow].path} lies in no folder of level {number} "
                f"below {self._root}. Put it into one, or name a lower level."
            )
        faults = {level: self._faults(places, level, tags) for level in range(1, deepest + 1)}
        level = min(number, deepest) if number else self._choose(people, places, faults)
        if number and number in faults:
            torn, merged, doubtful = faults[number]
            people.contradictions += [f"--patients-by folder:{number}: {fault}" for fault in torn]
            people.notes += [f"--patients-by folder:{number}: {fault}" for fault in merged + doubtful]
        owners = [min(self._at(place, level)) for place in places]
        full = [(*self._root_parts, *owner) for owner in owners]
        for place, patient in zip(places, shortest_suffixes(full), strict=True):
            people.patients[place] = patient
        return level

    def path_below(self, place: int, level: int, people: People) -> str:
        """The name of a patient's file: the patient, and its path from the patient's folder on without the suffix."""
        path = self._evidence[place].path
        below = _parts(path.parent)[len(self._root_parts) + level :]
        return "/".join((people.patients[place], *below, stem_of(path)))

    def _at(self, place: int, level: int) -> set[tuple[str, ...]]:
        return {folder[:level] for folder in self._folders(place)}

    def _faults(self, places: Sequence[int], level: int, tags: _Tags) -> tuple[list[str], list[str], list[str]]:
        """What a level would tear apart, what it would merge, and what it may tear apart, if folders are patients."""
        torn: list[str] = []
        merged: list[str] = []
        doubtful: list[str] = []
        patients = {place: name for place, name in tags.patient.items() if name not in tags.contradictory}
        studies = {place: self._evidence[place].study for place in places if self._evidence[place].study}
        for what, names in (("patient", patients), ("StudyInstanceUID", studies)):
            groups = _grouped(names, names.__getitem__)
            for name, of_one in groups.items():
                folders = sorted({"/".join(folder) for place in of_one for folder in self._at(place, level)})
                if len(folders) > 1:
                    everybody = len(groups) == 1 and len(of_one) == len(places)
                    (doubtful if everybody else torn).append(f"{what} {name!r} is in the folders {some(folders)}.")
        for place in places:
            if len(self._at(place, level)) > 1:
                torn.append(f"one series is in several folders, with {self._evidence[place].path}.")
        by_folder = _grouped(patients, lambda place: min(self._at(place, level)))
        for folder, of_one in by_folder.items():
            if len(held := sorted({patients[place] for place in of_one})) > 1:
                merged.append(f"folder {'/'.join(folder)} holds the patients {some(held)}.")
        return torn, merged, doubtful

    def _choose(self, people: People, places: Sequence[int], faults: dict) -> int:
        """The only level that agrees with everything; a contradiction if there is none, or more than one."""
        possible: dict[tuple, int] = {}  # levels that divide the series alike are one
        for level, found in faults.items():
            if not any(found):
                owners = [min(self._at(place, level)) for place in places]
                numbered = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
                possible.setdefault(tuple(map(numbered.__getitem__, owners)), level)
        named = [level for level in possible.values() if not self._is_of_images(places, level)]
        levels = named or list(possible.values())
        if len(levels) > 1:
            examples = "; ".join(f"level {level} has {self._examples(places, level)}" for level in levels)
            people.contradictions.append(
                f"Which folders are patients' below {self._root}? {examples}. Give --patients-by folder:{levels[0]} or "
                f"folder:{levels[-1]}."
            )
        elif not faults and any(folder for place in places for folder in self._folders(place)):
            stray = next(place for place in places if () in self._folders(place))
            people.contradictions.append(
                f"{self._evidence[stray].path} lies beside the patients' folders. Put it into its patient's folder."
            )
        elif not levels and faults:
            reasons = " ".join(f"Level {level}: {next(itertools.chain(*found))}" for level, found in faults.items())
            people.contradictions.append(
                f"No level of folders below {self._root} can be the patients'. {reasons} Give --patients-by auto, "
                "or name the level, as --patients-by folder:1."
            )
        return levels[0] if levels else len(faults) and 1

    def _is_of_images(self, places: Sequence[int], level: int) -> bool:
        return all(_NO_PERSONS_FOLDER.fullmatch(folder[-1]) for place in places for folder in self._at(place, level))

    def _examples(self, places: Sequence[int], level: int) -> str:
        folders = sorted({"/".join(folder) for place in places for folder in self._at(place, level)})
        return f"{len(folders)} ({some(folders, 3)})"
