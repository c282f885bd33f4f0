"""What the detectors learn from: slices of scans with masks, of phantoms, and of scans in which discs are marked.

They are made once for a run, and kept in files beside its state.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.detector.training.augment import Crops, stack
from data_prep.detector.training.cross_fitting import fold_of
from data_prep.detector.training.marked import SPIDER, MarkedSlice
from data_prep.detector.training.pseudo_labels import pseudo_labelled
from data_prep.detector.training.truth import Slice, slices_with_truth
from data_prep.phantom.hard_phantom import hard_phantom
from data_prep.phantom.phantom import phantom
from data_prep.read.metaimage import read_mha
from spinejax.errors import SpinejaxError
from spinejax.files.arrays import write_arrays
from spinejax.files.checksums import sha256_of

_PHANTOM_SLICES = 4  # slices used of each phantom
_MIDDLE_MM = 15.0  # they are this near to the middle one: at the flanks a body's outline is another
_HARD_PHANTOMS = 0.6  # fraction of the phantoms with unusual anatomy, contrast or field of view


class Material(NamedTuple):
    """Slices to learn from, and the patient of each: "spider/5". Phantoms have none: ""."""

    slices: Crops
    patients: np.ndarray

    def without(self, fold: int) -> Crops:
        """The slices of all patients but those of a fold."""
        return jax.tree.map(lambda array: array[[not is_of(fold, patient) for patient in self.patients]], self.slices)


def name_of(one: MarkedSlice) -> str:
    """The patient of a slice, with his data set."""
    return f"{one.source}/{one.patient}"


def is_of(fold: int, patient: str) -> bool:
    """Whether a patient, as `name_of` gives him, is one of a fold's; a phantom is of none."""
    return bool(patient) and fold_of(*patient.split("/", 1)) == fold


def digest(paths: Iterable[Path]) -> str:
    """One SHA-256 over all files and their names."""
    lines = sorted(f"{path.parent.name}/{path.name} {sha256_of(path)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stacks_of(root: Path, series: str) -> list[tuple[Path, Path]]:
    """The images and masks to train on."""
    masks = sorted((root / "masks").glob(f"*_{series}.mha"))
    if not masks:
        raise SpinejaxError(f"--spider {root}: no masks/*_{series}.mha there.")
    return [(root / "images" / mask.name, mask) for mask in masks]


def of_stacks(stacks: Sequence[tuple[Path, Path]], tell: Callable[[str], None]) -> Material:
    """The slices of scans with masks."""
    slices: list[tuple[str, Slice]] = []
    for image, mask in stacks:
        patient = f"{SPIDER}/{mask.name.split('_')[0]}"
        made = slices_with_truth(read_mha(image, np.float32), read_mha(mask, np.uint8))
        slices += [(patient, one) for one in made]
    tell(f"{len(slices)} slices of {len(stacks)} scans with masks")
    return _material(slices)


def of_phantoms(count: int, seed: int, tell: Callable[[str], None]) -> Material:
    """Slices near to the middle of phantoms, the unusual ones first."""
    slices: list[tuple[str, Slice]] = []
    for patient in range(count):
        draw = hard_phantom if patient < _HARD_PHANTOMS * count else phantom
        drawn = draw(seed + 7, patient)
        depth = drawn.scan.voxels.shape[2]
        away_mm = abs(np.arange(depth) - (depth - 1) / 2) * drawn.scan.spacing_mm[2]
        inner = np.flatnonzero(away_mm <= _MIDDLE_MM)
        chosen = np.random.default_rng(seed + patient).choice(inner, _PHANTOM_SLICES, replace=False)
        slices += [("", one) for one in slices_with_truth(drawn.scan, drawn.mask, sorted(chosen.tolist()))]
    tell(f"{len(slices)} slices of {count} phantoms")
    return _material(slices)


def of_marked(variables: dict[str, Any], marked: Sequence[MarkedSlice], tell: Callable[[str], None]) -> Material:
    """Marked slices with the corners that a detector, whose variables these are, gives them."""
    slices = [(name_of(one), made) for one in marked for made in pseudo_labelled(variables, [one])]
    tell(f"corners for {len(slices)} of {len(marked)} marked slices")
    return _material(slices)


def _material(slices: Sequence[tuple[str, Slice]]) -> Material:
    if not slices:
        none = np.zeros((0,), np.float32)
        return Material(Crops(*(none for _ in Crops._fields)), np.zeros((0,), "U1"))
    return Material(stack([one for _, one in slices]), np.array([patient for patient, _ in slices]))


def kept(path: Path, make: Callable[[], Material]) -> Material:
    """Slices from a file, if an earlier run with these settings has written it; otherwise they are made and written."""
    if not path.exists():
        made = make()
        write_arrays(path, {**made.slices._asdict(), "patients": made.patients})
    return read(path)


def read(path: Path) -> Material:
    """Slices from a file of `kept`."""
    with np.load(path, allow_pickle=False) as arrays:
        return Material(Crops(*(arrays[name] for name in Crops._fields)), arrays["patients"])


def joined(parts: Sequence[Crops], shares: Sequence[float]) -> tuple[Crops, jax.Array]:
    """All slices, and how often each is drawn: every part that has any in proportion to its share."""
    filled = [(part, share) for part, share in zip(parts, shares, strict=False) if len(part.kinds)]
    shape = np.max([part.image.shape[1:3] for part, _ in filled], axis=0)

    def padded(array):
        if array.ndim < 3 or array.shape[1:3] == tuple(shape) or array.dtype != np.uint8:
            return array
        missing = [(0, 0), *((0, size - n) for size, n in zip(shape, array.shape[1:3], strict=True))]
        return np.pad(array, missing + [(0, 0)] * (array.ndim - 3))

    data = jax.tree.map(lambda *arrays: jnp.asarray(np.concatenate(list(map(padded, arrays)))), *(p for p, _ in filled))
    weight = np.concatenate([np.full(len(part.kinds), share / len(part.kinds)) for part, share in filled])
    return data, jnp.asarray(weight / weight.sum(), jnp.float32)
