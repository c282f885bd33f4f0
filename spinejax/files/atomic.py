"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from spinejax.errors import SpinejaxError


def write_atomically(path: Path, write: Callable, *, flushed: bool = True) -> None:
    """Call `write(temporary_path)`, flush the file to disk and only then give it its name.

    A reader finds either the old file or the whole new one. With `flushed=False` that holds unless the power fails: for
    files with a checksum that can be made again.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk it would take up space
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the message names the file that the user knows
        raise
    if flushed:
        flush(path.parent)


def write_privately(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically, into a file that only its owner can read."""

    def write(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        # Created with its final mode: others can never read it.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)

    write_atomically(path, write)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path, option: str) -> Path:
    """Make the folder that an option names, if it is missing. Raises SpinejaxError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpinejaxError(f"{option} {folder}: no folder can be made there ({error.strerror}).") from error
    return folder
