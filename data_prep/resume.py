"""What lets an interrupted run go on, to the same bytes: which shards are finished, and what they were made from.

Notes on finished shards lie in `<out>/.unfinished/` until the manifest is written. They hold digests, counts and
pseudonyms only. The lock is the system's own on the folder, so that a killed run leaves none behind.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spinejax.errors import SpinejaxError
from spinejax.shards import MANIFEST, ShardSummary, sha256_of, write_atomically

_NOTES = ".unfinished"
_PLAN = "plan"


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold a data set's folder for this run.

    Raises:
        SpinejaxError: another run holds it.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpinejaxError(
                f"--out {out}: another run writes there. Wait for it, or give another folder."
            ) from error
        yield
    finally:
        os.close(folder)


def digest(*parts) -> str:
    """A digest of texts, numbers and the like, by their representation; of a path, by the file's contents."""
    hashed = hashlib.sha256()
    for part in parts:
        text = sha256_of(part) if isinstance(part, Path) else repr(part)
        hashed.update(f"{len(text)}:{text}".encode())
    return hashed.hexdigest()


def begin(out: Path, plan: str, *, overwrite: bool) -> None:
    """Make the folder ready: for a new run, or for the rest of an interrupted one of the same plan.

    Args:
        out: the folder, which exists.
        plan: digest of what is to be made.
        overwrite: drop what a run of another plan left.

    Raises:
        SpinejaxError: without `overwrite`, the folder holds a data set, or what a run of another plan left.
    """
    shards = sorted(out.glob("discs-?????-of-?????.h5*"))
    there = [path for path in (out / MANIFEST, *shards) if path.exists()]
    same_plan = _read(out / _NOTES / _PLAN) == {"plan": plan} and not (out / MANIFEST).exists()
    if there and not same_plan and not overwrite:
        raise SpinejaxError(f"--out {out}: holds {there[0].name} of another run. Give --overwrite, or another folder.")
    if not same_plan:
        for path in there:
            path.unlink()
        shutil.rmtree(out / _NOTES, ignore_errors=True)
    (out / _NOTES).mkdir(exist_ok=True)
    _write(out / _NOTES / _PLAN, {"plan": plan})


def beside(out: Path) -> Path:
    """The folder in which the successor of a data set is made."""
    new = out.resolve().with_name(out.resolve().name + ".new")
    if (new / MANIFEST).exists():  # finished, but killed before it took its place: it may be of any plan
        shutil.rmtree(new)
    return new


def replace(out: Path, new: Path) -> None:
    """Put a finished data set in another's place. The manifests go first and come last: no reader finds a mixture."""
    (out / MANIFEST).unlink()
    for path in out.glob("discs-?????-of-?????.h5"):
        path.unlink()
    for path in sorted(new.glob("discs-?????-of-?????.h5")):
        os.replace(path, out / path.name)
    os.replace(new / MANIFEST, out / MANIFEST)
    shutil.rmtree(new)


def end(out: Path) -> None:
    """Drop the notes: the manifest now says all."""
    shutil.rmtree(out / _NOTES, ignore_errors=True)


def finished(path: Path, sources: str) -> ShardSummary | None:
    """The summary of a shard that an earlier run finished from the same sources, if it is still what it was."""
    note = _read(_note(path))
    if not note or note.get("sources") != sources or not path.is_file() or sha256_of(path) != note.get("sha256"):
        return None
    return ShardSummary(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=note["sha256"],
        num_discs=note["num_discs"],
        discs=Counter(note["discs"]),
        patients={split: set(names) for split, names in note["patients"].items()},
        grades=Counter({(split, task, label): count for split, task, label, count in note["grades"]}),
        images={(image, split) for image, split in note["images"]},
        slice_sum=np.array(note["slice_sum"], np.int64),
    )


def note_finished(path: Path, sources: str, summary: ShardSummary) -> None:
    """Note that a shard is finished, and from which sources."""
    note = {
        "sources": sources,
        "sha256": summary.sha256,
        "num_discs": summary.num_discs,
        "discs": dict(summary.discs),
        "patients": {split: sorted(names) for split, names in summary.patients.items()},
        "grades": [[*key, count] for key, count in sorted(summary.grades.items())],
        "images": sorted(summary.images),
        "slice_sum": summary.slice_sum.tolist(),
    }
    _write(_note(path), note)


def _note(path: Path) -> Path:
    return path.parent / _NOTES / f"{path.name}.json"


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, content: dict) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content)))
