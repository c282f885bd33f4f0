"""Folders that can be verified: `SHA256SUMS` lists a sha256 for each file, and is written before the folder is named.

The list has the form of the command of that name: `sha256sum --check SHA256SUMS` reads it too.
"""

import concurrent.futures
import hashlib
import os
import re
import shutil
from pathlib import Path

from spinejax.files.atomic import flush

SUMS = "SHA256SUMS"
TEMPORARY = ".tmp"
"""Ending of a folder's name while it is written or deleted."""
NUM_THREADS = 4
"""Files that are summed at once: one thread does about 1 GB/s, and leaves Python's lock to the others."""


def sha256_of(path: Path) -> str:
    """A file's digest, 64 hexadecimal characters."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Sums:
    """The sums of a folder's files, each made once and by other threads, while further files are still written.

    Used as a context manager: it ends the threads.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._threads = concurrent.futures.ThreadPoolExecutor(NUM_THREADS)
        self._digests: dict[str, concurrent.futures.Future[str]] = {}

    def __enter__(self) -> "Sums":
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, subfolder: str) -> None:
        """Begin with the files of a subfolder that is complete."""
        for name in _files(self._folder, subfolder):
            self._digests[name] = self._threads.submit(_sum_and_flush, self._folder / name)

    def seal(self) -> None:
        """Wait for the sums, list them, and flush everything to disk.

        Files beside the subfolders are not listed: they may be added later, and have checksums of their own.

        Raises:
            OSError: the system refuses it: a full disk, a quota.
        """
        lines = [f"{self._digests[name].result()}  {name}\n" for name in sorted(self._digests)]
        (self._folder / SUMS).write_text("".join(lines))
        for path in (self._folder, *self._folder.rglob("*")):
            if path.relative_to(self._folder).as_posix() not in self._digests:
                flush(path)


def seal(folder: Path) -> None:
    """List the files of a folder's subfolders, and flush them all to disk. Raises OSError as `Sums.seal`."""
    with Sums(folder) as sums:
        for path in folder.iterdir():
            sums.add(path.name)
        sums.seal()


def copy(source: Path, target: Path, *subfolders: str) -> str | None:
    """Copy some subfolders of a sealed folder into a new folder, sealed too and on disk.

    Each file is summed once, in the copy, and compared with what the source lists.

    Returns:
        What is wrong with the source, as by `fault_of`; None if nothing is.
    """
    for name in subfolders:
        shutil.copytree(source / name, target / name)
    if (source / SUMS).is_file():
        lines = (source / SUMS).read_bytes().splitlines(keepends=True)
        (target / SUMS).write_bytes(b"".join(line for line in lines if _subfolder(line) in subfolders))
    fault = fault_of(target)
    for path in (target, *target.rglob("*")):
        flush(path)
    return fault


def _subfolder(line: bytes) -> str:
    """The subfolder in a line of the list."""
    return line.partition(b"  ")[2].partition(b"/")[0].decode("ascii", "replace")


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


def _files(folder: Path, subfolder: str = "*") -> list[str]:
    """The files of a folder's subfolders, without hidden ones, which file systems make (`.nfs…`, `.DS_Store`)."""
    files = (path for path in folder.glob(f"{subfolder}/**/*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _sum_and_flush(path: Path) -> str:
    digest = sha256_of(path)
    flush(path)
    return digest
