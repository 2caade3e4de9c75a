"""The report of a run as it lies in its folder: files of a few kinds, that can do nothing to the page beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path, PurePosixPath

from klab.harness.store.inside import open_inside

KINDS: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".pdf": "application/pdf",
    ".csv": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".tex": "text/plain; charset=utf-8",
    ".json": "application/json",
}
"""What a report consists of; nothing else in its folder is given out."""

POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A report may run its own scripts (its tables are sorted by them), but as a page of no origin: it can read nothing of
this server and of other runs, keep nothing, open nothing and send nothing."""
_CHUNK = 1 << 18


def open_report(folder: Path, name: str) -> tuple[FileIO, int, str]:
    """A file of the report: opened, its size in bytes, and its type.

    Args:
        folder: the run folder.
        name: the path below `report/`; "" is its page.

    Raises:
        FileNotFoundError: there is no such file, or it is none that reports have.
        UserError: it is reached through a link, or is no ordinary file.
    """
    parts = ("report", *(name or "index.html").split("/"))
    kind = KINDS.get(PurePosixPath(name or "index.html").suffix.lower())
    if kind is None:
        raise FileNotFoundError(name)
    file = open_inside(folder, parts)
    return file, os.fstat(file.fileno()).st_size, kind


def pieces(file: FileIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, which is closed at the end."""
    with file:
        while size > 0 and (data := file.read(min(size, _CHUNK))):
            size -= len(data)
            yield data
