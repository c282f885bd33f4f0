"""What an evaluation keeps of its hotspots: files, plots and metrics, made from one pass over a stream of maps."""

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Float32, Int

from spinejax.data.dataset import DataSet
from spinejax.geometry import INTENSITY_STEP, WINDOW_SHAPE, central_window
from spinejax.inference.graded import Graded
from spinejax.inference.hotspots import Method
from spinejax.metrics import pointing
from spinejax.metrics.pointing import Pointing
from spinejax.report import figures, hotspot_files
from spinejax.report.figures import Example
from spinejax.report.page import Report
from spinejax.tasks import Task

Item = TypeVar("Item")
Result = TypeVar("Result")


MAX_THREADS = 16  # by default


def write_hotspots(
    stream: Iterable[tuple[Int[np.ndarray, "M"], Float32[np.ndarray, "M T 112 224 9"]]],
    folder: Path,
    graded: Graded,
    grades: Int[np.ndarray, "D T"],
    method: Method,
    *,
    seed: int = 0,
    page: Report | None = None,
    also: Sequence[Callable[[np.integer, np.ndarray], None]] = (),
    threads: int = 0,
) -> Mapping[str, Pointing]:
    """Write hotspots into a folder: `hotspots.h5`, `nifti/`, and the gallery's figures. Returns `Gallery.pointing`.

    Args:
        stream: from `hotspots.stream`.
        grades, seed: as for `Gallery`.
        page: to which the discs are added.
        also: called with each disc's row and maps, in the discs' order.
        threads: how many compress files and pictures; 0 takes one for each core, at most 16. The bytes do not depend
            on it.
    """
    (folder / "nifti").mkdir(parents=True, exist_ok=True)
    data, tasks = graded.data, graded.tasks
    gallery = Gallery(data, tasks, grades, graded.rows, seed=seed)

    def write_own_files(disc: tuple[np.integer, np.ndarray]) -> tuple[np.integer, np.ndarray, dict[str, str]]:
        row, maps = disc
        hotspot_files.write_nifti(folder / "nifti", data, row, tasks, maps)
        return row, maps, page.pictures(row, maps) if page else {}

    def discs() -> Iterator[tuple[np.integer, np.ndarray]]:
        each = (disc for rows, maps in stream for disc in zip(rows, maps, strict=True))
        num_threads = threads or min(MAX_THREADS, os.cpu_count() or 1)
        with contextlib.closing(in_threads(write_own_files, each, num_threads)) as written:
            for row, maps, pictures in written:
                gallery.add(row, np.abs(maps))
                if page:
                    page.add_pictures(row, pictures)
                for add in also:
                    add(row, maps)
                yield row, maps

    hotspot_files.write_maps(folder / "hotspots.h5", discs(), data, tasks, grades, method)
    gallery.write_figures(folder)
    return gallery.pointing()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Generator[Result]:
    """`map(function, items)` by a pool of threads: in order, with `num_threads` + 1 items at most in memory.

    Items are taken by the caller's thread.
    """
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        running: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Gallery:
    """Examples, mean maps and measures of hotspots, collected disc by disc.

    Args:
        data, tasks: the data set, and the network's tasks.
        grades: the grade whose evidence was traced, for every row of the data set.
        rows: the discs that will be added.
        seed: seed of the choice of examples.
    """

    def __init__(
        self,
        data: DataSet,
        tasks: Sequence[Task],
        grades: Int[np.ndarray, "D T"],
        rows: Int[np.ndarray, "M"],
        *,
        seed: int = 0,
    ):
        self._data, self._tasks, self._grades = data, tasks, grades
        self._column = {task.name: data.tasks.index(task) for task in tasks if task in data.tasks}
        self._chosen: list[int | None] = []
        for t in range(len(tasks)):
            self._chosen.append(self._choose(t, rows, np.random.default_rng([seed, t])))
        self._examples: dict[int, Example] = {}
        self._count = [0] * len(tasks)
        self._windows, self._maps = np.zeros((2, len(tasks), *WINDOW_SHAPE))
        self._measures: dict[str, list[dict[str, float]]] = {task.name: [] for task in tasks}
        self._patients: list[str] = []

    def add(self, row: int | np.integer, maps: Float[np.ndarray, "T 112 224 9"]) -> None:
        """Add one disc: its row in the data set, and its maps, ≥ 0."""
        data = self._data
        window = central_window(data.volume(row)) * INTENSITY_STEP
        lesions = data.mask("lesion", row) if "lesion" in data.masks else None
        region = central_window(data.mask("region", row)) if "region" in data.masks else None
        self._patients.append(data.patient[row])
        for t, (task, map) in enumerate(zip(self._tasks, maps, strict=True)):
            lesion = np.zeros(WINDOW_SHAPE, bool)
            if lesions is not None and task.name in self._column:
                lesion = pointing.lesion_of(lesions, self._column[task.name])
            abnormal = self._grades[row, t] > 0
            side = pointing.own_side(task.name, map, region) if region is not None and abnormal else np.nan
            measures = pointing.point(map, lesion, data.affine[row], data.slices[row])
            self._measures[task.name].append(measures | {"own_side": side})
            if abnormal and map.any():
                self._count[t] += 1
                self._windows[t] += window
                self._maps[t] += map / map.sum()  # every disc counts alike, whatever its gradients' size
            if row == self._chosen[t]:
                title = f"{task.name}: {task.grades[self._grades[row, t]]}   ({data.scan[row]}, {data.level[row]})"
                self._examples[t] = Example(title, window, map, lesion if lesion.any() else None)

    def write_figures(self, folder: Path) -> None:
        """Write `examples.png`, the paper's Fig. 3, and `mean-maps.png`; both of discs graded above the first grade."""
        if self._examples:
            figures.hotspot_examples([self._examples[t] for t in sorted(self._examples)], folder / "examples.png")
        means = [
            Example(f"{task.name} (n = {count})", window / count, map / count)
            for task, count, window, map in zip(self._tasks, self._count, self._windows, self._maps, strict=True)
            if count
        ]
        if means:
            figures.mean_maps(means, folder / "mean-maps.png")

    def pointing(self) -> Mapping[str, Pointing]:
        """Task name → how well its maps point, for tasks that have a lesion mask or a side."""
        if not self._patients:
            return {}
        found = {name: pointing.summarise(each, self._patients) for name, each in self._measures.items()}
        return {name: each for name, each in found.items() if each.n or not np.isnan(each.estimates["own_side"].value)}

    def _choose(self, t: int, rows: np.ndarray, rng: np.random.Generator) -> int | None:
        """A random disc graded above the first grade; if possible rightly, and no other task's example."""
        worse = rows[self._grades[rows, t] > 0]
        column = self._column.get(self._tasks[t].name)
        if column is not None:
            right = worse[self._data.labels[worse, column] == self._grades[worse, t]]
            worse = right if len(right) else worse
        others = np.setdiff1d(worse, [row for row in self._chosen if row is not None])
        worse = others if len(others) else worse
        return int(rng.choice(worse)) if len(worse) else None
