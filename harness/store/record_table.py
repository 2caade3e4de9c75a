"""The manifest's file format: a record with one large table, whose rows are parsed when they are asked for.

The file is an ordinary sealed record, which `files.decode_record` reads as well; its checksum is verified whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from klab.harness.store import files


class LazyRows(Mapping[str, Any]):
    """The rows of a table by name, each parsed when it is asked for.

    Args:
        data: the file.
        spans: where each row begins and ends in it.
        cuts: consecutive entries of a row. The values of all but the last are those that many rows have in common:
            equal ones are parsed once and are then one object, which must not be changed.
        file: named in the `UserError` that asking for a row raises where it is not JSON.
    """

    def __init__(self, data: bytes, spans: Mapping[str, tuple[int, int]], cuts: tuple[str, ...], file: Path) -> None:
        self._data = data
        self._spans = spans
        self._cuts = tuple((name, f', "{name}": '.encode()) for name in cuts)
        self._file = file
        self._rows: dict[str, Any] = {}
        self._middles: dict[bytes, dict[str, Any]] = {}
        self._values: dict[bytes, Any] = {}

    def __getitem__(self, name: str) -> Any:
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = self._parsed(name)
        return row

    def __contains__(self, name: object) -> bool:
        return name in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def _parsed(self, name: str) -> Any:
        begin, end = self._spans[name]
        try:
            return self._joined(begin, end)
        except (ValueError, RecursionError):  # it does not consist of the pieces that were expected
            pass
        try:
            return json.loads(self._data[begin:end])
        except (ValueError, RecursionError) as error:
            raise files.damaged_file(self._file, f"does not describe {name}") from error

    def _joined(self, begin: int, end: int) -> dict[str, Any]:
        """The row from its pieces; a `ValueError` where a cut went through a value, as brackets do not fit then."""
        data, first, last = self._data, self._cuts[0][1], self._cuts[-1]
        start = data.index(first, begin, end)
        stop = data.rindex(last[1], start, end)
        middle = data[start:stop]
        if middle not in self._middles:
            self._middles[middle] = self._entries(middle)
        rest = data[stop + len(last[1]) : end].decode()
        return {
            **_object(f"{data[begin:start].decode()}}}"),
            **self._middles[middle],
            **_object(f'{{"{last[0]}": {rest}'),
        }

    def _entries(self, text: bytes) -> dict[str, Any]:
        """The entries with shared values; many differ in one of them only."""
        entries = {}
        begin = len(self._cuts[0][1])
        for (name, _), (_, mark) in pairwise(self._cuts):
            end = text.index(mark, begin) if mark != self._cuts[-1][1] else len(text)
            value = text[begin:end]
            if value not in self._values:
                self._values[value] = json.loads(value)
            entries[name] = self._values[value]
            begin = end + len(mark)
        return entries


_DECODE = json.JSONDecoder().raw_decode


def _object(text: str) -> dict[str, Any]:
    """What `json.loads` makes of an object that nothing surrounds, in half the time."""
    found, end = _DECODE(text)
    if end != len(text):
        raise ValueError("something stands behind the object")
    return found  # type: ignore[no-any-return]


def encode_table(head: Mapping[str, Any], key: str, rows: Mapping[str, Any]) -> bytes:
    """A record whose entry `key` is a table, written one row to a line."""
    text = json.dumps({"schema": files.SCHEMA, **head}, indent=2, ensure_ascii=False)[:-2]
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items())
    body = f"{text}{_opening(key)}{lines}{_CLOSING}"
    return f'{body},\n  "crc": "{files.checksum(body)}"\n}}\n'.encode()


def read_table(path: Path, key: str, cuts: tuple[str, ...]) -> dict[str, Any] | None:
    """The record in `path` with `LazyRows` for its entry `key`, or None when there is no such file.

    Raises:
        UserError: as `files.decode_record` does.
    """
    data = files.read_bytes(path, files.TABLE_BYTES)
    return None if data is None else decode_table(data, key, cuts, path)


def decode_table(data: bytes, key: str, cuts: tuple[str, ...], path: Path) -> dict[str, Any]:
    """The record in this text, which `path` had, with `LazyRows` for its entry `key`.

    Raises:
        UserError: as `files.decode_record` does.
    """
    try:
        return _split(data, key, cuts, path)
    except ValueError:  # not as `encode_table` writes it: another layout, or damaged
        return files.decode_record(data, path)


_CLOSING = "\n  }"


def _opening(key: str) -> str:
    return f",\n  {json.dumps(key)}: {{\n"


def _split(data: bytes, key: str, cuts: tuple[str, ...], path: Path) -> dict[str, Any]:
    if not files.checksum_matches(data):
        raise ValueError("its checksum does not fit")
    opening = _opening(key).encode()
    start = data.index(opening)
    record: dict[str, Any] = json.loads(data[:start] + b"}")
    if record.pop("schema") != files.SCHEMA:
        raise ValueError("another schema")
    begin, close = start + len(opening), data.rindex(f'{_CLOSING},\n  "crc": '.encode())
    spans = {}
    while begin < close:
        end = data.find(b"\n", begin, close)
        end = close if end < 0 else end
        name, row = begin + 5, data.index(b'": {', begin, end) + 3
        last = end - (data[end - 1] == _COMMA)
        written = data[name : row - 3].decode()
        if data[begin:name] != b'    "' or data[last - 1] != _BRACE or "\\" in written:
            raise ValueError("not one row to a line, or a name that is written otherwise")
        spans[written] = row, last
        begin = end + 1
    return {**record, key: LazyRows(data, spans, cuts, path)}


_COMMA, _BRACE = b",}"
