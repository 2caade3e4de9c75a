"""Files are replaced whole or appended to line by line; damage is noticed, torn ends are dropped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.grid import UserError
from klab.harness.store import files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.text().filter(lambda key: key not in ("schema", "crc"))
RECORDS = st.dictionaries(KEYS, JSON, max_size=5)


def same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals itself and 1 differs from 1.0."""
    return repr(left) == repr(right)


@given(RECORDS, st.sampled_from([None, 2]))
def test_a_sealed_record_comes_back_unchanged(record: dict[str, Any], indent: int | None) -> None:
    try:
        text = files.encode_record(record, indent=indent)
    except UnicodeEncodeError:  # lone surrogates are not text
        return
    assert same(files.decode_record(text, "x"), record)


@given(RECORDS.filter(bool), st.data())
def test_one_changed_byte_is_never_believed(record: dict[str, Any], data: st.DataObject) -> None:
    try:
        text = bytearray(files.encode_record(record))
    except UnicodeEncodeError:
        return
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    try:
        found = files.decode_record(bytes(text), "x")
    except UserError:
        return
    assert same(found, record)  # only white space and the like may change unnoticed


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_mistake(data: bytes) -> None:
    with pytest.raises(UserError):
        files.decode_record(data, "x")


@pytest.mark.parametrize(("schema", "word"), [(0, "older"), (2, "newer")])
def test_another_schema_is_refused_by_name(schema: int, word: str) -> None:
    with pytest.raises(UserError, match=rf"some\.json.*{word} klab \(schema {schema}"):
        files.decode_record(json.dumps({"schema": schema}).encode(), "some.json")


@settings(deadline=None, max_examples=40)
@given(st.lists(RECORDS, min_size=1, max_size=4), RECORDS, st.data())
def test_a_torn_last_line_is_dropped_and_written_over(
    records: list[dict[str, Any]], late: dict[str, Any], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        try:
            files.append_lines(path, [*records, late])
        except UnicodeEncodeError:
            return
        whole = path.read_bytes()
        first = whole[: whole[:-1].rfind(b"\n") + 1]
        cut = data.draw(st.integers(len(first), len(whole) - 1))
        path.write_bytes(whole[:cut])
        assert same(files.read_lines(path), records)
        assert same(files.last_line(path), records[-1])
        files.append_lines(path, [late])
        assert path.read_bytes() == whole


@settings(deadline=None, max_examples=30)
@given(st.lists(RECORDS, min_size=1, max_size=4), st.data())
def test_lines_read_together_are_those_read_one_by_one(records: list[dict[str, Any]], data: st.DataObject) -> None:
    """Also where a line is written with spaces, and where one is wrong: then it is the one that is named."""
    try:
        lines = [files.encode_record(record) for record in records]
    except UnicodeEncodeError:
        return
    place = data.draw(st.integers(0, len(lines) - 1))
    body = json.dumps({"schema": 1, **records[place]}, ensure_ascii=False)[:-1]
    spaced = f'{body}, "crc": "{files.checksum(body)}" }}'.encode()
    damaged = lines[place][:-12] + b"x" + lines[place][-11:]
    doubled = b"%s,%s" % (lines[place], lines[place])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for good, line in ((1, lines[place]), (1, spaced), (0, b'{"schema":2}'), (0, damaged), (0, doubled)):
            path.write_bytes(b"".join(each + b"\n" for each in [*lines[:place], line, *lines[place + 1 :]]))
            if good:
                assert same(files.read_lines(path), records)
                continue
            with pytest.raises(UserError, match=rf"rows\.jsonl line {place + 1}:"):
                files.read_lines(path)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_line_file_are_rows_or_a_mistake(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(data)
        for read in (files.read_lines, files.last_line):
            try:
                found = str(read(path))
            except UserError as error:
                found = str(error)
            assert found in ("[]", "None") or "rows.jsonl" in found


def test_a_long_last_line_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"number": 1}, {"text": "x" * 100_000}]
    files.append_lines(path, rows)
    assert files.last_line(path) == rows[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert files.last_line(path) == rows[0]


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the write stops in the middle with an OSError."""
    program = """
        import resource, sys
        from pathlib import Path
        from klab.harness.store import files
        folder = Path(sys.argv[1])
        files.append_lines(folder / "rows.jsonl", [{"number": 1}])
        files.replace(folder / "whole.json", files.encode_record({"number": 1}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for work in (
            lambda: files.append_lines(folder / "rows.jsonl", [{"number": 2}, {"text": "x" * 5000}]),
            lambda: files.replace(folder / "whole.json", files.encode_record({"text": "x" * 5000})),
        ):
            try:
                work()
            except OSError as error:
                print(error.strerror)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("File too large") == 2
    assert files.read_lines(tmp_path / "rows.jsonl") == [{"number": 1}]
    assert files.read_record(tmp_path / "whole.json") == {"number": 1}
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "whole.json"]


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path) -> None:
    """SIGKILL at any moment: a replaced file holds a whole record, and only the last appended line may be torn."""
    program = """
        import sys
        from pathlib import Path
        from klab.harness.store import files
        folder, number = Path(sys.argv[1]), 0
        print("ready", flush=True)
        while True:
            number += 1
            files.replace(folder / "whole.json", files.encode_record({"number": number, "fill": "x" * 20000}),
                          durable=False)
            files.append_lines(folder / "rows.jsonl", [{"number": number, "fill": "x" * 20000}])
    """
    for round_ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.03 + 0.017 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        record = files.read_record(tmp_path / "whole.json")
        assert record is not None
        assert record["number"] >= 1
        rows = [row["number"] for row in files.read_lines(tmp_path / "rows.jsonl")]
        starts = [place for place, number in enumerate(rows) if number == 1]
        for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            assert rows[begin:end] == list(range(1, end - begin + 1))
        files.remove_temporaries(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "whole.json"]
