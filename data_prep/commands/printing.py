"""What commands print: results to standard output, notes, failures and progress to standard error."""

import sys

from rich.console import Console

from spinejax.errors import printable

PROGRESS = Console(stderr=True)


def print_notes(notes: list[str]) -> None:
    """Print a line for each note."""
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def print_failures(failures: dict[str, str]) -> None:
    """Print a line for each failure: name → reason."""
    for name, reason in failures.items():
        line = reason if reason.startswith(name) else f"{name}: {reason}"
        print(f"failed: {printable(line)}", file=sys.stderr)
