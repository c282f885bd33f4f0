"""Tables in files: read strictly, and all faults of one reported at once."""

import codecs
import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.read.names import canonical
from spinejax.errors import SpinejaxError

_MAX_FAULTS_SHOWN = 20
_SEPARATORS = ",;\t"


@dataclass(frozen=True)
class Table:
    """A table's columns, and its rows with their line numbers; names and cells are stripped, and cells canonical."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, columns: Collection[str], also: Collection[str] = (), *, exact: bool = False) -> Table:
    """Read a table that spreadsheets and programs save as CSV, whatever their country.

    Cells are separated by commas, semicolons or tabs: by that one which gives the columns that the table must have. The
    text is UTF-8 or UTF-16; text that is neither is read as Latin-1 (Windows-1252), with a note. Rows and columns
    without any content are dropped, and so is a first line `sep=;`. Capitals do not matter in known columns' names.

    Args:
        path: the file.
        columns: the ones it must have.
        also: others that it may have.
        exact: whether it must have no others.

    Raises:
        SpinejaxError: the file is missing or not a table; a column is missing, unknown or repeated; a row is too long
            or too short.
    """
    if not path.is_file():
        raise SpinejaxError(f"{path}: no such file.")
    text, notes = _decoded(path)
    first, _, rest = text.partition("\n")
    separators = _SEPARATORS
    if first.strip().lower() in ("sep=,", "sep=;", "sep=\t", "sep="):  # as Excel writes and reads it
        separators, text = first.rstrip("\r\n").lstrip()[4:] or "\t", rest
    known = {name.casefold(): name for name in (*columns, *also)}
    separator = max(separators, key=lambda each: len(known.keys() & set(map(str.casefold, _first_row(text, each)))))
    try:
        (_, found), *rows = [*_rows(text, separator)] or [(0, [])]
    except csv.Error as error:
        raise SpinejaxError(f"{path}: not a table of text in columns ({error}). Save it as CSV.") from error
    found = [known.get(name.casefold(), name) for name in found]
    faults = [f"no column {name!r}" for name in sorted(set(columns) - set(found))]
    if faults:
        named = ", ".join(map(repr, filter(None, found[:20]))) or "none"
        faults.append(
            f"columns found: {named}; expected names separated by commas, semicolons or tabs in the first line"
        )
    faults += [f"unknown column {name!r}" for name in sorted({*found} - {*columns, ""}) if exact]
    faults += [f"column {name!r} occurs twice" for name in dict.fromkeys(found) if name and found.count(name) > 1]
    refuse(path, faults)
    for line, row in rows:
        if len(row) < len(found) or any(row[len(found) :]):
            faults.append(f"line {line} has too many or too few cells: {len(row)}, the first line has {len(found)}")
        elif any(cell for name, cell in zip(found, row, strict=False) if not name):
            faults.append(f"line {line}: a cell in a column without a name")
    refuse(path, faults)
    named_rows = [(line, {name: cell for name, cell in zip(found, row, strict=False) if name}) for line, row in rows]
    return Table([name for name in found if name], named_rows, notes)


def _decoded(path: Path) -> tuple[str, list[str]]:
    """A file's text, and a note if its encoding is a guess."""
    content = path.read_bytes()
    if content.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise SpinejaxError(f"{path}: a workbook of a spreadsheet program. Save its sheet as CSV, and give that file.")
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif content[1:2] == b"\0" or content[:1] == b"\0":  # without its mark; a table begins with a letter
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    try:
        return content.decode(encoding), []
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise SpinejaxError(f"{path}: not a table: neither UTF-8 nor UTF-16 ({error}). Save it as CSV.") from error
    note = f"{path}: not UTF-8, so it is read as Latin-1. Save it as UTF-8 if letters with accents are wrong."
    return content.decode("cp1252", errors="replace"), [note]


def _first_row(text: str, separator: str) -> list[str]:
    try:
        return next(_rows(text, separator), (0, []))[1]
    except csv.Error:  # quoted cells end before another separator
        return []


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that have any content, with the numbers of their last lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for row in reader:
        cells = [canonical(cell.strip()) for cell in row]
        if any(cells):
            yield reader.line_num, cells


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
