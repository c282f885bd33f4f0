"""SpineNet in JAX: grade intervertebral discs on lumbar MRI, and see where the evidence lies."""

import importlib

from spinejax.errors import SpinejaxError
from spinejax.tasks import PAPER_TASKS, UNLABELLED, Task

__version__ = "0.1.0"
__all__ = ["PAPER_TASKS", "UNLABELLED", "SpineNet", "SpinejaxError", "Task", "load"]

# JAX is loaded with the first name that needs it: preparing data, in many processes, does not.
_NEED_JAX = {"load": "spinejax.training.checkpoint", "SpineNet": "spinejax.network.spinenet"}


def __getattr__(name):
    if name not in _NEED_JAX:
        raise AttributeError(f"module 'spinejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_NEED_JAX[name]), name)
