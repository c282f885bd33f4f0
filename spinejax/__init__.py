"""SpineNet in JAX: grade intervertebral discs on lumbar MRI, and see where the evidence lies."""

import importlib
from typing import TYPE_CHECKING, Any

from spinejax.errors import NotInstalledError, SpinejaxError
from spinejax.tasks import PAPER_TASKS, UNLABELLED, Task

if TYPE_CHECKING:
    from spinejax.api import Grades, explain, export, grade, load
    from spinejax.inference.hotspots import Method
    from spinejax.network import views
    from spinejax.network.spinenet import SpineNet

__version__ = "0.1.0"
__all__ = [
    "PAPER_TASKS",
    "UNLABELLED",
    "Grades",
    "Method",
    "NotInstalledError",
    "SpineNet",
    "SpinejaxError",
    "Task",
    "explain",
    "export",
    "grade",
    "load",
    "views",
]

# JAX is loaded with the first name that needs it: preparing data, in many processes, does not.
_MODULES = {
    "SpineNet": "spinejax.network.spinenet",
    "Method": "spinejax.inference.hotspots",
    **dict.fromkeys(("Grades", "explain", "export", "grade", "load"), "spinejax.api"),
}


def __getattr__(name: str) -> Any:
    if name == "views":
        return importlib.import_module("spinejax.network.views")
    if name not in _MODULES:
        raise AttributeError(f"module 'spinejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
