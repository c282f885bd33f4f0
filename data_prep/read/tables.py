"""Tables in files: read strictly, and all faults of one reported at once."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from spinejax.errors import SpinejaxError

_MAX_FAULTS_SHOWN = 20


def read_rows(path: Path, columns: set[str], *, exact: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """A comma-separated table's rows with their line numbers, cells stripped.

    Args:
        path: the file, in UTF-8.
        columns: the ones it must have.
        exact: whether it must have no others.

    Raises:
        SpinejaxError: the file is missing or no table, a column is missing or unknown, a row is too long or too short.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            found = {name.strip() for name in table.fieldnames or ()}
            faults = [f"no column {name!r}" for name in sorted(columns - found)]
            faults += [f"unknown column {name!r}" for name in sorted(found - columns) if exact]
            refuse(path, faults)
            for row in table:
                if None in row or None in row.values():
                    raise SpinejaxError(f"{path}: line {table.line_num} has too many or too few cells. Fix the table.")
                yield table.line_num, {name.strip(): value.strip() for name, value in row.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpinejaxError(f"{path}: not a comma-separated UTF-8 table ({error}).") from error


def refuse(path: Path | str, faults: Sequence[str]) -> None:
    """Raises SpinejaxError with all the faults of a file, if it has any."""
    if faults:
        more = f"\n  and {len(faults) - _MAX_FAULTS_SHOWN} more" if len(faults) > _MAX_FAULTS_SHOWN else ""
        shown = "\n  ".join(faults[:_MAX_FAULTS_SHOWN])
        raise SpinejaxError(f"{path}: {len(faults)} faults; fix them and run again.\n  {shown}{more}")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
