"""Train SpineNet on a data set of disc volumes: `python train.py PRESET --data DIR --workdir RUN [--option value]…`.

`python train.py --config OTHER_RUN/config.json …` begins with the options of another run instead of a preset's.

A run is a folder. Started again, it resumes from its last checkpoint, and ends with the same parameters, bit for bit.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from spinejax import config, tasks
from spinejax.config import Config
from spinejax.data.batches import num_steps, refuse_unlabelled
from spinejax.data.dataset import DataSet
from spinejax.errors import require_option, status_of
from spinejax.files import lock
from spinejax.files.addresses import PATHS, Folder
from spinejax.files.mirror import held, mirror_of
from spinejax.files.stores import Address, cache_folder, located
from spinejax.geometry import VOLUME_SHAPE
from spinejax.network import cpu_kernels, losses
from spinejax.parallel import devices, layout, processes, runtime
from spinejax.report import figures
from spinejax.training import checkpoint, epoch, memory, shipped, speed, train_step
from spinejax.training.log import Log, progress
from spinejax.training.saving import Saver


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train SpineNet; options start from the preset's values."""

    data: Folder
    """Data set: a folder that `python -m data_prep` made, also in a bucket (`s3://…`, `gs://…`; extra `cloud`)."""
    workdir: Folder
    """The run's folder, also in a bucket. If it holds a run of the same options, that run is resumed."""
    options: Annotated[Config, tyro.conf.arg(name="")]
    distributed: bool = False
    """Be one of several processes of this run. SLURM, MPI, GKE or Cloud TPU tell each process its number; elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    start_seconds: int = 300
    """Seconds to wait for the other processes, with --distributed."""
    profile: str | None = None
    """Write a trace of steps FROM:TO, counted from 0, into the run's `profile`: for TensorBoard and Perfetto."""
    cache_dir: Path | None = None
    """Folder for copies of what is in a bucket. Default: `~/.cache/spinejax`."""


def main(arguments: Arguments) -> None:
    """Train in one process, or as one of several."""
    steps = None if arguments.profile is None else speed.parse_steps(arguments.profile)
    located(arguments.options.init_from or "")  # a store that this machine cannot read is refused by name
    runtime.set_up(deterministic=arguments.options.deterministic, precision=arguments.options.precision)
    start = processes.started(arguments.distributed, start_seconds=arguments.start_seconds)
    with start, processes.stop_notices() as stop:
        data = processes.by_each(lambda: DataSet(arguments.data, cache_dir=arguments.cache_dir))
        message = run(arguments.options, data, arguments.workdir, stop, profile=steps, cache_dir=arguments.cache_dir)
        if processes.is_first():
            print(message)


def run(
    options: Config,
    data: DataSet,
    workdir: Path | Address,
    stop: Callable[[int], bool],
    *,
    profile: range | None = None,
    cache_dir: Path | None = None,
) -> str:
    """Train from the start, or the last checkpoint, to the end or to SIGTERM. Returns how it ended, in a sentence.

    Steps of `profile` are traced. `cache_dir` is where a run in an object store is written first.
    """
    mesh = devices.make_mesh()
    # What the user can fix is refused before anything is written or computed.
    devices.check_batch(options.batch_size, mesh, "--batch-size")
    share = options.batch_size // mesh.size
    expected = f"a divisor of {share}, the discs of a batch on each of {mesh.size} devices"
    require_option(share % options.microbatches == 0, "microbatches", options.microbatches, expected)
    processes.refuse_difference("options", repr(options))
    processes.refuse_difference("data", data.digest)
    chosen = tasks.select(data.tasks, options.tasks)
    tasks.select(chosen, [name for name, _ in options.task_weights])
    refuse_unlabelled(data, chosen, ("train", options.validation_split))
    with contextlib.ExitStack() as exit_stack:
        folder, saved = hold(workdir, cache_dir, exit_stack)
        processes.by_first(lambda: checkpoint.check_options(options, folder))
        checkpoints = checkpoint.Checkpoints(
            folder, read_only=not processes.is_first(), name=None if folder == workdir else str(workdir), saved=saved
        )
        exit_stack.enter_context(contextlib.closing(checkpoints))  # waits for the last save
        return fit(options, data, chosen, checkpoints, mesh, stop, exit_stack, profile)


def hold(
    workdir: Path | Address, cache_dir: Path | None, exit_stack: contextlib.ExitStack
) -> tuple[Path, Callable[[], None]]:
    """Lock the run's folder until `exit_stack` closes.

    Returns:
        The folder on this machine, which of a run in an object store is copied there; and what copies it after a save.
    """
    advice = "Choose another --workdir; or, if both are processes of one run, start each with --distributed."
    if isinstance(workdir, Path):
        exit_stack.enter_context(processes.held_by_first(lock.locked(workdir, advice)))
        return workdir, lambda: None
    run = mirror_of(workdir, cache_folder(cache_dir), "work", replaces=checkpoint.REPLACED)
    held_run = held(run, wanted=checkpoint.is_needed_to_go_on, advice=advice, tell=print)
    exit_stack.enter_context(processes.held_by_first(held_run))
    exit_stack.enter_context(run.named())  # on the other processes too
    return run.folder, functools.partial(run.keep_up, print)


def fit(
    options: Config, data: DataSet, chosen, checkpoints: checkpoint.Checkpoints, mesh, stop, exit_stack, profile
) -> str:
    """The loop. An epoch takes steps, is evaluated, logged and saved. `exit_stack` closes what it opens."""
    state, unlogged, step, save, feed, model, utilisation, lower = set_up(options, data, chosen, checkpoints, mesh)
    exit_stack.enter_context(contextlib.closing(feed.batches))
    first, folder, name = processes.is_first(), checkpoints.run, checkpoints.name
    if profile and first:
        step = exit_stack.enter_context(speed.traced(step, int(state.step), profile, folder / "profile"))
    also = {"tensorboard": options.tensorboard, "wandb": options.wandb}
    log = exit_stack.enter_context(contextlib.closing(Log(folder, step=int(state.step), **also, write=first)))
    saver = Saver(checkpoints, save, log, options)
    if log.repeated:
        print(
            f"{name} goes on from step {int(state.step)}. Steps up to {log.repeated} were not saved: it repeats them."
        )
    steps_per_epoch = num_steps(len(data.rows("train")), options.batch_size)
    total = options.epochs * steps_per_epoch
    bar = exit_stack.enter_context(progress(total, int(state.step), options.batch_size, show=first))
    for number in options.evaluation_epochs(int(state.step) // steps_per_epoch):
        if train_step.is_over(state, options):
            break
        until = number * steps_per_epoch
        with memory.advice(lower, options, options.batch_size // mesh.size):
            state, taken = epoch.take_steps(state, feed, until, step, stop, bar)
        if int(state.step) < until:  # SIGTERM came
            metrics, _ = taken.read()
            log.write_steps(int(state.step), metrics, {})
            saver.at_stop(state, unlogged + metrics)
            return f"{name} was stopped by SIGTERM. It is saved at step {int(state.step)}: start it again to go on."
        counts = epoch.count(state, feed, model=model)  # the devices go on while the metrics are read and written
        metrics, pace = taken.read()
        used = utilisation.at(pace["discs_per_second"] / options.batch_size)
        log.write_steps(until, metrics, pace | {"utilisation": used, "peak_memory_mb": speed.peak_memory_mb()})
        means, unlogged = epoch.summary(unlogged + metrics, max_skipped=options.max_skipped), []
        error, accuracies = epoch.accuracy(counts)
        if number % options.eval_epochs == 0:  # an odd last epoch must not count towards a plateau
            state = train_step.evaluated(state, error, options)
            state = state.replace(plateau=devices.put_replicated(state.plateau, mesh))
        rate = options.learning_rate * float(state.plateau.scale)
        entry: dict = {"step": int(state.step), "epoch": number, "learning_rate": rate, "validation_error": error}
        entry |= means | pace | accuracies
        # The log comes first: a resumed run cuts it back to the checkpoint, but could not fill a gap.
        log.write(entry)
        bar.evaluated(entry)
        saver.after_evaluation(state, error)

    saver.at_end(state)

    def finish() -> str:
        checkpoint.export(folder)
        figures.learning_curves(log.entries, folder / "curves.png")
        best = checkpoint.best_step(folder)
        return f"{name} is finished: step {int(state.step)}, best step {best}, exported to {name}/{checkpoint.EXPORT}."

    return processes.by_first(finish)


def set_up(options: Config, data: DataSet, chosen, checkpoints: checkpoint.Checkpoints, mesh) -> tuple:
    """The state to begin with, metrics that the log lacks, functions to step and save, batches, network, speed, and
    a function that lowers a step.
    """
    init_key, run_key = jax.random.split(jax.random.key(options.seed))
    model = train_step.make_model(options, chosen)
    slice_mean = data.mean_of_filled_slices() if options.fill_slices else data.slice_mean
    saved: dict = {"model": model, "data_digest": data.digest}
    fresh = functools.partial(train_step.init, init_key, model, options, slice_mean)
    divided = layout.make(options.layout, mesh, jax.eval_shape(fresh).params, batch_size=options.batch_size)
    state, unlogged, layers = checkpoint.resume(
        checkpoints, divided.create(fresh), **saved, init_from=options.init_from, cache_dir=data.cache_dir
    )
    read = np.concatenate([data.rows("train"), data.rows(options.validation_split)])
    processes.by_each(lambda: data.copy(read, tell=processes.only_first(print)))
    start = [f"From {options.init_from}: {', '.join(layers)}."] if layers else []
    feed = epoch.make_feed(options, data, chosen, mesh, step=int(state.step))
    for note in (*start, *divided.notes(), *filter(None, [feed.note])) if processes.is_first() else ():
        print(note)
    rows = data.rows("train")
    sources = data.source[rows] if options.balance == "source" else None
    weights = losses.class_weights(data.labels[rows][:, feed.columns], chosen, sources)
    state, model = divided.put(state), divided.on(cpu_kernels.with_cpu_kernels(model))
    key, weights = devices.put_replicated((run_key, weights), mesh)
    fixed: dict = {"model": model, "config": config.of_a_step(options), "layout": divided}

    def step(state: train_step.TrainState, batch: dict[str, jax.Array]) -> tuple:
        return train_step.train_step(key, state, batch, weights, **fixed)

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)  # it is donated

    def lower() -> jax.stages.Lowered:
        shapes = {"volume": (VOLUME_SHAPE, np.uint16), "labels": ((len(chosen),), np.int32), "source": ((), np.int32)}
        batch = {
            name: jax.ShapeDtypeStruct((options.batch_size, *one), kind, sharding=devices.by_disc(mesh))
            for name, (one, kind) in shapes.items()
        }
        return train_step.whole_step.lower(key, like, batch, weights, **fixed)

    save = functools.partial(checkpoint.save, checkpoints, **saved, validation_split=options.validation_split)
    multiplied_in = options.precision if options.dtype == "float32" else options.dtype
    return state, unlogged, step, save, feed, model, speed.Utilisation(lower, multiplied_in), lower


def like_shipped(options: Config) -> Config:
    """The options, with the layers and the views of the network that ships, so that all of its weights fit."""
    about = shipped.about(shipped.FOLDER)
    network = about["record"]["model"]
    layers: dict = {"width": network["width"], "initialiser": network["initialiser"], "dropout": network["dropout"]}
    layers |= {"branch_point": network["branch_point"] or "none", "fill_slices": network.get("fill_slices", False)}
    return dataclasses.replace(options, **layers, views=about["views"])


def parsed(words: Sequence[str]) -> Arguments:
    """The command's arguments, from its words after its name; the first is a preset, or the first two `--config FILE`.

    Raises:
        SpinejaxError: FILE is missing or damaged.
    """
    chosen = dict(config.PRESETS)
    if words[:1] == ["finetune"]:
        purpose, options = chosen["finetune"]
        chosen["finetune"] = purpose, like_shipped(options)
    if words[:1] == ["--config"] and len(words) > 1:
        chosen["saved"] = f"The options in {words[1]}.", config.load(located(words[1]))
        words = ["saved", *words[2:]]
    presets = {
        name: (purpose, Arguments(tyro.MISSING, tyro.MISSING, options)) for name, (purpose, options) in chosen.items()
    }
    name = Path(sys.argv[0]).name
    return tyro.extras.overridable_config_cli(presets, args=words, prog=name, registry=PATHS)


def cli() -> None:
    """What `python train.py` and `spinejax-train` run."""
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):  # every option at once, not only the names of the presets
        purposes = (f"  {name:12}{purpose}" for name, (purpose, _) in config.PRESETS.items())
        print("Presets:", *purposes, sep="\n", end="\n\n")
        print("Instead of a preset, the options of another run: --config RUN/config.json", end="\n\n")
        words = ["paper", "--help"]
    sys.exit(status_of(lambda: main(parsed(words))))
