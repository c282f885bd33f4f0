"""The commands that look at scans and data sets: `inventory`, `overlay`, `verify`, `stats` and `inspect`."""

import sys
from pathlib import Path

from rich.console import Console

from data_prep.commands.printing import PROGRESS, print_notes
from data_prep.commands.reading import CacheFolder, DataFolder, Reading
from data_prep.look.contact_sheet import contact_sheet
from data_prep.look.corner_page import corner_pages
from data_prep.look.grade_table import grade_table
from data_prep.look.inventory_page import inventory_page
from data_prep.look.overlay import overlay_sheet
from data_prep.read.header_cache import HeaderCache
from data_prep.read.inventory import (
    entries,
    headers_beside,
    refuse_to_replace,
    write_inventory,
)
from spinejax.data.dataset import DataSet
from spinejax.data.dataset import verify as faults_of
from spinejax.errors import printable


def inventory(
    reading: Reading, *, out: Path, html: Path | None = None, workers: int = 1, overwrite: bool = False
) -> int:
    """List every series of PATHS in a table: what it is, whether `scans` would read it, and why not. Nothing is cut.

    Edit its columns `chosen` and `patient`, and give it to `scans --inventory`.

    Args:
        out: File of the table (CSV). The headers that were read are kept beside it, for `scans`.
        html: File of a page (HTML) with the same table and the middle slice of each series.
        workers: Number of processes that read headers.
        overwrite: Replace a table that is there already.
    """
    refuse_to_replace(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = HeaderCache(headers_beside(out))
    found = reading.search(cache, num_workers=workers, everyone=True)
    listed = entries(found)
    write_inventory(out, listed)
    cache.save()
    if html:
        inventory_page(html, listed, num_workers=workers, console=PROGRESS)
    print_notes([*(str(one) for one in found.left_out if not one.name), *found.notes, *found.patient_notes])
    print_notes([f"to be settled: {line}" for line in found.contradictions])
    num_chosen, num_failed = len(found.series), len(found.failed)
    print(
        f"{out}: {len(listed)} series, {num_chosen} chosen, {len(listed) - num_chosen - num_failed} left out, "
        f"{num_failed} failed"
    )
    return 0


def overlay(
    reading: Reading,
    *,
    out: Path,
    scans: int | None = None,
    seed: int = 0,
    scans_per_page: int = 200,
    workers: int = 1,
    inventory: Path | None = None,
) -> int:
    """Show whole scans with the vertebral corners and the boxes that discs are cut out of: some as one picture, or all
    on HTML pages, where corners and levels can be corrected and saved for --corners.

    Args:
        out: File of the picture (.png), or of the first page (.html), or a folder for the pages.
        scans: Number of scans, chosen at random. Default: 20 for a picture, all for pages.
        seed: Seed of the choice.
        scans_per_page: Number of scans on a page (HTML).
        workers: Number of processes (HTML).
        inventory: Table of `inventory`, in which series may have been chosen. Give the same PATHS.
    """
    jobs, found = reading.jobs(seed=seed, num_workers=workers, inventory=inventory)
    print_notes([*map(str, found.left_out), *found.notes, *found.failures.values()])
    if out.suffix == ".html" or out.is_dir() or not out.suffix:
        pages, counts = corner_pages(
            jobs,
            found,
            out,
            scans_per_page=scans_per_page,
            num_scans=scans,
            seed=seed,
            num_workers=workers,
            console=PROGRESS,
        )
        print("\n".join(map(str, pages)))
        print(f"{sum(counts.values())} scans: " + ", ".join(f"{count} {group}" for group, count in counts.items()))
        return 0
    for line in overlay_sheet(jobs, out, num_scans=20 if scans is None else scans, seed=seed):
        print(printable(line))
    return 0


def verify(data: DataFolder, *, cache_dir: CacheFolder = None) -> int:
    """Read a whole data set and list every fault."""
    faults = faults_of(data, cache_dir=cache_dir)
    for fault in faults:
        print(printable(fault), file=sys.stderr)
    print(
        f"{data}: "
        + (f"{len(faults)} faults" if faults else f"{len(DataSet(data, cache_dir=cache_dir))} discs, no fault")
    )
    return 2 if faults else 0


def stats(data: DataFolder) -> int:
    """Count the discs of a data set by grade and split, as in the paper's Table 1."""
    Console().print(grade_table(DataSet(data)))
    return 0


def inspect(data: DataFolder, *, out: Path, discs: int = 20, seed: int = 0, cache_dir: CacheFolder = None) -> int:
    """Draw a page of discs with the outlines of their regions and lesions, their levels and grades.

    Args:
        out: File of the page (PNG).
        discs: Number of discs, chosen at random.
        seed: Seed of the choice.
    """
    contact_sheet(DataSet(data, cache_dir=cache_dir), out, num_discs=discs, seed=seed)
    print(out)
    return 0
