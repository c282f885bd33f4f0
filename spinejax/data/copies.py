"""The shards of a data set in an object store, copied to this machine: each once, by its digest, when it is read."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spinejax.errors import SpinejaxError
from spinejax.files import lock
from spinejax.files.stores import Address, at_once, begun_bytes

FOLDER = "shards"
"""Subfolder of the cache. A file there has the name of its sha256, so all data sets share it."""


class Copies:
    """Where the copies of a data set's shards are, and how they come there.

    Args:
        folder: the shards' folder in the store.
        files: the manifest's entries.
        cache: the folder for copies.
    """

    def __init__(self, folder: Address, files: Sequence[Any], cache: Path):
        self._files = files
        self.sources = [folder / entry["name"] for entry in files]
        self.paths = [cache / FOLDER / f"{entry['sha256']}.h5" for entry in files]

    def make(self, indices: set[int], *, tell: Callable[[str], None] = lambda line: None) -> None:
        """Copy some of the shards, unless they are there. Other processes of this machine may copy the same.

        Raises:
            SpinejaxError: there is no room, the store fails, or a shard's sha256 is not the manifest's.
        """
        missing = sorted(index for index in indices if not self.paths[index].is_file())
        if not missing:
            return
        folder = self.paths[0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpinejaxError(f"--cache-dir: {folder} cannot be made ({error.strerror}).") from error
        free = shutil.disk_usage(folder).free  # before what another process copies meanwhile is counted
        size = sum(self._files[index]["bytes"] - begun_bytes(self.paths[index]) for index in missing)
        if size > free:
            raise SpinejaxError(
                f"--cache-dir: {folder} has {free / 1e9:.1f} GB free, and {size / 1e9:.1f} GB are to be copied there. "
                "Give another folder."
            )
        tell(f"Copying {len(missing)} of {len(self.paths)} shards, {size / 1e9:.2f} GB, to {folder}.")
        at_once(self._copy, missing)

    def _copy(self, index: int) -> None:
        path, entry = self.paths[index], self._files[index]
        with lock.waited_for(path):
            if not path.is_file():  # another process may have made it while this one waited
                self.sources[index].download(path, size=entry["bytes"], sha256=entry["sha256"])
