"""The project's commands, run as a user would, by benchmarks that are made of several of them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_script(*command) -> None:
    """Run one of the project's commands; its failure ends this one. Paths mean what they mean here."""
    words = [str(word.absolute() if isinstance(word, Path) else word) for word in command]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def require_trained(run: Path) -> None:
    """A training that was told to stop ends well, but is not at its end: what it left must not be judged."""
    if not (run / "export").is_dir():
        sys.exit(f"{run}: the training was stopped before its end. Start the same command again to go on.")
