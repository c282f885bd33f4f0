"""Pseudonyms, which replace the names of patients and scans in a shard.

A pseudonym is a keyed hash of the name. Whoever has the key can find a patient by hashing the name; whoever has only
the data set cannot, not even by trying all names. So the key file stays with the user and never enters the data set.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from spinejax.errors import SpinejaxError

_KEY_BYTES = 32


@dataclass(frozen=True, repr=False)
class Pseudonyms:
    """The two hashes of one key: a patient and a scan of the same name get different pseudonyms."""

    key: bytes

    def patient(self, name: str) -> str:
        """A patient's pseudonym."""
        return self._hash(name, b"patient")

    def scan(self, name: str) -> str:
        """A scan's pseudonym."""
        return self._hash(name, b"scan")

    def _hash(self, name: str, purpose: bytes) -> str:
        return hashlib.blake2b(
            name.encode(errors="surrogateescape"), key=self.key, person=purpose, digest_size=8
        ).hexdigest()


def load_or_make_key(path: Path | None, out: Path) -> Pseudonyms:
    """Read the key file, or make one if there is none yet.

    Args:
        path: the key file; None for `<out>.key`, beside the data set.
        out: the data set's folder. The key must not be in it, or whoever gets the data set gets the key.

    Raises:
        SpinejaxError: the key would be inside `out`, others may read it, or it is not a key.
    """
    path = out.resolve().with_name(out.resolve().name + ".key") if path is None else path
    if path.resolve().is_relative_to(out.resolve()):
        raise SpinejaxError(f"--key {path}: lies inside the data set {out}, which may be shared. Put it elsewhere.")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created with its final mode, and only if new: others can never read it, and no key is replaced.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    if not path.is_file():
        raise SpinejaxError(f"--key {path}: not a file. Give a key file, or the name of a new one.")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise SpinejaxError(f"--key {path}: others may read it. Run `chmod 600` on it.")
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise SpinejaxError(f"--key {path}: {len(key)} bytes, a key has {_KEY_BYTES}. Give a key made by data_prep.")
    return Pseudonyms(key)
