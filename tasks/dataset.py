"""Datasets on disk or on the hub: their splits as tables, found and read by `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from klab.grid.errors import UserError
from klab.tasks.values import short_float

READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
HELD_OUT_NAMES = ("test", "validation", "valid", "dev")
_EMPTY = re.compile(r'Instruction "(.*)" corresponds to no data')
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Table(Protocol):
    """The rows of one split; memory-mapped, so that a large dataset costs little."""

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def select_columns(self, column_names: list[str]) -> Table: ...


class Rows:
    """A table whose rows are decoded when they are looked at."""

    def __init__(self, table: Table, decode: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._table, self._decode = table, decode
        self.column_names = table.column_names

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._decode(self._table[row])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._decode, self._table)

    def select_columns(self, column_names: list[str]) -> Table:
        return Rows(self._table.select_columns(column_names), self._decode)


def load_tables(path: str, config: str | None = None, key: str = "task.path") -> Mapping[str, Table]:
    """The splits of a dataset; a single file is one split, `train`.

    Args:
        path: a JSONL, JSON, CSV, TSV or Parquet file (also compressed), a folder of such files or of
            `Dataset.save_to_disk`, or a hub id. Relative paths start at the working directory. What was downloaded
            once is read from the cache of `datasets`, also without a network.
        config: the hub dataset's configuration.
        key: names the setting in messages.

    Raises:
        UserError: there is nothing of that name, or it cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_file():
        options = {"sep": "\t"} if _suffix(local) == ".tsv" else {}
        return _read(path, key, _reader(local, key), data_files={"train": str(local)}, **options)
    if local.is_dir():
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return _saved(local, key)
        return _read(path, key, str(local), name=config)
    if local.is_absolute() or path.startswith((".", "~")) or _suffix(local) in READERS or not _HUB_ID.fullmatch(path):
        near = [str(Path(path).parent / each.name) for each in _siblings(local)]
        raise UserError(
            "no such file or folder", key=key, value=path, allowed=near, hint=f"Looked at {local.absolute()}."
        )
    return _read(path, key, path, name=config)


def require_columns(table: Table, columns: Iterable[tuple[str, str]], path: str) -> None:
    """Raises UserError where a table lacks a column.

    Args:
        columns: pairs of a setting and the column it names.
    """
    for setting, column in columns:
        if column not in table.column_names:
            raise UserError(
                "no such column", file=path, key=f"task.{setting}", value=column, allowed=sorted(table.column_names)
            )


def chosen_split(tables: Mapping[str, Table], name: str | None, setting: str, path: str) -> str | None:
    """The split that a setting names; unnamed, `train` or the only one, and for `held_out` a test split or None.

    Raises:
        UserError: the named split does not exist, or none is named and there are several without the usual names.
    """
    if name is not None:
        if name not in tables:
            raise UserError("no such split", file=path, key=f"task.{setting}", value=name, allowed=sorted(tables))
        return name
    if setting == "held_out":
        return next((each for each in HELD_OUT_NAMES if each in tables), None)
    if "train" in tables:
        return "train"
    if len(tables) == 1:
        return next(iter(tables))
    raise UserError("say which split", file=path, key=f"task.{setting}", allowed=sorted(tables))


def _read(path: str, key: str, source: str, **options: Any) -> Mapping[str, Table]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    from klab.tasks.written import Written

    try:
        builder = load_dataset_builder(source, **options)
        builder = Written.instead_of(builder) or builder
        builder.download_and_prepare()
        loaded: Any = builder.as_dataset()
    except (DatasetsError, ValueError, ConnectionError, FileNotFoundError) as error:
        cause = error.__cause__ or error
        empty = _EMPTY.search(str(cause))
        if empty:
            raise UserError("the split is empty", file=path, key=key, value=empty.group(1)) from error
        lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        local = "data_files" in options or Path(source).is_dir()
        hint = None if local else "Without a network, only datasets that were downloaded before can be read."
        raise UserError(f"cannot be read: {lines[0]}", key=key, value=path, hint=hint) from error
    return {name: _rows(table) for name, table in loaded.items()}


def _saved(folder: Path, key: str) -> Mapping[str, Table]:
    from datasets import load_from_disk

    try:
        loaded: Any = load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # an empty dataset is an IndexError
        raise UserError(f"cannot be read: {error}", key=key, value=str(folder)) from error
    tables = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {name: _rows(table) for name, table in tables.items()}


def _rows(table: Any) -> Table:
    """The table with values that know their text: those of JSON and CSV files, and floats of less than 64 bits."""
    from klab.tasks.written import Written, decoded

    if table.info.builder_name == Written.NAME:
        return Rows(table, decoded)
    short = [
        name for name, feature in table.features.items() if getattr(feature, "dtype", "") in ("float16", "float32")
    ]
    if not short:
        return cast("Table", table)
    dtypes = {name: table.features[name].dtype for name in short}
    return Rows(table, lambda row: {n: short_float(v, dtypes[n]) if n in dtypes else v for n, v in row.items()})


def _reader(file: Path, key: str) -> str:
    suffix = _suffix(file)
    if suffix not in READERS:
        raise UserError("a file of unknown kind", key=key, value=str(file), allowed=READERS)
    if file.stat().st_size == 0:
        raise UserError("the file is empty", key=key, value=str(file))
    return READERS[suffix]


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _siblings(file: Path) -> list[Path]:
    if not file.parent.is_dir():
        return []
    return sorted(each for each in file.parent.iterdir() if _suffix(each) in READERS)
