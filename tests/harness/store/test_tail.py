"""Each row of a growing file is read once, whatever writers and strangers do to the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.harness.store import files
from klab.harness.store.tail import Tail

OPENED: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "")


sys.addaudithook(_note)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Names of the files and folders that were opened meanwhile."""
    global OPENED
    OPENED = []
    yield OPENED
    OPENED = None


def line(update: int, **more: Any) -> bytes:
    return files.encode_record({"update": update, **more}) + b"\n"


def updates(tail: Tail) -> list[int]:
    return [row["update"] for row in tail.look()[0]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "cells" / "a").mkdir(parents=True)
    return tmp_path / "cells" / "a" / "metrics.jsonl"


@pytest.fixture
def tail(tmp_path: Path, path: Path) -> Tail:
    return Tail(tmp_path, ("cells", "a", "metrics.jsonl"))


def test_rows_come_once_and_a_torn_line_when_it_is_whole(path: Path, tail: Tail) -> None:
    assert tail.look() == ([], False)
    path.write_bytes(line(1) + line(2) + line(3)[:20])
    assert updates(tail) == [1, 2]
    assert updates(tail) == []
    with path.open("ab") as file:
        file.write(line(3)[20:] + line(4))
    assert updates(tail) == [3, 4]
    assert tail.problem is None


def test_a_torn_line_that_a_resumed_writer_drops_is_never_seen(path: Path, tail: Tail) -> None:
    path.write_bytes(line(1) + b'{"update": 2, "torn')
    assert updates(tail) == [1]
    files.append_lines(path, [{"update": 2}])
    assert updates(tail) == [2]


def test_a_file_that_nobody_wrote_to_is_not_opened(path: Path, tail: Tail, opened: list[str]) -> None:
    path.write_bytes(line(1))
    tail.look()
    opened.clear()
    assert tail.look() == ([], False)
    assert opened == []
    with path.open("ab") as file:
        file.write(line(2))
    opened.clear()
    assert updates(tail) == [2]
    assert "metrics.jsonl" in opened


@pytest.mark.parametrize("rows", [[1], [1, 2], [1, 2, 3, 4]], ids=["shorter", "as long", "longer"])
def test_a_file_that_was_written_anew_is_read_anew(path: Path, tail: Tail, rows: list[int]) -> None:
    path.write_bytes(line(1) + line(2))
    tail.look()
    files.replace(path, b"".join(line(row, again=True) for row in rows))
    found, anew = tail.look()
    assert anew
    assert [row["update"] for row in found] == rows
    path.unlink()
    assert tail.look() == ([], True)
    assert tail.look() == ([], False)


def test_a_file_that_was_written_anew_in_place_is_read_anew(path: Path, tail: Tail) -> None:
    path.write_bytes(line(1) + line(2))
    tail.look()
    path.write_bytes(line(5) + line(6) + line(7))
    found, anew = tail.look()
    assert anew
    assert [row["update"] for row in found] == [5, 6, 7]


def test_what_stands_before_a_damaged_line_is_read_and_nothing_after_it(path: Path, tail: Tail) -> None:
    damaged = line(2, reward=0.5).replace(b"0.5", b"0.6")
    path.write_bytes(line(1) + damaged + line(3))
    assert updates(tail) == [1]
    assert "metrics.jsonl line 2" in str(tail.problem)
    with path.open("ab") as file:
        file.write(line(4))
    assert updates(tail) == []
    files.replace(path, line(1) + line(2))
    assert updates(tail) == [1, 2]
    assert tail.problem is None


def test_a_long_file_comes_in_parts(tmp_path: Path, path: Path) -> None:
    path.write_bytes(b"".join(line(update, text="x" * 1000) for update in range(1, 6001)))
    tail = Tail(tmp_path, ("cells", "a", "metrics.jsonl"))
    found = updates(tail)
    assert tail.behind
    assert 0 < len(found) < 6000
    while tail.behind:
        found += updates(tail)
    assert found == list(range(1, 6001))


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["torn", "whole"])
def test_a_line_without_end_is_not_read_to_its_end(path: Path, tail: Tail, end: bytes) -> None:
    with path.open("wb") as file:
        file.write(line(1))
        file.truncate(2**30)
        file.seek(0, os.SEEK_END)
        file.write(end)
    assert updates(tail) == [1]
    assert updates(tail) == []
    assert "1 MiB" in str(tail.problem)


def test_no_link_is_followed_anywhere_on_the_way(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "metrics.jsonl").write_bytes(line(1))
    run = tmp_path / "run"
    (run / "cells" / "b").mkdir(parents=True)
    (run / "cells" / "a").symlink_to(outside)
    (run / "cells" / "b" / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    (run / "linked").symlink_to(tmp_path)
    for names in (
        ("cells", "a", "metrics.jsonl"),
        ("cells", "b", "metrics.jsonl"),
        ("linked", "outside", "metrics.jsonl"),
    ):
        tail = Tail(run, names)
        assert tail.look() == ([], False)
        assert "link" in str(tail.problem)
    for names in (("..", "outside", "metrics.jsonl"), ("", "metrics.jsonl"), ("cells/../../outside", "metrics.jsonl")):
        assert Tail(run, names).look() == ([], False)


def test_what_is_no_file_does_not_block(path: Path, tail: Tail) -> None:
    os.mkfifo(path)
    assert tail.look() == ([], False)
    assert "ordinary file" in str(tail.problem)
