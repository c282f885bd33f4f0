"""Grade discs and measure how well: `python evaluate.py [--checkpoint RUN] --data DIR [--tta]`.

Without `--checkpoint` the network that ships grades. With `--scan PATH` instead of `--data`, the discs are cut out of
raw scans first. With `--compare A B` nothing is graded: two evaluations of the same discs are compared.
"""

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import rich.console
import rich.progress
import tyro
from jax.sharding import Mesh
from jaxtyping import Int

from data_prep.dataset.pseudonyms import load_or_make_key
from data_prep.dataset.resuming import only_writer
from data_prep.read.dicomweb import fetched
from data_prep.sources.ungraded import SPLIT, ungraded_discs
from spinejax import config
from spinejax.commands.compare import compare
from spinejax.commands.folders import hold, prepare_pages
from spinejax.data.batches import eval_batches, eval_rows
from spinejax.data.dataset import ALL, DataSet
from spinejax.data.manifest import read_manifest
from spinejax.data.scan_picture import check_scan_pictures
from spinejax.errors import SpinejaxError, printable, require_option, status_of
from spinejax.files.addresses import PATHS, Folder, ScanPath, is_study_address
from spinejax.files.atomic import make_folder
from spinejax.files.mirror import Mirror
from spinejax.files.stores import Address, StoreError, cache_folder
from spinejax.inference import hotspots, predict, temperatures, unusual
from spinejax.inference.graded import Graded, labels_of
from spinejax.inference.hotspots import Method
from spinejax.metrics.calibration import Fit
from spinejax.metrics.grading import Rule
from spinejax.metrics.pointing import Pointing
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import SpineNet
from spinejax.network.views import ViewRanges
from spinejax.parallel import devices, processes, runtime
from spinejax.parallel.layout import Layout
from spinejax.report import hotspot_files, niivue, tables
from spinejax.report.gallery import write_hotspots
from spinejax.report.page import Report
from spinejax.report.results import REPLACED, RESEARCH_ONLY, Findings, remove_earlier, write_results
from spinejax.training import checkpoint, shipped


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Grade the discs of a data set or of raw scans, and compare with the raters' grades where there are any."""

    checkpoint: Folder | None = None
    """Run of `train.py`, whose best step is used; or a run's `export` folder, or the folder of one step; also in a
    bucket. Default: the network that ships with this package."""
    data: Folder | None = None
    """Data set to grade: a folder that `python -m data_prep` made, also in a bucket (`s3://…`, `gs://…`; extra
    `cloud`)."""
    scan: tuple[ScanPath, ...] = ()
    """Raw scans to grade instead of a data set: files or folders, or a study or series of a DICOMweb server
    (dicomweb://HOST/PATH/studies/UID; dicomwebs:// by TLS), which is deleted here afterwards. Their vertebrae are
    detected unless `--masks` gives them. The discs and `levels.png`, a picture of what was found, are written beside
    the results."""
    masks: Path | None = None
    """Folder with a vertebra mask for each scan of `--scan`, named like the scan."""
    lowest_level: str | None = None
    """Name of the lowest disc in each scan of `--scan`, from which the levels are counted."""
    weighting: Literal["t2", "t1", "any"] | None = None
    """Contrast of the scans of `--scan` that are read; others are left out. Default: t2; or t1, if there is no T2 and
    the network has learned T1."""
    key: Path | None = None
    """File with the key that makes the pseudonyms of `--scan`. It is created if missing. Default: `<out>.key`, or
    `<checkpoint>.key` if the results go into a run."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Split whose discs are graded; all grades every disc of the data set."""
    tta: bool = False
    """Average over the paper's 54 views, instead of grading the identity view alone."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """Average the views' probabilities, or their scores before the softmax."""
    out: Folder | None = None
    """Folder for the results, also in a bucket; those of an earlier evaluation are replaced. Default:
    `evaluation-<split or "scan">-<views>-views`, inside the run; of the network that ships, in the current folder."""
    batch_size: int = 32
    """Most discs graded at once, over all devices."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the computation. Default: the one that the network was trained in."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """How GPUs and TPUs multiply float32 numbers, as in `train.py`."""
    calibrate: bool = False
    """Calibrate the probabilities. The network that ships knows raters: the probabilities become those of one of them
    (`--rater`), and grades change with them. For a run, each task's scores are divided by the temperature stored with
    it; if it has none for this number of views and this average, it is fitted on the validation split and stored."""
    rater: str | None = None
    """With `--calibrate`: whose grades the probabilities predict. The network that ships knows the raters of its two
    data sets, spider, the default, and sudirman."""
    decide_by: Rule = "balance"
    """The grade of a disc is the one that is most probable relative to how often the rater gives it, which favours the
    mean of the grades' accuracies; its most probable one (probability), which is right most often; or the one of the
    least expected distance from the true grade (distance), which is off by two or more grades less often
    (docs/results.md). Without a rater, the first two are the same."""
    refer_below: float | None = None
    """Refer to a rater the grades whose probability, after `--calibrate` if it is given, is below this: 0 to 1."""
    hotspots: bool = False
    """Write each disc's evidence maps as HDF5 and as NIfTI in the scan's space, figures of them, and how well they
    point at lesions."""
    hotspot: Method = dataclasses.field(default_factory=Method)
    """How the hotspots are computed."""
    trained_views: bool = True
    """Draw the hotspots' views from the ranges that the network was trained with, which a run has in its `config.json`;
    without that file, or with `--no-trained-views`, from `--hotspot.ranges`."""
    hotspot_grades: tuple[tuple[str, str], ...] = ()
    """Grades whose evidence is traced, as `TASK GRADE` pairs. Default: the grade that the network gives each disc."""
    seed: int = 0
    """Seed of the hotspots' random views."""
    distributed: bool = False
    """Grade together with other processes, as with `train.py --distributed`. The first process cuts raw scans, and
    writes the results; with `--scan`, all must reach the folder `--out`."""
    start_seconds: int = 300
    """Seconds to wait for the other processes of `--distributed`."""
    report: Folder | None = None
    """Folder for an HTML page with the results and a browser of the discs and their hotspots; also in a bucket."""
    niivue: Folder | None = None
    """Folder for HTML pages, one for each scan, in which NiiVue shows the scan, masks and hotspots in three planes;
    also in a bucket."""
    write_threads: int = 0
    """Threads that compress hotspots and pictures; 0 takes one for each core, at most 16."""
    cache_dir: Path | None = None
    """Folder for copies of what is in a bucket. Default: `~/.cache/spinejax`."""
    compare: tuple[Folder, Folder] | None = None
    """Compare two evaluations of the same discs, A and B, instead of grading: two folders with `results.json` and
    `predictions.csv`, or a reader's grades as such a table; also in buckets. Writes `comparison.json` into `--out`
    (default: `comparison`), and a page into `--report` (default: the same folder)."""

    @property
    def num_views(self) -> int:
        """Number of views that are averaged."""
        return predict.view_set(self.tta).flip.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What one evaluation works with."""

    arguments: Arguments
    mesh: Mesh
    network: Path  # what `arguments.checkpoint` names, or a copy of it
    copied: Mirror | None  # the copy, if it is in a store
    step: Path  # folder of the checkpoint; `arguments.checkpoint` may stand for another step a moment later
    about: shipped.About | None  # of a network in the form that ships; None of a run's
    record: checkpoint.Record
    weights: str  # a digest that identifies them
    model: SpineNet
    variables: Mapping
    layout: Layout  # of the network, for grading
    out: Path  # the folders here: those of the options, or what is copied to them at the end
    report: Path | None
    niivue: Path | None
    data: DataSet

    @property
    def name(self) -> str:
        """The network's name in results."""
        return self.about["provenance"]["name"] if self.about else f"run of train.py, step {self.record['step']}"


def main(arguments: Arguments) -> None:
    """One evaluation, by one process or by several."""
    if arguments.compare:
        if arguments.data or arguments.scan or arguments.checkpoint:
            raise SpinejaxError("--compare reads what two evaluations wrote: leave out --data, --scan, --checkpoint.")
        out = arguments.out or arguments.report or Path("comparison")
        compare(*arguments.compare, out=out, report=arguments.report or out, cache_dir=arguments.cache_dir)
        return
    runtime.set_up(precision=arguments.precision)
    together = processes.started(arguments.distributed, start_seconds=arguments.start_seconds)
    with together, contextlib.ExitStack() as exit_stack:
        processes.end_on_sigterm()  # there is nothing to save
        job = set_up(arguments, exit_stack)
        conclude(job, grade(job, arguments.split))


# Set-up: every fault that can be found early is found here ------------------------------------------------------------


def set_up(arguments: Arguments, exit_stack: contextlib.ExitStack) -> Job:
    """Read the network and the discs, and lock the results' folder until `exit_stack` closes."""
    mesh = devices.make_mesh()
    check_options(arguments, mesh)
    processes.by_each(lambda: refuse_missing(arguments))
    network, copied = processes.by_each(lambda: network_of(arguments))
    with copied.named() if copied else contextlib.nullcontext():
        step, record, weights, model, variables = read_checkpoint(network)
    processes.refuse_difference("weights", weights)
    model = model.clone(dtype=np.dtype(arguments.dtype)) if arguments.dtype else model
    about = shipped.about(step) if shipped.is_one(step) else None
    if arguments.calibrate and (about or arguments.rater):
        temperatures_of(arguments, step, weights)
    if arguments.hotspots:
        hotspots.check_choice(model.tasks, dict(arguments.hotspot_grades))
    here = hold_folders(arguments, network, exit_stack)
    out, places = here["--out"], (here["--out"], here.get("--report"), here.get("--niivue"))
    if about:
        processes.by_first(lambda: introduce(about))
    if arguments.scan:
        processes.by_first(lambda: cut(arguments, model, out, about))
    data = processes.by_each(lambda: open_discs(arguments, mesh, model, out, about))
    processes.refuse_difference("data", data.digest)
    layout = predict.grading_layout(mesh, variables)
    if mesh.size > 1:
        processes.by_first(lambda: tell_layout(layout, mesh))
    return Job(arguments, mesh, network, copied, step, about, record, weights, model, variables, layout, *places, data)


def check_options(arguments: Arguments, mesh: Mesh) -> None:
    """Check what the options alone can tell. Raises SpinejaxError."""
    devices.check_batch(arguments.batch_size, mesh, "--batch-size")
    if (arguments.data is None) == (not arguments.scan):
        raise SpinejaxError("Give either --data DIR, a data set, or --scan PATH, raw scans.")
    if arguments.scan and arguments.split not in (SPLIT, ALL):
        raise SpinejaxError(f"--split {arguments.split}: raw scans are one split, {SPLIT}.")
    require_option(arguments.write_threads >= 0, "write_threads", arguments.write_threads, "0 or more")
    if arguments.rater and not arguments.calibrate:
        raise SpinejaxError(f"--rater {arguments.rater}: give --calibrate too; without it no rater is asked.")
    if (below := arguments.refer_below) is not None:
        require_option(0 <= below <= 1, "refer_below", below, "a probability, from 0 to 1")


def refuse_missing(arguments: Arguments) -> None:
    """Check that there is something to grade, before a folder or a key is made for the results."""
    if arguments.data is not None:
        read_manifest(arguments.data)
    for path in arguments.scan if processes.is_first() else ():  # it alone cuts them
        if not (path.exists() or is_study_address(str(path))):
            raise SpinejaxError(f"--scan {path}: no such file or folder.")


def network_of(arguments: Arguments) -> tuple[Path, Mirror | None]:
    """The network's folder on this machine, and what it is a copy of, if it is in a store."""
    if isinstance(arguments.checkpoint, Address):
        copied = checkpoint.fetch(arguments.checkpoint, cache_folder(arguments.cache_dir))
        with copied.named():
            checkpoint.find(copied.folder)  # every process has its own copy
        return copied.folder, copied
    return arguments.checkpoint or shipped.FOLDER, None


def read_checkpoint(path: Path) -> tuple[Path, checkpoint.Record, str, SpineNet, Mapping]:
    """The folder of the step that `path` stands for now, the same on every process; its record, weights and network."""
    path = path.absolute()
    folder = path / processes.by_first(lambda: str(checkpoint.find(path).relative_to(path)))
    try:
        record, weights = checkpoint.identify(folder)
        model, variables = checkpoint.load(folder)
        if weights == checkpoint.identify(folder)[1]:
            return folder, record, weights, with_cpu_kernels(model), variables
    except (SpinejaxError, OSError):
        if folder.is_dir() or shipped.is_one(folder):
            raise
    raise SpinejaxError(
        f"{folder}: training deleted or replaced this checkpoint while it was read: a run keeps its latest two steps "
        "and its best. Evaluate again."
    )


def hold_folders(arguments: Arguments, network: Path, exit_stack: contextlib.ExitStack) -> dict[str, Path]:
    """Lock the results' folders until `exit_stack` closes. Returns where they are here, by the option that names them.

    Raises:
        SpinejaxError: one of them cannot be written, is another process's, or must not be in a bucket.
    """
    out = output_folder(arguments, network)
    named = {"--out": out, "--report": arguments.report, "--niivue": arguments.niivue}
    for option, folder in named.items():
        if isinstance(folder, Address) and arguments.scan:
            raise SpinejaxError(f"{option} {folder}: what --scan cuts out of patients' scans stays on this machine.")
    processes.by_first(lambda: prepare_pages(named))  # where one cannot be made, nothing else is

    def enter(folder: contextlib.AbstractContextManager) -> None:
        exit_stack.enter_context(processes.held_by_first(folder))

    if isinstance(out, Path):
        enter(locked(out))
    here = hold(named, REPLACED, arguments.cache_dir, enter)
    processes.by_first(lambda: prepare_pages(here))
    return here


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the results' folder on a disk, made if need be."""
    with only_writer(make_folder(out, "--out")):
        yield


def introduce(about: shipped.About) -> None:
    """Print which network grades, in a line."""
    known = about["provenance"]
    said = f"Network: {known['name']}, trained on {known['trained_on']}. {RESEARCH_ONLY}"
    tables.new_console().print(said, highlight=False, soft_wrap=True, markup=False)


def tell_layout(layout: Layout, mesh: Mesh) -> None:
    """Print how the network lies on several devices, in a line."""
    copies = "Each device has a copy of the network"
    parts = "A copy of the network does not fit half of a device's free memory: its dense layers are split"
    said = f"{parts if layout.split else copies} ({mesh.size} devices)."
    tables.new_console().print(said, highlight=False, soft_wrap=True)


def output_folder(arguments: Arguments, network: Path) -> Path | Address:
    """Folder for the results. Raises SpinejaxError without --out if the checkpoint is neither a run nor the default."""
    what = "scan" if arguments.scan else arguments.split
    name = f"evaluation-{what}-{views(arguments.num_views).replace(' ', '-')}"
    if arguments.out or arguments.checkpoint is None:
        return arguments.out or Path(name)
    if not (network / checkpoint.CHECKPOINTS).is_dir():
        raise SpinejaxError(f"{arguments.checkpoint} is not a whole run: say with --out where results go.")
    return arguments.checkpoint / name


def temperatures_of(arguments: Arguments, step: Path, weights: str) -> Fit | None:
    """The temperatures stored with the checkpoint; None if a run has none for this way of grading.

    Raises:
        SpinejaxError: they are damaged; the network is of the form that ships, and has none; or it does not know the
            rater that is asked for.
    """
    found = temperatures.read(step, num_views=arguments.num_views, average=arguments.average, weights=weights)
    if found is None and shipped.is_one(step):
        stored = shipped.about(step)["temperatures"]
        known = ", ".join(f"{views(fit['num_views'])} and {fit['average']}" for fit in stored) or "none"
        raise SpinejaxError(
            f"--calibrate: this network has no temperatures for {views(arguments.num_views)} and {arguments.average} "
            f"(--tta, --average), only: {known}."
        )
    raters = list(found.get("raters", ())) if found else []
    if arguments.rater not in (None, *raters):
        known = f"its raters are {' and '.join(raters)}" if raters else "it has no raters"
        raise SpinejaxError(f"--rater {arguments.rater}: this network does not know that rater; {known}.")
    return found


def rater_of(arguments: Arguments, found: Fit) -> str | None:
    """Whose grades the calibrated probabilities are of; None if the network knows no raters."""
    return arguments.rater or next(iter(found.get("raters", ())), None)


def cut(arguments: Arguments, model: SpineNet, out: Path, about: shipped.About | None) -> None:
    """Cut the discs out of the raw scans into the results' folder, and print doubtful findings."""
    with fetched(arguments.scan) as paths:
        notes = ungraded_discs(
            paths,
            out,
            tasks=model.tasks,
            masks=arguments.masks,
            lowest_level=arguments.lowest_level,
            weighting=arguments.weighting,
            learned=about["contrasts"] if about else (),
            # A run is shared, and results inside it with it: the key is then written beside the run.
            pseudonyms=load_or_make_key(
                arguments.key, next(p for p in (arguments.out, arguments.checkpoint, out) if isinstance(p, Path))
            ),
            console=rich.console.Console(stderr=True),
        )
    remove_earlier(out)
    for note in notes:
        tables.new_console().print(f"note: {printable(note)}", highlight=False, soft_wrap=True, markup=False)


def open_discs(arguments: Arguments, mesh: Mesh, model: SpineNet, out: Path, about: shipped.About | None) -> DataSet:
    """The data set, or the one that was cut out of the raw scans."""
    data = DataSet(arguments.data or out / "discs", cache_dir=arguments.cache_dir)
    rows = data.rows(arguments.split)
    labels_of(data, rows, model.tasks)
    data.copy(rows_here(arguments, mesh, rows, about), tell=processes.only_first(print))
    if arguments.hotspots or arguments.niivue:
        hotspot_files.check_nifti(data, rows)
    if arguments.report or arguments.niivue:
        check_scan_pictures(data)
    return data


def rows_here(
    arguments: Arguments, mesh: Mesh, rows: Int[np.ndarray, "M"], about: shipped.About | None
) -> Int[np.ndarray, "L"]:
    """Those of the discs to grade that this process reads."""
    writes_discs = about or arguments.hotspots or arguments.report or arguments.niivue
    if processes.is_first() and writes_discs:
        return rows
    sizes = [batch_size(arguments, mesh, len(rows)), *([mesh.size] if arguments.hotspots else [])]
    return np.concatenate([eval_rows(rows, batch_size=size, **this_host()) for size in sizes])


# Grading --------------------------------------------------------------------------------------------------------------


def grade(job: Job, split: str) -> Graded:
    """The discs of a split with their grades."""
    rows, tasks = job.data.rows(split), job.model.tasks
    size = batch_size(job.arguments, job.mesh, len(rows))
    batches = eval_batches(job.data, rows, [], batch_size=size, **this_host())
    how: dict = {"tta": job.arguments.tta, "average_logits": job.arguments.average == "logits", "layout": job.layout}
    stream = predict.predict(job.model, job.variables, batches, job.mesh, **how)
    parts = [found for _, *found in with_progress(stream, "grading", len(rows))]
    probabilities, spread = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    if not all(np.isfinite(each).all() for each in probabilities.values()):
        raise SpinejaxError(f"{job.step}: this network gives probabilities that are not finite. Train it again.")
    labels = labels_of(job.data, rows, tasks)
    chosen = (job.arguments.refer_below, job.arguments.decide_by)
    return Graded(job.data, rows, tasks, labels, probabilities, spread, *chosen)


def batch_size(arguments: Arguments, mesh: Mesh, num_discs: int) -> int:
    """Discs graded at once: as many as the option says, or fewer, as a study has."""
    size = mesh.size
    while size < min(num_discs, arguments.batch_size):
        size *= 2
    return min(size, arguments.batch_size)


def this_host() -> dict[str, Any]:
    """Which part of each batch this process reads, for `eval_batches`."""
    return {"host": jax.process_index(), "num_hosts": jax.process_count()}


def calibrate(job: Job, graded: Graded) -> tuple[Graded, dict[str, dict[str, float]]]:
    """The discs as a rater known to the network would grade them, or else at its temperatures.

    Returns them, and the effect on each task that has labels.
    """
    num_views, average = job.arguments.num_views, job.arguments.average

    def stored() -> Fit | None:
        found = temperatures_of(job.arguments, job.step, job.weights)
        if job.arguments.split in ("validation", ALL) and (found is None or found["data"] == job.data.digest):
            raise SpinejaxError(
                "--calibrate fits on the validation split, so it cannot be judged there. Choose another."
            )
        return found

    def fitted(validation: Graded) -> Fit:
        found = temperatures.fit(validation, num_views=num_views, average=average)
        try:
            stored = temperatures.store(job.step, found, weights=job.weights)
            exported = job.network / checkpoint.EXPORT / checkpoint.CALIBRATION
            if job.copied and exported.is_file():
                job.copied.send(exported)
            said = f"Temperatures are stored in {job.copied.send(stored) if job.copied else stored}."
        except (OSError, StoreError) as error:
            said = (
                f"The temperatures cannot be stored with the checkpoint: {getattr(error, 'strerror', None) or error}."
            )
        tables.new_console().print(said, soft_wrap=True)
        return found

    if (found := processes.by_first(stored)) is None:
        validation = grade(job, "validation")
        found = processes.by_first(lambda: fitted(validation))
    if rater := rater_of(job.arguments, found):
        calibrated = temperatures.as_rater(graded, found, rater)
        return calibrated, temperatures.effect(graded, calibrated)
    calibrated = temperatures.apply(graded, found["temperatures"])
    effect = temperatures.effect(graded, calibrated)
    return calibrated, {name: {"temperature": found["temperatures"][name]} | each for name, each in effect.items()}


def explain(
    job: Job,
    graded: Graded,
    traced: Int[np.ndarray, "M T"],
    report: Report | None,
    viewer: niivue.Viewer | None,
) -> Mapping[str, Pointing]:
    """Make the discs' hotspots, by all processes. The first one writes them, and adds them to the pages.

    Returns how well they point, where masks can tell.
    """
    method = job.arguments.hotspot
    if job.arguments.trained_views and (ranges := trained_views(job)):
        method = dataclasses.replace(method, ranges=ranges)
    grades = np.zeros((len(job.data), len(job.model.tasks)), np.int64)
    grades[graded.rows] = traced
    # One disc per device: its views fill the device, and `views_at_once` alone bounds the memory.
    batches = eval_batches(job.data, graded.rows, [], batch_size=job.mesh.size, **this_host())
    key = jax.random.key(job.arguments.seed)
    stream = hotspots.stream(key, job.model, job.variables, batches, job.data.slices, grades, job.mesh, method=method)
    if not processes.is_first():
        collections.deque(stream, maxlen=0)
        return {}
    stream = with_progress(stream, "hotspots", len(graded.rows))
    options: dict = {"seed": job.arguments.seed, "page": report, "threads": job.arguments.write_threads}
    also = [viewer.add] if viewer else []
    return write_hotspots(stream, job.out / "hotspots", graded, grades, method, also=also, **options)


def trained_views(job: Job) -> ViewRanges | None:
    """The ranges of the views that the network was trained with; None if nothing tells."""
    if job.about:
        return job.about["views"]
    options = job.network / checkpoint.OPTIONS
    return config.load(options).views if options.is_file() else None


# Results --------------------------------------------------------------------------------------------------------------


def conclude(job: Job, graded: Graded) -> None:
    """Calibrate and explain the graded discs, by all processes. The first one writes and prints what follows."""
    arguments, out = job.arguments, job.out
    processes.by_first(lambda: remove_earlier(out))
    calibrated: dict = {}
    if arguments.calibrate:
        graded, calibrated = calibrate(job, graded)
    traced = hotspots.choose_grades(job.model.tasks, graded.grades, dict(arguments.hotspot_grades))
    report: Report | None = None
    viewer: niivue.Viewer | None = None
    if processes.is_first():
        if usual := shipped.read_usual(job.step) if job.about else None:
            distance = usual.distance(unusual.features(job.data, graded.rows)) / usual.threshold
            graded = dataclasses.replace(graded, distance=distance)
        graded.write(out / "predictions.csv", network=f"{job.name} ({job.weights[:12]})")
        if job.report:
            report = Report(job.report, graded, traced if arguments.hotspots else None)
        if job.niivue:
            viewer = niivue.Viewer(job.niivue, graded)
    pointing = explain(job, graded, traced, report, viewer) if arguments.hotspots else {}
    processes.by_first(lambda: write(job, graded, calibrated, pointing, report, viewer))


def write(
    job: Job,
    graded: Graded,
    calibrated: Mapping[str, Mapping[str, float]],
    pointing: Mapping[str, Pointing],
    report: Report | None,
    viewer: niivue.Viewer | None,
) -> None:
    """Write and print the results."""
    arguments, out, console = job.arguments, job.out, tables.new_console()
    same_data = job.record["data"] == job.data.digest
    chosen_on = job.record.get("validation_split")  # older runs did not record it
    about = {
        "split": arguments.split,
        "raw_scans": bool(arguments.scan),
        "num_views": arguments.num_views,
        "average": arguments.average,
        "decided_by": arguments.decide_by,
        "rater": graded.rater,
        "borrowed_from_other_raters": list(graded.borrowed),
        "network": {
            "name": job.name,
            "weights": job.weights,
            "trained_on": job.about["provenance"]["trained_on"] if job.about else None,
        },
        "step": job.record["step"],
        "data": job.data.digest,
        "trained_on_this_data": same_data,
        "validation_split": chosen_on,
        "discs": len(graded.rows),
        "unusual_discs": None if graded.distance is None else int(graded.unusual.sum()),
        "split_chose_the_step": same_data and chosen_on is not None and arguments.split in (chosen_on, ALL),
    }
    measured = (graded.results(), graded.doubts(), calibrated, pointing, graded.kept())
    findings = Findings(about, job.model.branch_point, *measured)
    write_results(out, findings)

    discs = f"{len(graded.rows)} discs of {len(set(graded.patients))} patients"
    origin = "raw scans" if arguments.scan else f"split {arguments.split}"
    rater = f", as {graded.rater}'s raters grade" if graded.rater else ""
    console.print(f"{discs}, {origin}, {views(arguments.num_views)} each{rater}", highlight=False)
    tables.show(console, findings)
    if report and arguments.report:
        made = report.close(findings).name
        console.print(f"The page is {arguments.report / made}.", highlight=False, soft_wrap=True)
    if viewer and arguments.niivue:
        made = viewer.close().name
        console.print(f"NiiVue's page is {arguments.niivue / made}.", highlight=False, soft_wrap=True)
    console.print(
        f"{RESEARCH_ONLY} Results are in {output_folder(arguments, job.network)}.", highlight=False, soft_wrap=True
    )


def views(number: int) -> str:
    """A number of views in words."""
    return "1 view" if number == 1 else f"{number} views"


def with_progress(stream: Iterable, what: str, total: int) -> Iterator:
    """The stream of (rows, …) unchanged, with a progress bar of its discs on a terminal."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)
        for batch in stream:
            yield batch
            progress.advance(bar, len(batch[0]))


def cli() -> None:
    """What `python evaluate.py` and `spinejax-evaluate` run."""
    sys.exit(status_of(lambda: main(tyro.cli(Arguments, prog=Path(sys.argv[0]).name, registry=PATHS))))
