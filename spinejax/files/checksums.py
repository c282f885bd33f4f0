"""Folders that can be verified: `SHA256SUMS` lists a sha256 for each file, and is written before the folder is named.

The list has the form of the command of that name: `sha256sum --check SHA256SUMS` reads it too.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from spinejax.files.atomic import flush

SUMS = "SHA256SUMS"
TEMPORARY = ".tmp"
"""Ending of a folder's name while it is written or deleted."""


def sha256_of(path: Path) -> str:
    """A file's digest, 64 hexadecimal characters."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """List the files of a folder's subfolders, and flush them all to disk.

    Files beside the subfolders are not listed: they may be added later, and have checksums of their own.
    """
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in _files(folder)))
    for path in (folder, *folder.rglob("*")):
        flush(path)


def commit(temporary: Path, target: Path) -> None:
    """Give a sealed folder its name. It is on disk when the call returns."""
    os.replace(temporary, target)
    flush(target.parent)


def discard(folder: Path) -> None:
    """Delete a folder; a reader never finds half of it under its name."""
    dying = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(dying, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, dying)
    shutil.rmtree(dying, ignore_errors=True)


def fault_of(folder: Path, *subfolders: str) -> str | None:
    """What is wrong with a sealed folder, in a few words that name the file; None if nothing is.

    Args:
        folder: the folder.
        subfolders: verify these alone, and leave the others unread; all of them if none is named.
    """
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
        if subfolders and name.split("/")[0] not in subfolders:
            continue
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


def _files(folder: Path) -> list[str]:
    """The files of a folder's subfolders, without hidden ones, which file systems make (`.nfs…`, `.DS_Store`)."""
    files = (path for path in folder.glob("*/**/*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in files)
