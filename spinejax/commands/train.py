"""Train SpineNet on a data set of disc volumes: `python train.py PRESET --data DIR --workdir RUN [--option value]…`.

A run is a folder. Started again, it resumes from its last checkpoint, and ends with the same parameters, bit for bit.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import tyro

from spinejax import config, tasks
from spinejax.config import Config
from spinejax.data.batches import num_steps, refuse_unlabelled
from spinejax.data.dataset import DataSet
from spinejax.errors import status_of
from spinejax.files import lock
from spinejax.files.addresses import PATHS
from spinejax.network import cpu_kernels, losses
from spinejax.parallel import devices, layout, processes, runtime
from spinejax.report import figures
from spinejax.training import checkpoint, epoch, train_step
from spinejax.training.log import Log, progress
from spinejax.training.saving import Saver


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train SpineNet; options start from the preset's values."""

    data: Path
    """Data set: a folder that `python -m data_prep` made."""
    workdir: Path
    """The run's folder. If it holds a run of the same options, that run is resumed."""
    options: Annotated[Config, tyro.conf.arg(name="")]
    distributed: bool = False
    """Be one of several processes of this run. SLURM, MPI, GKE or Cloud TPU tell each process its number; elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    start_seconds: int = 300
    """Seconds to wait for the other processes, with --distributed."""


def main(arguments: Arguments) -> None:
    """Train in one process, or as one of several."""
    runtime.set_up(deterministic=arguments.options.deterministic)
    start = processes.started(arguments.distributed, start_seconds=arguments.start_seconds)
    with start, processes.stop_notices() as stop:
        message = run(arguments.options, DataSet(arguments.data), arguments.workdir, stop)
        if processes.is_first():
            print(message)


def run(options: Config, data: DataSet, folder: Path, stop: Callable[[int], bool]) -> str:
    """Train from the start, or the last checkpoint, to the end or to SIGTERM. Returns how it ended, in a sentence."""
    mesh = devices.make_mesh()
    # What the user can fix is refused before anything is written or computed.
    devices.check_batch(options.batch_size, mesh, "--batch-size")
    processes.refuse_difference("options", repr(options))
    processes.refuse_difference("data", data.digest)
    chosen = tasks.select(data.tasks, options.tasks)
    tasks.select(chosen, [name for name, _ in options.task_weights])
    refuse_unlabelled(data, chosen, ("train", options.validation_split))
    advice = "Choose another --workdir; or, if both are processes of one run, start each with --distributed."
    with contextlib.ExitStack() as exit_stack:
        processes.by_first(lambda: exit_stack.enter_context(lock.locked(folder, advice)))
        processes.by_first(lambda: checkpoint.check_options(options, folder))
        checkpoints = checkpoint.Checkpoints(folder, read_only=not processes.is_first())
        exit_stack.enter_context(contextlib.closing(checkpoints))  # waits for the last save
        return fit(options, data, chosen, checkpoints, mesh, stop, exit_stack)


def fit(options: Config, data: DataSet, chosen, checkpoints: checkpoint.Checkpoints, mesh, stop, exit_stack) -> str:
    """The loop. An epoch takes steps, is evaluated, logged and saved. `exit_stack` closes what it opens."""
    state, unlogged, step, save, feed, model = set_up(options, data, chosen, checkpoints, mesh)
    exit_stack.enter_context(contextlib.closing(feed.batches))
    first, folder = processes.is_first(), checkpoints.run
    log = Log(folder, step=int(state.step), tensorboard=options.tensorboard, write=first)
    saver = Saver(checkpoints, save, log, options)
    if log.repeated:
        print(
            f"{folder} goes on from step {int(state.step)}. Steps up to {log.repeated} were not saved: it repeats them."
        )
    steps_per_epoch = num_steps(len(data.rows("train")), options.batch_size)
    total = options.epochs * steps_per_epoch
    bar = exit_stack.enter_context(progress(total, int(state.step), options.batch_size, show=first))
    for number in options.evaluation_epochs(int(state.step) // steps_per_epoch):
        if train_step.is_over(state, options):
            break
        until = number * steps_per_epoch
        state, taken = epoch.take_steps(state, feed, until, step, stop, bar)
        if int(state.step) < until:  # SIGTERM came
            saver.at_stop(state, unlogged + taken.read()[0])
            return f"{folder} was stopped by SIGTERM. It is saved at step {int(state.step)}: start it again to go on."
        counts = epoch.count(state, feed, model=model)  # the devices go on while the metrics are read
        metrics, speed = taken.read()
        means, unlogged = epoch.summary(unlogged + metrics, max_skipped=options.max_skipped), []
        error, accuracies = epoch.accuracy(counts)
        if number % options.eval_epochs == 0:  # an odd last epoch must not count towards a plateau
            state = train_step.evaluated(state, error, options)
            state = state.replace(plateau=devices.put_replicated(state.plateau, mesh))
        rate = options.learning_rate * float(state.plateau.scale)
        entry: dict = {"step": int(state.step), "epoch": number, "learning_rate": rate, "validation_error": error}
        entry |= means | speed | accuracies
        # The log comes first: a resumed run cuts it back to the checkpoint, but could not fill a gap.
        log.write(entry)
        bar.evaluated(entry)
        saver.after_evaluation(state, error)

    saver.at_end(state)

    def finish() -> str:
        exported = checkpoint.export(folder)
        figures.learning_curves(log.entries, folder / "curves.png")
        best = checkpoint.best_step(folder)
        return f"{folder} is finished: step {int(state.step)}, best step {best}, exported to {exported}."

    return processes.by_first(finish)


def set_up(options: Config, data: DataSet, chosen, checkpoints: checkpoint.Checkpoints, mesh) -> tuple:
    """The state to begin with, the metrics that the log lacks, functions to step and save, batches and network."""
    init_key, run_key = jax.random.split(jax.random.key(options.seed))
    model = train_step.make_model(options, chosen)
    slice_mean = data.mean_of_filled_slices() if options.fill_slices else data.slice_mean
    saved: dict = {"model": model, "data_digest": data.digest}
    state, unlogged, layers = checkpoint.resume(
        checkpoints, train_step.init(init_key, model, options, slice_mean), **saved, init_from=options.init_from
    )
    divided = layout.make(options.layout, mesh, state.params, batch_size=options.batch_size)
    start = [f"From {options.init_from}: {', '.join(layers)}."] if layers else []
    feed = epoch.make_feed(options, data, chosen, mesh, step=int(state.step))
    for note in (*start, *divided.notes(), *filter(None, [feed.note])) if processes.is_first() else ():
        print(note)
    weights = losses.class_weights(data.labels[data.rows("train")][:, feed.columns], chosen)
    state, model = divided.put(state), divided.on(cpu_kernels.with_cpu_kernels(model))
    key, weights = devices.put_replicated((run_key, weights), mesh)
    fixed: dict = {"model": model, "config": config.of_a_step(options), "layout": divided}

    def step(state: train_step.TrainState, batch: dict[str, jax.Array]) -> tuple:
        return train_step.train_step(key, state, batch, weights, **fixed)

    save = functools.partial(checkpoint.save, checkpoints, **saved, validation_split=options.validation_split)
    return state, unlogged, step, save, feed, model


def cli() -> None:
    """What `python train.py` and `spinejax-train` run."""
    presets = {
        name: (purpose, Arguments(tyro.MISSING, tyro.MISSING, options))
        for name, (purpose, options) in config.PRESETS.items()
    }
    if sys.argv[1:] in (["-h"], ["--help"]):  # every option at once, not only the names of the presets
        print("Presets:", *(f"  {name:12}{purpose}" for name, (purpose, _) in presets.items()), sep="\n", end="\n\n")
        sys.argv[1:] = ["paper", "--help"]
    name = Path(sys.argv[0]).name
    sys.exit(status_of(lambda: main(tyro.extras.overridable_config_cli(presets, prog=name, registry=PATHS))))
