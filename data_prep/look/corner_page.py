"""Pages of all scans, the doubtful first, on which a person corrects corners and levels and saves a corner file.

Each page contains everything it shows and makes no request: the pictures as text that is decoded when shown, the facts
as JSON. It names scans by the keys that `--corners` needs, so it stays where the scans are kept. Where a scan's bodies
are drawn, and what is saved, is calculated in the page (`templates/corners_*.js`), from the affine given here.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from rich.console import Console
from rich.progress import track

from data_prep.anatomy.discs import HEIGHT_MM, WIDTH_MM, extract_discs
from data_prep.anatomy.vertebrae import NAMES, VertebralBody
from data_prep.dataset.job import Job
from data_prep.dataset.workers import workers
from data_prep.read.found import Found, Series
from data_prep.read.scan import NotSagittalError, Scan
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import make_folder, write_atomically
from spinejax.files.html import style_and_script, templates, webp
from spinejax.tasks import LEVELS

SURE = 0.5
"""Bodies below this confidence make a scan doubtful."""

_MADE_BY = '<meta name="generator" content="spinejax corner page">'  # a page that a later run may replace or remove
_SCRIPTS = ("corners_bodies", "corners_picture", "corners_file")
_MAX_SLICES, _REACH_MM = 15, 30.0
_QUALITY, _SIDE_QUALITY = 75, 50  # of the middle slice, in which corners are placed, and of the others
_GREY = (0.5, 99.7)  # percentiles shown as black and white
_WIDTH_LIMITS_MM = (5.0, 100.0)  # of a corner file


def corner_pages(
    jobs: Sequence[Job],
    found: Found,
    out: Path,
    *,
    scans_per_page: int,
    num_scans: int | None = None,
    seed: int = 0,
    num_workers: int = 1,
    console: Console,
) -> tuple[list[Path], dict[str, int]]:
    """Write the pages of some scans. Pages of an earlier run with the same name are replaced.

    Args:
        jobs: one a series of `found`, in its order.
        found: the series, and what was left out or cannot be read, which the pages list.
        out: the first page, a name in .html; or a folder, which gets `index.html`. The others are beside it, with
            -002, -003, … after its name. Only the owner can read them.
        scans_per_page: the most.
        num_scans: number of scans, chosen at random; None for all. The found series without a job are always listed.
        seed: of that choice.
        num_workers: number of processes.
        console: for the progress.

    Returns:
        The pages, and how many scans are in each group of `doubt`.

    Raises:
        SpinejaxError: an option is out of range; nothing can be written to `out`; Jinja2 is missing.
    """
    for option, value in (("scans-per-page", scans_per_page), ("scans", num_scans), ("workers", num_workers)):
        if value is not None and value < 1:
            raise SpinejaxError(f"--{option} {value}: expected 1 or more.")
    template = templates("data_prep.look", "--out in .html needs Jinja2").get_template("corners.html")
    first = out if out.suffix == ".html" else out / "index.html"
    folder = make_folder(first.parent, "--out")
    with tempfile.TemporaryDirectory(prefix=".corner-page-", dir=folder) as made, workers(num_workers, None) as run:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(jobs))[:num_scans])
        files = [Path(made, f"{number}.txt") for number in chosen]
        looked = run(_look, [jobs[number] for number in chosen], [found.series[number] for number in chosen], files)
        scans = list(track(looked, "scans", len(files), console=console, disable=not console.is_terminal))
        left_out = [*map(str, found.left_out), *(scan["leftOut"] for scan in scans if "leftOut" in scan)]
        shown: list[tuple[dict, Path | None]] = [
            (scan, file) for scan, file in zip(scans, files, strict=True) if "leftOut" not in scan
        ]
        shown += [(_facts(name, reason), None) for name, reason in found.failures.items()]
        shown.sort(key=lambda each: doubt(each[0]))
        for scan, _ in shown:
            scan["doubt"] = doubt(scan)[0]
        parts = [shown[at : at + scans_per_page] for at in range(0, len(shown), scans_per_page)] or [[]]
        names = [first.name, *(f"{first.stem}-{number:03d}.html" for number in range(2, len(parts) + 1))]
        _remove_older(first)
        counts = {group: sum(scan["doubt"] == place for scan, _ in shown) for place, group in enumerate(GROUPS)}
        for number, (name, part) in enumerate(zip(names, parts, strict=True)):
            facts = {
                "page": hashlib.sha256(
                    "\n".join([name, *(scan["key"] for scan, _ in part)]).encode(errors="replace")
                ).hexdigest()[:16],
                "names": NAMES[::-1],
                "levels": LEVELS,
                "groups": GROUPS,
                "sure": SURE,
                "limits": {"width": WIDTH_MM, "height": HEIGHT_MM},
                "scans": [scan for scan, _ in part],
            }
            stream = template.stream(
                **style_and_script(Path(__file__).parent / "templates", "corners", *_SCRIPTS),
                made_by=_MADE_BY,
                facts=facts,
                pictures=(file.read_text() if file and file.exists() else "" for _, file in part),
                pages=[(each, len(its)) for each, its in zip(names, parts, strict=True)] if len(parts) > 1 else [],
                number=number,
                counts=counts,
                left_out=left_out if number == 0 else [],
            )
            write_atomically(folder / name, lambda path, stream=stream: _write_for_owner(path, stream))
    return [folder / name for name in names], counts


def _write_for_owner(path: Path, stream) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    stream.dump(str(path), encoding="utf-8", errors="replace")


def _remove_older(first: Path) -> None:
    """Remove the further pages of an earlier run, and nothing that is not such a page."""
    for path in first.parent.glob(f"{first.stem}-[0-9][0-9][0-9].html"):
        with path.open(encoding="utf-8", errors="replace") as file:
            if _MADE_BY in file.read(1000):
                path.unlink()


# Order ---------------------------------------------------------------------------------------------------------------

GROUPS = ("failed", "doubtful levels", "low confidence", "noted", "no doubt")
"""In this order scans are shown."""


def doubt(facts: Mapping) -> tuple[int, float]:
    """Sorts scans, the most doubtful first: by group of `GROUPS`, then by the lowest confidence of a body.

    A scan is in the first group that fits: no disc can be cut out of it; all its names may be off by one; a body's
    confidence is below `SURE`; there are notes. Bodies of masks and corner files have no confidence.
    """
    least = min((body["confidence"] for body in facts["bodies"] if body["confidence"] is not None), default=1.0)
    fits = (bool(facts["failure"]), facts["doubtfulLevels"], least < SURE, bool(facts["notes"]), True)
    return fits.index(True), least


# One scan ------------------------------------------------------------------------------------------------------------


def _facts(name: str, failure: str = "", *, key: str = "", alias: str = "", notes: Sequence[str] = ()) -> dict:
    """What the page's script needs of a scan that has no picture."""

    def short(text: str) -> str:
        return text.removeprefix(f"{name}: ")

    return {
        "key": key,
        "alias": alias,
        "name": name,
        "failure": short(failure),
        "notes": [short(note) for note in notes],
        "doubtfulLevels": False,
        "bodies": [],
        "slices": [],
    }


def _look(job: Job, series: Series, file: Path) -> dict:
    """The facts of one scan; its pictures go to a file, one a line, as base64."""
    scan, bodies, notes, failure, doubtful = None, [], [], "", False
    confidence: Mapping[str, float] = {}
    corner_mm: Mapping[str, float] = {}
    try:
        located = job.locate()
        scan, bodies, confidence = located.scan, located.bodies, located.confidence or {}
        notes, doubtful, corner_mm = list(located.notes), located.doubtful_levels, located.corner_mm or {}
        extract_discs(scan, bodies, notes=notes)
    except NotSagittalError as error:
        return {"leftOut": str(error)}
    except SpinejaxError as error:
        failure = str(error)
        scan = scan or _read(series)
    except (OSError, MemoryError) as error:
        failure = f"{job.name}: cannot be read ({error or 'it does not fit into memory'})."
        scan = scan or _read(series)
    facts = _facts(job.name, failure, key=series.key, alias=series.alias, notes=notes)
    if scan is None:
        return facts
    middle = int(np.median([body.mid_slice for body in bodies])) if bodies else scan.voxels.shape[2] // 2
    slices = slices_to_show(scan, middle)
    file.write_text("\n".join(_pictures(scan.voxels, slices, middle)))
    return facts | {
        "doubtfulLevels": doubtful,
        "affine": scan.affine.tolist(),
        "inverse": np.linalg.inv(scan.affine).tolist(),
        "shape": scan.voxels.shape,
        "slices": slices,
        "middle": slices.index(middle),
        "bodies": [body_facts(body, scan, confidence.get(body.name), corner_mm.get(body.name)) for body in bodies],
    }


def _read(series: Series) -> Scan | None:
    """A scan whose bodies were not found, or None if its voxels cannot be read either."""
    try:
        return series.read()[0]
    except (SpinejaxError, OSError, MemoryError):
        return None


def body_facts(body: VertebralBody, scan: Scan, confidence: float | None, corner_mm: float | None = None) -> dict:
    """A body with its corners as (row, column, slice) and the width that gives its slices again from a corner file."""
    low, high = _WIDTH_LIMITS_MM
    corners = [
        [row, column, body.mid_slice] if np.isfinite(row + column) else None for row, column in body.corners.tolist()
    ]
    width_mm = (body.slices[1] - body.slices[0]) * float(scan.spacing_mm[2])
    return {
        "name": body.name,
        "corners": corners,
        "widthMm": round(min(max(width_mm, low), high), 3),
        "confidence": confidence,
        "cornerMm": corner_mm,
    }


def slices_to_show(scan: Scan, middle: int) -> list[int]:
    """At most 15 slices, evenly spaced within 30 mm to either side of the middle one, which is among them."""
    reach = int(_REACH_MM / scan.spacing_mm[2])
    first, stop = max(0, middle - reach), min(scan.voxels.shape[2], middle + reach + 1)
    step = -(-(stop - first) // _MAX_SLICES)
    return list(range(middle - (middle - first) // step * step, stop, step))


def _pictures(voxels: Shaped[np.ndarray, "H W S"], slices: Sequence[int], middle: int) -> Iterator[str]:
    black, white = np.percentile(voxels[:, :, slices], _GREY)
    for place in slices:
        grey = 255 * ((voxels[:, :, place] - black) / max(white - black, 1e-9)).clip(0, 1)
        yield webp(np.rint(grey).astype(np.uint8), _QUALITY if place == middle else _SIDE_QUALITY)
