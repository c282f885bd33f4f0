"""Train SpineNet on a data set of disc volumes: `python train.py PRESET --data DIR --workdir RUN [--option value]…`.

A run is a folder. Starting it again goes on from its last checkpoint, and ends with the same parameters, bit for bit,
as if it had never stopped.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from spinejax import config, tasks
from spinejax.config import Config
from spinejax.data.batches import Batch, eval_batches, num_steps, refuse_unlabelled, train_batches
from spinejax.data.dataset import DataSet
from spinejax.data.device_cache import DeviceCache
from spinejax.errors import SpinejaxError, status_of
from spinejax.files import lock
from spinejax.metrics.grading import mean_per_class_accuracy
from spinejax.network import losses
from spinejax.network.cpu_kernels import with_cpu_kernels
from spinejax.network.spinenet import SpineNet
from spinejax.parallel import devices, processes, runtime
from spinejax.parallel import layout as layouts
from spinejax.report import figures
from spinejax.training import checkpoint, train_step
from spinejax.training.log import Log, Progress, entry_of, progress
from spinejax.training.train_step import TrainState

_HELD = "Choose another --workdir; or, if both are processes of one run, start each with --distributed."


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train SpineNet; options start from the preset's values."""

    data: Path
    """Data set: a folder that `python -m data_prep` made."""
    workdir: Path
    """The run's folder. If it holds a run of the same options, that run goes on."""
    options: Annotated[Config, tyro.conf.arg(name="")]
    distributed: bool = False
    """One of several processes of this run, as SLURM, MPI, GKE or Cloud TPU start them, or as JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say."""
    start_seconds: int = 300
    """With --distributed: how long to wait for the others."""


def main(arguments: Arguments) -> None:
    """One run, on one process or as one of several."""
    runtime.set_up()
    with (
        processes.started(arguments.distributed, start_seconds=arguments.start_seconds),
        processes.stop_notices() as told_to_stop,
    ):
        message = run(arguments.options, DataSet(arguments.data), arguments.workdir, told_to_stop)
        if processes.is_first():
            print(message)


def run(options: Config, data: DataSet, folder: Path, told_to_stop: Callable[[int], bool]) -> str:
    """A run, from the data set to the exported network, or to where it is told to stop. How it ended, in a sentence."""
    mesh = devices.make_mesh()
    devices.check_batch(options.batch_size, mesh, "--batch-size")
    processes.refuse_difference("options", repr(options))
    processes.refuse_difference("data", data.digest)
    chosen = tasks.select(data.tasks, options.tasks)
    refuse_unlabelled(data, chosen, ("train", options.validation_split))
    tasks.select(chosen, [name for name, _ in options.task_weights])  # refuse a weight for a task that is not learned
    columns = [data.tasks.index(task) for task in chosen]

    with contextlib.ExitStack() as held:
        processes.by_first(lambda: held.enter_context(lock.locked(folder, _HELD)))
        processes.by_first(lambda: checkpoint.check_options(options, folder))
        checkpoints = checkpoint.Checkpoints(folder, read_only=not processes.is_first())
        held.enter_context(contextlib.closing(checkpoints))  # waits for the last save
        model = train_step.make_model(options, chosen)
        slice_mean = data.mean_of_filled_slices() if options.fill_slices else data.slice_mean
        init_key, run_key = jax.random.split(jax.random.key(options.seed))
        state = train_step.init(init_key, model, options, slice_mean)
        is_new = processes.by_first(lambda: not checkpoints.all_steps())
        if options.init_from and is_new:
            state, taken = train_step.take_over(state, checkpoint.load(options.init_from)[1]["params"])
            processes.by_first(lambda: print(f"From {options.init_from}: {', '.join(taken)}."))
        state, unlogged = checkpoint.resume(checkpoints, state, model=model, data_digest=data.digest)
        layout = layouts.make(options.layout, mesh, state.params, batch_size=options.batch_size)
        for note in layout.notes() if processes.is_first() else ():
            print(note)
        state, model = layout.put(state), layout.on(with_cpu_kernels(model))
        save = functools.partial(
            checkpoint.save,
            checkpoints,
            model=model,
            data_digest=data.digest,
            validation_split=options.validation_split,
        )
        done = int(state.step)
        log = Log(folder, step=done, tensorboard=options.tensorboard, write=processes.is_first())

        train_rows = data.rows("train")
        weights = losses.class_weights(data.labels[train_rows][:, columns], chosen)
        step = functools.partial(
            train_step.train_step,
            devices.put_replicated(run_key, mesh),
            class_weights=devices.put_replicated(weights, mesh),
            model=model,
            config=config.of_a_step(options),
            layout=layout,
        )
        deciding_rows = data.rows(options.validation_split)
        put: Callable = functools.partial(devices.put_batch, mesh=mesh)
        if options.cache == "device":
            put = DeviceCache(data, np.concatenate([train_rows, deciding_rows]), mesh).put
        read = {
            "batch_size": options.batch_size,
            "host": jax.process_index(),
            "num_hosts": jax.process_count(),
            "volumes": options.cache == "none",
        }
        batches = train_batches(data, columns, seed=options.seed, step=done, workers=options.workers, **read)
        held.enter_context(contextlib.closing(batches))
        validation = functools.partial(eval_batches, data, deciding_rows, columns, **read)
        steps_per_epoch = num_steps(len(train_rows), options.batch_size)
        total = options.epochs * steps_per_epoch
        bar = held.enter_context(progress(total, done, options.batch_size, show=processes.is_first()))
        for epoch in next_epochs(done // steps_per_epoch, options):
            if train_step.is_over(state, options):
                break
            until = epoch * steps_per_epoch
            state, stretch, seconds, waited = train(state, batches, until, step, put, bar, told_to_stop)
            speed = {"seconds": seconds, "waited": waited, "discs": len(stretch) * options.batch_size}
            unlogged += stretch
            if int(state.step) < until:  # told to stop
                save(state, error=None, unlogged=unlogged)
                processes.by_first(checkpoints.wait)
                return f"{folder} was told to stop. It is saved at step {int(state.step)}: start it again to go on."
            figures_of_stretch, skipped_in_a_row = entry_of(unlogged, **speed)
            if skipped_in_a_row >= options.max_skipped:
                checkpoints.wait()
                raise SpinejaxError(
                    f"{folder}: the loss or a gradient was NaN or infinite in {skipped_in_a_row} steps in a row before "
                    f"epoch {epoch}. The last good checkpoint is kept (step {checkpoints.latest_step()}). Train again "
                    "in another --workdir, with a lower --learning-rate."
                )
            unlogged = []
            accuracies = validate(state, validation(), model, put)
            error = 1 - float(np.mean(list(accuracies.values())))
            if epoch % options.eval_epochs == 0:  # an odd last epoch must not count towards a plateau
                state = train_step.evaluated(state, error, options)
                state = state.replace(plateau=devices.put_replicated(state.plateau, mesh))
            entry = {
                "step": int(state.step),
                "epoch": epoch,
                "learning_rate": options.learning_rate * float(state.plateau.scale),
                "validation_error": error,
                **figures_of_stretch,
                **{f"validation_accuracy/{name}": value for name, value in accuracies.items()},
            }
            # The log comes first: a run that goes on cuts it back to the checkpoint, but could not fill a gap.
            log.write(entry)
            bar.evaluated(entry)
            save(state, error=error)

        def export() -> str:
            checkpoints.wait()
            exported = checkpoint.export(folder)
            figures.learning_curves(log.entries, folder / "curves.png")
            best = checkpoint.best_step(folder)
            return f"{folder} is finished: step {int(state.step)}, best step {best}, exported to {exported}."

        return processes.by_first(export)


def next_epochs(done: int, options: Config) -> list[int]:
    """The epochs at whose end the network is evaluated and saved, after `done` epochs."""
    every = options.eval_epochs
    on_the_grid = range(done - done % every + every, options.epochs, every)
    return [*on_the_grid, options.epochs] if done < options.epochs else []


def train(
    state: TrainState,
    batches: Iterator[Batch],
    until: int,
    step: Callable,
    put: Callable,
    progress: Progress,
    told_to_stop: Callable[[int], bool],
) -> tuple[TrainState, list[dict[str, float]], float, float]:
    """Take steps until there are so many, or until told to stop.

    Returns:
        The new state, the steps' figures, the seconds that it took, and how many of them were spent waiting for data.
    """
    figures_of_steps, waited, started = [], 0.0, time.perf_counter()
    for number in range(int(state.step), until):
        if told_to_stop(number):
            break
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, step_figures = step(state, put(batch))
        figures_of_steps.append(step_figures)
        progress.step()
    # Figures are read back once, here: inside the loop the devices never wait for the host.
    stretch = [{name: float(value) for name, value in each.items()} for each in devices.to_host(figures_of_steps)]
    return state, stretch, time.perf_counter() - started, waited


def validate(state: TrainState, batches: Iterator[Batch], model: SpineNet, put: Callable) -> dict[str, float]:
    """Task name → mean per-class accuracy on the batches' discs."""
    variables = {"params": state.params, "constants": state.constants}
    counts = [train_step.eval_step(variables, put(batch), model=model) for batch in batches]
    confusions = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *devices.to_host(counts))
    return {name: float(mean_per_class_accuracy(confusion)) for name, confusion in confusions.items()}


def cli() -> None:
    """What `python train.py` and `spinejax-train` run."""
    presets = {
        name: (purpose, Arguments(tyro.MISSING, tyro.MISSING, options))
        for name, (purpose, options) in config.PRESETS.items()
    }
    if sys.argv[1:] in (["-h"], ["--help"]):  # every option at once, not only the names of the presets
        print("Presets:", *(f"  {name:12}{purpose}" for name, (purpose, _) in presets.items()), sep="\n", end="\n\n")
        sys.argv[1:] = ["paper", "--help"]
    sys.exit(status_of(lambda: main(tyro.extras.overridable_config_cli(presets, prog=Path(sys.argv[0]).name))))
