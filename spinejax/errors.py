"""The one exception type for everything that a user can mend."""


class SpinejaxError(Exception):
    """A fault in an input, an option or a file that the user can put right.

    Its message is one sentence or two: which file or argument, what was found there, what was expected, what to do.
    The commands print it without a traceback and exit with status 2; any other exception is a fault of ours.
    """
