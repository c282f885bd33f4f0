"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, flush the file to disk and only then give it its name.

    A reader finds the old file or the whole new one, whatever happens in between.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would only be in the way
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
