"""A table whose rows are parsed when they are asked for tells what the whole record tells."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.grid import UserError
from klab.harness.store import files
from klab.harness.store.record_table import LazyRows, encode_table, read_table

CUTS = ("task", "policy", "seed")
WORDS = st.sampled_from(["id", "task", "policy", "seed", "other", ', "task": ', '": {', "}", '{"task": 1'])
VALUES = st.recursive(
    st.none() | st.integers(0, 3) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
ROW = st.fixed_dictionaries({"id": VALUES, "task": VALUES, "policy": VALUES, "seed": VALUES, "group": VALUES})
NAMES = st.text(max_size=6).filter(lambda name: name.isprintable())


def same(left: Any, right: Any) -> bool:
    """Equality of values, their types and the order of their keys."""
    return json.dumps(left) == json.dumps(right)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, ROW | st.dictionaries(WORDS, VALUES, max_size=5), max_size=4))
def test_every_row_is_that_of_the_whole_record(rows: dict[str, Any]) -> None:
    head = {"name": "x", "deep": {"rows": {"a": {}}}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        files.replace(path, encode_table(head, "rows", rows), durable=False)
        found = read_table(path, "rows", CUTS)
        whole = files.read_record(path)
    assert found is not None
    assert whole is not None
    assert same({**found, "rows": dict(found["rows"])}, whole)
    assert same(whole["rows"], rows)
    assert list(found) == list(whole)


def test_rows_wait_until_they_are_asked_for_and_share_what_is_equal(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    rows: dict[str, Any] = {
        name: {"id": name, "task": {"digits": 2}, "policy": {"name": name}, "seed": number}
        for number, name in enumerate("abc")
    }
    text = encode_table({}, "rows", rows)
    body = text[: text.rindex(b',\n  "crc"')].replace(b'{"id": "b"', b'{"id" ; "b"')
    path.write_bytes(body + f',\n  "crc": "{files.checksum(body.decode())}"\n}}\n'.encode())
    found = read_table(path, "rows", CUTS)
    assert found is not None
    table = found["rows"]
    assert isinstance(table, LazyRows)
    assert (list(table), len(table), "b" in table, "d" in table) == (["a", "b", "c"], 3, True, False)
    assert (table["a"], table["c"]) == (rows["a"], rows["c"])
    assert table["a"]["task"] is table["c"]["task"]
    with pytest.raises(UserError, match=r"table\.json.* b"):
        table["b"]


@pytest.mark.parametrize("indent", [None, 2])
def test_other_layouts_of_the_same_record_are_read_as_well(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "table.json"
    rows = {"a": {"task": {"digits": 2}, "policy": {}, "seed": 1}}
    files.replace(path, files.encode_record({"rows": rows}, indent=indent))
    assert read_table(path, "rows", CUTS) == {"rows": rows}
    assert read_table(tmp_path / "nothing.json", "rows", CUTS) is None


def test_a_table_of_a_newer_klab_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(files, "SCHEMA", 2)
    files.replace(path, encode_table({}, "rows", {}))
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer klab"):
        read_table(path, "rows", CUTS)
