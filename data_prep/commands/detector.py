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
    series: str = "t2_SPACE",
    begin: Path | None = None,
    steps: int = 12000,
    learning_rate: float = 3e-3,
    phantoms: int = 120,
    seed: int = 0,
) -> int:
    """Train the network that finds vertebral bodies, on SPIDER's scans with masks and on phantoms.

    Args:
        out: File of the weights (.npz). An interrupted run continues.
        spider: ROOT: the folder with SPIDER's images/ and masks/. Without it, the network trains on phantoms alone.
        series: Series to read: the scans named <patient>_<series>.mha.
        begin: File of weights (.npz) to start from. Default: random weights.
        steps: Number of steps of the optimiser.
        learning_rate: Highest learning rate, reached after 15 % of the steps.
        phantoms: Number of phantoms.
        seed: Seed of weights, phantoms and crops.
    """
    from data_prep.detector.training import run
    from spinejax.parallel import runtime

    runtime.set_up()
    recipe = run.Recipe(steps=steps, learning_rate=learning_rate, phantoms=phantoms, seed=seed)
    run.train_detector(spider, out, recipe, begin=begin, series=series, tell=PROGRESS.print)
    print(out)
    return 0


def detect_eval(reading: Reading, *, out: Path, development: bool = False, weights: Path | None = None) -> int:
    """Detect vertebral bodies in scans that have masks, and measure how well.

    Args:
        out: File of the metrics (JSON).
        development: Measure on six patients only, which never train: those with masks whose ids have the smallest
            SHA-256.
        weights: File of weights (.npz) of `train-detector`. Default: those that come with the package.
    """
    from data_prep.detector.training.truth import development_patients
    from data_prep.detector.weights import SHIPPED
    from data_prep.look.detector_accuracy import measure, table

    if reading.masks is None:
        raise SpinejaxError("detect-eval compares with masks: give --masks DIR.")
    weights = weights or SHIPPED
    if out.resolve() == weights.with_suffix(".json").resolve():
        raise SpinejaxError(f"--out {out}: that file belongs to the weights. Give another.")
    jobs, found = reading.jobs()
    pairs = zip(jobs, found.series, strict=True)
    masked = [(job, series.patient) for job, series in pairs if len(job.sources) > len(series.files)]
    print_notes([*map(str, found.left_out), *found.notes, *found.failures.values()])
    print(f"{len(masked)} of {len(jobs)} scans have a mask", file=sys.stderr)
    chosen = development_patients(patient for _, patient in masked)
    jobs = [job for job, patient in masked if patient in chosen or not development]
    metrics = measure(jobs, weights=weights, report=lambda line: print(printable(line), file=sys.stderr))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda part: part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n"))
    Console(width=None if sys.stdout.isatty() else 120).print(table(metrics["summary"]))
    return 0
