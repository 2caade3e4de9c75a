"""What stands in a file is what a prompt and an answer have: no guessed types in JSON and CSV, types elsewhere."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.grid.errors import UserError
from klab.tasks.dataset import load_tables
from klab.tasks.file import File
from klab.tasks.values import is_text, parsed, text_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., list[str | None]]:
    """Writes a file and returns column `a` as text."""

    def read(name: str, content: str | bytes) -> list[str | None]:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [text_of(row["a"]) for row in load_tables(str(file))["train"]]

    return read


def lines(*values: str) -> str:
    return "".join(f'{{"q": "{i}?", "a": {value}}}\n' for i, value in enumerate(values))


@pytest.mark.parametrize(
    "values",
    [
        ['"2024-01-02"', '"2024-01-03"'],
        ['"2024-01-04T00:00:00Z"', '"2024-01-04 12:30:00"'],
        ['"12:30"', '"12:30:00"'],
        ['"001"', '"NA"', '"None"', '"null"', '"true"', '""'],
        ['"a\\u2028b"', '"\\ud83d\\ude00"', '"ö\\n\\t\\""', '"  x "'],
    ],
)
def test_strings_of_json_lines_are_what_was_written(answers: Any, values: list[str]) -> None:
    assert answers("strings.jsonl", lines(*values)) == [json.loads(value) for value in values]


@pytest.mark.parametrize(
    "values",
    [
        ["1", "0.5", "2"],
        ["1", "null", "2"],
        ["1.0", "1.50", "1e3", "1E-7", "-0", "0.1000000000000000055"],
        ["9007199254740993", "123456789012345678901234567890", "1" * 5000],
        ["true", "false"],
        ["1", '"one"', "[1, 2.50]"],
        ["[1, 0.5, null, [true]]", '{"tests": ["f(1) == 2"], "id": 1.0}', "{}"],
    ],
)
def test_numbers_of_json_lines_are_what_was_written(answers: Any, values: list[str]) -> None:
    expected = [None if value == "null" else json.loads(value) if value.startswith('"') else value for value in values]
    assert answers("numbers.jsonl", lines(*values)) == expected


def test_cells_of_csv_are_what_was_written(answers: Any) -> None:
    cells = [
        "001",
        "NA",
        "None",
        "nan",
        "1.0",
        "1e3",
        "true",
        "2024-01-02",
        " x ",
        '"a\nb"',
        '"a,""b"""',
        "9" * 30,
        "-",
    ]
    expected = ["a\nb" if each == '"a\nb"' else 'a,"b"' if each == '"a,""b"""' else each for each in cells]
    rows = "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))
    assert answers("cells.csv", "q,a\n" + rows) == expected
    assert answers("windows.csv", ("\ufeffq,a\n" + rows).replace("\n", "\r\n")) == [
        each.replace("\n", "\r\n") for each in expected
    ]
    assert answers("cells.csv.gz", gzip.compress(("q,a\n" + rows).encode())) == expected
    assert answers("cells.tsv", "q\ta\n1\t1,5\n2\t\n") == ["1,5", None]


def test_json_files_hold_lines_or_one_list(answers: Any) -> None:
    rows = [{"q": "1?", "a": 1}, {"q": "2?"}, {"q": "3?", "a": 0.5, "b": "2024-01-02"}]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n\n".join(map(json.dumps, rows))):
        assert answers("rows.json", text) == ["1", None, "0.5"]
        assert answers("bom.json", "\ufeff" + text) == ["1", None, "0.5"]
    assert answers("one.json", json.dumps(rows[0], indent=1)) == ["1"]


def test_files_in_a_folder_and_many_rows(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(*(str(i) for i in range(2500))))
    (folder / "test.jsonl").write_text(lines('"2024-01-02"', "0.5", "7"))
    tables = load_tables(str(folder))
    assert [text_of(row["a"]) for row in tables["test"]] == ["2024-01-02", "0.5", "7"]
    assert [row["a"] for row in tables["train"]] == list(range(2500))  # whoever counts with them has numbers
    (folder / "test.jsonl").write_text(lines('"2024-01-03"'))
    assert [text_of(row["a"]) for row in load_tables(str(folder))["test"]] == ["2024-01-03"]


def test_types_of_parquet_are_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    day = datetime.datetime(2024, 1, 2)
    columns = {
        "float": (pa.array([2.0, 0.5, None, 1e300]), ["2", "0.5", None, repr(1e300)]),
        "short": (pa.array([2.0, 0.1, None, 1e-7], pa.float32()), ["2", "0.1", None, "1e-07"]),
        "integer": (pa.array([1, 2, None, 2**62]), ["1", "2", None, str(2**62)]),
        "string": (pa.array(["001", "2024-01-02", None, ""]), ["001", "2024-01-02", None, ""]),
        "date": (pa.array([day.date()] * 4), ["2024-01-02"] * 4),
        "time": (pa.array([day] * 4), ["2024-01-02 00:00:00"] * 4),
        "decimal": (pa.array([Decimal("12.50"), Decimal("3.00"), None, Decimal("0.05")]), ["12.50", "3", None, "0.05"]),
        "list": (pa.array([[1.0, 0.5], [], None, [None]]), ["[1, 0.5]", "[]", None, "[null]"]),
        "bool": (pa.array([True, False, None, True]), ["true", "false", None, "true"]),
    }
    pq.write_table(pa.table({name: array for name, (array, _) in columns.items()}), tmp_path / "typed.parquet")
    rows = list(load_tables(str(tmp_path / "typed.parquet"))["train"])
    assert {name: [text_of(row[name]) for row in rows] for name in columns} == {
        name: texts for name, (_, texts) in columns.items()
    }


def test_an_answer_that_is_missing_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"q": ["1", "2", "3"], "a": pa.array([None] * 3, pa.float64())}), tmp_path / "nan.parquet")
    (tmp_path / "empty.csv").write_text("q,a\n1,\n2,\n3,\n")
    for name in ("nan.parquet", "empty.csv"):
        with pytest.raises(UserError, match=rf"{name}: task\.answer: row \d has none"):
            File(str(tmp_path / name), "q", "a").split("train")[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "q,a\n1,2\n3,4,5\n", "line 3: 3 cells, but 2 columns"),
        ("rows.csv", "q,q\n1,2\n", "line 1: two columns are called 'q'"),
        ("rows.csv", "q,a\n", "there are no rows"),
        ("rows.jsonl", '{"q": 1}\n{"q": 1\n', "line 2: not JSON"),
        ("rows.jsonl", '{"q": 1}\n[1]\n', "line 2: a row is an object with a name for every value, not 1"),
        ("rows.jsonl", b'{"q": "\xff"}\n', "can't decode byte 0xff"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tables(str(tmp_path / name))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_a_value_of_json_has_its_own_text(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    found = text_of(parsed(text))
    assert found == (None if value is None else value if isinstance(value, str) else text)
    assert parsed(text) == value
    assert is_text(parsed(text)) is isinstance(value, (str, int, float))
