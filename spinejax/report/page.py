"""The report: an HTML page that contains everything it shows, and makes no request.

`index.html` has the tables, the charts and a browser of the discs. Pictures, style and script are inside the page, and
its content policy allows that one style and that one script, by their digests, and no request. If the discs are too
many, their pictures are in scripts beside the page, `discs-0001.js` …, which its script loads when they are needed: a
page that was opened from the disk may load nothing else. Patients and scans appear by their pseudonyms, and paths of
files do not appear.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt16

from spinejax import paper
from spinejax.data.scan_picture import read_scan_picture
from spinejax.files.atomic import make_folder, write_atomically
from spinejax.files.html import style_and_script, templates, webp
from spinejax.geometry import VOLUME_SHAPE, WINDOW_SHAPE, central_window
from spinejax.inference.graded import Graded
from spinejax.metrics.calibration import Doubt, refers
from spinejax.report import spine, tables
from spinejax.report.results import RESEARCH_ONLY, Findings
from spinejax.tasks import LEVELS

INDEX = "index.html"
REPLACED = (INDEX, "discs-*.js")
"""Patterns of the files of a report, which the next one into the same folder replaces."""
DISCS_PER_PAGE = 300
"""Limit for six tasks, and lower for more tasks, so that a page stays below 25 MB."""
DISCS_PER_CHUNK = 8
"""Discs whose pictures are in one file beside the page, of a set that is too large for one page: those of a scan.

Browsers are slow to give back the memory of scripts, so a chunk has no more than is looked at together.
"""

MAP_SHRINK = 2
"""A map is smooth: half of its rows and columns are enough to paint it."""
WINDOW_BYTES, MAP_BYTES = 32_000, 8_000
"""Maximum bytes, as base64, of a disc's slices and of each of its maps."""
_WINDOW_QUALITIES, _MAP_QUALITIES = (80, 60, 40, 20, 5, 0), (60, 40, 20, 5, 0)
BRIGHTEST = 99.9
"""Percentile of a map that is shown brightest: one pixel far above all others would leave the rest black."""


class Report:
    """Adds discs one by one, in the order of `graded.rows`; only one chunk of their pictures is in memory.

    Args:
        folder: made if missing. Chunks of an earlier report are removed from it.
        traced: the grades whose evidence the hotspots trace; None without hotspots.
        discs_per_page: the most whose pictures are in the page itself. With more, they are in chunks beside it.

    Raises:
        SpinejaxError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        graded: Graded,
        traced: Int[np.ndarray, "M T"] | None = None,
        *,
        discs_per_page: int | None = None,
    ):
        prepare_folder(folder)
        self._folder, self._graded, self._traced = folder, graded, traced
        self._grades = graded.grades
        self._leads = graded.leads()
        self._referred = {
            name: refers(each, self._grades[name], graded.refer_below or 0)
            for name, each in graded.probabilities.items()
        }
        self._scan_of = graded.data.scan[graded.rows].tolist()
        limit = discs_per_page or DISCS_PER_PAGE * 6 // max(6, len(graded.tasks))
        self._is_chunked = len(graded.rows) > limit
        self._chunks = list(_by_scan(graded.data.scan[graded.rows], min(limit, DISCS_PER_CHUNK)))
        self._known = graded.data.manifest.get("scans", {})
        examinations = {scan: known["examination"] for scan, known in self._known.items() if "examination" in known}
        self._names = spine.short_names(graded.patients.tolist(), self._scan_of, examinations)
        self._number = {scan: number for number, scan in enumerate(self._names)}  # a patient's scans in order of time
        self._identity = _identity(graded)
        self._discs: list[dict] = []
        self._scans: dict[str, dict] = {}
        self._pictures: dict[str, str] = {}
        self._next_chunk = 0

    def add(self, row: int | np.integer, maps: Float[np.ndarray, "T 112 224 9"] | None = None) -> None:
        """Add one disc: its row in the data set, and its maps if there are any."""
        self.add_pictures(row, self.pictures(row, maps))

    def pictures(self, row: int | np.integer, maps: Float[np.ndarray, "T 112 224 9"] | None = None) -> dict[str, str]:
        """A disc's pictures, for `add_pictures`. Threads may make several discs' at once."""
        made = {"window": window_sheet(central_window(self._graded.data.volume(row)))}
        return made if maps is None else made | {"maps": map_sheet(maps)}

    def add_pictures(self, row: int | np.integer, pictures: Mapping[str, str]) -> None:
        """`add`, of a disc whose pictures are made."""
        place = len(self._discs)
        if row != self._graded.rows[place]:
            raise ValueError(f"row {row} is not the next disc, {self._graded.rows[place]}")
        self._pictures |= {f"{name}-{place}": text for name, text in pictures.items()}
        self._discs.append(self._disc(place))
        if place + 1 == self._chunks[self._next_chunk].stop:
            self._end_chunk()

    def close(self, findings: Findings) -> Path:
        """Write `index.html`, and return its path. Discs that were not added are shown without maps."""
        for row in self._graded.rows[len(self._discs) :]:
            self.add(row)
        facts = {
            "tasks": [{"name": t.name, "title": title(t.name), "grades": list(t.grades)} for t in self._graded.tasks],
            "window": WINDOW_SHAPE,
            "shrink": MAP_SHRINK,
            "levels": [level for level in LEVELS if level in {disc["level"] for disc in self._discs}],
            "scans": [self._scans[scan] for scan in self._names],
            "discs": self._discs,
            "hotspots": self._traced is not None,
            "researchOnly": RESEARCH_ONLY,
            "identity": self._identity,
        }
        scripts = ("page", "cells", "spine", "follow")
        text = (
            environment()
            .get_template("page.html")
            .render(
                **style_and_script(Path(__file__).parent / "templates", *scripts, loads=self._is_chunked),
                facts=facts,
                pictures=self._pictures,
                findings=findings,
                published=tables.published(findings.results, findings.branch_point),
                intra_rater=paper.INTRA_RATER,
                graded=self._graded,
                num_patients=len(set(self._graded.patients)),
                research_only=RESEARCH_ONLY,
            )
        )
        write_atomically(self._folder / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return self._folder / INDEX

    def _end_chunk(self) -> None:
        """Describe the scans of the discs since the last chunk, and write their pictures if they go beside the page."""
        places = self._chunks[self._next_chunk]
        of_scan: dict[str, list[int]] = {}
        for place in range(places.start, places.stop):
            of_scan.setdefault(self._scan_of[place], []).append(place)
            self._discs[place]["chunk"] = self._next_chunk if self._is_chunked else None
        for scan, discs in of_scan.items():
            self._describe(scan, discs)
        if self._is_chunked:
            content = json.dumps(self._pictures, separators=(",", ":"))
            text = f'keepChunk("{self._identity}",{self._next_chunk},{content});\n'
            path = self._folder / chunk_name(self._next_chunk)
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
            self._pictures = {}
        self._next_chunk += 1

    def _describe(self, scan: str, places: list[int]) -> None:
        """Keep a scan's facts, with its discs from the top down; add its picture, if there is one, to the others."""
        data, rows = self._graded.data, self._graded.rows
        places = self._scans.get(scan, {"discs": []})["discs"] + places
        places.sort(key=lambda place: LEVELS.index(self._discs[place]["level"]))
        known = {"contrast": "", "examination": None, "days": None} | self._known.get(scan, {})
        facts = {name: known[name] for name in ("contrast", "examination", "days")}
        patient = self._discs[places[0]]["patient"]
        facts |= {"id": scan, "patient": patient, "name": self._names[scan], "discs": places, "picture": None}
        if picture := read_scan_picture(data, scan):
            for place in places:
                disc = self._discs[place]
                disc["at"] = spine.place_of(picture, data.affine[rows[place]], disc["level"])
            number = self._number[scan]
            self._pictures |= {f"scan-{number}-{place}": text for place, text in enumerate(picture["slices"])}
            facts["picture"] = spine.picture_facts(picture, data.affine[rows[places]])
        self._scans[scan] = facts

    def _disc(self, place: int) -> dict:
        graded, row = self._graded, self._graded.rows[place]
        spacing_mm = np.linalg.norm(graded.data.affine[row][:3, :3], axis=0)
        margin = (VOLUME_SHAPE[2] - WINDOW_SHAPE[2]) // 2
        names = [task.name for task in graded.tasks]
        return {
            "patient": str(graded.data.patient[row]),
            "scan": str(graded.data.scan[row]),
            "level": str(graded.data.level[row]),
            "slices": (graded.data.slices[row] - margin).clip(0, WINDOW_SHAPE[2]).tolist(),
            "pixelMm": round(float(spacing_mm[0]), 4),
            "sliceMm": round(float(spacing_mm[2]), 3),
            "label": [int(graded.labels[name][place]) for name in names],
            "grade": [int(self._grades[name][place]) for name in names],
            "p": [graded.probabilities[name][place].round(4).tolist() for name in names],
            "spread": [round(float(graded.spread[name][place]), 4) for name in names],
            "lead": [round(float(self._leads[name][place]), 4) for name in names],
            "refer": [bool(self._referred[name][place]) for name in names],
            "unusual": bool(graded.unusual[place]),
            "traced": None if self._traced is None else self._traced[place].tolist(),
        }


def prepare_folder(folder: Path) -> None:
    """Make a report's folder, and remove the discs of an earlier report from it.

    Raises:
        SpinejaxError: it cannot be made, or Jinja2 is not installed.
    """
    environment()
    made = make_folder(folder, "--report")
    for old in (*made.glob("discs-[0-9][0-9][0-9].html"), *made.glob("discs-[0-9][0-9][0-9][0-9].js")):
        old.unlink()


def _identity(graded: Graded) -> str:
    """Tells the chunks of this report from those of another, whose page may still be in the folder."""
    found = hashlib.sha256(graded.data.digest.encode())
    for part in (graded.rows, *graded.probabilities.values()):
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]


def chunk_name(number: int) -> str:
    """The file of a chunk of pictures, beside the page; the page's script has the same rule."""
    return f"discs-{number + 1:04d}.js"


def _by_scan(scans: np.ndarray, limit: int) -> Iterator[slice]:
    """Stretches of at most `limit` discs that do not split a scan's."""
    stops = [*(np.flatnonzero(scans[1:] != scans[:-1]) + 1).tolist(), len(scans)] if len(scans) else []
    first = 0
    for stop, following in zip(stops, [*stops[1:], None], strict=True):
        if following is None or following - first > limit:
            yield slice(first, stop)
            first = stop


def title(name: str) -> str:
    """A task's name as a reader would write it: `upper_endplate` → `Upper endplate`."""
    return name.replace("_", " ").capitalize()


@functools.cache
def environment():
    """The Jinja environment of the report's pages. Raises NotInstalledError without Jinja2."""
    made = templates("spinejax.report", "Option --report needs Jinja2")
    made.filters |= {
        "title_of": title,
        "mean_over_tasks": tables.mean_over_tasks,
        "percent": tables.percent,
        "number": tables.number,
        "coverage_floor": _coverage_floor,
    }
    made.globals["zip"] = zip
    return made


def _coverage_floor(doubt: Doubt) -> int:
    """Where a coverage chart's axis starts, in %: a multiple of ten below every point."""
    lowest = min(float(curve.min()) for curve in doubt.kept.values())
    return min(90, int(10 * lowest) * 10)


def window_sheet(window: UInt16[np.ndarray, "112 224 9"]) -> str:
    """A disc's slices below one another, from the patient's right to the left, as a WebP file of 1008×224, base64."""
    return _webp(np.concatenate(np.moveaxis(window >> 8, 2, 0)).astype(np.uint8), _WINDOW_QUALITIES, WINDOW_BYTES)


def map_sheet(maps: Float[np.ndarray, "T 112 224 9"]) -> str:
    """A disc's maps without their sign, as a WebP file, base64.

    It has a row for each task and a column for each slice, of 56×112 pixels each. Each map is scaled to its brightest.
    """
    return _webp(map_pixels(maps), _MAP_QUALITIES, len(maps) * MAP_BYTES)


def map_pixels(maps: Float[np.ndarray, "T 112 224 9"]) -> UInt8[np.ndarray, "_ 1008"]:
    """The pixels of `map_sheet`."""
    num_tasks, (rows, columns, num_slices) = len(maps), WINDOW_SHAPE
    strength = np.abs(maps)
    offsets = itertools.product(range(MAP_SHRINK), repeat=2)
    small = sum(strength[:, row::MAP_SHRINK, column::MAP_SHRINK] for row, column in offsets) / MAP_SHRINK**2
    brightest = np.percentile(small, BRIGHTEST, axis=(1, 2, 3), keepdims=True)
    grey = np.rint(255 * (small / np.where(brightest > 0, brightest, 1)).clip(0, 1)).astype(np.uint8)
    return grey.transpose(0, 1, 3, 2).reshape(num_tasks * rows // MAP_SHRINK, num_slices * columns // MAP_SHRINK)


def _webp(pixels: np.ndarray, qualities: Sequence[int], most_bytes: int) -> str:
    for quality in qualities:
        text = webp(pixels, quality)
        if len(text) <= most_bytes:
            break
    return text
