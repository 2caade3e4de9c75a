"""Columns of numbers and texts in a small Parquet file, which may come from a stranger: sizes are bounded before
anything is unpacked, and nothing but plain numbers and texts is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Numbers = np.ndarray[Any, np.dtype[Any]]
Columns = dict[str, Numbers | list[str | None]]
"""By name, a column: numbers as an array, texts as a list."""

FILE_BYTES = 2**26
_UNPACKED_BYTES = 2**30
_TEXT_BYTES = 2**28
_MOST_COLUMNS = 500
_ROWS = 2**16
_LEVEL = 19
_FEW = 8
"""A column with fewer than one distinct value in so many rows is stored as references to its values."""


def encoded(columns: Mapping[str, Numbers | Sequence[str | None]]) -> bytes:
    """The file. The same columns give the same bytes, whenever they are written.

    Args:
        columns: arrays of numbers, and sequences of texts, all of one length.
    """
    arrays = {
        name: pa.array(column) if isinstance(column, np.ndarray) else pa.array(column, pa.string())
        for name, column in columns.items()
    }
    repeated = [name for name, column in columns.items() if _repeats(column)]
    split = [name for name, array in arrays.items() if pa.types.is_floating(array.type) and name not in repeated]
    stream = BytesIO()
    pq.write_table(
        pa.table(arrays),
        stream,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=repeated,
        use_byte_stream_split=split,
        store_schema=False,
        row_group_size=2**20,
    )
    return stream.getvalue()


def decoded(data: bytes, most_rows: int) -> Columns:
    """The columns of a file.

    Args:
        most_rows: more rows than these are refused before they are read.

    Raises:
        ValueError: it is no such file, has other columns than numbers and texts, or is larger than allowed.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        _check_sizes(file.metadata, most_rows)
        kinds = {field.name: field.type for field in file.schema_arrow}
        if len(kinds) != len(file.schema_arrow) or not all(map(_is_plain, kinds.values())):
            raise ValueError("has other columns than numbers and texts")
        texts = [name for name, kind in kinds.items() if pa.types.is_string(kind)]
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
        return _read(file, texts, most_rows)
    except (pa.ArrowException, OSError, OverflowError) as error:  # what Arrow raises for damaged files
        raise ValueError("is not a sound Parquet file") from error


def _read(file: pq.ParquetFile, texts: Sequence[str], most_rows: int) -> Columns:
    parts: dict[str, list[Any]] = {field.name: [] for field in file.schema_arrow}
    rows = characters = 0
    for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
        rows += batch.num_rows
        if rows > most_rows:
            raise ValueError(f"has more than {most_rows} rows")
        for name in parts:
            column = batch.column(name)
            if name in texts:
                characters += int(pc.sum(pc.take(pc.binary_length(column.dictionary), column.indices)).as_py() or 0)
                if characters > _TEXT_BYTES:
                    raise ValueError(f"has more than {_TEXT_BYTES / 2**20:.0f} MiB of text")
                parts[name] += column.to_pylist()
            elif column.null_count:
                raise ValueError(f"has gaps in the column {name[:80]!r}")
            else:
                parts[name].append(column.to_numpy(zero_copy_only=False))
    empty = {
        field.name: np.empty(0, field.type.to_pandas_dtype()) for field in file.schema_arrow if field.name not in texts
    }
    return {name: found if name in texts else np.concatenate([empty[name], *found]) for name, found in parts.items()}


def _check_sizes(metadata: Any, most_rows: int) -> None:
    if metadata.num_rows > most_rows:
        raise ValueError(f"has {metadata.num_rows} rows, of {most_rows} at most")
    if metadata.num_columns > _MOST_COLUMNS:
        raise ValueError(f"has {metadata.num_columns} columns, of {_MOST_COLUMNS} at most")
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    unpacked = sum(
        group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns)
    )
    if unpacked > _UNPACKED_BYTES or metadata.num_rows * metadata.num_columns * 8 > _UNPACKED_BYTES:
        raise ValueError(f"unpacks to more than {_UNPACKED_BYTES / 2**20:.0f} MiB")


def _is_plain(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_floating(kind) or pa.types.is_signed_integer(kind) or kind == pa.string() or kind == pa.bool_()
    )


def _repeats(column: Numbers | Sequence[str | None]) -> bool:
    if not isinstance(column, np.ndarray):
        return True
    return len(np.unique(column)) * _FEW < len(column)
