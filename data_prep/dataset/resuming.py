"""What a run has finished before its data set is whole, so that an interrupted run can continue.

A finished scan is one file, named by the digest of everything that its discs depend on. It lies in `<out>.unfinished`,
beside the data set, because its notes name source files and no such name may enter a data set. The folder is readable
by its owner alone and is deleted once the data set is whole.
"""

import contextlib
import hashlib
import json
import math
import mmap
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.anatomy.discs import DiscVolume
from spinejax.data.manifest import MANIFEST
from spinejax.data.shards import VOLUME_DTYPES
from spinejax.errors import SpinejaxError
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of
from spinejax.files.lock import LOCK, locked
from spinejax.geometry import VOLUME_SHAPE

_MARK = "run"  # a file that marks the folder as a run's own
SHARDS = "discs-?????-of-?????.h5"
"""Pattern of a data set's shards."""
_SHARDS = f"{SHARDS}*"  # and of temporary ones
_ARRAYS = {"affine": (np.dtype("<f8"), (4, 4))} | {name: (dtype, VOLUME_SHAPE) for name, dtype in VOLUME_DTYPES.items()}
_CHECKSUM_BYTES = 8


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
            (out / LOCK).unlink(missing_ok=True)  # it names this host, and data sets are shared


# The folder ----------------------------------------------------------------------------------------------------------


def unfinished(out: Path) -> Path:
    """`<out>.unfinished`, the folder of what a run has finished so far."""
    return out.resolve().with_name(out.resolve().name + ".unfinished")


def begin(out: Path, *, overwrite: bool) -> Path:
    """Prepare for a new run, or for the rest of an interrupted one, and return the folder for finished scans.

    Args:
        out: the data set's folder, which exists. Nothing in it is changed.
        overwrite: replace what `out` holds.

    Raises:
        SpinejaxError: without `overwrite`, `out` holds a data set, or shards of another run; or the folder for finished
            scans holds files that no run wrote.
    """
    folder, manifest, shards = unfinished(out), out / MANIFEST, sorted(out.glob(_SHARDS))
    mark = folder / _MARK
    if folder.is_dir() and any(folder.iterdir()) and not mark.exists():
        raise SpinejaxError(f"{folder}: the run needs this folder for its own files. Move what it holds.")
    if manifest.exists() and mark.exists() and mark.stat().st_mtime <= manifest.stat().st_mtime:
        shutil.rmtree(folder)  # its run was killed just after the manifest was written
    if not overwrite and (manifest.exists() or (shards and not mark.exists())):
        held = manifest if manifest.exists() else shards[0]
        raise SpinejaxError(f"--out {out}: holds {held.name} of another run. Give --overwrite, or another folder.")
    folder.mkdir(mode=0o700, exist_ok=True)
    mark.touch()
    for path in folder.glob(_SHARDS):  # the number of shards may differ now
        path.unlink()
    return folder


def publish(folder: Path, out: Path) -> None:
    """Move a finished data set to `out`, in place of an older one, and delete `folder`.

    The old manifest goes first and the new one comes last, so that no reader finds a mixture.
    """
    (out / MANIFEST).unlink(missing_ok=True)
    for path in out.glob(_SHARDS):
        path.unlink()
    for path in sorted(folder.glob(_SHARDS)):
        shutil.move(path, out / path.name)  # copies if `out` is another disk
    write_atomically(out / MANIFEST, lambda path: shutil.copyfile(folder / MANIFEST, path))
    shutil.rmtree(folder)


# Finished scans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A scan's discs and notes, or the reason why it failed."""

    discs: Sequence[DiscVolume] = ()
    notes: Sequence[str] = ()
    failure: str | None = None


def digest(*parts) -> str:
    """A digest of values, by their representation, and of paths, by the content of their files.

    A file that cannot be read has a digest too; reading it again reports why.
    """
    hashed = hashlib.sha256()
    for part in parts:
        text = repr(part)
        if isinstance(part, Path):
            try:
                text = sha256_of(part)
            except OSError:
                text = "unreadable"
        hashed.update(f"{len(text)}:{text}".encode(errors="surrogateescape"))
    return hashed.hexdigest()


def save_scan(path: Path, result: ScanResult) -> None:
    """Write a scan's result. Raises OSError, as on a full disk.

    The file is a line of JSON, the discs' arrays and a checksum, which spares the wait for the disk: a scan that is
    damaged by a power failure is cut again.
    """
    discs = [
        (disc.level, *disc.slices, [name for name in _ARRAYS if getattr(disc, name) is not None])
        for disc in result.discs
    ]
    about = {"notes": list(result.notes), "failure": result.failure, "discs": discs}
    arrays = [getattr(disc, name) for disc, (*_, names) in zip(result.discs, discs, strict=True) for name in names]
    line = json.dumps(about).encode()
    line += b" " * (-len(line) % 8 + 7) + b"\n"  # numbers are faster where they are aligned
    hashed = xxhash.xxh3_64()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for part in (memoryview(line), *(np.ascontiguousarray(array).data for array in arrays)):
                file.write(part)
                hashed.update(part)
            file.write(hashed.digest())

    write_atomically(path, write, flushed=False)


def load_scan(path: Path) -> ScanResult | None:
    """What `save_scan` wrote; None if there is no such file or it is damaged."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # the latter if it is empty
        return None
    if xxhash.xxh3_64_digest(memoryview(content)[:-_CHECKSUM_BYTES]) != content[-_CHECKSUM_BYTES:]:
        return None
    place = content.find(b"\n") + 1
    about, discs = json.loads(content[:place]), []
    for level, first, stop, names in about["discs"]:
        arrays = {}
        for name in names:
            dtype, shape = _ARRAYS[name]
            count = math.prod(shape)
            arrays[name] = np.frombuffer(content, dtype, count, place).reshape(shape)
            place += count * dtype.itemsize
        discs.append(DiscVolume(level, slices=(first, stop), **arrays))
    return ScanResult(discs, about["notes"], about["failure"])
