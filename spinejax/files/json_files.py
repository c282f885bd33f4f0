"""JSON files: written whole or not at all, and checked against a type when they are read.

Only reading loads pydantic: a training step, which knows its options from `spinejax.config`, runs without it.
"""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.stores import Address

T = TypeVar("T")


def write_json(path: Path, content: Any) -> None:
    """Write JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = as_json(content)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def as_json(content: Any) -> str:
    """JSON as a text of lines; a path is written as its text. Raises ValueError for NaN and infinity."""
    return json.dumps(content, indent=1, allow_nan=False, default=os.fspath) + "\n"


def read_json(path: Path | Address, kind: type[T], advice: str, *, strict: bool = False) -> T:
    """Read JSON of a type that pydantic knows.

    Args:
        path: the file.
        kind: a `TypedDict` or a dataclass.
        advice: what to do about a damaged file; the end of the message.
        strict: convert nothing, as a text into a number.

    Raises:
        SpinejaxError: the file is not JSON of this type, or the type itself raised it. The message names the file, and
            the first entry that differs.
        OSError: it cannot be read.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_json(path.read_bytes(), strict=strict)
    except SpinejaxError as error:
        raise SpinejaxError(f"{path}: {error} {advice}".strip()) from error
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise SpinejaxError(f"{path}: damaged, or of a different version: {where}: {fault['msg']}. {advice}") from error
