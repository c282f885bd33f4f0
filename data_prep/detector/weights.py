"""The detectors' weights: one numpy file without pickle, with its SHA-256 and provenance in a JSON file beside it.

It has several detectors, its members, each of two networks. The provenance lists the patients that each member has not
learned from.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spinejax.errors import SpinejaxError
from spinejax.files.arrays import read_arrays, write_arrays
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of

_VERSION = 3
BODIES, ENDPLATES = "bodies", "endplates"  # a member's variables of `BodyNet`, and of `EndplateNet`
SHIPPED = Path(__file__).parent / "weights" / "detector.npz"


def save(path: Path, members: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the members' weights as float16, and their SHA-256 and what is known `about` them to a .json beside it.

    Raises:
        SpinejaxError: `path` does not end in .npz.
    """
    from flax.traverse_util import flatten_dict  # here and below: `weights_sum` must not load JAX

    if path.suffix != ".npz":
        raise SpinejaxError(f"--out {path}: expected a name that ends in .npz.")
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {
        f"{number}/{name}": leaf
        for number, member in enumerate(members)
        for name, leaf in flatten_dict(member, sep="/").items()
    }
    halves = {name: np.asarray(leaf).astype(np.float16) for name, leaf in sorted(leaves.items())}
    write_arrays(path, halves, compressed=True)
    describe(path, {"sha256": sha256_of(path), "version": _VERSION, **about})


def describe(path: Path, about: dict[str, Any]) -> None:
    """Write the JSON beside the weights."""
    text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    write_atomically(path.with_suffix(".json"), lambda part: part.write_text(text))


@lru_cache(maxsize=2)
def load(path: Path = SHIPPED) -> list[dict[str, Any]]:
    """Read the members and check the file's SHA-256: nested dictionaries of float32 arrays, as Flax takes them.

    Raises:
        SpinejaxError: a file is missing, differs from the SHA-256 written beside it, or is of another version.
    """
    from flax.traverse_util import unflatten_dict

    try:
        about = provenance(path)
        expected, found = str(about["sha256"]), sha256_of(path)
    except (OSError, ValueError, KeyError) as error:
        raise SpinejaxError(f"{path}: the detector's weights or their .json cannot be read ({error}).") from error
    if found != expected:
        raise SpinejaxError(f"{path}: SHA-256 {found[:12]}…, expected {expected[:12]}…: damaged. Install it again.")
    if about.get("version") != _VERSION:
        raise SpinejaxError(
            f"{path}: weights of version {about.get('version', 1)}, expected {_VERSION}. Train them again, or use the "
            "release that they were made with."
        )
    members = unflatten_dict({name: half.astype(np.float32) for name, half in read_arrays(path).items()}, sep="/")
    return [members[number] for number in sorted(members, key=int)]


def member_without(source: str, patient: str, path: Path = SHIPPED) -> int | None:
    """The member that has not learned from a patient; None if no member has: then all of them may be used."""
    folds = provenance(path).get("folds", [])
    return next((member for member, unseen in enumerate(folds) if f"{source}/{patient}" in unseen), None)


def weights_sum(path: Path = SHIPPED) -> str:
    """The SHA-256 written beside the weights, or "none"; a data set records it, so a change is noticed."""
    try:
        return str(provenance(path)["sha256"])
    except (OSError, ValueError, KeyError):
        return "none"


def provenance(path: Path = SHIPPED) -> dict[str, Any]:
    """What is written beside the weights: SHA-256, version, recipe, sources, and each member's unseen patients."""
    about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return about
