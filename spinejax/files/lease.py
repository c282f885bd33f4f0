"""One writer at a time in a folder of an object store: a lease, which its holder renews while it lives.

Stores have no locks that end with their process. A lease is a numbered file in `.leases`, and the highest number holds
the folder. The next number is taken by a conditional write, so one of several takers gets it. A store without such
writes overwrites: there a taker waits, and reads whose lease it is. A lease that nobody renews is taken over; by its
holder's machine at once. No clocks are compared: a lease is renewed if its content changes while it is watched.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from spinejax.errors import SpinejaxError
from spinejax.files.stores import Address, StoreError

FOLDER = ".leases"
RENEW_SECONDS = 10
LEASE_SECONDS = 60
"""How long a lease is watched before its holder counts as dead."""
SETTLE_SECONDS = 3
"""In a store without conditional writes, until the writes of all takers are there."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, folder: Address, number: int, content: dict):
        self._folder, self._number, self._content = folder, number, content
        self._over = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def check(self) -> None:
        """Raises SpinejaxError if another process has taken the folder; and StoreError if the store does not say."""
        if (newest := max(_numbers(self._folder), default=0)) > self._number:
            holder = _read(self._folder, newest).get("holder", "")
            raise SpinejaxError(
                f"{self._folder}: another process ({holder}) has taken over this folder. This one stops, and copies "
                "nothing more there."
            )

    def release(self) -> None:
        """Let others have the folder at once. What is left in the store names no machine."""
        self._over.set()
        with contextlib.suppress(StoreError):
            _file(self._folder, self._number).write_bytes(b"{}")

    def _renew(self) -> None:
        count = 0
        while not self._over.wait(RENEW_SECONDS):
            count += 1
            with contextlib.suppress(StoreError, FileNotFoundError):  # the next time may be better
                _file(self._folder, self._number).write_bytes(_text(self._content | {"renewed": count}))


@contextlib.contextmanager
def leased(folder: Address, advice: str, *, tell: Callable[[str], None] = lambda line: None) -> Iterator[Lease]:
    """Hold a folder of a store, so that no second process writes into it.

    Args:
        folder: the folder.
        advice: what to do if another process holds it; it ends the message.
        tell: gets a line if it takes a while to see whether its holder lives.

    Raises:
        SpinejaxError: another process holds it, and is alive.
        StoreError: nothing can be written there.
    """
    lease = _take(folder, advice, tell)
    try:
        yield lease
    finally:
        lease.release()


def _take(folder: Address, advice: str, tell: Callable[[str], None]) -> Lease:
    mine = {"token": uuid.uuid4().hex, "holder": f"host {socket.gethostname()}, process {os.getpid()}"} | _here()
    watched, since = None, 0.0
    while True:
        number = max(_numbers(folder), default=0)
        newest = _read(folder, number) if number else {}
        if newest and not _is_dead(newest):
            if watched and newest != watched:
                raise SpinejaxError(f"{folder}: another process ({newest.get('holder')}) is writing there. {advice}")
            if not watched:
                watched, since = newest, time.monotonic()
                about = f"{folder} is held by {newest.get('holder')}"
                tell(f"{about}: waiting up to {LEASE_SECONDS} s to see whether it lives.")
            if time.monotonic() < since + LEASE_SECONDS:
                time.sleep(1)
                continue
        if _create(folder, number + 1, mine):
            for old in _numbers(folder):
                if old <= number:
                    _file(folder, old).unlink()
            return Lease(folder, number + 1, mine)
        watched = None


def _create(folder: Address, number: int, mine: dict) -> bool:
    """Write a lease that must be new. Returns whether it is ours."""
    file = _file(folder, number)
    created = file.create(_text(mine))
    if created and file.create(_text(mine)):  # it was overwritten: this store has no conditional writes
        time.sleep(SETTLE_SECONDS)
        created = _read(folder, number).get("token") == mine["token"]
    return created


def _here() -> dict[str, str | int]:
    """What tells on the same machine whether the holder lives."""
    space = Path("/proc/self/ns/pid")  # a process id means nothing in another container
    return {"host": socket.gethostname(), "space": os.readlink(space) if space.exists() else "", "pid": os.getpid()}


def _is_dead(content: dict) -> bool:
    here = _here()
    if content.get("host") != here["host"] or content.get("space") != here["space"]:
        return False
    try:
        os.kill(content["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _numbers(folder: Address) -> list[int]:
    return [int(name) for name in (folder / FOLDER).files() if name.isdigit()]


def _read(folder: Address, number: int) -> dict:
    try:
        return json.loads(_file(folder, number).read_bytes() or b"{}")
    except (FileNotFoundError, ValueError):
        return {}


def _file(folder: Address, number: int) -> Address:
    return folder / FOLDER / f"{number:08}"


def _text(content: dict) -> bytes:
    return json.dumps(content).encode()
