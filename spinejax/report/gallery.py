"""What an evaluation shows of its hotspots: maps go by once, as a stream, and leave figures and measures behind."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from spinejax.data.dataset import DataSet
from spinejax.geometry import INTENSITY_STEP, WINDOW_SHAPE, central_window
from spinejax.inference.graded import Graded
from spinejax.inference.hotspots import Method
from spinejax.metrics import pointing
from spinejax.metrics.pointing import Pointing
from spinejax.report import figures, hotspot_files
from spinejax.report.figures import Example
from spinejax.tasks import Task


def write_hotspots(
    stream: Iterable[tuple[np.ndarray, np.ndarray]],
    folder: Path,
    graded: Graded,
    grades: np.ndarray,
    method: Method,
    *,
    seed: int = 0,
    also: Sequence[Callable[[int, np.ndarray], None]] = (),
) -> Mapping[str, Pointing]:
    """Write a stream of hotspots into a folder: `hotspots.h5`, `nifti/`, and the gallery's figures.

    Args:
        stream: from `hotspots.stream`.
        folder: made if missing.
        graded: the discs.
        grades, seed: as for `Gallery`.
        method: how the maps are computed.
        also: called with each disc's row and maps, float32[T, 112, 224, 9].

    Returns:
        As `Gallery.pointing`.
    """
    (folder / "nifti").mkdir(parents=True, exist_ok=True)
    data, tasks = graded.data, graded.tasks
    gallery = Gallery(data, tasks, grades, graded.rows, seed=seed)

    def discs():
        for batch_rows, batch_maps in stream:
            for row, maps in zip(batch_rows, batch_maps, strict=True):
                hotspot_files.write_nifti(folder / "nifti", data, row, tasks, maps)
                gallery.add(row, np.abs(maps))
                for add in also:
                    add(row, maps)
                yield row, maps

    hotspot_files.write_maps(folder / "hotspots.h5", discs(), data, tasks, grades, method)
    gallery.write_figures(folder)
    return gallery.pointing()


class Gallery:
    """Looks at every disc's maps once, and keeps a few of them, sums, and how well each points.

    Args:
        data: the data set.
        tasks: the network's.
        grades: int[D, T]. Whose score was traced back, for every row of the data set.
        rows: int[M]. The discs that will come.
        seed: of the choice of examples.
    """

    def __init__(self, data: DataSet, tasks: Sequence[Task], grades: np.ndarray, rows: np.ndarray, *, seed: int = 0):
        self._data, self._tasks, self._grades = data, tasks, grades
        self._column = {task.name: data.tasks.index(task) for task in tasks if task in data.tasks}
        self._chosen: dict[str, int | None] = {}
        for t, task in enumerate(tasks):
            self._chosen[task.name] = self._choose(t, rows, np.random.default_rng([seed, t]))
        self._examples: dict[str, Example] = {}
        self._count = {task.name: 0 for task in tasks}
        self._windows = np.zeros((len(tasks), *WINDOW_SHAPE))
        self._maps = np.zeros((len(tasks), *WINDOW_SHAPE))
        self._measures: dict[str, list[dict[str, float]]] = {task.name: [] for task in tasks}
        self._patients: list[str] = []

    def add(self, row: int, maps: np.ndarray) -> None:
        """Take in one disc: its row in the data set and its maps, float32[T, 112, 224, 9]."""
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
                self._count[task.name] += 1
                self._windows[t] += window
                self._maps[t] += map / map.sum()  # every disc counts alike, however steep the network is there
            if row == self._chosen[task.name]:
                title = f"{task.name}: {task.grades[self._grades[row, t]]}   ({data.scan[row]}, {data.level[row]})"
                self._examples[task.name] = Example(title, window, map, lesion if lesion.any() else None)

    def write_figures(self, folder: Path) -> None:
        """Write `examples.png`, the paper's Fig. 3, and `mean-maps.png`, of discs graded worse than a task's first."""
        examples = [self._examples[task.name] for task in self._tasks if task.name in self._examples]
        if examples:
            figures.hotspot_examples(examples, folder / "examples.png")
        means = [
            Example(f"{task.name} (n = {count})", self._windows[t] / count, self._maps[t] / count)
            for t, task in enumerate(self._tasks)
            if (count := self._count[task.name])
        ]
        if means:
            figures.mean_maps(means, folder / "mean-maps.png")

    def pointing(self) -> Mapping[str, Pointing]:
        """Task name → how well its maps point, for tasks that have a lesion mask or a side."""
        found = {
            task.name: pointing.summarise(self._measures[task.name], self._patients)
            for task in self._tasks
            if self._patients
        }
        return {name: each for name, each in found.items() if each.n or not np.isnan(each.estimates["own_side"].value)}

    def _choose(self, t: int, rows: np.ndarray, rng: np.random.Generator) -> int | None:
        """A random disc that the network graded worse than the first grade.

        Rightly so, if there is one; and one that stands for no other task yet, if there is one.
        """
        worse = rows[self._grades[rows, t] > 0]
        column = self._column.get(self._tasks[t].name)
        if column is not None:
            right = worse[self._data.labels[worse, column] == self._grades[worse, t]]
            worse = right if len(right) else worse
        others = np.setdiff1d(worse, [row for row in self._chosen.values() if row is not None])
        worse = others if len(others) else worse
        return int(rng.choice(worse)) if len(worse) else None
