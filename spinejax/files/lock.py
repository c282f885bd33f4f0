"""One writer a run folder.

What holds: on a local disk, and on network file systems that carry `flock` between hosts (NFS 4, Lustre mounted with
`flock`, GPFS), a second trainer is refused, and the kernel lets go of the lock however the first one ends. Elsewhere
(gcsfuse, Lustre mounted with `localflock`) two hosts may both get it; then the later one's name stands in the file, and
the earlier one stops before it would save again.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from spinejax.errors import SpinejaxError

LOCK = ".lock"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be, so that no second trainer writes into it.

    Raises:
        SpinejaxError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise SpinejaxError(
                f"{run}: another trainer ({file.read().strip()}) is writing into this folder. Choose another "
                "--workdir; or, if both are processes of one run, start each with --distributed."
            ) from error
        except OSError:  # a file system without locks: `refuse_if_lost` is what holds there
            pass
        file.truncate(0)
        file.write(_me())
        file.flush()
        yield


def refuse_if_lost(run: Path) -> None:
    """Raises SpinejaxError if another trainer has taken the folder since."""
    try:
        holder = (run / LOCK).read_text()
    except OSError:
        return  # a folder that was never locked, as one that is only copied
    if holder and holder != _me():
        raise SpinejaxError(
            f"{run}: another trainer ({holder}) has taken this folder over. This one stops, and saves nothing more."
        )


def _me() -> str:
    return f"host {socket.gethostname()}, process {os.getpid()}"
