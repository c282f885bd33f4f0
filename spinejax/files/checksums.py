"""A folder to be trusted: flushed to disk, and listed file by file with a sha256, before it gets its name.

The list, `SHA256SUMS`, has the form of the command of that name: `sha256sum --check SHA256SUMS` reads it too.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from spinejax.errors import SpinejaxError

SUMS = "SHA256SUMS"
TEMPORARY = ".tmp"
"""Ending of a folder's name while it is made or taken apart."""


def sha256_of(path: Path) -> str:
    """A file's digest, 64 hexadecimal characters."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """List every file of a folder's folders, and flush them all to disk.

    Files that lie beside those folders are not listed: they may come later, and have sums of their own.
    """
    files = _files(folder)
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in files))
    for path in (folder, *folder.rglob("*")):
        flush(path)


def commit(temporary: Path, target: Path) -> None:
    """Give a sealed folder its name; it stands there for good when the call returns."""
    os.replace(temporary, target)
    flush(target.parent)


def discard(folder: Path) -> None:
    """Delete a folder so that nobody meets half of it under its name."""
    dying = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(dying, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, dying)
    shutil.rmtree(dying, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words that name the file; None if every byte is what was saved."""
    try:
        lines = (folder / SUMS).read_bytes().decode("ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS} is missing or damaged ({type(error).__name__})"
    entries = [re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in lines[:-1]]
    if lines[-1] or not all(entries):
        return f"{SUMS} is damaged"
    listed = {entry[2]: entry[1] for entry in entries if entry}
    found = set(_files(folder))
    for name in sorted(found | listed.keys()):
        if name not in listed:
            return f"{name} is not listed in {SUMS}"
        if name not in found:
            return f"{name} is missing"
        try:
            if sha256_of(folder / name) != listed[name]:
                return f"{name} is not what was saved: its sha256 differs"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def check(folder: Path, way_back: str) -> None:
    """Raises SpinejaxError, ending in `way_back`, unless every file of a folder is what was saved."""
    fault = fault_of(folder)
    if fault:
        raise SpinejaxError(f"{folder}: {fault}. {way_back}")


def _files(folder: Path) -> list[str]:
    """The files of a folder's folders; hidden ones are the file system's own business (`.nfs…`, `.DS_Store`)."""
    files = (path for path in folder.glob("*/**/*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in files)
