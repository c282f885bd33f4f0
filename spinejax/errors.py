"""The exception for everything that a user can fix, and the exit status of a command."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_CHECKOUT = Path(__file__).parents[1]
"""The project's folder, if this is not an installed wheel."""


class SpinejaxError(Exception):
    """A fault in an input, an option or a file that the user can fix.

    Its message is one or two sentences: which file or argument, what was found, what was expected, what to do. The
    commands print it without a traceback and exit with status 2; any other exception is a fault of ours.
    """


class NoDeviceError(SpinejaxError):
    """JAX has no device to compute on. The input itself may be in order, and no other will fare better."""


class NotInstalledError(SpinejaxError):
    """A library is missing. The input itself may be in order.

    Args:
        need: what needs which library.
        extra: the extra of this package that installs the library.
    """

    def __init__(self, need: str, extra: str):
        super().__init__(need, extra)  # pickled with these, on its way from a worker

    def __str__(self) -> str:
        need, extra = self.args
        if (_CHECKOUT / "pyproject.toml").is_file():
            return f"{need}. Run `pip install -e '.[{extra}]'` in this project's folder."
        return f"{need}. Run `pip install 'spinejax[{extra}]'`."


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Around a command's imports: ends in one line where this Python lacks a library that every command needs.

    In a clone that is what a newcomer sees first who has not activated the environment.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith(("spinejax", "data_prep")):
            raise  # a fault of ours
        sys.stderr.write(
            f"error: {missing}: this Python, {sys.executable}, lacks what spinejax needs. After `make demo`: "
            "`. .venv/bin/activate`. Or install it here: `pip install -e '.[all]'`.\n"
        )
        raise SystemExit(2) from None


@contextlib.contextmanager
def needs(need: str, extra: str) -> Iterator[None]:
    """Around the import of a library: raises NotInstalledError if it is missing. Arguments as there."""
    try:
        yield
    except ImportError as error:
        raise NotInstalledError(need, extra) from error


def require_option(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises SpinejaxError, naming the command's option and its value, unless the condition holds."""
    if not condition:
        raise SpinejaxError(f"Option --{name.replace('_', '-')} is {value}: expected {expected}.")


def printable(message: object) -> str:
    r"""A message for the terminal, in which control characters of a file's name are escapes.

    So no name forges a line or moves the cursor. Our own line breaks are followed by two spaces, and remain.

    Example:
        >>> print(printable("P1\nerror: P2: damaged"))
        P1\nerror: P2: damaged
    """
    lines = str(message).split("\n  ")
    return "\n  ".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


def message_of(error: SpinejaxError | OSError) -> str:
    """What the user reads: what the system refuses is told with the file."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def status_of(command: Callable[[], int | None]) -> int:
    """Run a command and give its exit status: 0 done, 2 the user can fix it, 130 interrupted.

    What the user can fix, and what the system refuses (a full disk, a folder without write access), is one line on the
    standard error. Anything else is a fault of ours: its traceback is shown, and the status is 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a log in Latin-1 must not end a command
            reconfigure(errors="replace")
    try:
        return command() or 0
    except (SpinejaxError, OSError) as error:
        print(f"error: {printable(message_of(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted. No file is half-written.", file=sys.stderr)
        return 130
    return 2
