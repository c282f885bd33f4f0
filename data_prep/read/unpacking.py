"""Compressed streams, unpacked no further than their headers allow."""

import zlib
from collections.abc import Iterator
from typing import BinaryIO


def unpacked(file: BinaryIO, limit: int, wbits: int = zlib.MAX_WBITS) -> Iterator[bytes]:
    """The content of a zlib stream, piece by piece; it stops just past `limit` bytes.

    Raises:
        zlib.error: the stream is damaged.
        EOFError: it ends too early.
    """
    stream, total = zlib.decompressobj(wbits), 0
    while not stream.eof and total <= limit:
        packed = stream.unconsumed_tail or file.read(1 << 18)
        if not packed:
            raise EOFError("it ends too early: truncated")
        piece = stream.decompress(packed, 1 << 22)
        total += len(piece)
        yield piece
