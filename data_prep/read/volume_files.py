"""Volume files, NIfTI and MetaImage: recognised by name, read as scans."""

from pathlib import Path

import numpy as np

from data_prep.read.metaimage import read_mha
from data_prep.read.names import canonical
from data_prep.read.nifti import read_nifti
from data_prep.read.scan import Scan
from data_prep.read.tree import files_below, unreadable
from spinejax.errors import SpinejaxError

_READERS = {".mha": read_mha, ".mhd": read_mha, ".nii": read_nifti, ".nii.gz": read_nifti}


def read_scan(path: str | Path, dtype) -> Scan:
    """Read a NIfTI or MetaImage file, as `read_nifti` and `read_mha` do; raises SpinejaxError if it is neither."""
    reader = _READERS.get(suffix_of(Path(path)))
    if reader is None:
        raise SpinejaxError(f"{path}: expected a name that ends in {', '.join(_READERS)}.")
    return reader(path, dtype)


def is_volume(path: Path) -> bool:
    """Whether a file's name is that of a volume file."""
    return suffix_of(path) in _READERS


def suffix_of(path: Path) -> str:
    """The suffix in lower case; `.nii.gz` counts as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """A file's name without its suffix, in its canonical form (`data_prep.read.names`)."""
    return canonical(path.name[: len(path.name) - len(suffix_of(path))])


def volume_files(folder: Path) -> list[Path]:
    """Every NIfTI and MetaImage file of a tree. Raises SpinejaxError if a part of it cannot be read."""

    def refuse(path: str | Path, error: SpinejaxError | OSError) -> None:
        raise SpinejaxError(unreadable(path, error)) from error

    return [path for path in files_below([folder], (), refuse) if is_volume(path)]


def read_volume(path: Path) -> tuple[Scan, list[str]]:
    """`Series.read` of one volume file: the scan, and no notes."""
    return read_scan(path, np.float32), []
