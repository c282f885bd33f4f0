"""Arrays by name in one numpy file, without pickle."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spinejax.files.atomic import write_atomically


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """Write arrays as one .npz file that appears whole or not at all.

    The same arrays in the same order give the same bytes; compressed, only with the same version of zlib.
    """
    save_arrays = np.savez_compressed if compressed else np.savez

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            save_arrays(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises OSError or ValueError if it is damaged, or has objects in it."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
