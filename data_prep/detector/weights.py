"""The detector's weights: one numpy file without pickle, with its SHA-256 and provenance in a JSON file beside it."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of

SHIPPED = Path(__file__).parent / "weights" / "detector.npz"


def save(path: Path, variables: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write weights as float16, and their SHA-256 and provenance to `path` with the suffix .json.

    Raises:
        SpinejaxError: `path` does not end in .npz.
    """
    from flax.traverse_util import flatten_dict  # here and below: `weights_sum` must not load JAX

    if path.suffix != ".npz":
        raise SpinejaxError(f"--out {path}: expected a name that ends in .npz.")
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = flatten_dict(variables, sep="/")
    write_arrays(path, {name: np.asarray(leaf).astype(np.float16) for name, leaf in sorted(leaves.items())})
    about = {"sha256": sha256_of(path), **provenance}
    write_atomically(
        path.with_suffix(".json"), lambda part: part.write_text(json.dumps(about, indent=2, allow_nan=False) + "\n")
    )


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as one .npz file that appears whole or not at all."""

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


@lru_cache(maxsize=2)
def load(path: Path = SHIPPED) -> dict[str, Any]:
    """Read weights and check their SHA-256: nested dictionaries of float32 arrays, as Flax takes them.

    Raises:
        SpinejaxError: a file is missing, or differs from the SHA-256 written beside it.
    """
    from flax.traverse_util import unflatten_dict

    try:
        expected, found = _written_sum(path), sha256_of(path)
    except (OSError, ValueError, KeyError) as error:
        raise SpinejaxError(f"{path}: the detector's weights or their .json cannot be read ({error}).") from error
    if found != expected:
        raise SpinejaxError(f"{path}: SHA-256 {found[:12]}…, expected {expected[:12]}…: damaged. Install it again.")
    with np.load(path, allow_pickle=False) as arrays:
        return unflatten_dict({name: arrays[name].astype(np.float32) for name in arrays.files}, sep="/")


def weights_sum(path: Path = SHIPPED) -> str:
    """The SHA-256 written beside the weights, or "none"; a data set records it, so a change is noticed."""
    try:
        return _written_sum(path)
    except (OSError, ValueError, KeyError):
        return "none"


def _written_sum(path: Path) -> str:
    return str(json.loads(path.with_suffix(".json").read_text())["sha256"])
