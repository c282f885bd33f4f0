"""A page for each scan in which NiiVue shows scan, masks and hotspots in three planes.

NiiVue (https://github.com/niivue/niivue) is inside the page, as its npm package has it, and so are the volumes, as
NIfTI: the page makes no request, and works from the disk. It needs a browser with WebGL 2.

    scan        the picture of the whole scan, if the data set has one; else the discs' own volumes, each in its place
    masks       vertebral bodies by name, discs by level, and the data set's lesions, if it has them
    hotspots    one volume for each task with the maps of all discs, each scaled by its own 99.9th percentile
"""

import base64
import functools
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import shapely
from jaxtyping import Float, UInt8

from spinejax.data.scan_picture import ScanPicture, read_scan_picture
from spinejax.files.atomic import make_folder, write_atomically
from spinejax.files.html import grey_pixels, style_and_script, templates
from spinejax.geometry import WINDOW_SHAPE, central_window, window_affine
from spinejax.inference.graded import Graded
from spinejax.report import spine
from spinejax.report.hotspot_files import whole_numbers_as_nifti
from spinejax.report.page import BRIGHTEST, INDEX, title
from spinejax.report.results import RESEARCH_ONLY
from spinejax.tasks import LEVELS

REPLACED = (INDEX, "scan-*.html")
"""Patterns of the files of an evaluation's pages, which the next ones in the same folder replace."""

BUNDLE = Path(__file__).parent / "niivue_bundle" / "niivue.umd.js.xz"
NIIVUE_VERSION = "0.69.0"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
"""Of `dist/niivue.umd.js` in the npm package @niivue/niivue; `make niivue` gets it again."""

FEW_SLICES = 4
"""With fewer, a page begins with the sagittal plane alone: in the other two there is nothing to see."""

BLUR = 0.6
"""Standard deviation, in voxels of the scan."""


class Grid(NamedTuple):
    """Voxels in the patient's space; `affine` is (row, column, slice, 1) → LPS, mm."""

    affine: Float[np.ndarray, "4 4"]
    shape: tuple[int, int, int]


class Viewer:
    """Adds discs one by one, in the order of `graded.rows`; the maps of one scan are in memory.

    Args:
        folder: made if missing. Pages of an earlier evaluation are removed from it.

    Raises:
        SpinejaxError: the folder cannot be made.
    """

    def __init__(self, folder: Path, graded: Graded):
        prepare_folder(folder)
        self._folder, self._graded, self._grades = folder, graded, graded.grades
        self._scans = graded.data.scan[graded.rows]
        self._names = spine.short_names(graded.patients.tolist(), self._scans.tolist())
        self._places = {
            scan: np.flatnonzero(self._scans == scan).tolist() for scan in dict.fromkeys(self._scans.tolist())
        }
        self._maps: dict[int, Float[np.ndarray, "T 112 224 9"] | None] = {}
        self._place = 0

    def add(self, row: int | np.integer, maps: Float[np.ndarray, "T 112 224 9"] | None = None) -> None:
        """Add one disc: its row in the data set, and its maps if there are any."""
        if row != self._graded.rows[self._place]:
            raise ValueError(f"row {row} is not the next disc, {self._graded.rows[self._place]}")
        scan = str(self._scans[self._place])
        self._maps[self._place] = None if maps is None else np.abs(maps)
        if self._place == self._places[scan][-1]:
            self._write_scan(scan)
        self._place += 1

    def close(self) -> Path:
        """Write what is left, without maps, and a list of the scans if there are several; returns `index.html`."""
        for row in self._graded.rows[self._place :]:
            self.add(row)
        if len(self._places) > 1:
            self._write(INDEX, {"scan": None})
        return self._folder / INDEX

    def _write_scan(self, scan_name: str) -> None:
        """The page of a scan, all of whose discs are added."""
        places = self._places[scan_name]
        maps = [self._maps.pop(place) for place in places]
        graded, data = self._graded, self._graded.data
        rows = graded.rows[places]
        picture = read_scan_picture(data, scan_name)
        affines = [window_affine(affine) for affine in data.affine[rows]]
        if picture:
            scan = np.stack([grey_pixels(each) for each in picture["slices"]], axis=2)
            grid = Grid(np.array(picture["affine"]), scan.shape)
        else:
            grid = around(affines)
            scan = pasted(grid, affines, (central_window(data.volume(row)) >> 8 for row in rows))
        names, masks = labelled(grid, picture, affines, data.level[rows].tolist())
        volumes = {"scan": scan, "masks": masks}
        if "lesion" in data.masks:
            lesions = ((central_window(data.mask("lesion", row)) > 0).astype(np.uint8) for row in rows)
            volumes["lesions"] = pasted(grid, affines, lesions, order=0)
        seen = [(affine, each) for affine, each in zip(affines, maps, strict=True) if each is not None]
        for column, task in enumerate(graded.tasks if seen else ()):
            of_task = (brightened(each[column], grid, affine) for affine, each in seen)
            volumes[f"hotspots-{task.name}"] = pasted(grid, [affine for affine, _ in seen], of_task)
        number = list(self._places).index(scan_name)
        facts = {
            "tasks": [{"name": task.name, "title": title(task.name)} for task in graded.tasks],
            "discs": sorted(map(self._disc, places, affines), key=lambda disc: LEVELS.index(disc["level"])),
            "labels": names,
            "whole": picture is not None,
            "flat": grid.shape[2] < FEW_SLICES,
            "hotspots": bool(seen),
        }
        files = {
            name: base64.b64encode(whole_numbers_as_nifti(values, grid.affine)).decode()
            for name, values in volumes.items()
        }
        name = _name(number) if len(self._places) > 1 else INDEX
        self._write(name, {"scan": number, "facts": facts, "volumes": files})

    def _disc(self, place: int, affine: Float[np.ndarray, "4 4"]) -> dict[str, Any]:
        """What the page's script needs of a disc; its centre in RAS, mm, as NiiVue counts."""
        graded = self._graded
        middle = affine @ [*((np.array(WINDOW_SHAPE) - 1) / 2), 1]
        given = [(task, self._grades[task.name][place]) for task in graded.tasks]
        return {
            "level": str(graded.data.level[graded.rows[place]]),
            "centre": [round(float(mm), 2) for mm in (-middle[0], -middle[1], middle[2])],
            "grades": [
                [task.grades[grade], round(float(graded.probabilities[task.name][place, grade]), 3)]
                for task, grade in given
            ],
        }

    def _write(self, name: str, about: dict[str, Any]) -> None:
        pages = [(_name(number), self._names[scan]) for number, scan in enumerate(self._places)]
        parts = style_and_script(Path(__file__).parent / "templates", "niivue", bundle=bundle())
        text = (
            _environment()
            .get_template("niivue.html")
            .render(**parts, **about, pages=pages, index=INDEX, version=NIIVUE_VERSION, research_only=RESEARCH_ONLY)
        )
        write_atomically(self._folder / name, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def prepare_folder(folder: Path) -> None:
    """Make the pages' folder, and remove the pages of an earlier evaluation from it.

    Raises:
        SpinejaxError: it cannot be made, or Jinja2 or nibabel is not installed.
    """
    _environment()
    for old in make_folder(folder, "--niivue").glob("scan-[0-9][0-9][0-9].html"):
        old.unlink()


def around(affines: Sequence[Float[np.ndarray, "4 4"]]) -> Grid:
    """A grid that holds all windows of a scan, turned as the one in the middle, in its voxels."""
    middle = affines[len(affines) // 2]
    rows, columns, slices = WINDOW_SHAPE
    ends = np.array([[r, c, s, 1] for r in (0, rows - 1) for c in (0, columns - 1) for s in (0, slices - 1)], float)
    corners = np.concatenate([np.linalg.inv(middle) @ affine @ ends.T for affine in affines], axis=1)[:3]
    first, last = np.floor(corners.min(1)), np.ceil(corners.max(1))
    shift = np.eye(4)
    shift[:3, 3] = first
    height, width, depth = (last - first + 1).astype(int).tolist()
    return Grid(middle @ shift, (height, width, depth))


def pasted(
    grid: Grid, affines: Sequence[Float[np.ndarray, "4 4"]], windows, *, order: int = 1
) -> UInt8[np.ndarray, "H W S"]:
    """Windows in their places of a grid, the larger value where they overlap; `order` 1 is linear, 0 the nearest."""
    whole = np.zeros(grid.shape, np.uint8)
    for affine, window in zip(affines, windows, strict=True):
        place, at = _voxels_of(grid, affine)
        values = scipy.ndimage.map_coordinates(window, at, order=order, output=np.float32)
        whole[place] = np.maximum(whole[place], np.rint(values).astype(np.uint8))
    return whole


def _voxels_of(
    grid: Grid, affine: Float[np.ndarray, "4 4"], shape: Sequence[int] = WINDOW_SHAPE
) -> tuple[tuple[slice, ...], Float[np.ndarray, "3 h w s"]]:
    """The box of a grid's voxels around a window, and the places of those voxels in the window."""
    to_grid = np.linalg.inv(grid.affine) @ affine
    ends = np.array([[r, c, s, 1] for r in (0, shape[0] - 1) for c in (0, shape[1] - 1) for s in (0, shape[2] - 1)])
    corners = (to_grid @ ends.T)[:3]
    first = np.clip(np.floor(corners.min(1)), 0, grid.shape).astype(int)
    last = np.clip(np.ceil(corners.max(1)) + 1, first, grid.shape).astype(int)
    place = tuple(slice(*each) for each in zip(first, last, strict=True))
    voxels = np.stack([*np.mgrid[place], np.ones(last - first)])
    return place, np.tensordot(np.linalg.inv(to_grid)[:3], voxels, axes=1)


def labelled(
    grid: Grid, picture: ScanPicture | None, affines: Sequence[Float[np.ndarray, "4 4"]], levels: Sequence[str]
) -> tuple[list[str], UInt8[np.ndarray, "H W S"]]:
    """Names of labels, the first for nothing; and the voxels of vertebral bodies and discs, each with its label.

    A body is what its corners enclose, on its slices; a disc is the box that the report draws, on the slices that the
    network sees.
    """
    names, masks = [""], np.zeros(grid.shape, np.uint8)
    bodies = picture["bodies"] if picture else []
    for body in bodies:
        corners = [corner for corner in body["corners"] if corner is not None]
        if len(corners) > 2:
            names.append(body["name"])
            rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]]
            inside = shapely.contains_xy(shapely.Polygon(corners), rows, columns)
            masks[inside, slice(*body["slices"])] = len(names) - 1
    for level, affine in zip(levels, affines, strict=True):
        names.append(level)
        place, (rows, columns, slices) = _voxels_of(grid, affine)
        top, bottom, left, right = spine.box_of(bodies, np.linalg.inv(grid.affine) @ affine, level)
        inside = (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
        inside &= (slices >= -0.5) & (slices <= WINDOW_SHAPE[2] - 0.5)
        masks[place][inside & (masks[place] == 0)] = len(names) - 1
    return names, masks


def brightened(
    map: Float[np.ndarray, "112 224 9"], grid: Grid, affine: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "112 224 9"]:
    """A map from 0 to 255, its brightest voxels at 255; blurred in plane, so that the grid misses no peak."""
    coarser = np.linalg.norm(grid.affine[:3, :2], axis=0) / np.linalg.norm(affine[:3, :2], axis=0)
    blurred = scipy.ndimage.gaussian_filter(map, (*np.maximum(coarser, 1) * BLUR, 0))
    brightest = np.percentile(blurred, BRIGHTEST) or blurred.max() or 1.0
    return (255 * blurred / brightest).clip(0, 255)


@functools.cache
def bundle() -> str:
    """NiiVue's script."""
    return lzma.decompress(BUNDLE.read_bytes()).decode("utf-8")


def _name(number: int) -> str:
    return f"scan-{number + 1:03d}.html"


@functools.cache
def _environment():
    return templates("spinejax.report", "Option --niivue needs Jinja2")
