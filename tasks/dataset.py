"""Datasets on disk or on the hub: their splits as tables, found and read by `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from klab.grid.errors import UserError

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
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


def load_tables(path: str, config: str | None = None, key: str = "task.path") -> Mapping[str, Table]:
    """The splits of a dataset; a single file is one split, `train`.

    Args:
        path: a JSONL, JSON, CSV or Parquet file (also compressed), a folder of such files or of
            `Dataset.save_to_disk`, or a hub id. Relative paths start at the working directory. What was downloaded
            once is read from the cache of `datasets`, also without a network.
        config: the hub dataset's configuration.
        key: names the setting in messages.

    Raises:
        UserError: there is nothing of that name, or it cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _read(path, key, _reader(local, key), data_files={"train": str(local)})
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
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded: Mapping[str, Table] = load_dataset(source, **options)
    except (DatasetsError, ValueError, ConnectionError, FileNotFoundError) as error:
        cause = error.__cause__ or error
        empty = _EMPTY.search(str(cause))
        if empty:
            raise UserError("the split is empty", file=path, key=key, value=empty.group(1)) from error
        lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        local = "data_files" in options or Path(source).is_dir()
        hint = None if local else "Without a network, only datasets that were downloaded before can be read."
        raise UserError(f"cannot be read: {lines[0]}", key=key, value=path, hint=hint) from error
    return loaded


def _saved(folder: Path, key: str) -> Mapping[str, Table]:
    from datasets import load_from_disk

    try:
        loaded: Any = load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # an empty dataset is an IndexError
        raise UserError(f"cannot be read: {error}", key=key, value=str(folder)) from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


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
