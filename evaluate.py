"""Grade discs with a trained network and say how well: `python evaluate.py --checkpoint RUN --data DIR [--tta]`."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import rich.console
import rich.progress
import tyro

from spinejax import (
    calibration,
    checkpoint,
    config,
    devices,
    figures,
    hotspots,
    map_files,
    metrics,
    pipeline,
    predict,
    report,
)
from spinejax.dataset import DataSet
from spinejax.errors import SpinejaxError, status_of
from spinejax.hotspots import Method
from spinejax.pointing import Pointing
from spinejax.showing import Gallery
from spinejax.tasks import UNLABELLED, Task


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Grade a split's discs, and compare with its labels where it has any."""

    checkpoint: Path
    """A run of `train.py` (its best step is taken), its `export` folder, or one step's folder."""
    data: Path
    """Data set: a folder that `python -m data_prep` made."""
    split: Literal["train", "validation", "test"] = "test"
    """Which discs."""
    tta: bool = False
    """Average over the paper's 54 views; without it the identity view alone."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over the views."""
    out: Path | None = None
    """Where results go; `evaluation-<split>-<views>-views` inside the run if not given."""
    batch_size: int = 32
    """Discs graded at once, over all devices."""
    calibrate: bool = False
    """Make the probabilities honest: divide each task's scores by a temperature fitted on the validation split."""
    hotspots: bool = False
    """Write each disc's evidence maps: one HDF5, NIfTI in the scan's space, figures, and how well they point."""
    hotspot: Method = dataclasses.field(default_factory=Method)
    """How they are made."""
    trained_views: bool = True
    """Draw their views as in training, from the run's `config.json` if it is there, not from `--hotspot.ranges`."""
    hotspot_grades: tuple[tuple[str, str], ...] = ()
    """Trace back this grade of a task, as `TASK GRADE` pairs; without one, the grade that each disc is given."""
    seed: int = 0
    """Decides the hotspots' random views."""


def main(arguments: Arguments) -> None:
    """One evaluation, from the checkpoint to the tables."""
    devices.keep_compiled()
    mesh = devices.make_mesh()
    devices.check_batch(arguments.batch_size, mesh, "--batch-size")
    record = checkpoint.read_record(checkpoint.find(arguments.checkpoint))
    model, variables = checkpoint.load(arguments.checkpoint)
    data = DataSet(arguments.data)
    rows = data.rows(arguments.split)
    labels = labels_of(data, rows, model.tasks)
    if arguments.hotspots:  # faults come before the work
        hotspots.check_choice(model.tasks, dict(arguments.hotspot_grades))
        map_files.check_nifti(data, rows)
    num_views = predict.view_set(arguments.tta).flip.shape[0]
    out = output_folder(arguments, num_views)
    about: dict[str, Any] = {
        "split": arguments.split,
        "num_views": num_views,
        "average": arguments.average,
        "step": record["step"],
        "data": data.digest,
        "trained_on_this_data": record["data"] == data.digest,
    }

    probabilities = grade(arguments, model, variables, data, rows, mesh)
    if arguments.calibrate:
        about["calibration"] = calibrate(arguments, model, variables, data, labels, probabilities, mesh)
    every_result = [
        metrics.evaluate_task(task, labels[task.name], probabilities[task.name], data.patient[rows])
        for task in model.tasks
    ]
    results = [result for result in every_result if result]
    report.write_predictions(out / "predictions.csv", data, rows, model.tasks, labels, probabilities)
    pointing = explain(arguments, model, variables, data, rows, probabilities, mesh, out) if arguments.hotspots else {}
    if pointing:
        about["hotspots"] = {name: found.to_json() for name, found in pointing.items()}
    report.write_results(out / "results.json", about, results)

    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    num_patients = len(set(data.patient[rows]))
    views = "1 view" if num_views == 1 else f"{num_views} views"
    console.print(
        f"{len(rows)} discs of {num_patients} patients, split {arguments.split}, {views} each", highlight=False
    )
    if not about["trained_on_this_data"]:
        console.print("The network was trained on another data set: its splits say nothing about this one's patients.")
    if results:
        figures.confusion_matrices(results, out / "confusion.png")
        console.print(report.accuracy_table(results, model.branch_point))
        console.print(report.agreement_table(results))
        console.print(report.recall_table(results))
    else:
        console.print("No disc of this split has a label for the network's tasks: predictions only.")
    if arguments.calibrate:
        console.print(report.calibration_table(about["calibration"]))
    if pointing:
        console.print(report.pointing_table(pointing))
    console.print(f"{report.RESEARCH_ONLY} Results are in {out}.", highlight=False, soft_wrap=True)


def output_folder(arguments: Arguments, num_views: int) -> Path:
    """Where results go, made if need be.

    Raises:
        SpinejaxError: no folder was named, and the checkpoint is not a run, which could hold one.
    """
    if arguments.out is None and not (arguments.checkpoint / checkpoint.CHECKPOINTS).is_dir():
        raise SpinejaxError(f"{arguments.checkpoint} is not a whole run: say with --out where results go.")
    name = f"evaluation-{arguments.split}-{num_views}-view{'s' if num_views > 1 else ''}"
    out = arguments.out or arguments.checkpoint / name
    out.mkdir(parents=True, exist_ok=True)
    return out


def labels_of(data: DataSet, rows: np.ndarray, tasks: Sequence[Task]) -> dict[str, np.ndarray]:
    """Task name → int[M]: the data set's labels for the network's tasks; `UNLABELLED` for a task that it lacks.

    Raises:
        SpinejaxError: a task of the same name has other grades there.
    """
    columns = {task.name: column for column, task in enumerate(data.tasks)}
    labels = {}
    for task in tasks:
        if task.name not in columns:
            labels[task.name] = np.full(len(rows), UNLABELLED)
            continue
        stored = data.tasks[columns[task.name]]
        if stored != task:
            raise SpinejaxError(
                f"{data.folder}: task {task.name} has the grades {', '.join(stored.grades)}; the network learned "
                f"{', '.join(task.grades)}."
            )
        labels[task.name] = data.labels[rows, columns[task.name]].astype(np.int64)
    return labels


def grade(arguments: Arguments, model, variables: Mapping, data: DataSet, rows, mesh) -> dict[str, np.ndarray]:
    """Task name → float32[M, C], in the order of `rows`."""
    batches = pipeline.eval_batches(data, rows, [], batch_size=arguments.batch_size)
    stream = predict.predict(
        model, variables, batches, mesh, tta=arguments.tta, average_logits=arguments.average == "logits"
    )
    parts = [probabilities for _, probabilities in counted(stream, "grading", len(rows))]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def calibrate(
    arguments: Arguments, model, variables: Mapping, data: DataSet, labels: Mapping, probabilities: dict, mesh
) -> dict[str, dict[str, float]]:
    """Put every task's probabilities at its temperature, in place. What that changes, for tasks that have labels.

    Raises:
        SpinejaxError: the split is the one that temperatures are fitted on.
    """
    if arguments.split == "validation":
        raise SpinejaxError("--calibrate fits on the validation split, so it cannot be judged there. Choose another.")
    rows = data.rows("validation")
    fitting, found = labels_of(data, rows, model.tasks), {}
    for name, fitted in grade(arguments, model, variables, data, rows, mesh).items():
        usable, judged = fitting[name] != UNLABELLED, labels[name] != UNLABELLED
        temperature = calibration.fit_temperature(fitted[usable], fitting[name][usable])
        if judged.any():
            found[name] = calibration.before_and_after(probabilities[name][judged], labels[name][judged], temperature)
        probabilities[name] = calibration.at_temperature(probabilities[name], temperature)
    return found


def explain(
    arguments: Arguments, model, variables: Mapping, data: DataSet, rows, probabilities: Mapping, mesh, out: Path
) -> Mapping[str, Pointing]:
    """Write the discs' hotspots below `out`. Where masks can tell, give how well they point: task name → figures."""
    folder = out / "hotspots"
    (folder / "nifti").mkdir(parents=True, exist_ok=True)
    grades = np.zeros((len(data), len(model.tasks)), np.int64)
    grades[rows] = hotspots.choose_grades(model.tasks, probabilities, dict(arguments.hotspot_grades))
    method, options = arguments.hotspot, arguments.checkpoint / checkpoint.OPTIONS
    if arguments.trained_views and options.is_file():
        method = dataclasses.replace(method, ranges=config.load(options).views)
    gallery = Gallery(data, model.tasks, grades, rows, seed=arguments.seed)
    # Views fill a device as well as discs would: one disc a device leaves `views_at_once` to bound the memory alone.
    batches = pipeline.eval_batches(data, rows, [], batch_size=mesh.size)
    key = jax.random.key(arguments.seed)
    stream = hotspots.stream(key, model, variables, batches, data.slices, grades, mesh, method=method)

    def discs():
        for batch_rows, batch_maps in counted(stream, "hotspots", len(rows)):
            for row, maps in zip(batch_rows, batch_maps, strict=True):
                map_files.write_nifti(folder / "nifti", data, row, model.tasks, maps)
                gallery.look(row, np.abs(maps))
                yield row, maps

    map_files.write_maps(folder / "hotspots.h5", discs(), data, model.tasks, grades, method)
    gallery.hang(folder)
    return gallery.pointing()


def counted(stream: Iterable, what: str, total: int) -> Iterator:
    """Pass a stream of (rows, …) on, with a progress bar of its discs on a terminal."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)
        for batch in stream:
            yield batch
            progress.advance(bar, len(batch[0]))


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(tyro.cli(Arguments))))
