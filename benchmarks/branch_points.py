"""The paper's Table 2 on other data: the effect of the branch point, of random views, and of grading with 54 views.

    python -m benchmarks.branch_points --data DISCS --out RUNS

For every branch point, with and without random views, it trains two networks, with validation and test swapped. It
grades each with one view and with 54, and writes `table.json`, `table.md` and `plot.png`. Finished runs are kept: after
an interruption, start the same command again. Options after `--` go to every training: `-- --width 1 --batch-size 256`
is the paper's network.

On a pod, start the same command on every host, with `RUNS` on a disk that all hosts share and with
`--every=--distributed`, which makes `train.py` and `evaluate.py` one program over all hosts.
"""

import dataclasses
import io
import itertools
import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.running import require_trained, run_script, start
from benchmarks.tables import table
from spinejax import paper
from spinejax.config import PRESETS
from spinejax.network.spinenet import BRANCH_POINTS
from spinejax.network.views import ViewRanges

SWAPS = (("validation", "test"), ("test", "validation"))
"""The split that chooses a run's epoch, and the one that tests it: the two networks of each experiment (Sect. 5)."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train and test every branch point."""

    data: Path
    """Data set."""
    out: Path
    """Folder of the runs and the table."""
    preset: str = "quickstart"
    """Preset of every training."""
    branch_points: tuple[str, ...] = tuple(str(point).lower() for point in BRANCH_POINTS)
    """Columns of the table."""
    augmentation: tuple[bool, ...] = (True, False)
    """Train with random views, without, or both."""
    every: str = ""
    """Options of training and evaluation both: `--every="--distributed --start-seconds 600"`."""
    options: tyro.conf.Positional[tuple[str, ...]] = ()
    """Options of every training, after `--`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network of the table."""

    branch_point: str
    augmented: bool
    seed: int

    @property
    def name(self) -> str:
        """The name of its run's folder."""
        return f"{self.branch_point}-{'views' if self.augmented else 'no-views'}-{self.seed}"


def main(arguments: Arguments) -> None:
    """Make every run, then the table."""
    if arguments.preset not in PRESETS:
        sys.exit(f"--preset {arguments.preset}: expected one of {', '.join(PRESETS)}.")
    cells = [Cell(*each) for each in itertools.product(arguments.branch_points, arguments.augmentation, (0, 1))]
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
        train_and_test(cell, arguments)
    rows = list(summarise(cells, arguments.out))
    put(arguments.out / "table.json", json.dumps(rows, indent=1, allow_nan=False).encode() + b"\n")
    put(arguments.out / "table.md", markdown(rows).encode())
    put(arguments.out / "plot.png", plot(rows))
    print(markdown(rows))


def train_and_test(cell: Cell, arguments: Arguments) -> None:
    """Train one network and grade its test split with one view and with 54. Finished parts are skipped."""
    chooses, tests = SWAPS[cell.seed]
    run = arguments.out / cell.name
    every = shlex.split(arguments.every)
    if not (run / "export").is_dir():
        views = () if cell.augmented else no_views()
        run_script(
            *("train.py", arguments.preset, "--data", arguments.data, "--workdir", run, "--seed", cell.seed),
            *("--branch-point", cell.branch_point, "--validation-split", chooses, *views),
            *(*every, *arguments.options),
        )
        require_trained(run)
    for tta in (False, True):
        out = judged(run, tta)
        if not (out / "results.json").is_file():
            flags = ("--tta",) if tta else ()
            run_script(
                *("evaluate.py", "--checkpoint", run, "--data", arguments.data, "--split", tests, "--out", out),
                *(*flags, *every),
            )


def no_views() -> list[str]:
    """Options that turn every random view into the identity."""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(ViewRanges)]
    return list(itertools.chain.from_iterable((f"--views.{name}", "0") for name in names))


def judged(run: Path, tta: bool) -> Path:
    """The folder of a run's evaluation on its test split."""
    return run / f"judged-{54 if tta else 1}"


def summarise(cells: Sequence[Cell], out: Path) -> Iterator[dict]:
    """A row for each branch point, augmentation and number of views: each task's mean and standard deviation, in %."""
    by_experiment = itertools.groupby(cells, key=lambda cell: (cell.branch_point, cell.augmented))
    for (branch_point, augmented), pair in by_experiment:
        runs = [out / cell.name for cell in pair]
        for tta in (False, True):
            results = [json.loads((judged(run, tta) / "results.json").read_text())["tasks"] for run in runs]
            accuracies = {
                task: [100 * each[task]["mean_per_class_accuracy"]["value"] for each in results] for task in results[0]
            }
            yield {
                "branch_point": branch_point,
                "augmented": augmented,
                "num_views": 54 if tta else 1,
                "tasks": {task: spread(values) for task, values in accuracies.items()},
                "mean": spread(np.mean(list(accuracies.values()), axis=0)),
            }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean, and the standard deviation with divisor n - 1."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


def markdown(rows: Sequence[Mapping]) -> str:
    """The table of docs/results.md."""
    tasks = list(rows[0]["tasks"])
    lines = []
    for row in rows:
        figures = [*row["tasks"].values(), row["mean"]]
        cells = [
            row["branch_point"],
            "yes" if row["augmented"] else "no",
            "1 view" if row["num_views"] == 1 else f"{row['num_views']} views",
        ]
        cells += [f"{each['mean']:.1f} ± {each['std']:.1f}" for each in figures]
        lines.append(cells)
    return table(("branch point", "random views", "graded with", *tasks, "mean"), lines)


def plot(rows: Sequence[Mapping]) -> bytes:
    """A PNG: the mean over tasks by branch point, a line for each way of training and grading, and the paper's line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    experiments = itertools.groupby(
        sorted(rows, key=lambda row: (row["augmented"], row["num_views"])), lambda r: (r["augmented"], r["num_views"])
    )
    for (augmented, num_views), group in experiments:
        group = list(group)
        label = f"{'random views' if augmented else 'no random views'}, graded with {num_views}"
        points = [row["branch_point"] for row in group]
        means, stds = ([row["mean"][key] for row in group] for key in ("mean", "std"))
        axes.errorbar(points, means, stds, marker="o", capsize=3, label=label)
    published = {str(point).lower(): np.mean([mean for mean, _ in column]) for point, column in paper.TABLE_2.items()}
    axes.plot(list(published), list(published.values()), "k:", label="paper, on its own data")
    axes.set(xlabel="branch point", ylabel="mean per-class accuracy over tasks, %")
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    return drawn.getvalue()


def put(path: Path, content: bytes) -> None:
    """Write a file atomically. All hosts of a pod write the same content, so each uses its own temporary name."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    start("branch_points", Arguments, main)
