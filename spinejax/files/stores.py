"""Object stores: what is read, written, listed and deleted at addresses such as `s3://bucket/folder`.

fsspec knows the stores; only this file knows fsspec. What fails is tried again, and what still fails is an error that
names the address. Nothing is trusted that a store confirms: downloads are checked by the caller's sha256, uploads are
listed and compared (`spinejax.files.mirror`).
"""

import concurrent.futures
import contextlib
import io
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spinejax.errors import NotInstalledError, SpinejaxError, needs
from spinejax.files.atomic import flush
from spinejax.files.checksums import sha256_of

T = TypeVar("T")

WAITS_SECONDS = (1, 4)
"""Before a second and a third try. The stores' own libraries try several times each."""
BLOCK_BYTES = 2**25
"""What is asked for at once, and all that a broken transfer loses."""
NUM_TRANSFERS = 8
"""Files that are copied at once."""
_IN_EXTRA = ("s3", "s3a", "gs", "gcs")
_FLEETING = ("memory", "data", "reference", "generic", "dir")
"""Schemes of fsspec that are no stores."""


class StoreError(SpinejaxError):
    """A store does not do what was asked of it: it cannot be reached, or refuses."""


@dataclass(frozen=True)
class Address:
    """A folder or file in an object store. It has those methods of a `Path` that stores have.

    Args:
        scheme: the kind of store, such as "s3".
        path: bucket and key, without a slash at its end.
    """

    scheme: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read an address such as `s3://bucket/folder`.

        Raises:
            SpinejaxError: no store has this scheme, there is no bucket, or the path is not a plain one.
            NotInstalledError: the library for this scheme is missing.
        """
        scheme, rest = text.lower().partition(":")[0], text.partition(":")[2]
        _class_of(scheme, text)
        path = rest.removeprefix("//").rstrip("/")
        if not rest.startswith("//") or not path or path != posixpath.normpath(path).lstrip("/"):
            raise SpinejaxError(f"{text}: not the address of a folder. Expected {scheme}://BUCKET/FOLDER.")
        return cls(scheme, path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> "Address":
        return Address(self.scheme, f"{self.path}/{name}")

    @property
    def bucket(self) -> str:
        """The store and its bucket, as `s3://bucket`."""
        return f"{self.scheme}://{self.path.split('/')[0]}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    def relative(self, path: str) -> "Address":
        """Where a relative path leads, such as "../other". Raises SpinejaxError if it leaves the bucket."""
        target = posixpath.normpath(f"{self.path}/{path}")
        if target.split("/")[0] != self.path.split("/")[0]:
            raise SpinejaxError(f"{self}: {path} leads out of the bucket.")
        return Address(self.scheme, target)

    def is_file(self) -> bool:
        """Whether there is such a file."""
        try:  # `isfile` would take any fault for an absence
            return self.attempt(lambda store: store.info(self.path))["type"] == "file"
        except FileNotFoundError:
            return False

    def read_bytes(self) -> bytes:
        """A file's content. Raises FileNotFoundError if there is none."""
        return self.attempt(lambda store: store.cat_file(self.path))

    def open(self) -> "Stream":
        """A file's content as a stream, of which only what is read is transferred, in small blocks."""
        return Stream(self)

    def files(self) -> dict[str, int]:
        """The files below this folder: relative name → bytes. Raises StoreError if there is no such bucket."""
        try:
            found = self.attempt(lambda store: store.find(self.path, detail=True))
        except FileNotFoundError as error:
            raise StoreError(f"{self}: cannot be listed ({_line(error)}). Check the name of the bucket.") from error
        start = len(self.path.split("/"))
        return {"/".join(name.split("/")[start:]): about["size"] for name, about in sorted(found.items())}

    def write_bytes(self, content: bytes) -> None:
        """Write a file. It appears whole or not at all."""
        self._write(lambda store: store.pipe_file(self.path, content))

    def create(self, content: bytes) -> bool:
        """Write a file that must be new. Returns whether it was; stores without conditional writes say so always."""
        try:
            self._write(lambda store: store.pipe_file(self.path, content, mode="create"))
        except FileExistsError:
            return False
        return True

    def upload(self, source: Path) -> None:
        """Copy a file of this machine here. It appears whole or not at all."""
        self._write(lambda store: store.put_file(str(source), self.path))

    def _write(self, do: Callable[[Any], Any]) -> None:
        try:
            self.attempt(do)
        except FileNotFoundError as error:
            raise StoreError(f"{self}: cannot be written ({_line(error)}). Check the name of the bucket.") from error

    def unlink(self) -> None:
        """Delete a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt(lambda store: store.rm_file(self.path))

    def download(self, target: Path, *, size: int, sha256: str) -> None:
        """Copy a file to this machine. An interrupted copy goes on where it stopped.

        Raises:
            SpinejaxError: its sha256 is another one, also after a second try.
        """
        part = _part_of(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            with open(part, "ab") as file:
                while (start := file.tell()) < size:
                    file.write(self._block(start, min(start + BLOCK_BYTES, size)))
            if part.stat().st_size == size and sha256_of(part) == sha256:
                flush(part)
                os.replace(part, target)
                return
            part.unlink()
        raise SpinejaxError(f"{self}: its sha256 is not the one that is listed: the file was changed or is damaged.")

    def _block(self, start: int, stop: int) -> bytes:
        def read(store) -> bytes:
            block = store.cat_file(self.path, start=start, end=stop)
            if len(block) != stop - start:
                raise OSError(f"{len(block)} of {stop - start} bytes came")
            return block

        return self.attempt(read)

    def attempt(self, do: Callable[[Any], T]) -> T:
        """Do something with the store; again, if it fails.

        Raises:
            FileNotFoundError, FileExistsError: as the store says.
            StoreError: it failed every time, or is forbidden.
        """
        for wait in (*WAITS_SECONDS, None):
            try:
                return do(_class_of(self.scheme, str(self))(use_listings_cache=False))
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # each store has its own types, for what is often over a moment later
                if _is_forbidden(error):
                    raise StoreError(f"{self}: no permission ({_line(error)}). Check the credentials.") from error
                if wait is None:
                    reason = f"the object store fails, or is not reached ({_line(error)})"
                    raise StoreError(f"{self}: {reason}. Check the address and the connection.") from error
                time.sleep(wait)
        raise AssertionError


class Stream(io.RawIOBase):
    """A file in a store, opened for reading."""

    def __init__(self, address: Address):
        self._address = address
        options: dict = {"block_size": 2**16, "cache_type": "blockcache"}
        self._file = address.attempt(lambda store: store.open(address.path, "rb", **options))

    def readinto(self, buffer) -> int:
        start = self._file.tell()

        def read(_) -> int:
            self._file.seek(start)
            return self._file.readinto(buffer)

        return self._address.attempt(read)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def begun_bytes(target: Path) -> int:
    """How much of a file's copy is there already: of one that is being made, or was interrupted."""
    for path in (_part_of(target), target):  # in this order: a part may get its name meanwhile
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size
    return 0


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _is_forbidden(error: Exception) -> bool:
    """Whether a store refuses for good: s3fs says so by type, gcsfs by a code or a word."""
    told = getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden")
    return isinstance(error, PermissionError) or told


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_address(text: str) -> bool:
    """Whether a text is meant as an address: a scheme of more than one letter, which would be a drive."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", text, re.IGNORECASE) is not None


def located(folder: "str | Path | Address") -> "Path | Address":
    """A folder on a disk or in a store. Raises what `Address.parse` raises."""
    if isinstance(folder, str):
        return Address.parse(folder) if is_address(folder) else Path(folder)
    return folder


def cache_folder(given: Path | None = None) -> Path:
    """Where copies of what is in stores are kept: the folder that is given, or one in the user's cache.

    Raises:
        SpinejaxError: the user has no home.
    """
    if given is not None:
        return given.absolute()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "spinejax")
    if not folder.is_absolute():
        raise SpinejaxError("There is no home folder to keep copies of a bucket's files in: give --cache-dir.")
    return folder


def at_once(do: Callable[[Any], None], items: Iterable) -> None:
    """Call a function on each item, several at once; raises what the first of them raises."""
    with concurrent.futures.ThreadPoolExecutor(NUM_TRANSFERS) as threads:
        for done in [threads.submit(do, item) for item in items]:
            done.result()


def _class_of(scheme: str, text: str) -> Any:
    """Fsspec's class for a scheme. Raises SpinejaxError if there is none, or its library is missing."""
    with needs(f"{text} needs fsspec", "cloud"):
        import fsspec
    try:
        if scheme in _FLEETING:
            raise ValueError
        # It prints the stack of what it raises, and warns at each request of a bucket whose kind it may not ask for.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise SpinejaxError(
            f"{text}: no object store is known by {scheme}://. Give a folder of this machine, or an address such as "
            "s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."
        ) from error
    except ImportError as error:
        if scheme in _IN_EXTRA:
            library = "s3fs" if scheme.startswith("s3") else "gcsfs"
            raise NotInstalledError(f"{text} needs {library}", "cloud") from error
        raise SpinejaxError(f"{text}: the library for {scheme}:// is missing. {error}.") from error
