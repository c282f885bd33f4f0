"""Volume files, NIfTI, MetaImage and NRRD: recognised by name, read as scans."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.read.metaimage import read_mha, simpleitk_geometry
from data_prep.read.names import canonical
from data_prep.read.nifti import is_nifti_header, nifti_geometry, pair_of, read_nifti
from data_prep.read.nrrd import read_nrrd, segment_names
from data_prep.read.scan import Scan
from data_prep.read.tree import files_below, unreadable
from spinejax.errors import SpinejaxError

# Usual words for a mask: what follows the last "_" of its name, or a part of it.
MASK_WORDS = re.compile("d?seg(mentation)?|msk|masks?|labels?|pred|vert(ebrae)?", re.IGNORECASE)
_READERS = {".mha": read_mha, ".mhd": read_mha, ".nrrd": read_nrrd, ".nhdr": read_nrrd, ".seg.nrrd": read_nrrd}
_READERS |= dict.fromkeys((".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz"), read_nifti)
_SUFFIXES = sorted(_READERS, key=len, reverse=True)  # .nii.gz before .gz
_VOXELS = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz")}


def read_scan(path: str | Path, dtype) -> Scan:
    """Read a volume file, as `read_nifti`, `read_mha` and `read_nrrd` do; raises SpinejaxError for any other name."""
    reader = _READERS.get(suffix_of(Path(path)))
    if reader is None:
        raise SpinejaxError(f"{path}: expected a name that ends in {', '.join(_READERS)}.")
    return reader(path, dtype)


def segment_names_in(path: Path) -> dict[int, str]:
    """A mask's labels and the names of its segments; none in a format without. Raises as `segment_names`."""
    return segment_names(path) if suffix_of(path) in (".nrrd", ".seg.nrrd") else {}


def is_volume(path: Path) -> bool:
    """Whether a file is a volume file by its name, and a pair by its header too: others are called .img or .hdr."""
    pair = pair_of(path)
    return is_nifti_header(pair[0]) if pair else suffix_of(path) in _READERS


def is_mask(path: Path) -> bool:
    """Whether a file's name is that of a mask: a volume's that ends in `_seg` or the like, or 3D Slicer's."""
    named = MASK_WORDS.fullmatch(stem_of(path).rpartition("_")[2])
    return is_volume(path) and (named is not None or suffix_of(path) == ".seg.nrrd")


def suffix_of(path: Path) -> str:
    """The suffix in lower case; `.nii.gz` and `.seg.nrrd` count as one."""
    name = path.name.lower()
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), path.suffix.lower())


def stem_of(path: Path) -> str:
    """A file's name without its suffix, in its canonical form (`data_prep.read.names`)."""
    return canonical(path.name[: len(path.name) - len(suffix_of(path))])


def volume_files(folder: Path) -> list[Path]:
    """Every volume file of a tree, a pair as its header. Raises SpinejaxError if a part of it cannot be read."""

    def refuse(path: str | Path, error: SpinejaxError | OSError) -> None:
        raise SpinejaxError(unreadable(path, error)) from error

    return [path for path in whole_files(files_below([folder], (), refuse)) if is_volume(path)]


def whole_files(files: Iterable[Path]) -> list[Path]:
    """The files, each once, but a volume that consists of two (`files_of`) as its header alone."""
    named = [pair[0] if (pair := pair_of(path)) and is_volume(path) else path for path in files]
    voxels = {part for path in named for part in files_of(path)[1:]}
    return [path for path in dict.fromkeys(named) if path not in voxels]


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, and the one beside it that has the voxels if it is a header by its name."""
    pair = pair_of(path)
    beside = pair[1:] if pair else [path.with_name(path.stem + suffix) for suffix in _VOXELS.get(suffix_of(path), ())]
    return (path, *(file for file in beside if file != path and file.is_file()))


def geometry_of(path: Path) -> tuple[tuple[int, ...], Float[np.ndarray, "4 4"]] | None:
    """The size and the affine (LPS, mm) in the header of a volume file, or None if it cannot be read.

    The header is not checked: this serves to describe a file before it is read.
    """
    try:
        return (nifti_geometry if _READERS[suffix_of(path)] is read_nifti else simpleitk_geometry)(path)
    except Exception:  # the libraries raise anything; `read_scan` says what is wrong
        return None


def read_volume(path: Path) -> tuple[Scan, list[str]]:
    """`Series.read` of one volume file: the scan, and no notes."""
    return read_scan(path, np.float32), []
