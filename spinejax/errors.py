"""The one exception type for everything that a user can mend, and how a command ends."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_CHECKOUT = Path(__file__).parents[1]
"""The project's folder, if this is not an installed wheel."""


class SpinejaxError(Exception):
    """A fault in an input, an option or a file that the user can put right.

    Its message is one sentence or two: which file or argument, what was found there, what was expected, what to do.
    The commands print it without a traceback and exit with status 2; any other exception is a fault of ours.
    """


class NotInstalledError(SpinejaxError):
    """A library is missing: no fault of the input, which may well be in order once the library is there.

    Args:
        need: what needs which library.
        extra: the extra of this package that installs the library.
    """

    def __init__(self, need: str, extra: str):
        super().__init__(need, extra)  # what it is pickled by, on its way from a worker

    def __str__(self) -> str:
        need, extra = self.args
        if (_CHECKOUT / "pyproject.toml").is_file():
            return f"{need}. Run `pip install -e '.[{extra}]'` in this project's folder."
        return f"{need}. Run `pip install 'spinejax[{extra}]'`."


@contextlib.contextmanager
def needs(need: str, extra: str) -> Iterator[None]:
    """Around the import of a library: raises NotInstalledError if it is missing. Arguments as there."""
    try:
        yield
    except ImportError as error:
        raise NotInstalledError(need, extra) from error


def require_option(condition: bool, name: str, value, expected: str) -> None:
    """Raises SpinejaxError, naming the command's option and its value, unless the condition holds."""
    if not condition:
        raise SpinejaxError(f"Option --{name.replace('_', '-')} is {value}: expected {expected}.")


def status_of(command: Callable[[], int | None]) -> int:
    """Run a command and give its exit status: 0 done, 2 the user can mend it, 130 interrupted.

    What the user can mend, and what the system refuses (a full disk, a folder that may not be written), is one line on
    the standard error. Anything else is a fault of ours: its traceback is shown, and the status is 1.
    """
    try:
        return command() or 0
    except SpinejaxError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted. Nothing half-written stands under its name.", file=sys.stderr)
        return 130
    return 2
