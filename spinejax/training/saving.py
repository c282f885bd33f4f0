"""When a run saves: by time, at the best step once it is confirmed, when it is stopped, and at its end.

A save takes seconds of disk and memory, an epoch perhaps a fifth of one. So a run saves every few minutes. The best
step so far is kept on the devices meanwhile. It is confirmed, and saved, when as many evaluations as the plateau rule's
patience have not found a better one.

No step is saved before the best one up to it. So a run that is killed and resumed ends with the same best step: it was
saved, or it is among the steps that are repeated.
"""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spinejax.config import Config
from spinejax.parallel import processes
from spinejax.training.checkpoint import Checkpoints
from spinejax.training.log import Log
from spinejax.training.saved_step import Unlogged, best_step, read_record
from spinejax.training.train_step import TrainState


class Saver:
    """Saves a run's states. All processes of the run call it together; the first one decides, and writes.

    Args:
        checkpoints: the run's saved steps.
        save: `checkpoint.save` for this run: called with a state, its `error`, and `unlogged` metrics if there are any.
        log: flushed before each save, so that a saved step is never ahead of it.
        options: `save_minutes`; and `plateau_patience`, the evaluations that confirm the best step.
    """

    def __init__(self, checkpoints: Checkpoints, save: Callable[..., None], log: Log, options: Config):
        self._checkpoints, self._save, self._log = checkpoints, save, log
        self._seconds, self._patience = 60 * options.save_minutes, options.plateau_patience
        is_new, least = processes.by_first(self._saved_before)
        self._least_error = math.inf if least is None else least
        # A new run saves at its first evaluation: a folder that cannot be written to is found at once.
        self._due_at = -math.inf if is_new else time.monotonic() + self._seconds
        self._best: tuple[TrainState, float] | None = None  # the best state and its error, if not saved yet
        self._since_best = 0
        self._evaluated: tuple[int, float] | None = None  # the last evaluated step and its error

    def after_evaluation(self, state: TrainState, error: float) -> None:
        """Save what is due, and hold the state if it is the best so far.

        Raises:
            SpinejaxError: the disk is too full; or an earlier save failed.
        """
        is_best = error <= self._least_error
        self._least_error = min(error, self._least_error)
        self._since_best = 0 if is_best else self._since_best + 1
        self._evaluated = int(state.step), error
        if is_best:
            self._best = None  # frees its memory before the next one is held
        if processes.by_first(self._is_due):
            self._due_at = time.monotonic() + self._seconds
            self._save_all(state, error)
        elif is_best:
            self._best = _copy(state), error
        elif self._since_best == self._patience:
            self._save_best()

    def at_stop(self, state: TrainState, unlogged: Unlogged) -> None:
        """Save a state, with the metrics that the log lacks, and wait until it is on disk."""
        if unlogged or not self._evaluated:
            self._save_all(state, None, unlogged=unlogged)
            processes.by_first(self._checkpoints.wait)
        else:  # no step was taken since an evaluation
            self.at_end(state)

    def at_end(self, state: TrainState) -> None:
        """Save the last state, and wait until it is on disk."""
        if self._evaluated:
            self._save_all(state, self._evaluated[1])
        processes.by_first(self._checkpoints.wait)

    def _saved_before(self) -> tuple[bool, float | None]:
        """Whether nothing is saved yet; and the least error of the steps that are."""
        best = best_step(self._checkpoints.run)
        return best is None, None if best is None else read_record(self._checkpoints.directory / str(best))["error"]

    def _is_due(self) -> bool:
        self._checkpoints.check()  # a save that failed ends the run now, not minutes later
        return time.monotonic() >= self._due_at and not (self._seconds and self._checkpoints.is_saving())

    def _save_all(self, state: TrainState, error: float | None, **options) -> None:
        self._save_best()
        self._log.flush()
        self._save(state, error=error, **options)

    def _save_best(self) -> None:
        if self._best:
            (state, error), self._best = self._best, None
            self._log.flush()
            self._save(state, error=error)


@jax.jit
def _copy(tree):
    """A tree of arrays that outlives the original, which the next step overwrites."""
    return jax.tree.map(jnp.copy, tree)
