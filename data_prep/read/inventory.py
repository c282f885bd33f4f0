"""An inventory: every series that was found, as a table in which the user chooses series and names patients."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.read.csv_tables import read_table, refuse, some
from data_prep.read.found import Facts, Found, LeftOut, Series
from data_prep.read.names import canonical
from data_prep.read.parts import PLANES
from data_prep.read.scan import NotSagittalError, refuse_non_sagittal
from data_prep.read.series import with_aliases
from data_prep.read.volume_files import geometry_of
from spinejax.errors import SpinejaxError, printable
from spinejax.files.atomic import write_privately

COLUMNS = (
    *("chosen", "patient", "key", "plane", "contrast", "spacing_mm", "slices", "description", "date", "files"),
    *("folder", "file", "reason"),
)
_YES, _NO = ("yes", "y", "true", "1", "x"), ("no", "n", "false", "0", "")
_NUMBER = re.compile(r"\d+([.,]\d+)?(E\+?\d+)?", re.IGNORECASE)
_FORMULA = "=+-@'"  # a cell that begins so is a formula to spreadsheets, or has our mark


@dataclass(frozen=True)
class Entry:
    """One series of an inventory."""

    name: str
    files: tuple[Path, ...]
    facts: Facts
    reason: str  # why it is left out or failed; empty if it is chosen
    series: Series | None  # None if it cannot be read

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table, in the order of `COLUMNS`, without control characters."""
        facts, first = self.facts, self.files[0]
        who = (self.series.patient, self.series.key) if self.series else ("", "")
        spacing = " x ".join(f"{mm:.3g}" for mm in facts.spacing_mm)
        described = (facts.plane, facts.contrast, spacing, str(facts.num_slices or ""), facts.description, facts.date)
        place = (str(len(self.files)), canonical(str(first.parent)), canonical(first.name))
        row = ("no" if self.reason else "yes", *who, *described, *place, self.reason)
        return tuple(printable(cell).replace("\n", " ").strip() for cell in row)


def describe_volumes(found: Found) -> None:
    """Add to volume files what their headers say, and leave out those of another plane, as `scans` would."""
    described = [_described(one) for one in found.series]
    for place, one in enumerate(found.left_out):
        if one.series:
            series, _ = _described(one.series)
            found.left_out[place] = replace(one, facts=series.facts, series=series)
    found.series = [one for one, reason in described if not reason]
    found.left_out += [LeftOut(one.name, reason, one.files, one.facts, one) for one, reason in described if reason]


def _described(one: Series) -> tuple[Series, str]:
    """A series with what its file's header says, if it is a volume file; and why it is of another plane, or ""."""
    geometry = None if one.facts.plane else geometry_of(one.files[0])
    if geometry is None:
        return one, ""
    shape, affine = geometry
    reason, spacing = "", np.linalg.norm(affine[:3, :3], axis=0)
    try:
        refuse_non_sagittal(shape, affine, one.name)
        slices = int(np.argmax(abs(affine[0, :3]) / spacing))
    except NotSagittalError as error:
        reason, slices = _without(one.name, str(error)), int(np.argmax(spacing))
    except SpinejaxError:  # no geometry that can be described: it fails when it is read
        return one, ""
    rows, columns = sorted({0, 1, 2} - {slices}, key=lambda axis: -abs(affine[2, axis]) / spacing[axis])
    facts = replace(
        one.facts,
        plane=PLANES[int(np.argmax(abs(affine[:3, slices])))],
        num_slices=shape[slices],
        spacing_mm=tuple(float(spacing[axis]) for axis in (rows, columns, slices)),
    )
    return replace(one, facts=facts), reason


def entries(found: Found) -> list[Entry]:
    """Every series that was found, read or not, by patient; without the files that are no scans."""
    chosen = [Entry(one.name, one.files, one.facts, "", one) for one in found.series]
    others = [
        Entry(one.name, one.files, one.facts, _without(one.name, one.reason), one.series)
        for one in (*found.left_out, *found.failed)
        if one.name and one.files
    ]
    return sorted([*chosen, *others], key=lambda entry: (entry.cells[1], entry.facts.date, entry.name, entry.reason))


def _without(name: str, reason: str) -> str:
    return reason.removeprefix(name).removeprefix(": ")


def write_inventory(path: Path, rows: Iterable[Entry]) -> None:
    """Write an inventory that only its owner can read: it names patients."""
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(COLUMNS)
    table.writerows([f"'{cell}" if cell[:1] in _FORMULA and cell else cell for cell in row.cells] for row in rows)
    write_privately(path, "\ufeff" + file.getvalue())  # without the mark, Excel takes UTF-8 for Windows-1252


def choose(found: Found, path: Path, changed: Callable[[Iterable[Path]], list[Path]]) -> list[Series]:
    """Replace the choice of series, and the names of patients, by those of an inventory that the user may have edited.

    Series that are not in the inventory are left out, with a note.

    Args:
        found: the series, found with the inventory's options.
        path: the inventory.
        changed: gives those of some files that have changed since it was written.

    Returns:
        The chosen series whose patient the user has not named, about whom there may be doubts.

    Raises:
        SpinejaxError: the file is missing or has faults: a chosen series that is not there, or cannot be read; one
            without a patient; a cell that is neither yes nor no. All are listed.
    """
    known = entries(found)
    by_key = {one.cells[2]: one for one in known if one.series}
    first_files = Counter(one.cells[-3:-1] for one in known)  # several series may be in one file
    by_file = {one.cells[-3:-1]: one for one in known if first_files[one.cells[-3:-1]] == 1}
    wanted: dict[str, Series] = {}
    seen: set[int] = set()
    faults: list[str] = []
    named: set[str] = set()
    people: dict[str, set[str]] = {}  # name of a patient → those who have it now
    for line, row in read_table(path, ("chosen", "patient", "key", "files", "folder", "file")).rows:
        row = {name: cell.removeprefix("'") for name, cell in row.items()}
        entry = by_key.get(row["key"]) or by_file.get((row["folder"], row["file"]))
        what = f"line {line}: {row['key'] or row['file']}"
        if row["chosen"].lower() not in (*_YES, *_NO):
            faults.append(f"{what}: chosen is {row['chosen']!r}, expected yes or no")
        chosen = row["chosen"].lower() in _YES
        if entry:
            faults += [f"{what}: occurs twice"] if id(entry) in seen else []
            seen.add(id(entry))
        if not chosen:
            continue
        if entry is None:
            faults.append(f"{what}: is not there any more")
        elif entry.series is None:
            faults.append(f"{what}: cannot be read: {entry.reason}")
        elif not row["patient"]:
            faults.append(f"{what}: has no patient")
        else:
            given, patient = entry.cells[1], entry.series.patient
            if row["patient"] not in (given, given.lstrip("0")):  # a spreadsheet makes 7 of 0007
                if _rounded(given, row["patient"]):
                    faults.append(
                        f"{what}: patient is {row['patient']}, which a spreadsheet made of {given}: format it as text"
                    )
                patient = row["patient"]
                named.add(entry.series.key)
            people.setdefault(patient, set()).add(entry.series.patient)
            wanted[entry.series.key] = replace(entry.series, patient=patient)
            found.notes += _changes(entry, row["files"], changed(entry.files), path)
    refuse(path, faults)
    new = [one.name for one in known if id(one) not in seen]
    if new:
        found.notes.append(f"{len(new)} series are not in {path}, and left out: {some(new)}.")
    not_chosen = [one for one in found.series if one.key not in wanted]
    found.left_out = [one for one in found.left_out if not (one.series and one.series.key in wanted)]
    found.failed = [one for one in found.failed if not (one.series and one.series.key in wanted)]
    found.left_out += [
        LeftOut(one.name, "not chosen in the inventory", one.files, one.facts, one) for one in not_chosen
    ]
    found.series = with_aliases(list(wanted.values()))
    found.notes += [
        f"{some(sorted(map(repr, several)))} are one patient, {name!r}, by the inventory."
        for name, several in people.items()
        if len(several) > 1
    ]
    return [one for one in found.series if one.key not in named]


def _rounded(given: str, cell: str) -> bool:
    """Whether a cell is a number as a spreadsheet saves it: 1.1 for 1.10, or a long one with fewer digits.

    Two such numbers, of two patients, may become one.
    """
    if not (_NUMBER.fullmatch(given) and _NUMBER.fullmatch(cell)):
        return False
    old, new = (float(number.replace(",", ".")) for number in (given, cell))
    return old == new or (len(given) > 11 and math.isclose(old, new, rel_tol=1e-4))


def _changes(entry: Entry, num_files: str, changed: list[Path], path: Path) -> list[str]:
    if num_files != str(len(entry.files)):
        return [f"{entry.name}: has {len(entry.files)} files, and had {num_files} when {path} was written."]
    if changed:
        return [f"{entry.name}: {some([file.name for file in changed])} changed after {path} was written."]
    return []


def headers_beside(path: Path) -> Path:
    """The file of headers that belongs to an inventory."""
    return path.with_name(f"{path.stem}.headers.json")


def refuse_to_replace(path: Path, *, overwrite: bool) -> None:
    """Raises SpinejaxError if an inventory is there already: the user may have edited it."""
    if path.exists() and not overwrite:
        raise SpinejaxError(f"--out {path}: is there already, and may have been edited. Give --overwrite, or another.")
