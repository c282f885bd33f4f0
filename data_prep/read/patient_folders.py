"""Patients by the tree: at which level below the folder that holds everything each folder is one person's."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.read.csv_tables import some
from data_prep.read.names import canonical
from data_prep.read.patient_tags import Evidence, Tags, grouped
from data_prep.read.volume_files import stem_of

# Names of files and folders that say what an image is or when it was made, and not whose it is.
_WORDS = (
    "t1w?|t2w?|stir|pdw?|flair|dixon|space|tse|fse|gre|fs|fatsat|water|fat|sag(ittal)?|ax(ial)?|tra|cor(onal)?|mri?|ct"
    "|dicom|dcm|nifti|nii|mha|images?(t[rs])?|imgs?|scans?|vol(ume)?s?|anat|raw|data|derivatives|export|files?|original"
    "|l?spine|lumbar|ls|lws|pre|post|baseline|follow[-_ ]?up|follow|up"
)
_COUNTED = "ser(ies)?|se|stud(y|ies)|stu?|ses(sion)?|visit|tp|timepoint|run|acq|image|img|im|scan|vol(ume)?"
_DATE = r"(19|20)\d\d[\W_]?\d\d[\W_]?\d\d([\W_T]\d{4,6})?|\d\d-\d\d-(19|20)\d\d(-.*)?"  # the second as in TCIA
NO_PERSONS_FOLDER = re.compile(rf"(({_WORDS}|({_COUNTED})[\W_]?\d*|{_DATE})([\W_]+|$))+", re.IGNORECASE)
_IMAGES_FOLDER = re.compile(rf"(({_WORDS}|{_COUNTED})([\W_]+|$))+", re.IGNORECASE)  # without a number of its own
NO_PERSONS_FILE = re.compile(rf"{_WORDS}|{_COUNTED}|{_DATE}", re.IGNORECASE)
_TIME = r"(ses(sion)?|visit|tp|timepoint)[\W_]?\d*"
_IMAGE_WORDS_LAST = re.compile(rf"([-\s]+(({_WORDS})([-\s]\d)?|{_TIME}|{_DATE}|(19|20)\d\d))+$", re.IGNORECASE)


@dataclass
class Level:
    """A level of folders that are patients: its number, place → patient, and what was assumed or contradicts itself."""

    number: int = 0
    patients: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def shortest_suffixes(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each path, or as many of its last parts as tell it from other paths that end alike."""
    found = [""] * len(paths)
    for places in grouped(range(len(paths)), lambda place: paths[place][-1]).values():
        longest = max(len(paths[place]) for place in places)
        different = len({paths[place] for place in places})
        length = next(n for n in range(1, longest + 1) if len({paths[p][-n:] for p in places}) == different)
        for place in places:
            found[place] = "/".join(paths[place][-length:])
    return found


def without_image_words(name: str) -> str:
    """`P001` of `P001-T2`, `P001 STIR sag`, `P001-visit2` and `P001-20190101`; all of a name that is nothing else."""
    person = _IMAGE_WORDS_LAST.sub("", name)
    return name if NO_PERSONS_FILE.fullmatch(person) else person


def parts_of(folder: Path) -> tuple[str, ...]:
    """The names of a folder and of all that hold it."""
    return tuple(map(canonical, Path(os.path.abspath(folder)).parts))


class Tree:
    """The folders of all series, counted from the one that holds them all."""

    def __init__(self, evidence: Sequence[Evidence], paths: Sequence[Path]):
        tops = [os.path.abspath(path if path.is_dir() else path.parent) for path in paths]
        self._root = Path(os.path.commonpath(tops)) if tops else Path()
        self._root_parts = parts_of(self._root)
        self._evidence = evidence
        folders = [one.folders or (one.path.parent,) for one in evidence]
        self._folders = [{parts_of(folder)[len(self._root_parts) :] for folder in each} for each in folders]

    def patients(self, places: Sequence[int], tags: Tags, number: int = 0) -> "Level":
        """Take each folder of one level for a patient: level `number`, or for 0 the one that contradicts nothing.

        Args:
            places: of the series.
            tags: what the tags say of all series.
            number: the level, from 1 for the folders directly below the one that holds all.
        """
        chosen = Level()
        deepest = min((len(folder) for place in places for folder in self._folders[place]), default=0)
        if number > deepest:
            shallow = next(p for p in places if any(len(folder) < number for folder in self._folders[p]))
            chosen.contradictions.append(
                f"--patients-by folder:{number}: {self._evidence[shallow].path} lies in no folder of level {number} "
                f"below {self._root}. Put it into one, or name a lower level."
            )
        faults = {level: self._faults(places, level, tags) for level in range(1, deepest + 1)}
        chosen.number = level = min(number, deepest) if number else self._choose(chosen, places, faults)
        if number and number in faults:
            torn, merged, doubtful = faults[number]
            chosen.contradictions += [f"--patients-by folder:{number}: {fault}" for fault in torn]
            chosen.notes += [f"--patients-by folder:{number}: {fault}" for fault in merged + doubtful]
        owners = [min(self._at(place, level)) for place in places]
        full = [(*self._root_parts, *owner) for owner in owners]
        chosen.patients = dict(zip(places, shortest_suffixes(full), strict=True))
        return chosen

    def tops_of_persons(self, places: Sequence[int]) -> list[str]:
        """The folders directly below the one that holds all, but those that are called after images, dates or UIDs."""
        tops = {folder[0] for place in places for folder in self._folders[place] if folder}
        return sorted(top for top in tops if not (NO_PERSONS_FOLDER.fullmatch(top) or re.fullmatch(r"[\d.]+", top)))

    def name_below(self, place: int, chosen: "Level") -> str:
        """A file's path from its patient's folder on, without the suffix."""
        path = self._evidence[place].path
        below = parts_of(path.parent)[len(self._root_parts) + chosen.number :]
        return "/".join((chosen.patients[place], *below, stem_of(path)))

    def _at(self, place: int, level: int) -> set[tuple[str, ...]]:
        return {folder[:level] for folder in self._folders[place]}

    def _faults(self, places: Sequence[int], level: int, tags: Tags) -> tuple[list[str], list[str], list[str]]:
        """What a level would tear apart, what it would merge, and what it may tear apart, if folders are patients."""
        torn: list[str] = []
        merged: list[str] = []
        doubtful: list[str] = []
        patients = {place: name for place, name in tags.patient.items() if name not in tags.contradictory}
        studies = {place: self._evidence[place].study for place in places if self._evidence[place].study}
        for what, names in (("patient", patients), ("StudyInstanceUID", studies)):
            groups = grouped(names, names.__getitem__)
            for name, of_one in groups.items():
                folders = sorted({"/".join(folder) for place in of_one for folder in self._at(place, level)})
                if len(folders) > 1:
                    everybody = len(groups) == 1 and len(of_one) == len(places)
                    (doubtful if everybody else torn).append(f"{what} {name!r} is in the folders {some(folders)}.")
        for place in places:
            if len(self._at(place, level)) > 1:
                torn.append(f"one series is in several folders, with {self._evidence[place].path}.")
        by_folder = grouped(patients, lambda place: min(self._at(place, level)))
        for folder, of_one in by_folder.items():
            if len(held := sorted({patients[place] for place in of_one})) > 1:
                merged.append(f"folder {'/'.join(folder)} holds the patients {some(held)}.")
        return torn, merged, doubtful

    def _choose(self, chosen: "Level", places: Sequence[int], faults: dict) -> int:
        """The only level that agrees with everything; a contradiction if there is none, or more than one."""
        possible: dict[tuple, int] = {}  # levels that divide the series alike are one
        for level, found in faults.items():
            if not any(found):
                owners = [min(self._at(place, level)) for place in places]
                numbered = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
                possible.setdefault(tuple(map(numbered.__getitem__, owners)), level)
        named = [level for level in possible.values() if not self._are_called(NO_PERSONS_FOLDER, places, level)]
        levels = named or list(possible.values())
        if levels and not named and len({min(self._at(place, levels[0])) for place in places}) > 1:
            doubt = f"Folders that are called after images, not patients: {self._examples(places, levels[0])}."
            if self._are_called(_IMAGES_FOLDER, places, levels[0]):
                chosen.contradictions.append(
                    f"{doubt} Give --patients-by auto, or --patients-by folder:{levels[0]} if each is one patient."
                )
            else:
                chosen.notes.append(f"{doubt} Each is taken for one patient.")
        if len(levels) > 1:
            examples = "; ".join(f"level {level} has {self._examples(places, level)}" for level in levels)
            chosen.contradictions.append(
                f"Which folders are patients' below {self._root}? {examples}. Give --patients-by folder:{levels[0]} or "
                f"folder:{levels[-1]}."
            )
        elif not faults and any(folder for place in places for folder in self._folders[place]):
            stray = next(place for place in places if () in self._folders[place])
            chosen.contradictions.append(
                f"{self._evidence[stray].path} lies beside the patients' folders. Put it into its patient's folder."
            )
        elif not levels and faults:
            reasons = " ".join(f"Level {level}: {next(itertools.chain(*found))}" for level, found in faults.items())
            chosen.contradictions.append(
                f"No level of folders below {self._root} can be the patients'. {reasons} Give --patients-by auto, "
                "or name the level, as --patients-by folder:1."
            )
        return levels[0] if levels else len(faults) and 1

    def _are_called(self, words: re.Pattern, places: Sequence[int], level: int) -> bool:
        return all(words.fullmatch(folder[-1]) for place in places for folder in self._at(place, level))

    def _examples(self, places: Sequence[int], level: int) -> str:
        folders = sorted({"/".join(folder) for place in places for folder in self._at(place, level)})
        return f"{len(folders)} ({some(folders, 3)})"
