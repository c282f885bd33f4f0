"""What an interrupted run had finished: scans and shards, each with all that was said of it, found again by content.

Both lie beside the data set, in `resume.rest_of(out)`, until it is whole. A finished scan is one file of its discs, its
notes, or the reason why it failed, named by the digest of all that these depend on. Once a scan's shard stands, the
scan's file is dropped, and the shard's record takes its place: so discs are on disk twice for shards in work only.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.anatomy.discs import DiscVolume
from spinejax.data.shards import ShardSummary
from spinejax.files.atomic import write_atomically
from spinejax.files.checksums import sha256_of

_ARRAYS = ("volume", "affine", "region", "lesion")


# Scans ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What became of a scan: its discs and notes, or the reason why it failed."""

    discs: Sequence[DiscVolume] = ()
    notes: Sequence[str] = ()
    failure: str | None = None


def keep_scan(rest: Path, digest: str, result: ScanResult) -> None:
    """Keep what became of a scan, under the digest of all that it depends on. Raises OSError, as on a full disk."""
    told = {
        "notes": list(result.notes),
        "failure": result.failure,
        "discs": [[disc.level, *disc.slices] for disc in result.discs],
    }
    arrays = {"told": np.array(json.dumps(told))}
    for index, disc in enumerate(result.discs):
        values = {name: getattr(disc, name) for name in _ARRAYS}
        arrays |= {f"{index}.{name}": value for name, value in values.items() if value is not None}

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(_scan_file(rest, digest), write)


def kept_scan(rest: Path, digest: str) -> ScanResult | None:
    """What became of a scan in an earlier run; None if it was not finished, or its file is damaged."""
    try:
        with np.load(_scan_file(rest, digest), allow_pickle=False) as arrays:
            told = json.loads(str(arrays["told"]))
            discs = []
            for index, (level, first, stop) in enumerate(told["discs"]):
                values = {name: arrays[f"{index}.{name}"] for name in _ARRAYS if f"{index}.{name}" in arrays}
                discs.append(DiscVolume(level, slices=(first, stop), **values))
            return ScanResult(discs, told["notes"], told["failure"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def drop_scans(rest: Path, digests: Sequence[str]) -> None:
    """Drop what was kept of these scans: their shard stands."""
    for digest in digests:
        _scan_file(rest, digest).unlink(missing_ok=True)


def _scan_file(rest: Path, digest: str) -> Path:
    return rest / f"{digest}.npz"


# Shards --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardResult:
    """A finished shard: the digests of its scans in order, its share of the manifest, and what was said of its scans.

    `failures` is name → reason.
    """

    scans: Sequence[str]
    summary: ShardSummary
    notes: Sequence[str] = ()
    failures: Mapping[str, str] = field(default_factory=dict)


def keep_shard(rest: Path, result: ShardResult) -> None:
    """Record that a shard is finished. Raises OSError, as on a full disk."""
    summary = result.summary
    record = {
        "scans": list(result.scans),
        "notes": list(result.notes),
        "failures": dict(result.failures),
        "sha256": summary.sha256,
        "num_discs": summary.num_discs,
        "discs": dict(summary.discs),
        "patients": {split: sorted(names) for split, names in summary.patients.items()},
        "grades": [[*key, count] for key, count in sorted(summary.grades.items())],
        "images": sorted(summary.images),
        "slice_sum": summary.slice_sum.tolist(),
    }
    write_atomically(_record(rest, summary.file), lambda path: path.write_text(json.dumps(record)))


def kept_shard(rest: Path, shard: Path) -> ShardResult | None:
    """What an earlier run recorded of a shard; None if it did not finish it, or the shard is not what it was."""
    try:
        record = json.loads(_record(rest, shard.name).read_text())
        if sha256_of(shard) != record["sha256"]:
            return None
        summary = ShardSummary(
            file=shard.name,
            bytes=shard.stat().st_size,
            sha256=record["sha256"],
            num_discs=record["num_discs"],
            discs=Counter(record["discs"]),
            patients={split: set(names) for split, names in record["patients"].items()},
            grades=Counter({(split, task, label): count for split, task, label, count in record["grades"]}),
            images={(image, split) for image, split in record["images"]},
            slice_sum=np.array(record["slice_sum"], np.int64),
        )
        return ShardResult(record["scans"], summary, record["notes"], record["failures"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(rest: Path, shard: str) -> Path:
    return rest / f"{shard}.json"
