"""The progress of a run: a bar on a terminal, and a line for every tenth elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


def with_progress(results: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    """The results unchanged, counted as they come. `what` is what they are, in the plural."""
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for done, result in enumerate(progress.track(results, total=total, description=what), start=1):
            yield result
            if not console.is_terminal and (done == total or done % max(total // 10, 1) == 0):
                console.print(f"{done} of {total} {what}", highlight=False)
