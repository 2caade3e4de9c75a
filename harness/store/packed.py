"""Texts in gzip's format, unpacked only as far as a bound: a small file from a stranger may unpack to any size."""

from __future__ import annotations

import gzip
import zlib

_GZIP = 31
"""What zlib calls gzip's format with its largest window."""


def packed(data: bytes) -> bytes:
    """The text in gzip's format; the same text gives the same bytes, whenever it is packed."""
    return gzip.compress(data, 9, mtime=0)


def unpacked(data: bytes, largest: int) -> bytes:
    """The text.

    Raises:
        ValueError: it is not in gzip's format, is damaged, or has more than `largest` bytes.
    """
    unpacker = zlib.decompressobj(_GZIP)
    try:
        text = unpacker.decompress(data, largest + 1)
    except zlib.error as error:
        raise ValueError("is not in gzip's format, or damaged") from error
    if len(text) > largest:
        raise ValueError(f"unpacks to more than {largest / 2**20:,.0f} MiB")
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("is not in gzip's format, or damaged")
    return text
