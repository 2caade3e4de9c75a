"""JSON and CSV files as they were written, by a builder for `datasets`.

The builders of `datasets` guess types: a string that looks like a date becomes a timestamp, 1 beside 0.5 becomes 1.0,
`001` becomes 1 and `NA` becomes null. This one keeps every value as the JSON text of what stands in the file;
`datasets` does the rest (downloads, compressed files, splits, cache, memory mapping).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json

from klab.tasks.values import json_text, parsed

ROWS = 1000
"""Rows of a table that is written at once."""

VERSION = "1"
"""Part of the cache's key; changes whenever files are read differently."""


@dataclass
class WrittenConfig(datasets.BuilderConfig):  # type: ignore[misc]
    """How files are read: what the dataset's card may say of its JSON or CSV files."""

    format: str = "json"
    sep: str = ","
    names: list[str] | None = None
    field: str | None = None
    encoding: str | None = None


class Written(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Every column is a string: the JSON text of the value, null where there is none."""

    BUILDER_CONFIG_CLASS = WrittenConfig
    NAME = __name__.rpartition(".")[2]
    """What `datasets` calls it, also in its cache."""

    @classmethod
    def instead_of(cls, builder: Any) -> Written | None:
        """The builder for the files of another one; None where these are neither JSON nor CSV."""
        files = builder.config.data_files
        if not isinstance(builder, (Json, Csv)) or not files:
            return None
        names = {field.name for field in fields(WrittenConfig)} - {
            field.name for field in fields(datasets.BuilderConfig)
        }
        settings = {name: getattr(builder.config, name, None) for name in names}
        settings["format"] = "csv" if isinstance(builder, Csv) else "json"
        settings["sep"] = settings["sep"] or ","
        return cls(
            dataset_name=builder.dataset_name,
            repo_id=builder.repo_id,
            config_name=builder.config.name,
            config_id=builder.config_id,
            hash=f"{builder.hash}-written-{VERSION}",
            base_path=builder.base_path,
            token=builder.token,
            storage_options=builder.storage_options,
            data_files=files,
            **settings,
        )

    def _info(self) -> Any:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        found = dl_manager.extract(dl_manager.download(self.config.data_files))
        listed = {
            split: [Path(file) for each in paths for file in dl_manager.iter_files(each)]
            for split, paths in found.items()
        }
        columns: dict[str, None] = {}
        for files in listed.values():
            for file in files:
                for row in self._rows(file):
                    columns.update(dict.fromkeys(row))
        if not columns:
            raise ValueError("there are no rows")
        self.info.features = datasets.Features({column: datasets.Value("string") for column in columns})
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": files}) for split, files in listed.items()]

    def _generate_shards(self, files: list[Path]) -> Iterator[str]:
        yield from map(str, files)

    def _generate_tables(self, files: list[Path]) -> Iterator[tuple[Any, Any]]:
        schema = self.info.features.arrow_schema
        for place, file in enumerate(files):
            for number, rows in enumerate(_batches(self._rows(file))):
                texts = {
                    name: [None if row.get(name) is None else json_text(row[name]) for row in rows]
                    for name in schema.names
                }
                yield Key(place, number), pa.table(texts, schema=schema)

    def _rows(self, file: Path) -> Iterator[Mapping[str, Any]]:
        encoding = self.config.encoding or "utf-8"
        with open(
            file, encoding="utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding, newline=""
        ) as opened:
            try:
                yield from (
                    _csv_rows(opened, self.config.sep, self.config.names)
                    if self.config.format == "csv"
                    else _json_rows(opened, self.config.field)
                )
            except csv.Error as error:
                raise ValueError(str(error)) from error


def decoded(row: Mapping[str, str | None]) -> dict[str, Any]:
    """The values of a row that `Written` stored."""
    return {name: None if text is None else parsed(text) for name, text in row.items()}


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _json_rows(lines: Iterable[str], field: str | None) -> Iterator[Mapping[str, Any]]:
    """Objects, one a line or in a list; a text that is one object is one row."""
    numbered = enumerate(lines, start=1)
    for number, line in numbered:
        if not line.strip():
            continue
        try:
            if field is not None:
                raise ValueError
            value = parsed(line)
        except ValueError as error:
            whole = line + "".join(rest for _, rest in numbered)
            try:
                value = parsed(whole)
            except ValueError:
                raise ValueError(f"line {number}: not JSON: {error}") from None
            value = value[field] if field is not None else value
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"line {number}: a row is an object with a name for every value, not {json.dumps(row)[:60]}"
                )
            yield row


def _csv_rows(lines: Iterable[str], sep: str, names: list[str] | None) -> Iterator[Mapping[str, Any]]:
    """A row's cells by the names in the first row; an empty cell is none."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=sep, strict=True)
    header = names
    for cells in reader:
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise ValueError(f"line {reader.line_num}: two columns are called {twice!r}")
            continue
        if len(cells) > len(header):
            raise ValueError(f"line {reader.line_num}: {len(cells)} cells, but {len(header)} columns")
        yield {name: cell or None for name, cell in zip(header, cells, strict=False)}
