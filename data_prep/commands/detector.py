"""The commands of the detector: `train-detector` and `detect-eval`."""

import json
import sys
from pathlib import Path

from rich.console import Console

from data_prep.commands.printing import PROGRESS, print_notes
from data_prep.commands.reading import Reading
from spinejax.errors import SpinejaxError, printable
from spinejax.files.atomic import write_atomically


def train_detector(
    *,
    out: Path,
    spider: Path | None = None,
    sudirman: Path | None = None,
    series: str = "t2_SPACE",
    begin: Path | None = None,
    steps: int = 5000,
    endplate_steps: int = 0,
    learning_rate: float = 3e-3,
    phantoms: int = 150,
    seed: int = 0,
    workers: int = 1,
) -> int:
    """Train the five detectors of vertebral bodies, each without one fifth of the patients.

    Args:
        out: File of the weights (.npz). An interrupted run continues.
        spider: ROOT: the folder with SPIDER's images/ and masks/, and perhaps level_points.csv. Without it, one network
            trains on phantoms alone.
        sudirman: ROOT: the folder with images/ and boxes.csv of the Lumbar Spine MRI Dataset.
        series: Series with masks to read: the scans named <patient>_<series>.mha.
        begin: File of weights (.npz) to start from. Default: random weights.
        steps: Number of steps of each network that finds bodies. 0 keeps those of --begin.
        endplate_steps: Number of steps of each network that looks at endplates. Default: four fifths of --steps, or
            4,000 with --steps 0.
        learning_rate: Highest learning rate, reached after 15 % of the steps of each part.
        phantoms: Number of phantoms.
        seed: Seed of weights, phantoms and crops.
        workers: Number of networks that are trained at the same time, each in a process of its own.
    """
    from data_prep.detector.training import run

    recipe = run.Recipe(
        steps=steps, endplate_steps=endplate_steps, learning_rate=learning_rate, phantoms=phantoms, seed=seed
    )
    run.train_detector(
        *(spider, out, recipe),
        sudirman=sudirman,
        begin=begin,
        series=series,
        num_workers=workers,
        tell=PROGRESS.print,
    )
    print(out)
    return 0


def detect_eval(
    reading: Reading,
    *,
    out: Path,
    spider: Path | None = None,
    sudirman: Path | None = None,
    ensemble: bool = False,
    sheets: Path | None = None,
    workers: int = 1,
    weights: Path | None = None,
) -> int:
    """Measure how well vertebral bodies are detected: out-of-fold on the sets that the networks learned from (--spider,
    --sudirman), or in any scans that have masks (PATHS and --masks).

    Args:
        out: File of the metrics (JSON).
        spider: ROOT: the folder with SPIDER's images/ and masks/, and perhaps level_points.csv. Each patient is
            measured with the network that has not seen him.
        sudirman: ROOT: the folder with images/ and boxes.csv of the Lumbar Spine MRI Dataset, likewise.
        ensemble: With --spider or --sudirman, measure all networks together. That is not out-of-fold.
        sheets: With --spider or --sudirman, folder for overlays of all scans (PNG), the most doubtful first, and
            of those with wrong levels once more.
        workers: With --spider or --sudirman, number of processes.
        weights: File of weights (.npz) of `train-detector`. Default: those that come with the package.
    """
    from data_prep.detector.weights import SHIPPED
    from data_prep.look import out_of_fold
    from data_prep.look.detector_accuracy import table
    from data_prep.look.marked_sheets import marked_sheets

    weights = weights or SHIPPED
    if out.resolve() == weights.with_suffix(".json").resolve():
        raise SpinejaxError(f"--out {out}: that file belongs to the weights. Give another.")
    measured = []
    if spider is None and sudirman is None:
        metrics = _by_masks(reading, weights)
        title, summaries = "by masks", {"scans": metrics["summary"]}
    elif reading.paths or reading.masks:
        raise SpinejaxError(
            "detect-eval measures either PATHS with --masks, or --spider and --sudirman: give one of them."
        )
    else:
        some = out_of_fold.cases(spider, sudirman)
        some = some if ensemble else out_of_fold.with_unseen_members(some, weights)
        measured = out_of_fold.measure(some, weights=weights, num_workers=workers, report=_report)
        metrics = out_of_fold.results(measured, weights=weights)
        title, summaries = metrics["measured"], out_of_fold.summaries(metrics)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda part: part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n"))
    Console(width=None if sys.stdout.isatty() else 160).print(table(title, summaries))
    for path in marked_sheets(measured, sheets) if sheets else ():
        print(path)
    return 0


def _by_masks(reading: Reading, weights: Path) -> dict:
    from data_prep.look.detector_accuracy import measure

    if reading.masks is None:
        raise SpinejaxError("detect-eval compares with masks: give --masks DIR, or --spider ROOT and --sudirman ROOT.")
    jobs, found = reading.jobs()
    masked = [job for job, series in zip(jobs, found.series, strict=True) if len(job.sources) > len(series.files)]
    print_notes([*map(str, found.left_out), *found.notes, *found.failures.values()])
    print(f"{len(masked)} of {len(jobs)} scans have a mask", file=sys.stderr)
    return measure(masked, weights=weights, report=_report)


def _report(line: str) -> None:
    print(printable(line), file=sys.stderr)
