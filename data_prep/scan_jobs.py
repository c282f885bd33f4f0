"""A hospital's scans as jobs: series of any format, with masks or corners, and perhaps labels."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.build import Job
from data_prep.corner_file import bodies_from_corners, read_corners
from data_prep.discs import DiscVolume, extract_discs
from data_prep.labels import Labels
from data_prep.mask_conventions import CONVENTIONS, to_house
from data_prep.privacy import Pseudonyms
from data_prep.scan import Scan, require_same_grid
from data_prep.scans import Found, Series, read_scan, stem_of, volume_files
from data_prep.splits import split_patients
from data_prep.tables import some
from data_prep.vertebrae import bodies_from_spider_mask, body_labels
from spinejax.errors import SpinejaxError
from spinejax.tasks import LEVELS


@dataclass(frozen=True)
class Cutting:
    """How discs are found in a scan and cut out.

    Args:
        convention: the tool that made the masks, one of `CONVENTIONS`; None to recognise it by its labels.
        lowest_level: name of each scan's lowest disc, if the levels are to be counted from it.
        per_disc: normalise each disc by one median over all of its slices, instead of each slice by its own.
    """

    convention: str | None = None
    lowest_level: str | None = None
    per_disc: bool = False

    def __post_init__(self):
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
) -> tuple[list[Job], list[str]]:
    """One job for each series that was found, and notes on labels that fit none of them.

    A series without a mask, or without corners, becomes a job that fails with that reason: a run names it and goes on.

    Args:
        found: the series.
        masks: folder of the masks, each named after its scan's key (`_mask_of`).
        corners: a corner file. Either it or `masks` is given.
        labels: of the discs.
        cutting: how discs are found and cut out.
        seed: of the split.
        pseudonyms: of patients and scans.

    Raises:
        SpinejaxError: neither or both of masks and corners are given, or they cannot be read; nothing was found.
    """
    if (masks is None) == (corners is None):
        raise SpinejaxError("Give either --masks DIR or --corners FILE: they tell where the vertebrae are.")
    if not found.series:
        reasons = "".join(f"\n  {line}" for line in [*found.left_out, *found.failures.values()][:20])
        raise SpinejaxError(f"No sagittal scan was found.{reasons}")
    if masks is not None and not masks.is_dir():
        raise SpinejaxError(f"--masks {masks}: no such folder.")
    mask_files = [] if masks is None else volume_files(masks)
    bodies = {} if corners is None else read_corners(corners)
    of_scan = {one.key: labels.of(one.patient, one.key) if labels else {} for one in found.series}
    patients: dict[str, list[Mapping[str, int]]] = {}
    for one in found.series:
        patients.setdefault(one.patient, []).extend(of_scan[one.key].values())
    splits = split_patients(patients, seed=seed)

    jobs = []
    for one in found.series:
        mask = None if masks is None else _mask_of(one, masks, mask_files)
        its_bodies = bodies.get(one.key)
        cut = (
            partial(_cut, one, mask, its_bodies, cutting)
            if corners is None or its_bodies
            else partial(_no_corners, one)
        )
        jobs.append(
            Job(
                name=one.name,
                patient=pseudonyms.patient(one.patient),
                scan=pseudonyms.scan(one.key),
                split=splits[one.patient],
                labels=of_scan[one.key],
                cut=cut,
                sources=(*one.files, *([mask] if isinstance(mask, Path) else [])),
                recipe=f"{cutting} {json.dumps(its_bodies, sort_keys=True)}",
            )
        )
    unused = labels.without_scan([(one.patient, one.key) for one in found.series]) if labels else []
    return jobs, [f"labelled, but no such scan: {some(unused)} ({len(unused)} in all)"] if unused else []


def cut_scan(series: Series, mask: Path, cutting: Cutting) -> tuple[list[DiscVolume], list[str]]:
    """The disc volumes of a series with its mask, and notes on what was left out.

    Raises:
        SpinejaxError: a file cannot be read, they do not share a grid, or no disc can be cut out.
    """
    return _cut(series, mask, None, cutting)


def _cut(
    series: Series, mask: Path | str | None, corners: Mapping | None, cutting: Cutting
) -> tuple[list[DiscVolume], list[str]]:
    scan, notes = series.read()
    if scan.voxels.min() == scan.voxels.max():
        raise SpinejaxError(f"{series.name}: every voxel is {scan.voxels.flat[0]:g}: an empty image. Export it again.")
    if corners is not None:
        return extract_discs(scan, bodies_from_corners(scan, corners), per_disc=cutting.per_disc), notes
    if not isinstance(mask, Path):
        raise SpinejaxError(str(mask))
    labels = read_scan(mask, np.uint8)
    labels = Scan(labels.voxels, labels.affine, f"mask of {series.name}")
    require_same_grid(scan, labels)
    labels, doubts = to_house(labels, cutting.convention, cutting.lowest_level)
    bodies, left_out = bodies_from_spider_mask(labels)
    regions = Scan(body_labels(labels), labels.affine, labels.name)
    discs = extract_discs(scan, bodies, regions=regions, per_disc=cutting.per_disc)
    return discs, notes + doubts + left_out


def _no_corners(series: Series) -> tuple[list[DiscVolume], list[str]]:
    series.read()  # a series of another plane is left out, not failed
    raise SpinejaxError(f"{series.name}: the corner file has no scan {series.key!r}.")


def _mask_of(series: Series, folder: Path, files: list[Path]) -> Path | str:
    """The mask of a series, or why there is none.

    A mask is named as its scan, or that with something behind an underscore (`0007_t2.nii.gz`, `0007_t2_seg.mha`), or
    as SPINEPS names them (`sub-07_T2w.nii.gz` has `sub-07_mod-T2w_seg-vert_msk.nii.gz`).
    """
    named = [path for path in files if stem_of(path) == series.key]
    named = named or [path for path in files if stem_of(path).startswith(f"{series.key}_")]
    subject, _, contrast = series.key.rpartition("_")
    vertebrae = [path for path in files if "seg-vert" in path.name and stem_of(path).startswith(f"{subject}_")]
    named = named or [path for path in vertebrae if subject and f"_mod-{contrast}_" in path.name]
    named = named or (vertebrae if subject else [])
    if len(named) == 1:
        return named[0]
    if named:
        return (
            f"{series.name}: {some([path.name for path in named])} could all be its mask. Keep one in --masks {folder}."
        )
    return (
        f"{series.name}: no mask {series.key}.nii.gz or .mha in --masks {folder} (there are {len(files)}: "
        f"{some([path.name for path in files])}). Name masks after their scans."
    )
