"""Train SpineNet on a data set of disc volumes: `python train.py PRESET --data DIR --workdir RUN [--option value]…`.

A run is a folder. Starting it again goes on from its last checkpoint, and ends with the same parameters, bit for bit,
as if it had never stopped.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from spinejax import checkpoint, config, devices, figures, logbook, losses, pipeline, tasks, training
from spinejax import layout as layouts
from spinejax.config import Config
from spinejax.dataset import DataSet
from spinejax.device_cache import DeviceCache
from spinejax.errors import SpinejaxError, status_of
from spinejax.metrics import mean_per_class_accuracy
from spinejax.model import SpineNet
from spinejax.tasks import UNLABELLED, Task
from spinejax.training import TrainState


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train SpineNet; options start from the preset's values."""

    data: Path
    """Data set: a folder that `python -m data_prep` made."""
    workdir: Path
    """The run's folder. If it holds a run of the same options, that run goes on."""
    options: Annotated[Config, tyro.conf.arg(name="")]


def main(arguments: Arguments) -> None:
    """One run, from the data set to the exported network."""
    options, run = arguments.options, arguments.workdir
    devices.keep_compiled()
    mesh = devices.make_mesh()
    devices.check_batch(options.batch_size, mesh, "--batch-size")
    data = DataSet(arguments.data)
    chosen = tasks.select(data.tasks, options.tasks)
    refuse_unlabelled(data, chosen, ("train", options.validation_split))
    tasks.select(chosen, [name for name, _ in options.task_weights])  # refuse a weight for a task that is not learned
    columns = [data.tasks.index(task) for task in chosen]

    with checkpoint.locked(run):
        checkpoint.settle(options, run)
        model = training.make_model(options, chosen)
        init_key, run_key = jax.random.split(jax.random.key(options.seed))
        state = training.init(init_key, model, options, data.slice_mean)
        checkpoints = checkpoint.open_checkpoints(run)
        latest = checkpoints.latest_step()
        if latest is not None:
            state = checkpoint.restore(checkpoints, state, latest, model=model, data_digest=data.digest)
        layout = layouts.make(options.layout, mesh, state.params, batch_size=options.batch_size)
        for note in layout.notes():
            print(note)
        state, model = layout.put(state), layout.on(model)
        done = int(state.step)
        log = logbook.Log(run, step=done, tensorboard=options.tensorboard)

        train_rows = data.rows("train")
        weights = losses.class_weights(data.labels[train_rows][:, columns], chosen)
        step = functools.partial(
            training.train_step,
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
        batches = pipeline.train_batches(data, columns, seed=options.seed, step=done, workers=options.workers, **read)
        validation = functools.partial(pipeline.eval_batches, data, deciding_rows, columns, **read)
        steps_per_epoch = pipeline.num_steps(len(train_rows), options.batch_size)
        total = options.epochs * steps_per_epoch
        with contextlib.closing(batches), logbook.progress(total, done, options.batch_size) as progress:
            for epoch in next_epochs(done // steps_per_epoch, options):
                if training.is_over(state, options):
                    break
                num_steps = epoch * steps_per_epoch - int(state.step)
                state, figures_of_stretch, skipped_in_a_row = train(
                    run_key, state, batches, num_steps, step, put, progress
                )
                if skipped_in_a_row >= options.max_skipped:
                    checkpoints.close()
                    kept = "The last good checkpoint is kept" if checkpoints.all_steps() else "Nothing was saved yet"
                    raise SpinejaxError(
                        f"{run}: the loss or a gradient was NaN or infinite in {skipped_in_a_row} steps in a row "
                        f"before epoch {epoch}. {kept}. Train again in another --workdir, with a lower --learning-rate."
                    )
                accuracies = validate(state, validation(), model, put)
                error = 1 - float(np.mean(list(accuracies.values())))
                if epoch % options.eval_epochs == 0:  # an odd last epoch must not count towards a plateau
                    state = training.evaluated(state, error, options)
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
                progress.evaluated(entry)
                checkpoint.save(checkpoints, state, model, data_digest=data.digest, error=error)
        checkpoints.close()  # waits for the last save
        exported = checkpoint.export(run)
        figures.learning_curves(log.entries, run / "curves.png")
        best = checkpoint.best_step(run)
        print(f"{run} is finished: step {int(state.step)}, best step {best}, exported to {exported}.")


def refuse_unlabelled(data: DataSet, chosen: Sequence[Task], splits: Sequence[str]) -> None:
    """Raises SpinejaxError if a task cannot be learned or validated: a split has no disc with a label for it."""
    for split in splits:
        labels = data.labels[data.rows(split)]
        for task in chosen:
            if (labels[:, data.tasks.index(task)] == UNLABELLED).all():
                raise SpinejaxError(
                    f"{data.folder}: no disc of split {split!r} has a label for {task.name}. Leave it out with --tasks."
                )


def next_epochs(done: int, options: Config) -> list[int]:
    """The epochs at whose end the network is evaluated and saved, after `done` epochs."""
    every = options.eval_epochs
    on_the_grid = range(done - done % every + every, options.epochs, every)
    return [*on_the_grid, options.epochs] if done < options.epochs else []


def train(
    key: jax.Array,
    state: TrainState,
    batches: Iterator[pipeline.Batch],
    num_steps: int,
    step: Callable,
    put: Callable,
    progress: logbook.Progress,
) -> tuple[TrainState, dict[str, float], int]:
    """Take steps; also give what the log says of them (means, speed, waiting), and the most skipped in a row."""
    figures_of_steps, waited, started = [], 0.0, time.perf_counter()
    for _ in range(num_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, step_figures = step(key, state, put(batch))
        figures_of_steps.append(step_figures)
        progress.step()
    # Figures are read back once, here: inside the loop the devices never wait for the host.
    figures_of_steps = jax.device_get(figures_of_steps)
    seconds = time.perf_counter() - started
    skipped = [int(each.pop("skipped")) for each in figures_of_steps]
    taken = [each for each, skips in zip(figures_of_steps, skipped, strict=True) if not skips]
    means = {name: float(np.mean([each[name] for each in taken] or np.nan)) for name in figures_of_steps[0]}
    speed = num_steps * progress.batch_size / seconds
    entry = {"skipped_steps": num_steps - len(taken), "discs_per_second": speed, "waiting_for_data": waited / seconds}
    return state, means | entry, max(skipped)


def validate(state: TrainState, batches: Iterator[pipeline.Batch], model: SpineNet, put: Callable) -> dict[str, float]:
    """Task name → mean per-class accuracy on the batches' discs."""
    variables = {"params": state.params, "constants": state.constants}
    counts = [training.eval_step(variables, put(batch), model=model) for batch in batches]
    confusions = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *jax.device_get(counts))
    return {name: float(mean_per_class_accuracy(confusion)) for name, confusion in confusions.items()}


if __name__ == "__main__":
    presets = {
        name: (purpose, Arguments(tyro.MISSING, tyro.MISSING, options))
        for name, (purpose, options) in config.PRESETS.items()
    }
    if sys.argv[1:] in (["-h"], ["--help"]):  # every option at once, not only the names of the presets
        print("Presets:", *(f"  {name:12}{purpose}" for name, (purpose, _) in presets.items()), sep="\n", end="\n\n")
        sys.argv[1:] = ["paper", "--help"]
    sys.exit(status_of(lambda: main(tyro.extras.overridable_config_cli(presets))))
