"""Tables in files: read strictly, and all faults of one reported at once."""

import csv
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.read.names import canonical
from spinejax.errors import SpinejaxError

_MAX_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Table:
    """A table's columns, and its rows with their line numbers; names and cells are stripped, and cells canonical."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_table(path: Path, columns: Collection[str], *, exact: bool = False) -> Table:
    """Read a comma-separated table in UTF-8.

    Args:
        path: the file.
        columns: the ones it must have.
        exact: whether it must have no others.

    Raises:
        SpinejaxError: the file is missing or not a table; a column is missing, unknown or repeated; a row is too long
            or too short.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            found = [name.strip() for name in table.fieldnames or ()]
            faults = [f"no column {name!r}" for name in sorted(set(columns) - set(found))]
            faults += [f"unknown column {name!r}" for name in sorted(set(found) - set(columns)) if exact]
            faults += [f"column {name!r} occurs twice" for name in dict.fromkeys(found) if found.count(name) > 1]
            refuse(path, faults)
            rows = []
            for row in table:
                if None in row or None in row.values():
                    raise SpinejaxError(f"{path}: line {table.line_num} has too many or too few cells. Fix the table.")
                rows.append((table.line_num, {name.strip(): canonical(value.strip()) for name, value in row.items()}))
            return Table(found, rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpinejaxError(f"{path}: not a comma-separated UTF-8 table ({error}).") from error


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a comma-separated table in UTF-8."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def refuse(path: Path | str, faults: Sequence[str]) -> None:
    """Raises SpinejaxError with all the faults of a file, if it has any."""
    if faults:
        more = f"\n  and {len(faults) - _MAX_FAULTS_SHOWN} more" if len(faults) > _MAX_FAULTS_SHOWN else ""
        shown = "\n  ".join(faults[:_MAX_FAULTS_SHOWN])
        raise SpinejaxError(f"{path}: {len(faults)} faults; fix them and run again.\n  {shown}{more}")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
