"""Columns come back with the same bits, and the same columns are the same file."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from klab.harness.store.column_table import decoded, encoded
from klab.harness.store.packed import packed, unpacked

ROWS = st.shared(st.integers(0, 40), key="rows")
KINDS = [np.float64, np.float32, np.int64, np.int32]
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)


@given(
    numbers=st.lists(
        ROWS.flatmap(lambda n: st.sampled_from(KINDS).flatmap(lambda kind: arrays.arrays(kind, n))), max_size=3
    ),
    texts=ROWS.flatmap(lambda n: st.lists(st.none() | TEXT, min_size=n, max_size=n)),
)
def test_columns_come_back_with_the_same_bits(
    numbers: list[np.ndarray[tuple[int], np.dtype[np.float64]]], texts: list[str | None]
) -> None:
    columns = {"text": texts, **{f"c{place}": column for place, column in enumerate(numbers)}}
    data = encoded(columns)
    assert encoded(columns) == data
    found = decoded(data, len(texts))
    assert list(found) == list(columns)
    assert found["text"] == texts
    for name, column in list(columns.items())[1:]:
        assert found[name].dtype == column.dtype  # type: ignore[union-attr]
        assert np.asarray(found[name]).tobytes() == np.asarray(column).tobytes()


def test_many_rows_are_refused_before_they_are_read() -> None:
    data = encoded({"a": np.zeros(101)})
    assert len(decoded(data, 101)["a"]) == 101
    with pytest.raises(ValueError, match="has 101 rows, of 100 at most"):
        decoded(data, 100)


def test_much_text_is_refused_although_its_file_is_small() -> None:
    text = ["x" * 2**20] * 300
    data = encoded({"a": text})
    assert len(data) < 2**12
    with pytest.raises(ValueError, match="more than 256 MiB of text"):
        decoded(data, 300)


@given(st.binary(max_size=300))
def test_packed_texts_come_back_and_are_bounded(text: bytes) -> None:
    data = packed(text)
    assert gzip.decompress(data) == text
    assert unpacked(data, len(text)) == text
    if text:
        with pytest.raises(ValueError, match="unpacks to more"):
            unpacked(data, len(text) - 1)
    for broken in (data[:-1], data + b"x", b"x" + data):
        with pytest.raises(ValueError, match="damaged"):
            unpacked(broken, 1000)
