"""Who the patient of each series is, looked at over all series together.

PatientID, PatientName, StudyInstanceUID, file names and the tree can each be missing, be the same for everybody, or
contradict each other. Two faults are never made without a word: one patient taken for two, who could then be in two
splits, and two patients taken for one.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.read.csv_tables import some
from data_prep.read.patient_folders import (
    NO_PERSONS_FILE,
    NO_PERSONS_FOLDER,
    Level,
    Tree,
    parts_of,
    shortest_suffixes,
    without_image_words,
)
from data_prep.read.patient_tags import Evidence, Tags, alike, by_tags, grouped, says_nothing
from data_prep.read.volume_files import stem_of
from spinejax.errors import SpinejaxError


@dataclass
class People:
    """The patient and the key of each series, in order."""

    patients: list[str]
    keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was assumed
    contradictions: list[str] = field(default_factory=list)  # what must be settled before patients are split

    def take(self, level: Level) -> None:
        """Take the patients of a level of folders."""
        for place, patient in level.patients.items():
            self.patients[place] = patient
        self.notes += level.notes
        self.contradictions += level.contradictions


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
    people, tree = People([""] * len(evidence)), Tree(evidence, paths)
    dicom = [place for place, one in enumerate(evidence) if one.uid]
    volumes = [place for place, one in enumerate(evidence) if not one.uid]
    if kind == "folder":
        level = tree.patients(dicom + volumes, by_tags(evidence, dicom), number)
        people.take(level)
        if len(evidence) > 1 and len(set(people.patients)) == 1:
            people.notes.append(
                f"{len(evidence)} scans are all of patient {people.patients[0]!r}, by their folder. Give --patients-by "
                "auto if they are of several."
            )
        people.keys = [one.uid or tree.name_below(place, level) for place, one in enumerate(evidence)]
        return people
    tags = by_tags(evidence, dicom)
    if kind == "auto":
        people.notes += tags.notes
        people.contradictions += tags.contradictions
        _use_tags(people, evidence, dicom, tags, tree)
    elif kind == "study":
        _use_studies(people, evidence, dicom, tags)
    else:
        people.notes += tags.contradictions
        _use_patient_ids(people, evidence, dicom)
    _use_file_names(people, evidence, volumes, dicom, tree, number if kind == "name" else None)
    stems = [(*parts_of(one.path.parent), one.uid or stem_of(one.path)) for one in evidence]
    people.keys = [one.uid or key for one, key in zip(evidence, shortest_suffixes(stems), strict=True)]
    return people


def _use_tags(people: People, evidence: Sequence[Evidence], dicom: Sequence[int], tags: Tags, tree: Tree) -> None:
    """By PatientID, and where it says nothing by PatientName, by study, or by the tree."""
    told: dict[str, list[int]] = defaultdict(list)
    with_id = {tags.patient[place] for place in dicom if not says_nothing(evidence[place].patient_id)}
    for place in dicom:
        one, patient = evidence[place], tags.patient.get(place)
        people.patients[place] = patient or one.study
        if says_nothing(one.patient_id):
            way = "StudyInstanceUID" if one.study else "folder"
            told["study or name, as others," if patient in with_id else "PatientName" if patient else way].append(place)
    for way, places in told.items():
        level = tree.patients(places, Tags())
        if way == "folder":
            people.take(level)
        written = some(sorted({repr(evidence[place].patient_id) for place in places}))
        count, in_folders = len({people.patients[place] for place in places}), len(set(level.patients.values()))
        doubt = "Give --patients-by folder or study if names are not reliable."
        if way in ("StudyInstanceUID", "folder"):
            doubt = (
                "A person with two of these is taken for two: give --patients-by folder if each person has a folder."
            )
        if way in ("StudyInstanceUID", "folder") and count == 1 < len(places):
            doubt = "Give --patients-by folder:1 if they are of several, each with a folder."
        if way == "StudyInstanceUID" and not level.contradictions and in_folders not in (1, count):
            doubt += f" By their folders they would be of {in_folders}."
        people.notes.append(
            f"{len(places)} series have no PatientID that tells patients apart ({written}). By their {way} they are of "
            f"{count} people. {doubt}"
        )
    studies = {evidence[place].study for place in dicom}
    patients = {people.patients[place] for place in dicom}
    if len(patients) == 1 and len(studies) > 1:
        people.notes.append(
            f"{len(dicom)} series of {len(studies)} studies are all of patient {patients.pop()!r}. Give --patients-by "
            "study or folder if they are of several."
        )
        return
    for patient, places in grouped(dicom, people.patients.__getitem__).items():
        if patient not in with_id or re.search(r"\d", patient):  # else it may be a word for a whole study's people
            continue
        folders = tree.tops_of_persons(places)
        if len(folders) > 1 and len({evidence[place].study for place in places}) > 1:
            people.notes.append(
                f"Patient {patient!r} has studies in the folders {some(folders)}. Give --patients-by folder or study "
                "if they are of several people."
            )


def _use_studies(people: People, evidence: Sequence[Evidence], dicom: Sequence[int], tags: Tags) -> None:
    for place in dicom:
        people.patients[place] = evidence[place].study
    if without := [evidence[place].path for place in dicom if not evidence[place].study]:
        people.contradictions.append(
            f"--patients-by study: {len(without)} series have no StudyInstanceUID, among them that of {without[0]}. "
            "Give --patients-by folder."
        )
    owners = grouped(tags.patient, tags.patient.__getitem__)
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
    people: People,
    evidence: Sequence[Evidence],
    volumes: Sequence[int],
    dicom: Sequence[int],
    tree: Tree,
    num_parts: int | None,
) -> None:
    """By the first part of the file's name, or the first `num_parts`; None: by the tree where that says nothing."""
    for place in volumes:
        parts = re.split(r"[_.]", stem_of(evidence[place].path))[: num_parts or 1]
        people.patients[place] = "_".join(parts)
    by_tree = False
    if num_parts is None:
        of_nobody = {place for place in volumes if NO_PERSONS_FILE.fullmatch(people.patients[place] or "image")}
        by_tree = len({evidence[place].path.parent for place in of_nobody}) > 1
        if by_tree:
            people.take(tree.patients(sorted(of_nobody), Tags()))
        else:
            _note_shared_words(people, sorted(of_nobody))
        named = [place for place in volumes if place not in of_nobody]
        _join_alike(people, named, dicom)
        _doubt_namesakes(people, evidence, named)
        _note_numbered(people, evidence, named)
    patients = {people.patients[place] for place in volumes}
    if len(volumes) > 1 and len(patients) == 1 and not by_tree:  # or files are named after the study
        people.notes.append(
            f"{len(volumes)} scans are all of patient {patients.pop()!r}, by the part of their names before the first "
            "_ or .: give --patients-by folder, or name:2, which takes one part more, if they are of several."
        )


def _note_numbered(people: People, evidence: Sequence[Evidence], places: Sequence[int]) -> None:
    """Where a patient's name is followed by numbers, as in `SITE_001`, they may be the patients, and it their group."""
    numbered = []
    for patient, same in grouped(places, people.patients.__getitem__).items():
        stems = [stem_of(evidence[place].path) for place in same]
        rest = [stem.removeprefix(patient)[1:] for stem in stems if re.match(rf"{re.escape(patient)}[_.]", stem)]
        parts = {re.split(r"[_.]", words)[0] for words in rest}
        counted = all(re.fullmatch(r"[a-z]*\d+", part, re.IGNORECASE) for part in parts)
        if len(parts) > 1 and counted and not any(NO_PERSONS_FOLDER.fullmatch(part) for part in parts):
            numbered.append(f"{len(same)} of {patient!r}")
    if numbered and len({*people.patients}) > 1:  # else it is said below
        people.notes.append(
            f"Scans whose names go on with different numbers are taken for one person's: {some(numbered)}. Give "
            "--patients-by name:2, which takes one part of the name more, if they are of several."
        )


def _note_shared_words(people: People, places: Sequence[int]) -> None:
    words = grouped(places, lambda place: people.patients[place])
    shared = [f"{len(same)} of {word!r}" for word, same in words.items() if len(same) > 1]
    if shared and len({*people.patients}) > 1:  # else it is said below
        people.notes.append(
            f"Scans that begin alike, with no patient's name, are taken for one person's: {some(shared)}. Give "
            "--patients-by name:2, which takes one part of the name more."
        )


def _join_alike(people: People, places: Sequence[int], dicom: Sequence[int]) -> None:
    """Take files for one person's if the patient's name differs in spelling, or in a word on the image (`P1-T2`)."""
    known = {alike(people.patients[place]): people.patients[place] for place in dicom}
    for form, same in grouped(places, lambda place: alike(without_image_words(people.patients[place]))).items():
        spelt = sorted({people.patients[place] for place in same})
        one = known.get(form) or min(map(without_image_words, spelt))
        if len(spelt) == 1 and one != known.get(form):
            continue
        for place in same:
            people.patients[place] = one
        if spelt != [one]:
            people.notes.append(
                f"Files of {some(spelt)} are taken for one person's, {one!r}. Give --patients-by name if they are "
                "several people's."
            )


def _doubt_namesakes(people: People, evidence: Sequence[Evidence], places: Sequence[int]) -> None:
    """Files of one patient in several folders may be of several people."""
    spread, doubtful = [], []
    for patient, of_one in grouped(places, lambda place: people.patients[place]).items():
        folders = sorted({parts_of(evidence[place].path.parent) for place in of_one})
        shared = len(Path(os.path.commonpath([os.path.join(*parts) for parts in folders])).parts)
        below = {part for parts in folders for part in parts[shared:]}
        inside = all(patient in parts for parts in folders)
        if len(folders) == 1 or inside or all(NO_PERSONS_FOLDER.fullmatch(part) for part in below):
            continue
        stems = [stem_of(evidence[place].path) for place in of_one]
        where = f" ({', '.join('/'.join(parts[shared:]) or parts[-1] for parts in folders[:5])})"
        if len(set(stems)) < len(stems):
            doubtful.append(max(stems, key=stems.count) + where)
        else:
            spread.append(patient + where)
    if doubtful:
        people.contradictions.append(
            f"Files of one name are in several folders: {some(doubtful, 3)}. Are they of one person, or of several? "
            "Give --patients-by name if a name is one person, --patients-by folder if a folder is. Otherwise make a "
            "data set of each folder."
        )
    if spread:
        people.notes.append(
            f"{len(spread)} patients have files in several folders, by their names: {some(spread, 3)}. Give "
            "--patients-by folder if a folder is one person."
        )
