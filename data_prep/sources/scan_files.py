"""A hospital's scans as jobs: series of any format, with or without masks, corners and labels."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from data_prep.anatomy.corner_file import bodies_from_corners, read_corners
from data_prep.anatomy.mask_checks import flipped
from data_prep.anatomy.mask_labels import CONVENTIONS, to_spider
from data_prep.anatomy.plausibility import doubts_of
from data_prep.dataset.job import Examination, Job, Located
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.dataset.splits import split_patients
from data_prep.detector.doubt import MAX_DOUBT
from data_prep.detector.weights import weights_sum
from data_prep.read.csv_tables import some
from data_prep.read.found import Found, Series
from data_prep.read.names import canonical
from data_prep.read.plausible import plausible
from data_prep.read.scan import Scan, require_same_grid
from data_prep.read.volume_files import MASK_WORDS, files_of, read_scan, segment_names_in, stem_of, volume_files
from data_prep.sources.labels import Labels
from spinejax.data.shards import SPLITS
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS

Vertebrae: TypeAlias = Path | Mapping | str | None
"""A scan's mask file or its part of a corner file; or the reason why it has neither; or None, to detect the bodies."""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How discs are found in a scan and cut out; options of the commands."""

    convention: Literal["spider", "totalspineseg", "spineps", "totalsegmentator"] | None = None
    """Tool that made the masks. Default: recognised by its labels."""
    lowest_level: str | None = None
    """Name of each scan's lowest disc, to count the levels from it. Default: the mask's own names, or the sacrum's."""
    detect_missing: bool = False
    """Detect the vertebrae of scans without a mask or corners, instead of failing there."""
    normalise: Literal["slice", "disc"] = "slice"
    """Scale each slice by the median of its vertebral bodies, as in the paper, or a disc by one median."""
    slices: Literal["slabs", "native"] = "slabs"
    """Average slices less than 2.5 mm apart into slabs of about 4 mm, or keep them as they are."""
    max_doubt: float = MAX_DOUBT
    """Greatest probability of wrong levels that is accepted of detected vertebrae. Above it a scan is noted as
    doubtful, and left out if it has labels."""

    def __post_init__(self):
        if not 0 <= self.max_doubt <= 1:
            raise SpinejaxError(f"--max-doubt {self.max_doubt}: expected a probability, from 0 to 1.")
        for option, value, known in (
            ("--convention", self.convention, tuple(CONVENTIONS)),
            ("--lowest-level", self.lowest_level, LEVELS),
        ):
            if value not in (None, *known):
                raise SpinejaxError(f"{option} {value}: expected one of {', '.join(known)}.")


def scan_jobs(
    found: Found,
    *,
    masks: Path | None,
    corners: Path | None,
    labels: Labels | None,
    cutting: Cutting,
    seed: int,
    pseudonyms: Pseudonyms,
    keep_doubtful: bool = False,
) -> tuple[list[Job], list[str]]:
    """One job for each series that was found, and notes on labels that match none of them.

    Without masks and corners, the detector finds the bodies. With them, a series that has none becomes a job that fails
    and says so, because its name may be wrong; with `cutting.detect_missing` its bodies are detected.

    Args:
        found: the series.
        masks: folder of the masks, each named after its scan's key (`_mask_of`).
        corners: a corner file, instead of `masks`.
        labels, seed: labels of the discs, and seed of the split.
        cutting: how discs are found and cut out.
        pseudonyms: for patients and scans.
        keep_doubtful: keep labelled scans whose levels the detector reports as doubtful.

    Raises:
        SpinejaxError: both masks and corners are given, or they cannot be read; nothing was found; labels are given
            and match none of the scans.
    """
    if masks is not None and corners is not None:
        raise SpinejaxError("Give either --masks DIR or --corners FILE, not both; or neither, to detect the vertebrae.")
    if not found.series:
        reasons = "".join(f"\n  {line}" for line in [*found.left_out, *found.failures.values()][:20])
        raise SpinejaxError(f"No sagittal scan was found.{reasons}")
    if masks is not None and not masks.is_dir():
        raise SpinejaxError(f"--masks {masks}: no such folder.")
    notes: list[str] = []
    marked = None if corners is None else read_corners(corners)
    if unknown := sorted((marked or {}).keys() - {name for one in found.series for name in (one.key, one.alias)}):
        notes.append(f"--corners {corners}: no such scan: {some(unknown)} ({len(unknown)} in all).")
    of_scan = _labels_of(found.series, labels, notes)
    patients: dict[str, list[Mapping[str, int]]] = {}
    for one in found.series:
        patients.setdefault(one.patient, []).extend(of_scan[one.key].values())
    given = labels.splits if labels else {}
    splits = _given_splits(patients, given, notes) if given else split_patients(patients, seed=seed)
    when = examinations(found.series)
    jobs = [
        job_of(
            series,
            vertebrae,
            cutting,
            labels=of_scan[series.key],
            examination=when.get(series.key),
            split=splits[series.patient],
            pseudonyms=pseudonyms,
            refuse_doubtful=bool(of_scan[series.key]) and not keep_doubtful,
        )
        for series, vertebrae in _with_vertebrae(found.series, masks, marked, cutting.detect_missing)
    ]
    return jobs, notes


def _labels_of(
    found: Sequence[Series], labels: Labels | None, notes: list[str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Key of a scan → its labels by level. What matches no scan is noted, and refused if nothing matches."""
    if labels is None:
        return {one.key: {} for one in found}
    notes += labels.notes
    of_scans, unused = labels.of_scans([(one.patient, one.key) for one in found])
    misspelt = labels.misspelt(one.patient for one in found)
    zeros = f" Write {some(misspelt)}: a spreadsheet may have made 7 of 0007." if misspelt else ""
    if unused and not any(of_scans):
        scans = some([f"{one.patient} {one.key}" for one in found])
        raise SpinejaxError(
            f"--labels: none of its {len(labels.rows)} patients and scans is among those found: it names "
            f"{some(unused)}, the scans are {scans}. Make the names agree.{zeros}"
        )
    if unused:
        notes.append(f"labelled, but no such scan: {some(unused)} ({len(unused)} in all).{zeros}")
    return dict(zip((one.key for one in found), of_scans, strict=True))


def _given_splits(patients: Iterable[str], given: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Patient → the split of the label table. Patients without one are training patients, with a note."""
    splits = {patient: given.get(patient, "train") for patient in sorted(patients)}
    if without := [patient for patient in splits if patient not in given]:
        notes.append(f"{len(without)} patients have no split in --labels, and are in train: {some(without)}.")
    if empty := [split for split in SPLITS if split not in splits.values()]:
        notes.append(f"no patient is in {' or '.join(empty)}, by the splits in --labels.")
    return splits


def _with_vertebrae(
    found: Sequence[Series], masks: Path | None, marked: Mapping[str, Mapping] | None, detect_missing: bool
) -> Iterator[tuple[Series, Vertebrae]]:
    scan_files = {file.resolve() for one in found for file in one.files}  # they may lie among the masks
    mask_files = [path for path in volume_files(masks) if path.resolve() not in scan_files] if masks else []
    keys = {one.key for one in found}
    masked = {one.key: _mask_of(one, masks, mask_files, keys) for one in found} if masks else {}
    owners = Counter(mask for mask in masked.values() if isinstance(mask, Path))
    for one in found:
        vertebrae: Vertebrae = masked.get(one.key)
        if isinstance(vertebrae, Path) and owners[vertebrae] > 1:
            vertebrae = (
                f"{vertebrae} could be the mask of {owners[vertebrae]} scans. Name it, or its folder, after one: "
                f"{one.key}."
            )
        elif marked is not None:
            none = f"the corner file has no scan {one.key!r}."
            vertebrae = marked.get(one.key, marked.get(one.alias, none) if one.alias else none)
        yield one, None if isinstance(vertebrae, str) and detect_missing else vertebrae


def job_of(
    series: Series,
    vertebrae: Vertebrae,
    cutting: Cutting,
    *,
    labels: Mapping[str, Mapping[str, int]],
    split: str,
    pseudonyms: Pseudonyms,
    refuse_doubtful: bool,
    member: int | None = None,
    source: str = "",
    examination: Examination | None = None,
) -> Job:
    """The job of one series. The arguments are those of `locate` and `Job`."""
    mask = files_of(vertebrae) if isinstance(vertebrae, Path) else ()
    return Job(
        name=series.name,
        patient=pseudonyms.patient(series.patient),
        scan=pseudonyms.scan(series.key),
        split=split,
        labels=labels,
        locate=partial(locate, series, vertebrae, cutting, member),
        sources=(*series.files, *mask),
        recipe=f"{cutting} {'mask' if mask else json.dumps(vertebrae, sort_keys=True)} {weights_sum()} {member}",
        per_disc=cutting.normalise == "disc",
        native_slices=cutting.slices == "native",
        refuse_doubtful=refuse_doubtful,
        source=source,
        contrast=series.facts.contrast,
        examination=examination,
    )


def examinations(found: Sequence[Series]) -> dict[str, Examination]:
    """Key of a scan → its examination, for patients with several scans.

    Scans of one date are one examination. If a scan of the patient has no date, or none that is one, each scan counts
    as an examination, in the order of their names.
    """
    of_patient: dict[str, list[Series]] = {}
    for one in found:
        of_patient.setdefault(one.patient, []).append(one)
    known: dict[str, Examination] = {}
    for scans in of_patient.values():
        try:
            dates = {one.key: date.fromisoformat(one.facts.date) for one in scans}  # YYYYMMDD, too
        except ValueError:
            in_order = sorted((one.key for one in scans), key=_by_number)
            dated = {key: Examination(number, None) for number, key in enumerate(in_order, start=1)}
        else:
            in_time = sorted(set(dates.values()))
            dated = {key: Examination(1 + in_time.index(day), (day - in_time[0]).days) for key, day in dates.items()}
        known |= dated if len(scans) > 1 else {}
    return known


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts `t2_10` behind `t2_9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def locate(series: Series, vertebrae: Vertebrae, cutting: Cutting, member: int | None = None) -> Located:
    """Read a series and find its vertebral bodies. `member`, if any, is the only detector that may be used for it.

    Raises:
        NotSagittalError: the series is of another plane. This comes first, because such a series needs no mask.
        SpinejaxError: a file cannot be read; there are no `vertebrae`; scan and mask do not share a grid; no bodies are
            found.
    """
    located = _located(series, vertebrae, cutting, member)
    doubts = doubts_of(located.bodies, located.scan.spacing_mm, located.regions)
    return replace(located, notes=[*located.notes, *(f"{series.name}: {doubt}" for doubt in doubts)])


def _located(series: Series, vertebrae: Vertebrae, cutting: Cutting, member: int | None) -> Located:
    scan, notes = series.read()
    scan, changes = plausible(scan)
    notes = notes + changes
    if isinstance(vertebrae, str):
        raise SpinejaxError(f"{series.name}: {vertebrae}")
    if vertebrae is None:
        # Both load JAX, which masks and corners do not need.
        from data_prep.detector.detect import detect
        from spinejax.parallel.devices import all_devices

        all_devices()  # raises if JAX_PLATFORMS is not available

        detection = detect(scan, lowest_level=cutting.lowest_level, max_doubt=cutting.max_doubt, member=member)
        return Located(
            scan,
            detection.bodies,
            notes + detection.notes,
            confidence=detection.confidence,
            doubtful_levels=detection.doubtful_levels,
            corner_mm=detection.corner_mm,
        )
    if isinstance(vertebrae, Mapping):
        return Located(scan, bodies_from_corners(scan, vertebrae), notes)
    mask = read_scan(vertebrae, np.uint8)
    mask = Scan(mask.voxels, mask.affine, f"mask of {series.name}")
    require_same_grid(scan, mask)
    mask, doubts = to_spider(mask, cutting.convention, cutting.lowest_level, segment_names_in(vertebrae))
    if how := flipped(scan, mask):
        raise SpinejaxError(
            f"{mask.name}: it fits the image better when it is flipped {how}. Save it with the scan's own orientation."
        )
    return Located.by_mask(scan, mask, notes=notes + doubts)


def _mask_of(series: Series, folder: Path, files: list[Path], keys: set[str]) -> Path | str:
    """The mask of a series, or why there is none. The first rule below that a file matches decides.

    A mask is named like its scan, with its folder (`P001/t2.mha`) or without; like its scan with a word for mask after
    an underscore (`0007_t2_seg.mha`, but not `0007_t2_SPACE_seg.mha`, which belongs to another series); as by SPINEPS
    (`sub-07_mod-T2w_seg-vert_msk.nii.gz` for `sub-07_T2w.nii.gz`); or like a folder
    above the scan, with such a word or without, or in a folder of that name (`P001/seg.mha`). A file that is named like
    another scan, one of `keys`, belongs to that one.
    """
    name = series.alias or series.key.rpartition("/")[2]
    subject, _, contrast = name.rpartition("_")
    free = [path for path in files if stem_of(path) == name or stem_of(path) not in keys]
    longer = (key.rpartition("/")[2] for key in keys - {series.key})
    others = tuple(f"{key}_" for key in longer if len(key) > len(subject))
    of_subject = [
        path
        for path in free
        if subject and "seg-vert" in path.name and (stem := stem_of(path)).startswith(f"{subject}_")
        if not stem.startswith(others)
    ]
    named = (
        [path for path in free if "/" in series.key and _with_folders(path).endswith(f"/{series.key}")]
        or [path for path in free if stem_of(path) == series.key.replace("/", "_")]
        or [path for path in free if stem_of(path) == name]
        or [path for path in free if MASK_WORDS.search(_word_after(f"{name}_", stem_of(path)))]
        or [path for path in of_subject if f"_mod-{contrast}_" in path.name]
        or of_subject
        or _of_a_folder_above(series, folder, free)
    )
    if len(named) == 1:
        return named[0]
    if named:
        return f"{some([path.name for path in named])} could all be its mask. Keep one in --masks {folder}."
    return (
        f"no mask {series.key}.nii.gz or .mha among the {len(files)} in --masks {folder}. Name masks after scans, or "
        "after the folders above them."
    )


def _of_a_folder_above(series: Series, folder: Path, files: list[Path]) -> list[Path]:
    """The masks that are named after a folder above a scan, or lie in folders that are named as those of the scan.

    All that a mask's path says below `folder` has to be folders of the scan, in their order, but for words for mask:
    another patient's `P002/T2.mha` is none of `P001/T2`. Of several masks those that say most are meant, and of names
    of one folder that of the nearest.
    """
    above = [name for parent in series.files[0].absolute().parents if (name := canonical(parent.name))]
    way = f"/{'/'.join(reversed(above))}/"
    told = {}
    for path in files:
        own = [part for each in path.relative_to(folder).parent.parts if not MASK_WORDS.search(part := canonical(each))]
        stem = stem_of(path)
        named = [name for name in above if stem == name or MASK_WORDS.search(_word_after(f"{name}_", stem))]
        if named:
            own.append(max(named, key=len))
        elif not all(MASK_WORDS.search(word) or word in ("mr", "ml", "spine") for word in stem.lower().split("_")):
            continue
        if own and (place := way.rfind(f"/{'/'.join(own)}/")) >= 0:
            told[path] = (len(own), place)
    return [path for path, what in told.items() if what == max(told.values())]


def _with_folders(path: Path) -> str:
    """A file's path without its suffix."""
    return f"{canonical(path.absolute().parent.as_posix())}/{stem_of(path)}"


def _word_after(prefix: str, stem: str) -> str:
    """The word after the beginning of a name, up to the next underscore; empty if the name begins otherwise."""
    return stem.removeprefix(prefix).partition("_")[0] if stem.startswith(prefix) else ""
