"""Options that take a path: folders and files of this machine, or also folders in object stores and studies of servers.

As a `Path`, an address such as `gs://bucket/folder` is a folder with the name `gs:`, which would be made here. So every
option says what it takes, and refuses all other addresses when the command's words are read.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from spinejax.errors import SpinejaxError
from spinejax.files.stores import Address, is_address, located

PATHS = ConstructorRegistry()
"""Given to tyro, it makes every option and argument of type `Path` by `local_path`."""


def local_path(text: str) -> Path:
    """The path of a file or folder on a local or mounted disk.

    Raises:
        SpinejaxError: it is an address. A folder whose name looks like one can be given as `./gs:/…`.
    """
    if is_address(text):
        raise SpinejaxError(
            f"{text}: an address, not a folder or file of this machine. Give a path on a local or mounted disk; copy "
            "the files of a bucket there, or mount it."
        )
    return Path(text)


def is_study_address(text: str) -> bool:
    """Whether this is meant as the address of a study on a DICOMweb server. A `Path` has lost one of its slashes."""
    return re.match(r"dicomwebs?:", text) is not None


def _by(path_of: Callable[[str], Any]) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: path_of(words[0]),
        is_instance=lambda value: isinstance(value, (Path, Address)),
        str_from_instance=lambda value: [str(value)],
    )


ScanPath = Annotated[Path, _by(lambda text: Path(text) if is_study_address(text) else local_path(text))]
"""An option's file or folder, or the address of a study, which `data_prep.read.dicomweb.fetched` brings here."""

Folder = Annotated[Path | Address, _by(located)]
"""An option's folder, on a disk or in an object store. A store that this machine cannot read is refused by name."""


@PATHS.primitive_rule
def _rule(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    return _by(local_path) if type_info.type is Path else None
