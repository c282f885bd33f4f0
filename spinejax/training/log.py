"""What a run reports while it trains.

    log.jsonl        a line for each evaluation; also as scalars for TensorBoard and Weights & Biases, if asked
    metrics.jsonl    a line for each step

and progress on the terminal.
"""

import contextlib
import itertools
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import pydantic
import rich.console
import rich.progress
from typing_extensions import TypedDict

from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.files.atomic import flush, write_atomically
from spinejax.training.saved_step import OPTIONS, Unlogged

LOG = "log.jsonl"
METRICS = "metrics.jsonl"
WANDB = "wandb"


class _Entry(TypedDict):
    """What the library itself reads of an entry; it holds more metrics."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]

    step: int
    epoch: int
    loss: float | None
    validation_error: float
    learning_rate: float


_ENTRY = pydantic.TypeAdapter(_Entry)


class Log:
    """One JSON line for each evaluation, in `RUN/log.jsonl`, and for each step, in `RUN/metrics.jsonl`.

    `repeated` is the last step that the log had and that was not saved, if it is later than `step`.

    Args:
        run: the run's folder.
        step: the step that the run resumes from. Later lines are deleted: their steps were not saved, and are repeated.
        tensorboard: also write the evaluations' scalars as event files into the run's folder.
        wandb: also log them to Weights & Biases.
        write: if not, only keep the entries in memory: another process writes them.

    Raises:
        SpinejaxError: TensorBoard or Weights & Biases was asked for, but the extra is not installed.
    """

    def __init__(self, run: Path, *, step: int, tensorboard: bool = False, wandb: bool = False, write: bool = True):
        self._path = run / LOG if write else None
        self.entries: list[dict] = []
        self.repeated: int | None = None
        if self._path:
            found = read_log(self._path)
            self.entries = [entry for entry in found if entry["step"] <= step]
            self.repeated = max((entry["step"] for entry in found if entry["step"] > step), default=None)
            text = "".join(_line(entry) for entry in self.entries)
            write_atomically(self._path, lambda path: path.write_text(text))
            _cut(run / METRICS, step)
        self._writer = _tensorboard_writer(run, step) if tensorboard and write else None
        self._wandb = _wandb_run(run) if wandb and write else None

    def write(self, entry: dict) -> None:
        """Append an entry; it holds at least `step`."""
        self.entries.append(entry)
        if self._path:
            with open(self._path, "a") as file:
                file.write(_line(entry))
        scalars = {name: value for name, value in entry.items() if name != "step" and value is not None}
        if self._writer:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, entry["step"])
            self._writer.flush()
        if self._wandb:
            self._wandb.log(scalars, step=entry["step"])

    def write_steps(self, last: int, metrics_of_steps: Unlogged, about: Mapping[str, float | None]) -> None:
        """Append a line for each step up to `last`; that one's also has what is said `about` all of them."""
        if self._path and metrics_of_steps:
            first = last - len(metrics_of_steps) + 1
            lines: list[dict] = [{"step": step, **metrics} for step, metrics in enumerate(metrics_of_steps, first)]
            lines[-1] |= about
            with open(self._path.with_name(METRICS), "a") as file:
                file.write("".join(map(_line, lines)))

    def flush(self) -> None:
        """Wait until all entries are on disk. A step may be saved only after its entry."""
        for path in (self._path, self._path.with_name(METRICS)) if self._path else ():
            if path.is_file():
                flush(path)

    def close(self) -> None:
        """End what is written beside the run's own files."""
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()


def _line(entry: dict) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict]:
    """The entries of a log, oldest first. A last line that a kill cut short is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    entries: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = _ENTRY.validate_json(line)
        except pydantic.ValidationError as error:
            if number < len(lines):
                raise SpinejaxError(f"{path}: line {number} is not an entry of a log. Delete that line.") from error
        else:  # earlier versions wrote NaN, which JSON does not have
            entries.append({name: None if value != value else value for name, value in entry.items()})
    return entries


def _cut(path: Path, step: int) -> None:
    """Delete the lines of later steps, and those at the end that a kill or the loss of power cut short."""

    def is_kept(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except ValueError:
            return False

    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = list(itertools.takewhile(is_kept, lines))
    if kept != lines:
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(kept)))


class Progress:
    """Shows steps done, discs per second, time left and a line per evaluation; plain lines if not on a terminal."""

    def __init__(self, bar: rich.progress.Progress, task: rich.progress.TaskID, batch_size: int):
        self._bar, self._task, self.batch_size = bar, task, batch_size

    def step(self) -> None:
        """Count one step."""
        self._bar.advance(self._task)
        speed = self._bar.tasks[0].speed
        self._bar.update(self._task, speed=f"{speed * self.batch_size:.0f} discs/s" if speed else "")

    def evaluated(self, entry: dict) -> None:
        """Print an evaluation's result."""
        loss = "none" if entry["loss"] is None else f"{entry['loss']:.3f}"
        self._bar.console.print(
            f"epoch {entry['epoch']:4d}  step {entry['step']:6d}  loss {loss}  "
            f"validation error {entry['validation_error']:.3f}  learning rate {entry['learning_rate']:.1e}  "
            f"{entry['discs_per_second']:.0f} discs/s",
            highlight=False,
        )


@contextlib.contextmanager
def progress(num_steps: int, done: int, batch_size: int, *, show: bool = True) -> Iterator[Progress]:
    """Show progress while the block runs."""
    columns = (
        rich.progress.TextColumn("training"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(soft_wrap=True, quiet=not show)
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Progress(bar, bar.add_task("", total=num_steps, completed=done, speed=""), batch_size)


def _tensorboard_writer(run: Path, step: int):
    try:
        import tensorboardX
    except ImportError as error:
        raise NotInstalledError("Option --tensorboard needs tensorboardX", "tensorboard") from error
    return tensorboardX.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def _wandb_run(run: Path):
    """A run of Weights & Biases, the same one when the folder's run is resumed.

    Neither code nor the machine's name is sent, nor what is printed: paths are there that may name patients.
    """
    try:
        import wandb
    except ImportError as error:
        raise NotInstalledError("Option --wandb needs wandb", "wandb") from error
    identity = run / WANDB / "id"
    if not identity.is_file():
        identity.parent.mkdir(exist_ok=True)
        write_atomically(identity, lambda path: path.write_text(secrets.token_hex(8)))
    options = json.loads((run / OPTIONS).read_text()) if (run / OPTIONS).is_file() else {}
    quiet = wandb.Settings(
        host="undisclosed",
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_stats=True,
    )
    return wandb.init(
        dir=run,
        project="spinejax",
        id=identity.read_text(),
        resume="allow",
        config={name: value for name, value in options.items() if name != "init_from"},
        settings=quiet,
    )
