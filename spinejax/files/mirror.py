"""A folder of this machine that is kept equal to one in an object store.

Everything is written here first, with the atomic writes and locks of a disk, and then copied. A seal is a file that
vouches for others: `SHA256SUMS`, `manifest.json`, `results.json`, and a page, `index.html`. In the store, a seal is
deleted before a file that it vouches for changes, and written last, when the store lists all of them with their sizes,
and no others. So a reader finds what a seal promises, or no seal; and what has no seal does not count.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spinejax.errors import SpinejaxError
from spinejax.files import checksums, lease, lock
from spinejax.files.atomic import write_atomically
from spinejax.files.stores import Address, StoreError, at_once

SEALS = (checksums.SUMS, "manifest.json", "results.json", "index.html")
NUM_TRIES = 3
"""Times that a file is written which the store confirms and then does not list."""
_WHOLE_BYTES = 2**24
"""Up to this size a file is read at once: it may be a log that grows meanwhile."""


class Mirror:
    """A folder here, and the one in the store that is to have the same files.

    Args:
        address, folder: of the two.
        replaces: patterns of the names that `push` may delete in the store, if they are not here.
    """

    def __init__(self, address: Address, folder: Path, *, replaces: Sequence[str] = ()):
        self.address, self.folder, self._replaces = address, folder, replaces
        self._same: dict[str, tuple[int, int]] = {}  # name → size and time of change here, when both were equal
        self.check: Callable[[], None] = lambda: None
        """Called before each `push`; raises SpinejaxError if the folder in the store is another process's now."""

    def pull(self, wanted: Callable[[str], bool]) -> None:
        """Copy those files of the store to the folder whose names are wanted; delete here what is not there.

        What a `SHA256SUMS` lists is compared with it. What a stopped writer left is not copied: subfolders without such
        a list, and files that the list of their folder does not name.

        Raises:
            SpinejaxError: a file is not what was written, or the store fails.
        """
        there = {name: size for name, size in self.address.files().items() if not _is_hidden(name)}
        for name in set(self._here()) - there.keys():
            (self.folder / name).unlink()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        there = {name: size for name, size in there.items() if wanted(name)}
        sums = [name for name in there if _lists(name)]
        listed = {name: digest for seal in sums for name, digest in self._sums(seal, self.address).items()}
        sealed = tuple(name.removesuffix(checksums.SUMS) for name in sums)

        def copy(name: str) -> None:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in listed:
                if not (target.is_file() and checksums.sha256_of(target) == listed[name]):
                    (self.address / name).download(target, size=there[name], sha256=listed[name])
            else:
                content = (self.address / name).read_bytes()
                write_atomically(target, lambda path: path.write_bytes(content))
            self._same[name] = _stamp(target)

        unlisted = {name for name in there if name not in listed and any(_vouches(seal, name) for seal in sums)}
        at_once(copy, [name for name in set(there) - unlisted if "/" not in name or name.startswith(sealed)])

    def push(self) -> None:
        """Bring what is new or changed into the store, and delete there what is gone here.

        Raises:
            SpinejaxError: another process has taken over the folder in the store.
            StoreError: the store fails. Called again, it goes on.
        """
        self.check()
        here, there = self._here(), self.address.files()
        changed = {name for name in here if name not in there or self._same.get(name) != _stamp(self.folder / name)}
        # A file that a seal here lists is not deleted there, whoever deleted it here.
        kept = {*here, *(name for seal in here if _lists(seal) for name in self._sums(seal, self.folder))}
        gone = {name for name in there if name not in kept and any(fnmatch.fnmatch(name, p) for p in self._replaces)}
        broken = {
            seal
            for seal in filter(_is_seal, there)
            if (seal in here or self._is_own_seal(seal))  # others' are left alone: a page in a run's folder
            and any(_vouches(seal, name) for name in (changed | gone if seal in here else changed) - {seal})
        }
        for seal in sorted(broken):
            self._delete(seal)
        # An old file of the same size would hide that the store has lost the new one.
        alike = {name for name in changed if there.get(name) == _stamp(self.folder / name)[0] and not _is_seal(name)}
        at_once(self._delete, [name for name in sorted(alike) if any(_vouches(seal, name) for seal in broken)])
        self.upload(sorted(name for name in changed if not _is_seal(name)))
        seals = {name for name in here if _is_seal(name) and name in changed | broken}
        # A step that is made again has files of other names than what a killed writer left of it.
        left_over = {name for name in gone if not _is_seal(name) and any(_vouches(seal, name) for seal in seals)}
        at_once(self._delete, sorted(left_over))
        for seal in sorted(seals, key=lambda name: _stamp(self.folder / name)[1]):  # in the order they were written
            self.upload([seal])
        if any(map(self._is_own_seal, seals)):
            self.remember()
        for is_seal in (True, False):
            names = [name for name in sorted(gone - broken - left_over) if _is_seal(name) == is_seal]
            at_once(self._delete, names)

    def _delete(self, name: str) -> None:
        """Delete a file in the store."""
        (self.address / name).unlink()

    def send(self, path: Path) -> Address:
        """Copy one file of the folder into the store, and return its address there."""
        name = path.relative_to(self.folder).as_posix()
        self.upload([name])
        return self.address / name

    def upload(self, names: Sequence[str]) -> None:
        """Copy files, until the store lists them with their sizes."""
        sizes: dict[str, int] = {}

        def copy(name: str) -> None:
            path = self.folder / name
            try:
                stamp = _stamp(path)
                content = path.read_bytes() if stamp[0] <= _WHOLE_BYTES else None
            except FileNotFoundError:  # deleted here meanwhile
                return
            if content is None:
                (self.address / name).upload(path)
            else:
                (self.address / name).write_bytes(content)
            sizes[name] = stamp[0] if content is None else len(content)
            self._same[name] = stamp

        left = list(names)
        for _ in range(NUM_TRIES):
            at_once(copy, left)
            there = self.address.files() if left else {}
            left = [name for name in left if name in sizes and there.get(name) != sizes[name]]
            if not left:
                return
        raise StoreError(f"{self.address / left[0]}: the store confirmed that it was written, and does not have it.")

    def _sums(self, seal: str, where: Path | Address) -> dict[str, str]:
        """What a `SHA256SUMS` lists: name, from the mirrored folder → digest."""
        folder = seal.removesuffix(checksums.SUMS)
        lines = (where / seal).read_bytes().decode("ascii", errors="replace").splitlines()
        return {f"{folder}{line[66:]}": line[:64] for line in lines}

    def _here(self) -> list[str]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        names = (path.relative_to(self.folder).as_posix() for path in paths)
        return sorted(name for name in names if not _is_hidden(name))

    def keep_up(self, tell: Callable[[str], None]) -> None:
        """As `push`, but a store that fails is told, and no error: the next call catches up."""
        try:
            self.push()
        except StoreError as error:
            tell(f"note: {error} The work goes on in {self.folder}; it is copied once the store is there again.")

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """In the messages of the block, files that are copied from the store are named by their address."""
        try:
            yield
        except SpinejaxError as error:
            text = str(error).replace(str(self.folder), str(self.address))
            raise _reworded(error, text.replace(str(self.folder.parent), str(self.address))) from error

    def goes_on(self) -> bool:
        """Whether what is here continues what is in the store: nobody else has sealed anything there, or deleted it."""
        if not (self.folder.is_dir() and self._record.is_file()):
            return False
        seals = [name for name in self.address.files() if self._is_own_seal(name)]
        there = {_digest((self.address / seal).read_bytes()) for seal in seals}
        copied, here = self._copied(), self._seals_here()
        return there <= copied | here if there else not here or not here <= copied

    def has_news(self) -> bool:
        """Whether something is sealed here that was not copied yet."""
        return not self._seals_here() <= self._copied()

    def set_aside(self) -> Path | None:
        """Empty the folder. Returns where its files are now, if not all that is sealed was copied to the store."""
        kept = None
        if self._record.is_file() and self.has_news():
            kept = next(p for n in itertools.count(1) if not (p := Path(f"{self.folder}.{n}")).exists())
            self.folder.rename(kept)
        self.delete()
        self.folder.mkdir(parents=True)
        return kept

    def remember(self) -> None:
        """Record which seals were in both folders. Without the record, the folder is not whole."""
        digests = sorted(self._copied() | self._seals_here())
        write_atomically(self._record, lambda path: path.write_text("\n".join(digests)))

    def delete(self) -> None:
        """Delete the folder. If it is killed meanwhile, nobody takes what remains for the whole."""
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _record(self) -> Path:
        return self.folder.with_name("copied")

    def _copied(self) -> set[str]:
        return set(self._record.read_text().split()) if self._record.is_file() else set()

    def _seals_here(self) -> set[str]:
        return {_digest((self.folder / name).read_bytes()) for name in self._here() if self._is_own_seal(name)}

    def _is_own_seal(self, name: str) -> bool:
        return _is_seal(name) and any(fnmatch.fnmatch(name, pattern) for pattern in self._replaces)


def mirror_of(address: Address, cache: Path, purpose: str, *, replaces: Sequence[str] = ()) -> Mirror:
    """The mirror of a store's folder in the folder for copies, one for each purpose."""
    home = cache / purpose / _digest(str(address).encode())[:16]
    return Mirror(address, home / address.name, replaces=replaces)


@contextlib.contextmanager
def held(
    mirror: Mirror, *, wanted: Callable[[str], bool] = lambda name: False, advice: str, tell: Callable[[str], None]
) -> Iterator[None]:
    """Hold a folder of a store, and have its mirror to work in, which is copied there at the end, and deleted here.

    If what is here was not copied because a process was killed or the store failed, it is gone on with; unless others
    have worked in the store's folder since, or it was deleted.

    Args:
        mirror: of the folder.
        wanted: which of the store's files are needed here.
        advice: what to do if another process holds the folder; it ends the message.
        tell: gets what the user should know.

    Raises:
        SpinejaxError: another process holds it; or the store fails, at the start or at the end. The message says what
            folder has everything.
    """
    home = mirror.folder.parent
    with contextlib.ExitStack() as exit_stack:
        with mirror.named():
            exit_stack.enter_context(lock.locked(home, advice))
        mirror.check = exit_stack.enter_context(lease.leased(mirror.address, advice, tell=tell)).check
        if not mirror.goes_on():
            if kept := mirror.set_aside():
                tell(f"note: {mirror.address} has changed since this machine worked on it. That work is in {kept}.")
            mirror.pull(wanted)
            mirror.remember()
        elif mirror.has_news():
            mirror.push()
        try:
            with mirror.named():
                yield
        except SpinejaxError as error:
            raise _reworded(error, f"{error} The files on this machine are in {mirror.folder}.") from error
        try:
            mirror.push()
        except SpinejaxError as error:
            raise SpinejaxError(
                f"{error} Everything is saved in {mirror.folder}: start the same command again to copy it to "
                f"{mirror.address}, or use it there."
            ) from error
        mirror.delete()


def _reworded(error: SpinejaxError, text: str) -> SpinejaxError:
    """The same error with another message, unless it makes its message itself."""
    if error.args == (str(error),):
        error.args = (text,)
    return error


def _vouches(seal: str, name: str) -> bool:
    """Whether a seal is about a file. `SHA256SUMS` lists the files of subfolders alone."""
    folder, _, kind = seal.rpartition("/")
    inside = name.removeprefix(f"{folder}/") if folder else name
    return (not folder or inside != name) and (kind != checksums.SUMS or "/" in inside)


def _is_seal(name: str) -> bool:
    return name.rpartition("/")[2] in SEALS


def _lists(name: str) -> bool:
    return name.rpartition("/")[2] == checksums.SUMS


def _is_hidden(name: str) -> bool:
    """Temporary files, locks and leases; and names that would lead out of a folder."""
    temporary = (checksums.TEMPORARY, ".part")
    return any(not part or part.startswith(".") or part.endswith(temporary) for part in name.split("/"))


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with a file's content: its size, and the time of its last change in ns."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
