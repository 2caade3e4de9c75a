"""Allocator settings: keep freed memory in the process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""

_NEVER = 2**31 - 1
_PAD = 2**26


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor in place of giving it back to the system, where the C library is glibc.

    An update allocates and frees the same large temporaries again and again; each time the system would have to clear
    their pages anew. The process holds what it needed at its peak, as it did before.

    Returns:
        whether the C library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        settings = ((_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD), (_MMAP_THRESHOLD, _NEVER))
        return all([mallopt(name, value) == 1 for name, value in settings])
    return False
