"""Two evaluations of the same discs, compared: `python evaluate.py --compare A B`. No network, no discs."""

import contextlib
from pathlib import Path

from spinejax.commands.folders import hold
from spinejax.files.atomic import make_folder
from spinejax.files.stores import Address, cache_folder
from spinejax.report import comparison, tables
from spinejax.report.predictions import Predictions, fetch_predictions, read_predictions
from spinejax.report.results import RESEARCH_ONLY


def compare(
    a: Path | Address, b: Path | Address, *, out: Path | Address, report: Path | Address, cache_dir: Path | None
) -> None:
    """Compare two evaluations, or an evaluation and a reader's table: results go to `out`, the page to `report`."""
    found = comparison.compare(*(predictions_of(each, cache_dir) for each in (a, b)))
    with contextlib.ExitStack() as exit_stack:
        named = {"--out": out, "--report": report}
        here = hold(named, comparison.REPLACED, cache_dir, exit_stack.enter_context)
        comparison.write(found, make_folder(here["--out"], "--out"))
        console = tables.new_console()
        comparison.show(console, found)
        made = comparison.write_page(found, make_folder(here["--report"], "--report")).name
        console.print(f"The page is {report / made}.", highlight=False, soft_wrap=True)
        console.print(f"{RESEARCH_ONLY} Results are in {out}.", highlight=False, soft_wrap=True)


def predictions_of(place: Path | Address, cache_dir: Path | None) -> Predictions:
    """An evaluation, or a reader's table, on a disk or in an object store."""
    if isinstance(place, Path):
        return read_predictions(place)
    copied = fetch_predictions(place, cache_folder(cache_dir))
    with copied.named():
        return read_predictions(copied.folder)
