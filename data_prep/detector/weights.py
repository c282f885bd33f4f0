"""The detector's weights: one numpy file without pickle, and beside it its SHA-256 and where it comes from."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically

SHIPPED = Path(__file__).parent / "weights" / "detector.npz"


def save(path: Path, variables: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write weights as float16, and `path` with .json: their SHA-256 and the provenance.

    Raises:
        SpinejaxError: `path` does not end in .npz.
    """
    if path.suffix != ".npz":
        raise SpinejaxError(f"--out {path}: expected a name in .npz.")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf).astype(np.float16) for name, leaf in sorted(_flat(variables).items())}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)
    about = {"sha256": _sha256(path), **provenance}
    write_atomically(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(about, indent=2) + "\n"))


@lru_cache(maxsize=2)
def load(path: Path = SHIPPED) -> dict[str, Any]:
    """Read weights, having checked their SHA-256: nested dictionaries of float32 arrays, as Flax takes them.

    Raises:
        SpinejaxError: a file is missing, or is not the one whose sum is written beside it.
    """
    try:
        expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
        found = _sha256(path)
    except (OSError, ValueError, KeyError) as error:
        raise SpinejaxError(f"{path}: the detector's weights or their .json cannot be read ({error}).") from error
    if found != expected:
        raise SpinejaxError(f"{path}: SHA-256 {found[:12]}…, expected {expected[:12]}…: damaged. Install it again.")
    variables: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            *folders, leaf = name.split("/")
            place = variables
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = arrays[name].astype(np.float32)
    return variables


def weights_sum(path: Path = SHIPPED) -> str:
    """The SHA-256 that is written beside the weights, or "none": what tells a changed detector."""
    try:
        return str(json.loads(path.with_suffix(".json").read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        return "none"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
