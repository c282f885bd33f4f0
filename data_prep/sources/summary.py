"""What a run read, left out and could not read: a table by reason for the terminal, and a log of every file."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset.build import Outcome
from data_prep.dataset.job import Job
from data_prep.read.found import Found
from data_prep.read.names import canonical
from spinejax.errors import SpinejaxError, printable
from spinejax.files.atomic import write_privately
from spinejax.files.json_files import as_json

_LEFT_OUT = "left out: "  # how a note on a scan without discs begins
_WIDTH = 90
_BEGINNING = b'{\n "read": ['  # of a log


@dataclass(frozen=True)
class Item:
    """One scan, or some files, that gave no disc."""

    name: str
    reason: str
    files: tuple[Path, ...] = ()

    @property
    def kind(self) -> str:
        """The reason's first clause, without what is of one file alone: its name, numbers and paths."""
        first, _, rest = self.reason.partition(": ")
        text = rest if rest and self.name and ("/" in first or self.name in first) else self.reason
        text = re.sub(r"^\d+ (of \d+ )?files:? ", "" if self.name else "files that ", text)
        clause = re.split(r"[:;]|\.(?!\S)", re.sub(r" ?\([^()]*\)", "", text))[0]
        words = ("…" if _is_of_one(word) else word for word in clause.split())
        return printable(re.sub("…( …)+", "…", " ".join(words)))[:_WIDTH]

    @property
    def count(self) -> int:
        """Scans, or files that are none."""
        return 1 if self.name else len(self.files)


def _is_of_one(word: str) -> bool:
    """Whether a word of a message is a number, a path or the name of a file, and not "T2"."""
    return bool(re.search(r"[\d/\\_]|\w\.\w", word)) and not re.fullmatch(r"t[12]\W*", word, re.IGNORECASE)


@dataclass(frozen=True)
class Summary:
    """What became of everything that a run met."""

    read: list[str]  # names of scans
    left_out: list[Item]
    failed: list[Item]
    notes: list[str]

    def lines(self) -> list[str]:
        """The table: a line for what was read, and one for each kind of reason, the most frequent first."""
        lines = [f"read      {len(self.read):6}  scans"]
        for what, items in (("left out", self.left_out), ("failed", self.failed)):
            counts: Counter[str] = Counter()
            for item in items:
                counts[item.kind] += item.count
            lines += [f"{what:10}{count:6}  {kind}" for kind, count in counts.most_common()]
        return lines

    def write(self, path: Path) -> None:
        """Write the log as JSON that only its owner can read: it names source files."""
        items = {
            name: [
                {
                    "name": printable(one.name),
                    "kind": one.kind,
                    "reason": printable(one.reason),
                    "files": _names(one.files),
                }
                for one in listed
            ]
            for name, listed in (("left_out", self.left_out), ("failed", self.failed))
        }
        write_privately(path, as_json({"read": _printable(self.read)} | items | {"notes": _printable(self.notes)}))


def _printable(texts: Sequence[str]) -> list[str]:
    """Texts that strict readers of JSON take, too: a byte of a name that is not UTF-8 is an escape."""
    return [printable(text) for text in texts]


def _names(files: Sequence[Path]) -> list[str]:
    return _printable([canonical(str(file)) for file in files])


def check_log(path: Path, out: Path) -> None:
    """Make a log's folder. Raises SpinejaxError if the log cannot be written there, before anything else is done.

    It must not be in the data set, because it names source files and the data set may be shared; nor replace a file
    that is no log, such as the key of the pseudonyms.
    """
    if path.resolve().is_relative_to(out.resolve()):
        raise SpinejaxError(f"--log {path}: lies inside the data set {out}, which may be shared. Put it elsewhere.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            earlier = file.read(len(_BEGINNING)) == _BEGINNING
    except FileNotFoundError:
        return
    except OSError as error:
        raise SpinejaxError(f"--log {path}: cannot be written ({error.strerror}). Give another file.") from error
    if not earlier:
        raise SpinejaxError(f"--log {path}: holds something else than a log. Give another file.")


def summarised(jobs: Sequence[Job], found: Found, outcome: Outcome) -> Summary:
    """The summary of a finished run."""
    left_out = [Item(one.name, one.reason, one.files) for one in found.left_out]
    unclaimed = list(outcome.notes)
    without = {job.name: job for job in jobs if job.name in outcome.failures}
    for job in jobs:
        reasons = [note for note in unclaimed if note.startswith(f"{_LEFT_OUT}{job.name}: ")]
        left_out += [Item(job.name, reason.removeprefix(_LEFT_OUT), job.sources) for reason in reasons]
        unclaimed = [note for note in unclaimed if note not in reasons]
        without |= {job.name: job} if reasons else {}
    failed = [Item(one.name, one.reason, one.files) for one in found.failed]
    failed += [Item(name, reason, without[name].sources) for name, reason in outcome.failures.items()]
    read = [job.name for job in jobs if job.name not in without]
    return Summary(read, left_out, failed, [*found.notes, *unclaimed])
