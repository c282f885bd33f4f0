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

    def write(self, path: Path, out: Path) -> None:
        """Write the log as JSON that only its owner can read: it names source files."""
        refuse_inside(path, out)
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_privately(path, as_json({"read": _printable(self.read)} | items | {"notes": _printable(self.notes)}))


def _printable(texts: Sequence[str]) -> list[str]:
    """Texts that strict readers of JSON take, too: a byte of a name that is not UTF-8 is an escape."""
    return [printable(text) for text in texts]


def _names(files: Sequence[Path]) -> list[str]:
    return _printable([canonical(str(file)) for file in files])


def refuse_inside(path: Path, out: Path) -> None:
    """Raises SpinejaxError if a log, which names source files, would be inside the data set, which may be shared."""
    if path.resolve().is_relative_to(out.resolve()):
        raise SpinejaxError(f"--log {path}: lies inside the data set {out}, which may be shared. Put it elsewhere.")


def summarised(jobs: Sequence[Job], found: Found, outcome: Outcome) -> Summary:
    """The summary of a finished run."""
    left_out = [Item(one.name, one.reason, one.files) for one in found.left_out]
    cut_out = [note.removeprefix(_LEFT_OUT) for note in outcome.notes if note.startswith(_LEFT_OUT)]
    without = {job.name: job for job in jobs if job.name in outcome.failures}
    for job in jobs:
        reasons = [text for text in cut_out if text.startswith(f"{job.name}: ")]
        left_out += [Item(job.name, reason, job.sources) for reason in reasons]
        without |= {job.name: job} if reasons else {}
    failed = [Item(one.name, one.reason, one.files) for one in found.failed]
    failed += [Item(name, reason, without[name].sources) for name, reason in outcome.failures.items()]
    read = [job.name for job in jobs if job.name not in without]
    notes = [*found.notes, *(note for note in outcome.notes if not note.startswith(_LEFT_OUT))]
    return Summary(read, left_out, failed, notes)
