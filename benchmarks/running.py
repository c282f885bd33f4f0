"""How benchmarks start, how they run the project's commands, and what they say when a library is missing."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from spinejax.errors import NotInstalledError, status_of

ROOT = Path(__file__).parent.parent


def start(name: str, arguments: type, main: Callable) -> None:
    """Run a benchmark's `main` with the options of its command line, and end with its exit status."""
    import tyro  # here, because the twin in PyTorch imports this module where only JAX and PyTorch are installed

    sys.exit(status_of(lambda: main(tyro.cli(arguments, prog=f"python -m benchmarks.{name}"))))


def peer(library: str, extra: str = "bench") -> ModuleType:
    """A library that only benchmarks need. If it is not installed, the program ends with one line and status 2."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError:
        print(f"error: {NotInstalledError(f'This benchmark needs {library}', extra)}", file=sys.stderr)
        sys.exit(2)


def run_script(*command) -> None:
    """Run one of the project's commands in the project's folder; its failure ends the benchmark.

    Paths may be relative to the current folder.
    """
    words = [str(word.absolute() if isinstance(word, Path) else word) for word in command]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def require_trained(run: Path) -> None:
    """End the benchmark if a training was stopped before its end: its network must not be judged."""
    if not (run / "export").is_dir():
        sys.exit(f"{run}: the training was stopped before its end. Start the same command again to go on.")
