"""The files of a tree, whatever their format: each once, in an order that does not depend on the file system."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from spinejax.errors import SpinejaxError

Report: TypeAlias = Callable[[str | Path, SpinejaxError | OSError], None]
"""Takes a file or folder that cannot be read, and why."""


def files_below(paths: Sequence[Path], exclude: Sequence[Path], report: Report) -> Iterator[Path]:
    """Every file of some files and folders once.

    Args:
        paths: files and folders.
        exclude: folders that are not searched.
        report: called with what cannot be read.

    Raises:
        SpinejaxError: a path does not exist.
    """
    hidden = {path.resolve() for path in exclude}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise SpinejaxError(f"{path}: no such file or folder.")
        for file in [path] if path.is_file() else _walk(path, hidden, report):
            try:
                new = file.is_file() and file.resolve() not in seen  # a reader would wait for ever on a pipe or socket
            except OSError as error:  # in a folder whose names may be read, but not its files
                report(file, error)
                continue
            if new:
                seen.add(file.resolve())
                yield file


def _walk(root: Path, hidden: set[Path], report: Report) -> Iterator[Path]:
    """All files of a tree, except system files and folders, whose name begins with a dot.

    Linked folders come last, so that a file that is there twice is found in its own folder.
    """
    seen: set[Path] = set()
    tops = [root]
    for top in tops:
        for folder, folders, names in os.walk(top, onerror=lambda error: report(error.filename, error)):
            here = [Path(folder, name) for name in sorted(folders) if name[0] != "."]
            here = [path for path in here if path.resolve() not in hidden]
            folders[:] = [] if Path(folder).resolve() in seen else [path.name for path in here]
            seen.add(Path(folder).resolve())  # links may lead in a circle
            tops += [path for path in here if path.is_symlink()]
            yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def unreadable(path: str | Path, error: SpinejaxError | OSError) -> str:
    """The message on a file or folder that cannot be read."""
    return f"{path}: cannot be read ({error.strerror})." if isinstance(error, OSError) else str(error)
