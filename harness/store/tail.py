"""A file of lines that grows: every row is read once, and a file that nobody wrote to is not opened again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.store.files import LINE_BYTES, damaged_file, decode_lines
from klab.harness.store.inside import open_inside

_MARK_BYTES = 32
"""So many bytes before the place up to which a file was read are compared when it is read on."""


class Tail:
    """The rows of a line file (metrics.jsonl, evaluations.jsonl) since the last look at it.

    Args:
        root: the run folder; the file is reached through no link inside it.
        names: folders and file below `root`.
        limit: bytes that one look reads at most.

    Attributes:
        problem: why the file cannot be read (on): a line is damaged or too long, or it is no ordinary file.
        behind: whether there is more to read at once.
    """

    def __init__(self, root: Path, names: Sequence[str], limit: int = 4 * LINE_BYTES) -> None:
        self.problem: str | None = None
        self.behind = False
        self._root = root
        self._names = tuple(names)
        self._path = root.joinpath(*names)
        self._limit = limit
        self._stamp: tuple[int, ...] = ()
        self._begin()

    def look(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole rows that were added, and whether they are rows of another file than those before: one that was
        written anew, as a resumed cell does. A torn last line is left for the next look.
        """
        stamp = self._stamp_now()
        if stamp == self._stamp and not self.behind:
            return [], False
        self._stamp, self.behind = stamp, False
        if not stamp:
            return [], self._forget()
        try:
            with open_inside(self._root, self._names) as file:
                return self._read(file.fileno())
        except FileNotFoundError:
            return [], self._forget()
        except UserError as error:
            self.problem = str(error)
            return [], False

    def _stamp_now(self) -> tuple[int, ...]:
        try:
            status = os.lstat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _begin(self) -> None:
        self._file, self._offset, self._lines, self._mark = 0, 0, 0, b""
        self.problem = None

    def _forget(self) -> bool:
        """Begin anew; whether anything had been read."""
        before = self._offset > 0
        self._begin()
        return before

    def _read(self, descriptor: int) -> tuple[list[dict[str, Any]], bool]:
        status = os.fstat(descriptor)
        anew = False
        if not self._is_the_same(descriptor, status):
            anew = self._forget()
        self._file = status.st_ino
        if self.problem is not None:
            return [], anew
        data = os.pread(descriptor, self._limit, self._offset)
        end = data.rfind(b"\n") + 1
        if end == 0:
            if len(data) > LINE_BYTES:
                self.problem = str(self._too_long())
            return [], anew
        rows = self._rows(data[: end - 1].split(b"\n"))
        self._offset += end
        self._mark = (self._mark + data[max(0, end - _MARK_BYTES) : end])[-_MARK_BYTES:]
        self.behind = self.problem is None and len(data) == self._limit and self._offset < status.st_size
        return rows, anew

    def _is_the_same(self, descriptor: int, status: os.stat_result) -> bool:
        """Whether the file still begins with what was read of it, by its number, its size and the end of that."""
        if status.st_ino != self._file or status.st_size < self._offset:
            return False
        return os.pread(descriptor, len(self._mark), self._offset - len(self._mark)) == self._mark

    def _rows(self, lines: list[bytes]) -> list[dict[str, Any]]:
        first = self._lines + 1
        self._lines += len(lines)
        try:
            if any(len(line) > LINE_BYTES for line in lines):
                raise self._too_long()
            return decode_lines(lines, self._path, first)
        except UserError as error:
            self.problem = str(error)
        return list(self._sound(lines, first))

    def _sound(self, lines: list[bytes], first: int) -> Iterator[dict[str, Any]]:
        """The rows before the first damaged line."""
        for number, line in enumerate(lines, first):
            if len(line) > LINE_BYTES:
                return
            try:
                yield from decode_lines([line], self._path, number)
            except UserError:
                return

    def _too_long(self) -> UserError:
        return damaged_file(self._path, f"has a line of more than {LINE_BYTES / 2**20:.0f} MiB")
