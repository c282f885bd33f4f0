"""Grade discs with a trained network and say how well: `python evaluate.py --checkpoint RUN --data DIR [--tta]`.

With `--scan PATH` instead of `--data`, from a raw scan: its vertebrae are found and its discs cut out first.
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import rich.console
import rich.progress
import tyro

from data_prep.dataset.pseudonyms import load_or_make_key
from data_prep.dataset.resuming import only_writer
from data_prep.sources.ungraded import SPLIT, ungraded_discs
from spinejax import config
from spinejax.data.batches import eval_batches
from spinejax.data.dataset import DataSet
from spinejax.errors import SpinejaxError, status_of
from spinejax.inference import hotspots, predict, temperatures
from spinejax.inference.graded import Graded, labels_of
from spinejax.inference.hotspots import Method
from spinejax.metrics.pointing import Pointing
from spinejax.parallel import devices, processes, runtime
from spinejax.report import figures, hotspot_files, tables
from spinejax.report.gallery import write_hotspots
from spinejax.report.page import Report, prepare_folder
from spinejax.report.tables import Findings
from spinejax.tasks import Task
from spinejax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Grade a split's discs, and compare with its labels where it has any."""

    checkpoint: Path
    """A run of `train.py` (its best step is taken), its `export` folder, or one step's folder."""
    data: Path | None = None
    """Data set: a folder that `python -m data_prep` made."""
    scan: tuple[Path, ...] = ()
    """Instead of a data set: raw scans, files or folders. Their vertebrae are detected, unless `--masks` tells them;
    the discs, and a picture of what was found, `levels.png`, go beside the results."""
    masks: Path | None = None
    """Of `--scan`: folder with a mask a scan, named after the scan."""
    lowest_level: str | None = None
    """Of `--scan`: name of the lowest disc, to count the levels from it."""
    key: Path | None = None
    """Of `--scan`: file of the key that makes pseudonyms, made if it is not there; `<out>.key` if not given, or
    `<checkpoint>.key` if `--out` is not given either."""
    split: Literal["train", "validation", "test"] = "test"
    """Which discs."""
    tta: bool = False
    """Average over the paper's 54 views; without it the identity view alone."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over the views."""
    out: Path | None = None
    """Where results go; `evaluation-<split or "scan">-<views>-views` inside the run if not given. What an earlier
    evaluation left there is replaced."""
    batch_size: int = 32
    """Discs graded at once, over all devices."""
    calibrate: bool = False
    """Make the probabilities honest: divide each task's scores by the temperature stored with the checkpoint. If there
    is none yet for this way of grading, it is fitted on the validation split and stored."""
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
    distributed: bool = False
    """One of several processes that grade together, as for `train.py --distributed`; the first one writes."""
    start_seconds: int = 300
    """With --distributed: how long to wait for the others."""
    report: Path | None = None
    """Write a page to look at into this folder, with every figure and a browser of the discs and their hotspots."""

    @property
    def num_views(self) -> int:
        """Views that are averaged over."""
        return predict.view_set(self.tta).flip.shape[0]


def main(arguments: Arguments) -> None:
    """One evaluation, by one process or by several."""
    runtime.set_up()
    with processes.started(arguments.distributed, start_seconds=arguments.start_seconds):
        processes.end_on_sigterm()  # there is nothing to save
        evaluate(arguments)


def evaluate(arguments: Arguments) -> None:
    """One evaluation, from the checkpoint to the tables."""
    mesh = devices.make_mesh()
    devices.check_batch(arguments.batch_size, mesh, "--batch-size")
    record = checkpoint.read_record(checkpoint.find(arguments.checkpoint))
    model, variables = checkpoint.load(arguments.checkpoint)
    out = Path(processes.by_first(lambda: str(output_folder(arguments))))
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    check(arguments, model)
    with contextlib.ExitStack() as held:
        processes.by_first(lambda: held.enter_context(only_writer(make_folder(out))))
        data = prepare(arguments, model, out, console)
        processes.refuse_difference("data", data.digest)
        about = {
            "split": arguments.split,
            "num_views": arguments.num_views,
            "average": arguments.average,
            "step": record["step"],
            "data": data.digest,
            "trained_on_this_data": record["data"] == data.digest,
        }
        graded = grade(arguments, model, variables, data, arguments.split, mesh)
        processes.by_first(lambda: conclude(arguments, model, variables, graded, mesh, about, out))


def conclude(arguments: Arguments, model, variables: Mapping, graded: Graded, mesh, about: dict, out: Path) -> None:
    """Everything that is made of the graded discs."""
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    remove_earlier(out)
    calibrated: dict = {}
    if arguments.calibrate:
        graded, calibrated = calibrate(arguments, model, variables, graded, mesh, console)
    graded.write(out / "predictions.csv")
    traced = hotspots.choose_grades(model.tasks, graded.probabilities, dict(arguments.hotspot_grades))
    page = Report(arguments.report, graded, traced if arguments.hotspots else None) if arguments.report else None
    pointing: Mapping[str, Pointing] = {}
    if arguments.hotspots:
        pointing = explain(arguments, model, variables, graded, traced, mesh, out / "hotspots", page)
    elif page:
        for row in graded.rows:
            page.look(row)
    findings = Findings(about, model.branch_point, graded.results(), graded.doubts(), calibrated, pointing)
    tables.write_results(out / "results.json", findings)
    if findings.results:
        figures.confusion_matrices(findings.results, out / "confusion.png")
        figures.trust(findings.doubts, out / "trust.png")

    views = "1 view" if arguments.num_views == 1 else f"{arguments.num_views} views"
    many = f"{len(graded.rows)} discs of {len(set(graded.patients))} patients"
    console.print(f"{many}, split {arguments.split}, {views} each", highlight=False)
    if not about["trained_on_this_data"]:
        console.print("The network was trained on another data set: its splits say nothing about this one's patients.")
    tables.show(console, findings)
    if page:
        console.print(f"The page is {page.close(findings)}.", highlight=False, soft_wrap=True)
    console.print(f"{tables.RESEARCH_ONLY} Results are in {out}.", highlight=False, soft_wrap=True)


def remove_earlier(out: Path) -> None:
    """Remove an earlier evaluation's results, or its hotspots would pass for this network's."""
    shutil.rmtree(out / "hotspots", ignore_errors=True)
    for name in ("predictions.csv", "results.json", "confusion.png", "trust.png"):
        (out / name).unlink(missing_ok=True)


def check(arguments: Arguments, model) -> None:
    """Faults come before the work: raises SpinejaxError for options that would stop it later."""
    if arguments.distributed and (arguments.scan or arguments.hotspots or arguments.calibrate):
        raise SpinejaxError(
            "--scan, --hotspots and --calibrate are for one process: evaluate again without --distributed."
        )
    if (arguments.data is None) == (not arguments.scan):
        raise SpinejaxError("Give either --data DIR, a data set, or --scan PATH, raw scans.")
    if arguments.scan and arguments.split != SPLIT:
        raise SpinejaxError(f"--split {arguments.split}: raw scans are one split, {SPLIT}.")
    if arguments.hotspots:
        hotspots.check_choice(model.tasks, dict(arguments.hotspot_grades))
    if page := arguments.report:
        processes.by_first(lambda: prepare_folder(page))


def prepare(arguments: Arguments, model, out: Path, console: rich.console.Console) -> DataSet:
    """The discs to grade: a data set's, or cut out of raw scans. What is doubtful about these is printed.

    Raises:
        SpinejaxError: no disc was found, or those that were are not what the options ask for.
    """
    if arguments.scan:
        cut(arguments, model.tasks, out, console)
    data = DataSet(arguments.data or out / "discs")
    rows = data.rows(arguments.split)
    labels_of(data, rows, model.tasks)
    if arguments.hotspots:
        hotspot_files.check_nifti(data, rows)
    return data


def cut(arguments: Arguments, tasks: Sequence[Task], out: Path, console: rich.console.Console) -> None:
    """The raw scans' discs, into the results' folder, in the place of what an earlier evaluation left there."""
    whose = arguments.checkpoint if arguments.out is None else out  # a run is shared, and its results with it
    notes = ungraded_discs(
        arguments.scan,
        out,
        tasks=tasks,
        masks=arguments.masks,
        lowest_level=arguments.lowest_level,
        pseudonyms=load_or_make_key(arguments.key, whose),
        console=rich.console.Console(stderr=True),
    )
    remove_earlier(out)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def make_folder(out: Path) -> Path:
    """The results' folder, which is there afterwards. Raises SpinejaxError if it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpinejaxError(f"--out {out}: no folder can be made there ({error.strerror}).") from error
    return out


def output_folder(arguments: Arguments) -> Path:
    """Where results go.

    Raises:
        SpinejaxError: no folder was named, and the checkpoint is not a run, which could hold one.
    """
    if arguments.out is None and not (arguments.checkpoint / checkpoint.CHECKPOINTS).is_dir():
        raise SpinejaxError(f"{arguments.checkpoint} is not a whole run: say with --out where results go.")
    what = "scan" if arguments.scan else arguments.split
    name = f"evaluation-{what}-{arguments.num_views}-view{'s' if arguments.num_views > 1 else ''}"
    return arguments.out or arguments.checkpoint / name


def grade(arguments: Arguments, model, variables: Mapping, data: DataSet, split: str, mesh) -> Graded:
    """A split's discs with their grades."""
    rows = data.rows(split)
    hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
    batches = eval_batches(data, rows, [], batch_size=arguments.batch_size, **hosts)
    stream = predict.predict(
        model, variables, batches, mesh, tta=arguments.tta, average_logits=arguments.average == "logits"
    )
    parts = [found for _, *found in counted(stream, "grading", len(rows))]
    probabilities, spread = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return Graded(data, rows, model.tasks, labels_of(data, rows, model.tasks), probabilities, spread)


def calibrate(
    arguments: Arguments, model, variables: Mapping, graded: Graded, mesh, console: rich.console.Console
) -> tuple[Graded, dict[str, dict[str, float]]]:
    """The discs at the checkpoint's temperatures, and what that changes for each task that has labels.

    Raises:
        SpinejaxError: the discs are those that the temperatures were fitted to.
    """
    found = temperatures.read(arguments.checkpoint, num_views=arguments.num_views, average=arguments.average)
    if arguments.split == "validation" and (found is None or found["data"] == graded.data.digest):
        raise SpinejaxError("--calibrate fits on the validation split, so it cannot be judged there. Choose another.")
    if found is None:
        fitting = grade(arguments, model, variables, graded.data, "validation", mesh)
        found = temperatures.fit(fitting, num_views=arguments.num_views, average=arguments.average)
        try:
            console.print(f"Temperatures stored in {temperatures.store(arguments.checkpoint, found)}.", soft_wrap=True)
        except OSError as error:
            console.print(f"The temperatures cannot be stored with the checkpoint: {error.strerror}.", soft_wrap=True)
    return temperatures.apply(graded, found["temperatures"]), temperatures.effect(graded, found["temperatures"])


def explain(
    arguments: Arguments, model, variables: Mapping, graded: Graded, traced, mesh, folder: Path, page: Report | None
) -> Mapping[str, Pointing]:
    """Write the discs' hotspots into `folder`, and show them to the page. Where masks can tell, how well they point."""
    data, rows = graded.data, graded.rows
    method, options = arguments.hotspot, arguments.checkpoint / checkpoint.OPTIONS
    if arguments.trained_views and options.is_file():
        method = dataclasses.replace(method, ranges=config.load(options).views)
    grades = np.zeros((len(data), len(model.tasks)), np.int64)
    grades[rows] = traced
    # Views fill a device as well as discs would: one disc a device leaves `views_at_once` to bound the memory alone.
    batches = eval_batches(data, rows, [], batch_size=mesh.size)
    key = jax.random.key(arguments.seed)
    stream = hotspots.stream(key, model, variables, batches, data.slices, grades, mesh, method=method)
    stream = counted(stream, "hotspots", len(rows))
    also = [page.look] if page else []
    return write_hotspots(stream, folder, data, model.tasks, grades, rows, method, seed=arguments.seed, also=also)


def counted(stream: Iterable, what: str, total: int) -> Iterator:
    """Pass a stream of (rows, …) on, with a progress bar of its discs on a terminal."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)
        for batch in stream:
            yield batch
            progress.advance(bar, len(batch[0]))


def cli() -> None:
    """What `python evaluate.py` and `spinejax-evaluate` run."""
    sys.exit(status_of(lambda: main(tyro.cli(Arguments, prog=Path(sys.argv[0]).name))))
