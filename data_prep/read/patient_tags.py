"""What the DICOM tags of a series say of its patient: PatientID, PatientName, PatientBirthDate, StudyInstanceUID."""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data_prep.read.csv_tables import some

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

# What anonymisers write in place of an identifier.
_PLACEHOLDER = re.compile(
    r"[\W_0]*|x+|an[oó]n[^\W\d_]*([\W_]*(patient|name|id|user|subject))?|(un|not)[\W_]*known|none|null|nil|nan|n[\W_]*a"
    r"|no[\W_]*(id|name)|(de[\W_]*id[^\W\d_]*|removed|deleted|hidden|redacted|empty|patient|name|id|test"
    r"|pseudonym[^\W\d_]*|dummy|private|confidential|subject)([\W_]*patient)?[\W_]*",
    re.IGNORECASE,
)


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


def alike(name: str) -> str:
    """What is left of an identifier without case, accents, blanks and leading zeros: `P 007` and `p7` are alike."""
    plain = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", name).casefold())
    return re.sub(r"\s", "", re.sub(r"(?<!\d)0+(?=\d)", "", plain))


def says_nothing(identifier: str) -> bool:
    """Whether an identifier is empty, or what anonymisers write."""
    return bool(_PLACEHOLDER.fullmatch(identifier.strip(" ^_-.")))


def grouped(values: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """The values for which `by` gives the same, in order."""
    groups: dict[K, list[T]] = defaultdict(list)
    for value in values:
        groups[by(value)].append(value)
    return dict(groups)


@dataclass
class Tags:
    """Who DICOM series are of by PatientID and PatientName: place → patient; a place is missing where they are silent.

    `contradictory` are those patients who may be two people.
    """

    patient: dict[int, str] = field(default_factory=dict)
    contradictory: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def by_tags(evidence: Sequence[Evidence], dicom: Sequence[int]) -> Tags:
    """Who the series at the places `dicom` are of, and what contradicts itself.

    A series without PatientID is of the patient of its study, or else of the one of the same name and birth.
    """
    tags = Tags()
    with_id = [place for place in dicom if not says_nothing(evidence[place].patient_id)]
    people = {place: _Person.of(evidence[place]) for place in dicom}
    for places in grouped(with_id, lambda place: alike(evidence[place].patient_id)).values():
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
    for patient, places in grouped(tags.patient, tags.patient.__getitem__).items():
        those = {people[place] for place in places}
        if doubt := _two_people(those):
            tags.contradictory.add(patient)
            tags.contradictions.append(
                f"PatientID {patient!r}: {doubt}. Give --patients-by name if it is one person; --patients-by study, or "
                "--patients-by folder, if the PatientID is wrong."
            )
        elif differ := _differences(those):
            tags.notes.append(f"PatientID {patient!r} is taken for one person, with two {differ}.")
    _note_two_ids(tags, people)
    studies = grouped((place for place in dicom if evidence[place].study), lambda place: evidence[place].study)
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


def _note_two_ids(tags: Tags, people: dict[int, "_Person"]) -> None:
    """One name under two PatientIDs may be one person, unless births differ or an anonymiser gave all the same."""
    groups = grouped((place for place in tags.patient if people[place].name), lambda place: people[place].name)
    for places in groups.values() if len({people[place] for place in tags.patient}) > 1 else ():
        for same in grouped(places, lambda place: people[place].birth).values():
            if len(ids := sorted({tags.patient[place] for place in same})) > 1:
                tags.notes.append(
                    f"PatientIDs {some(ids)} have one name, and no two dates of birth, and are taken for {len(ids)} "
                    "people. If they are one, name the patient in an `inventory`, and give it with --inventory."
                )


def _add_names(tags: Tags, evidence: Sequence[Evidence], places: Sequence[int], people: dict[int, "_Person"]) -> None:
    """Where there is no PatientID, a patient's name and date of birth stand for it."""
    known = grouped(tags.patient, lambda place: people[place].name)
    for name, namesakes in grouped(places, lambda place: people[place].name).items():
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
        unknown = says_nothing(one.patient_name) or alike(one.patient_name) == alike(one.patient_id)
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


def _differences(people: set[_Person]) -> str:
    """What one person has two of, though written in full: "names", "dates of birth" or ""."""
    names = [one.name for one in people if one.name]
    if any(not (a <= b or b <= a) for a, b in itertools.combinations(names, 2)):
        return "names"
    return "dates of birth" if len({one.birth for one in people} - {""}) > 1 else ""
