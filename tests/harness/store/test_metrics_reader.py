"""Numbers that are read together are those that are read row by row; what is not plainly numbers is left to that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from klab.harness.store import Run, files
from klab.harness.store.metrics_reader import read_metric_columns

NUMBERS = st.floats() | st.integers(-(2**70), 2**70) | st.booleans()
ODD = st.none() | st.text(max_size=3) | st.sampled_from(["1", "true", "null", "nan", "a:b", "a,b"]) | st.just([1, 2])
LAYOUTS = st.sampled_from([("loss",), ("loss", "k1"), ("k1", "loss"), ("a:b",), ('a"b',), ("a,b", "crc1")])


@st.composite
def line_files(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The rows of one file: mostly alike, now and then with something else in them."""
    names = draw(LAYOUTS)
    rows = []
    for update in range(draw(st.integers(1, 4))):
        row: dict[str, Any] = {"update": update, **{name: draw(NUMBERS) for name in names}}
        if draw(st.integers(0, 9)) == 0:
            row[draw(st.sampled_from([*names, "update", "more"]))] = draw(ODD | NUMBERS)
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=60)
@example([[{"update": 0, "loss": 0.0, "more": 0.0}, {"update": 1, "loss": 0.0}]])
@given(st.lists(line_files(), min_size=1, max_size=4))
def test_what_is_read_at_once_is_what_the_rows_say(texts: list[list[dict[str, Any]]]) -> None:
    with TemporaryDirectory() as folder:
        paths = {str(place): Path(folder) / f"{place}.jsonl" for place in range(len(texts))}
        for path, rows in zip(paths.values(), texts, strict=True):
            files.append_lines(path, rows)
        for key, numbers in read_metric_columns(paths).items():
            rows = files.read_lines(paths[key])
            assert numbers.updates.tolist() == [row["update"] for row in rows]
            assert all(type(row["update"]) is int for row in rows)
            assert set(numbers.names) == set(rows[0]) - {"update"}
            for name, column in zip(numbers.names, numbers.values, strict=True):
                told = [math.nan if row.get(name) is None else float(row[name]) for row in rows]
                np.testing.assert_array_equal(column, told)
                assert np.signbit(column).tolist() == np.signbit(told).tolist() or np.isnan(told).any()


def test_numbers_are_found_beside_what_is_none(tmp_path: Path) -> None:
    good = [{"update": number, "loss": number / 3, "bad": number == 2} for number in range(5)]
    contents: dict[str, list[dict[str, Any]]] = {
        "good": good,
        "again": good[1:4],
        "wider": [{**row, "beta": 1e-300} for row in good],
        "words": [{**row, "name": "x"} for row in good],
        "backwards": good[::-1],
        "fractions": [{**row, "update": row["update"] + 0.5} for row in good],
        "nothing": [],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in contents}
    for name, rows in contents.items():
        files.append_lines(paths[name], rows)
    paths["absent"], paths["folder"], paths["damaged"] = (tmp_path / name for name in ("absent", "folder", "damaged"))
    paths["folder"].mkdir()
    paths["damaged"].write_bytes(paths["good"].read_bytes().replace(b"0.333", b"0.334"))
    with paths["again"].open("ab") as torn:
        torn.write(b'{"schema":1,"update":9,')
    found = read_metric_columns(paths)
    assert {"good", "again", "wider"} <= set(found)
    assert not {"words", "backwards", "fractions", "nothing", "absent", "folder", "damaged"} & set(found)
    assert found["good"].values.tolist() == [[row["loss"] for row in good], [float(row["bad"]) for row in good]]
    assert (len(found["again"]), found["wider"].names) == (3, ("loss", "bad", "beta"))


def test_a_line_of_another_schema_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    body = json.dumps({"schema": 2, "update": 1, "loss": 0.5}, separators=(",", ":"))[:-1]
    path.write_text(f'{body},"crc":"{files.checksum(body)}"}}\n')
    assert read_metric_columns({"x": path}) == {}


def test_rows_written_after_the_numbers_were_read_are_not_missed(run: Run) -> None:
    folder = run.cell(run.cells[0])
    rows = [{"update": update, "loss": 0.5} for update in range(1, 9)]
    folder.append_metrics(rows[:5])
    numbers = read_metric_columns({"x": folder.path / "metrics.jsonl"})["x"]
    assert folder.read_measurements(numbers) == (None, numbers, [])
    folder.append_metrics(rows[5:])
    folder.write_result({"state": "finished", "updates": 8})
    assert folder.read_measurements(numbers) == ({"state": "finished", "updates": 8}, rows, [])


def test_rows_that_are_gone_are_missed(run: Run) -> None:
    folder = run.cell(run.cells[0])
    folder.append_metrics([{"update": update, "loss": 0.5} for update in range(1, 9)])
    folder.write_result({"state": "finished", "updates": 8})
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    for numbers in (None, read_metric_columns({"x": path})["x"]):
        with pytest.raises(ValueError, match=r"metrics\.jsonl.*7 rows of the 8"):
            folder.read_measurements(numbers)
