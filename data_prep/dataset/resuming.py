"""A data set's folder while it is made: who may write there, and what a run that was interrupted left.

What such a run had finished lies in a folder beside the data set (`rest_of`), because its notes name the scans' files,
and no name enters a data set. It is its owner's alone, and gone once the manifest is written.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from spinejax.data.manifest import MANIFEST
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of
from spinejax.files.lock import LOCK, locked

_PLAN = "plan"
_SUCCESSOR = "successor"


def rest_of(out: Path) -> Path:
    """`<out>.unfinished`, the folder of what an interrupted run had finished."""
    return out.resolve().with_name(out.resolve().name + ".unfinished")


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold a folder, a data set's or an evaluation's, for this run.

    Raises:
        SpinejaxError: another run holds it.
    """
    with locked(out, "Wait for it, or give another --out."):
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)  # it names this host, and data sets are passed on


def digest(*parts) -> str:
    """A digest of texts, numbers and the like, by their representation; of a path, by the file's contents.

    A file that cannot be read has a digest too: that it cannot be read is told by whoever needs it.
    """
    hashed = hashlib.sha256()
    for part in parts:
        text = repr(part)
        if isinstance(part, Path):
            try:
                text = sha256_of(part)
            except OSError:
                text = "unreadable"
        hashed.update(f"{len(text)}:{text}".encode())
    return hashed.hexdigest()


def begin(out: Path, plan: str, *, overwrite: bool) -> None:
    """Make the folder ready: for a new run, or for the rest of an interrupted one.

    Args:
        out: the folder, which exists.
        plan: digest of what is to be made.
        overwrite: drop the shards that a run of another plan left. Its finished scans are taken over all the same.

    Raises:
        SpinejaxError: without `overwrite`, the folder holds a data set, or shards that a run of another plan left; or
            somebody else's files lie where the finished scans go.
    """
    rest = rest_of(out)
    _refuse_others(rest, _PLAN)
    if (out / MANIFEST).exists():  # what a run left that was killed in its last moment
        shutil.rmtree(rest, ignore_errors=True)
    shards = sorted(out.glob("discs-?????-of-?????.h5*"))
    there = [path for path in (out / MANIFEST, *shards) if path.exists()]
    same_plan = _plan(rest) == plan and not (out / MANIFEST).exists()
    if there and not same_plan and not overwrite:
        raise SpinejaxError(f"--out {out}: holds {there[0].name} of another run. Give --overwrite, or another folder.")
    if not same_plan:
        for path in there:
            path.unlink()
    rest.mkdir(mode=0o700, exist_ok=True)
    write_atomically(rest / _PLAN, lambda path: path.write_text(plan))


def beside(out: Path) -> Path:
    """The folder in which the successor of a data set is made, `<out>.new`.

    Raises:
        SpinejaxError: somebody else's files lie there.
    """
    new = out.resolve().with_name(out.resolve().name + ".new")
    _refuse_others(new, _SUCCESSOR)
    if (new / MANIFEST).exists():  # finished, but killed before it took its place: it may be of any plan
        shutil.rmtree(new)
    new.mkdir(exist_ok=True)
    (new / _SUCCESSOR).touch()
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
    """Drop what was kept for the next run: the manifest now says all."""
    shutil.rmtree(rest_of(out), ignore_errors=True)


def _refuse_others(folder: Path, mark: str) -> None:
    """What lies in a folder that a run makes for itself is deleted in the end; so it must be a run's."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise SpinejaxError(f"{folder}: is wanted for the time of this run, but other files lie there. Move them.")


def _plan(rest: Path) -> str | None:
    try:
        return (rest / _PLAN).read_text()
    except (OSError, ValueError):
        return None
