"""Stored files: replaced atomically or appended to line by line, with checksums that are verified when read.

Every JSON object carries `schema` and `crc` (CRC-32 of the text before it), so that a damaged file is noticed instead
of believed. Operating system errors (full disk, I/O error, read-only folder) propagate as `OSError` and leave the old
contents in place.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any
from zlib import crc32

from klab.grid import UserError

SCHEMA = 1

RECORD_BYTES = 2**24
TABLE_BYTES = 2**27
LINES_BYTES = 2**28
LINE_BYTES = 2**20
"""Most bytes of a single record, of a manifest, of a file of lines, and of one line."""

_CRC = re.compile(rb',\s*"crc":\s*"([0-9a-f]{8})"\s*}\s*$')
_CRC_SPAN = 64
_TAIL = len(',"crc":"00000000"}')
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{12}\.tmp$")


def replace(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to a temporary neighbour and rename it over `path`; with `durable` it also survives a power cut."""
    with replacing(path, durable=durable) as descriptor:
        write_all(descriptor, data)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[int]:
    """The descriptor of a temporary neighbour that is renamed over `path` at the end of the block, or removed where the
    block raises; with `durable` it also survives a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield descriptor
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_folder(folder: Path) -> None:
    """Give a folder and its files the modes that the umask allows: libraries write some for their owner only."""
    probe = folder / f".umask.{secrets.token_hex(6)}.tmp"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o777)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    folder.chmod(mode)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode & 0o666)


def remove_temporaries(folder: Path) -> None:
    """Remove temporaries that a killed writer left in `folder`; the caller must be its only writer."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.match(entry.name):
                Path(entry.path).unlink(missing_ok=True)


def encode_record(record: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """`record` as JSON text with its schema first and its checksum last. NaN and infinities are written as such."""
    full = {"schema": SCHEMA, **record}
    full.pop("crc", None)
    if indent is None:
        body = json.dumps(full, separators=(",", ":"), ensure_ascii=False)[:-1]
        return f'{body},"crc":"{checksum(body)}"}}'.encode()
    body = json.dumps(full, indent=indent, ensure_ascii=False)[:-2]
    return f'{body},\n{" " * indent}"crc": "{checksum(body)}"\n}}\n'.encode()


def decode_record(data: bytes, file: Path | str, *, keep_schema: bool = False) -> dict[str, Any]:
    """The record that `encode_record` wrote.

    Raises:
        UserError: when the text is not such a record, was damaged, or has another schema.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged_file(file, "is not valid JSON") from error
    if not isinstance(record, dict):
        raise damaged_file(file, "does not hold a JSON object")
    check_schema(record.get("schema"), file)
    if not checksum_matches(data):
        raise damaged_file(file, "was damaged or edited: its checksum does not fit")
    del record["crc"]
    if not keep_schema:
        del record["schema"]
    return record


def checksum_matches(data: bytes) -> bool:
    """Whether the text ends with the checksum of what stands before it."""
    start = max(0, len(data) - _CRC_SPAN)
    found = _CRC.search(data[start:])
    return found is not None and int(found[1], 16) == crc32(memoryview(data)[: start + found.start()])


def check_schema(schema: object, file: Path | str) -> None:
    """Raises a `UserError` unless `schema` is the one that this version of klab reads."""
    if type(schema) is int and schema == SCHEMA:
        return
    if type(schema) is int:
        age = "a newer" if schema > SCHEMA else "an older"
        raise UserError(
            f"was written by {age} klab (schema {schema}; this one reads schema {SCHEMA})",
            file=file,
            hint="Use that version of klab, or start a new run folder with --runs.",
        )
    raise damaged_file(file, "does not say its schema")


def damaged_file(file: Path | str, problem: str) -> UserError:
    """The mistake to raise for a stored file that cannot be what klab wrote."""
    return UserError(
        problem, file=file, hint="Restore this file from a copy, or delete its folder to run the cell again."
    )


def open_file(path: Path | str) -> FileIO:
    """An ordinary file, opened for reading. A run folder may come from anybody: pipes and devices could block or never
    end, and a link could lead anywhere.

    Raises:
        UserError: when it is a link, a folder, or no ordinary file.
        FileNotFoundError, NotADirectoryError: when there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise damaged_file(path, "is a link, not a file") from error
        if error.errno == errno.ENXIO:
            raise damaged_file(path, "is not an ordinary file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "is a folder, not a file" if stat.S_ISDIR(mode) else "is not an ordinary file"
        raise damaged_file(path, kind)
    return FileIO(descriptor)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record stored in `path`, or None when there is no such file."""
    data = read_bytes(path)
    return None if data is None else decode_record(data, path)


def read_bytes(path: Path | str, largest: int = RECORD_BYTES) -> bytes | None:
    """The contents of a file that klab wrote, or None when there is no such file.

    Raises:
        UserError: when it is no ordinary file, larger than `largest` bytes, or begins with something else than `{`;
            such files are not read.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                most = f"{largest / 2**20:,.0f} MiB"
                raise damaged_file(path, f"has {size / 2**20:,.0f} MiB, and such a file has {most} at most")
            if os.pread(file.fileno(), 1, 0) not in (b"", b"{"):
                raise damaged_file(path, "is not valid JSON: it does not begin with {")
            return file.readall()
    except (FileNotFoundError, NotADirectoryError):
        return None


def append_lines(path: Path, records: Iterable[Mapping[str, Any]], *, durable: bool = False) -> None:
    """Append one line per record, all or none; a torn last line of an earlier writer is dropped first."""
    data = b"".join(encode_record(record) + b"\n" for record in records)
    if not data:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = _whole_size(descriptor)
        try:
            write_all(descriptor, data)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell; a torn end is dropped by whoever reads
                os.ftruncate(descriptor, size)
            raise
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of a line file, [] when there is none; a torn write after the last line break is dropped.

    Raises:
        UserError: when a whole line is damaged (the message names it).
    """
    return decode_lines((read_bytes(path, LINES_BYTES) or b"").split(b"\n")[:-1], path)


def decode_lines(lines: list[bytes], path: Path, first: int = 1) -> list[dict[str, Any]]:
    """The records of consecutive lines of a file, the first of which has this number.

    Raises:
        UserError: when one of them is damaged.
    """
    try:
        return _unseal_lines(lines)
    except (ValueError, LookupError, TypeError, RecursionError):  # the plain way tells which line is wrong, and why
        return [decode_record(line, f"{path} line {number}") for number, line in enumerate(lines, first)]


def line_checksums_match(lines: list[bytes]) -> bool:
    """Whether each line ends with the checksum of what stands before it, exactly as `encode_record` writes it."""
    return all(line[-_TAIL:] == b',"crc":"%08x"}' % crc32(line[:-_TAIL]) for line in lines)


def _unseal_lines(lines: list[bytes]) -> list[dict[str, Any]]:
    """Many lines at once, each exactly as `encode_record` writes it."""
    if not line_checksums_match(lines):
        raise ValueError("a line's checksum does not fit")
    records: list[dict[str, Any]] = json.loads(f"[{b','.join(lines).decode()}]")
    if len(records) != len(lines):
        raise ValueError("a line is not one record")
    for record in records:
        del record["crc"]
        check_schema(record.pop("schema", None), "")
    return records


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole record of a line file without reading the rest; None when there is none.

    Raises:
        UserError: when it is damaged, or longer than `LINE_BYTES`.
    """
    try:
        with open_file(path) as file:
            end = file.seek(0, os.SEEK_END)
            tail = b""
            while end > 0:
                step = min(end, 1 << 14)
                end -= step
                file.seek(end)
                tail = (file.read(step) or b"") + tail
                whole = tail[: tail.rfind(b"\n") + 1].rstrip(b"\n")
                if whole and (b"\n" in whole or end == 0):
                    return decode_record(whole.rsplit(b"\n", 1)[-1], path)
                if len(tail) > LINE_BYTES:
                    raise damaged_file(path, f"ends in a line of more than {LINE_BYTES / 2**20:.0f} MiB")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None


def checksum(body: str) -> str:
    """CRC-32 of the text, as it stands in records."""
    return f"{crc32(body.encode()):08x}"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes at the descriptor's position, in as many pieces as the system takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _whole_size(descriptor: int) -> int:
    """Bytes up to and including the last line break; what follows is cut off."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        step = min(end, 1 << 14)
        os.lseek(descriptor, end - step, os.SEEK_SET)
        found = os.read(descriptor, step).rfind(b"\n")
        if found >= 0:
            end = end - step + found + 1
            break
        end -= step
    if end < size:
        os.ftruncate(descriptor, end)
    return end
