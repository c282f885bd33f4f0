"""How large a report may be: writing, first paint and the browser's memory for 10,000 discs, and for a single scan.

    python evaluate.py --scan examples/7_t2_SPACE.mha --hotspots --out runs/demo/evaluation
    python -m benchmarks.large_report --evaluation runs/demo/evaluation [--discs 10000] [--json docs/large-report.json]

The discs, their hotspots and the scan's picture are those of the evaluation, repeated; patients, grades, labels and
probabilities are made up. The pictures of each disc of the evaluation are packed once and then repeated, so the CPU
time of writing is that of the report of the evaluation alone. Chromium, headless, opens the pages from the disk, three
times each. Its memory is the sum of its processes' proportional set sizes (Linux), so that what they share is counted
once. It needs Chromium with its driver, and the extras `dev` and `report`.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
from jaxtyping import Float
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.running import start
from spinejax.data.dataset import DataSet
from spinejax.inference.graded import Graded, labels_of
from spinejax.metrics import calibration, grading
from spinejax.report import page
from spinejax.report.page import Report
from spinejax.report.results import Findings
from spinejax.tasks import from_json
from tests.browser import BROWSER, DRIVER, FLAGS

ABOUT = {
    "split": "test", "num_views": 54, "average": "probabilities", "step": 1, "data": "made up", "discs": 0,
    "trained_on_this_data": False, "validation_split": None, "split_chose_the_step": False, "unusual_discs": None,
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Measure large reports."""

    evaluation: Path
    """Folder of `evaluate.py --scan … --hotspots`."""
    discs: int = 10_000
    """Discs of the large report."""
    visited: int = 150
    """Discs that are looked at, spread over all, before the memory is read again."""
    out: Path | None = None
    """Folder for the reports. Default: one that is deleted."""
    json: Path | None = None
    """File for the numbers."""


class Repeated:
    """A data set's discs again and again, as scans of other patients."""

    def __init__(self, data: DataSet, folder: Path, copies: int):
        self._data, self._folder = data, folder
        self.folder, self.digest, self.manifest, self.tasks = folder, data.digest, {}, data.tasks
        self.shards = folder
        columns = (data.level, data.slices, data.affine)
        self.level, self.slices, self.affine = (np.concatenate([each] * copies) for each in columns)
        copy = np.repeat(np.arange(copies), len(data))
        self.scan = np.array([f"{number:016x}" for number in copy])
        self.patient = np.array([f"{number // 2:08x}{0:08x}" for number in copy])  # two scans each
        (folder / "scans").mkdir(parents=True)
        [picture] = (data.shards / "scans").glob("*.json")
        for scan in set(self.scan.tolist()):
            (folder / "scans" / f"{scan}.json").symlink_to(picture.resolve())

    def __len__(self) -> int:
        return len(self.level)

    def volume(self, row: int) -> np.ndarray:
        """The disc volume of a row."""
        return self._data.volume(row % len(self._data))


def made_up(data: Any, tasks: Any) -> tuple[Graded, Findings]:
    """All discs with random grades and labels, of which nine in ten agree."""
    rng, rows = np.random.default_rng(0), np.arange(len(data))
    probabilities = {task.name: rng.dirichlet(np.full(task.num_grades, 0.4), len(rows)) for task in tasks}
    labels = {
        name: np.where(rng.random(len(rows)) < 0.9, each.argmax(1), rng.integers(each.shape[1], size=len(rows)))
        for name, each in probabilities.items()
    }
    spread = {task.name: rng.uniform(0, 0.1, len(rows)) for task in tasks}
    graded = Graded(data, rows, tasks, labels, probabilities, spread)
    task = tasks[0]
    discs = graded.labelled(task)
    result = grading.evaluate_task(task, discs.labels, discs.probabilities, discs.patients, num_resamples=20)
    doubt = calibration.doubt(task, *discs)
    return graded, Findings({**ABOUT, "discs": len(rows)}, "conv5", [result] if result else [], [doubt])


def write(
    folder: Path, graded: Graded, findings: Findings, maps: Float[np.ndarray, "N T 112 224 9"]
) -> dict[str, float]:
    """Write a report, and measure it."""
    traced = np.stack([graded.probabilities[task.name].argmax(1) for task in graded.tasks], axis=1)
    start = time.process_time()
    report = Report(folder, graded, traced)
    for row in graded.rows:
        report.add(row, maps[row % len(maps)])
    report.close(findings)
    files = list(folder.iterdir())
    return {
        "cpu_ms_per_disc": 1000 * (time.process_time() - start) / len(graded.rows),
        "page_MB": (folder / page.INDEX).stat().st_size / 1e6,
        "all_MB": sum(file.stat().st_size for file in files) / 1e6,
        "files": len(files),
    }


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a profile of its own. It logs nothing: a log of requests keeps what was loaded."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def memory_mb(driver: Any) -> dict[str, float]:
    """Of all processes of the browser, and of the page's own: proportional set sizes in MB, and CPU time in seconds."""
    found = []
    for each in psutil.Process(driver.service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            times = each.cpu_times()
            shows_pages = "--type=renderer" in each.cmdline()
            found.append((each.memory_full_info().pss / 1e6, times.user + times.system, shows_pages))
    size, seconds, _ = max((each for each in found if each[2]), default=(0.0, 0.0, True))
    return {"browser_MB": sum(each[0] for each in found), "page_MB": size, "page_cpu_s": seconds}


def opened(address: str, visited: int, num_discs: int) -> dict[str, Any]:
    """Open a page in a new browser: when it paints and can be used, and how much memory it takes then and later."""
    with chromium() as driver:

        def run(script: str) -> Any:
            return driver.execute_script(script)

        def wait_until(script: str) -> None:
            WebDriverWait(driver, 60, poll_frequency=0.02).until(lambda _: run(script))

        empty = memory_mb(driver)
        driver.get(address)
        wait_until("return document.body.dataset.drawn && document.body.dataset.spine")
        usable_ms = run("return performance.now()")
        paint_ms = run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
        found: dict[str, Any] = {"first_paint_s": paint_ms / 1000, "usable_s": usable_ms / 1000}
        found |= {"empty": empty, "opened": memory_mb(driver)}
        run("element('discs').scrollIntoView()")
        for disc in np.linspace(0, num_discs - 1, min(visited, num_discs)).astype(int):
            run(f"chooseDisc({disc})")
            wait_until(f"return document.body.dataset.drawn.startsWith('{disc} ')")
        found["visited"] = memory_mb(driver)
        run("element('sort').value = 'confidence'; list(); element('as-table').open = true; showTable()")
        run("window.saved = asCsv(state.shown.map((index) => facts.discs[index]))")
        found["table"] = memory_mb(driver)
        found["list_ms"] = run("const start = performance.now(); list(); return performance.now() - start")
        driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        found["collected"] = memory_mb(driver)
        return found


def main(arguments: Arguments) -> None:
    """Write both reports, open them, and print the numbers."""
    data = DataSet(arguments.evaluation / "discs")
    with h5py.File(arguments.evaluation / "hotspots" / "hotspots.h5") as file:
        tasks, maps = from_json(json.loads(file.attrs["tasks"])), file["map"][:].astype(np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        found: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
        one, findings = made_up(data, tasks)
        one = replace(one, labels=labels_of(data, one.rows, tasks))
        found["one_scan"] = {"discs": len(data), **write(out / "one", one, findings, maps)}
        windows, sheets = page.window_sheet, page.map_sheet
        packed = [(windows(page.central_window(data.volume(row))), sheets(maps[row])) for row in range(len(data))]
        many = Repeated(data, out / "data", -(-arguments.discs // len(data)))
        graded, findings = made_up(many, tasks)
        page.window_sheet, page.map_sheet = map(_in_turn, zip(*packed, strict=True))
        found["many"] = {"discs": len(many), **write(out / "many", graded, findings, maps)}
        page.window_sheet, page.map_sheet = windows, sheets
        del found["many"]["cpu_ms_per_disc"]
        for name, num_discs in (("one_scan", len(data)), ("many", len(many))):
            address = (out / name.removesuffix("_scan") / page.INDEX).resolve().as_uri()
            turns = [opened(address, arguments.visited if turn == 0 else 0, num_discs) for turn in range(3)]
            found[name] |= turns[0]
            for key in ("first_paint_s", "usable_s", "list_ms"):
                each = [turn[key] for turn in turns]
                found[name][key] = {"median": statistics.median(each), "all": each}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _in_turn(texts: Sequence[str]) -> Any:
    place = iter(range(2**40))
    return lambda _: texts[next(place) % len(texts)]


if __name__ == "__main__":
    start("large_report", Arguments, main)
