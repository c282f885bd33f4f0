"""Finding series with several processes, headers that were kept, and a progress bar."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from data_prep.dataset.progress import with_progress
from data_prep.dataset.workers import workers
from data_prep.read.found import Found
from data_prep.read.header_cache import Header, HeaderCache
from data_prep.read.series import find_series

_FEW = 500  # files that are read sooner than processes start, and without a bar


def search(
    paths: Sequence[Path], cache: HeaderCache, *, num_workers: int = 1, console: Console | None = None, **options
) -> Found:
    """What `find_series` finds, with headers from a cache.

    Args:
        paths: files and folders.
        cache: headers that are known; those that are read are added.
        num_workers: number of processes that read headers.
        console: where to show the progress.
        options: those of `find_series`.
    """

    def headers(files: Sequence[Path]) -> Iterator[Header]:
        if len(files) < _FEW:
            yield from cache.read(files)
            return
        with workers(num_workers, None) as run:
            yield from with_progress(cache.read(files, run), len(files), "files", console or Console(quiet=True))

    return find_series(paths, headers=headers, **options)
