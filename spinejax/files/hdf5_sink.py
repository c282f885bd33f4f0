"""What HDF5 writes into: on a full disk the library itself does not raise, it crashes the process."""

import io


class Sink(io.FileIO):
    """A file to write HDF5 into. A write that fails is swallowed, with all that follow, until `check` raises it."""

    failure: OSError | None = None

    def write(self, data) -> int:
        left = memoryview(data)
        try:
            while len(left) and self.failure is None:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            self.failure = error
        return len(data)

    def truncate(self, size=None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size

    def check(self) -> None:
        """Raises OSError if a write has failed."""
        if self.failure is not None:
            raise self.failure
