"""A lock that allows one writer per folder.

On a local disk, and on network file systems that carry `flock` between hosts (NFS 4, GPFS, Lustre with `flock`),
a second writer is refused, and the kernel releases the lock however the first one ends. Elsewhere (gcsfuse, Lustre
mounted with `localflock`) two hosts may both get the lock. The file then holds the later one's name, and the earlier
trainer stops before its next save.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from spinejax.errors import SpinejaxError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """Hold a folder, made if need be, so that no second process writes into it.

    Args:
        folder: the folder.
        advice: what to do if another process holds it; it ends the message.

    Raises:
        SpinejaxError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The fallback would leave a lock file that outlives a killed process.
    lock = filelock.FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        holder = (folder / LOCK).read_text().strip()
        raise SpinejaxError(f"{folder}: another process ({holder}) is writing into this folder. {advice}") from error
    except OSError:  # a file system without locks: `refuse_if_lost` protects there
        pass
    try:
        (folder / LOCK).write_text(_me())
        yield
    finally:
        lock.release()


def waited_for(path: Path) -> filelock.BaseFileLock:
    """A lock, to be used as a context manager, for what several processes of this machine would make: a file or folder.

    The first makes it, and the others wait. Its file stays beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(f"{path}.lock", fallback_to_soft=False)


def refuse_if_lost(folder: Path) -> None:
    """Raises SpinejaxError if another process has taken the folder since."""
    try:
        holder = (folder / LOCK).read_text()
    except OSError:
        return  # the folder was never locked: it may be a copy
    if holder and holder != _me():
        raise SpinejaxError(
            f"{folder}: another process ({holder}) has taken over this folder. This one stops, and saves nothing more."
        )


def _me() -> str:
    return f"host {socket.gethostname()}, process {os.getpid()}"
