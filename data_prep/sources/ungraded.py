"""Raw scans → a data set of ungraded discs in one split: the input of `evaluate.py --scan`."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.anatomy.discs import PREPROCESSING, SLICES
from data_prep.dataset.build import Settings, build
from data_prep.dataset.job import Job, Located
from data_prep.dataset.pseudonyms import Pseudonyms
from data_prep.look.overlay import overlay_sheet
from data_prep.look.scan_picture import picture_of
from data_prep.read.found import Series
from data_prep.read.series import find_series
from data_prep.sources.scan_files import Cutting, scan_jobs
from data_prep.sources.summary import summarised
from spinejax.data.manifest import MANIFEST, read_manifest
from spinejax.data.scan_picture import FOLDER, write_scan_picture
from spinejax.errors import SpinejaxError
from spinejax.files import checksums
from spinejax.tasks import Task

SPLIT = "test"
SOURCE = {"source": "ungraded scans"}


def ungraded_discs(
    paths: Sequence[Path],
    out: Path,
    *,
    tasks: Sequence[Task],
    masks: Path | None = None,
    lowest_level: str | None = None,
    weighting: str | None = None,
    learned: Sequence[str] = (),
    pseudonyms: Pseudonyms,
    console: Console,
) -> list[str]:
    """Find the vertebrae of some scans, cut out their discs, and draw what was found.

    The data set gets pictures of its scans, which a report lays grades and hotspots over.

    Args:
        paths: files and folders of scans.
        out: gets the data set `discs/`, and `levels.png` with corners, levels and disc boxes over the scans. Earlier
            ones of this function are replaced.
        tasks: the task table; no disc has a label.
        masks: folder with a mask per scan; without it the vertebrae are detected.
        lowest_level: name of the lowest disc, to count the levels from it.
        weighting: the contrast that is read, as by `find_series`. Default: T2; or T1, where there is no T2 and the
            network has learned T1.
        learned: the contrasts that the network has learned, "t1" and so on; empty if that is not known. Scans that are
            known to be of another contrast are noted.
        pseudonyms, console: for patients and scans, and for the progress.

    Returns:
        What is doubtful, was left out or failed, a line each; then a table of how many, by kind of reason.

    Raises:
        SpinejaxError: no scan or no disc was found; or `out/discs` holds another data set.
    """
    # Made beside the results and moved among them at the end: the files of an interrupted run name the scans.
    made = out.resolve().with_name(f"{out.resolve().name}.discs")
    _refuse_to_replace(out / "discs")
    if (made / MANIFEST).exists():
        _refuse_to_replace(made)
    excluded = [masks] if masks else []
    found = find_series(paths, weighting=weighting or "t2", exclude=excluded)
    if weighting is None and not found.series and "t1" in learned:
        found = find_series(paths, weighting="t1", exclude=excluded)
    cutting = Cutting(lowest_level=lowest_level)
    jobs, notes = scan_jobs(
        found, masks=masks, corners=None, labels=None, cutting=cutting, seed=0, pseudonyms=pseudonyms
    )
    jobs = [dataclasses.replace(job, split=SPLIT) for job in jobs]
    settings = Settings(overwrite=True)
    recorded = PREPROCESSING | SOURCE | {"slices": SLICES[cutting.slices]}
    outcome = build(jobs, made, tasks=tasks, preprocessing=recorded, settings=settings, console=console)
    failures = found.failures | outcome.failures
    if jobs and len(outcome.failures) == len(jobs):
        raise SpinejaxError(next(iter(failures.values())))

    def keep_picture(job: Job, found: Located) -> None:
        write_scan_picture(made, job.scan, picture_of(found))

    shutil.rmtree(made / FOLDER, ignore_errors=True)  # of an interrupted run
    overlay_sheet(jobs, out / "levels.png", num_scans=len(jobs), seed=0, also=keep_picture)
    checksums.seal(made)
    shutil.rmtree(out / "discs", ignore_errors=True)
    os.replace(made, out / "discs")
    left_out = [f"left out: {line}" for line in found.left_out]
    failed = [f"failed: {name}: {reason}" for name, reason in failures.items()]
    table = summarised(jobs, found, outcome).lines()
    notes += [f"{one.name}: {_not_learned(one, learned)}." for one in found.series if _not_learned(one, learned)]
    return [*left_out, *found.notes, *notes, *outcome.notes, *failed, *(" ".join(line.split()) for line in table)]


def _not_learned(series: Series, learned: Sequence[str]) -> str:
    """That a scan is of a contrast that the network has not learned; "" if it may be of one that it has."""
    contrast = series.facts.contrast
    if not contrast or not learned or set(contrast.split()) & set(learned):
        return ""
    return f"it is graded, but it is {contrast}, and the network has learned {' and '.join(learned)}"


def _refuse_to_replace(discs: Path) -> None:
    """Refuse a folder that this module did not make: it may hold the user's only copy."""
    if not discs.is_dir() or not any(discs.iterdir()):
        return
    made = (discs / MANIFEST).exists() and SOURCE.items() <= read_manifest(discs)["preprocessing"].items()
    if not made:
        raise SpinejaxError(f"{discs}: holds what --scan did not make, and would replace. Give another --out.")
