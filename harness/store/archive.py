"""An archive: the results of a run in one small folder, without weights, completions and logs.

`archive.json` is a sealed record: what was spent and when, what the archive leaves out, and the SHA-256 of every other
file. `manifest.json.gz` is the run's manifest; `cells.parquet`, `evaluations.parquet` and `metrics.parquet` are its
numbers, `gradients.json.gz` what the exact lab measured, `tuning.json` what configurations chose, and `grid.yaml` the
grid file for people. An archive may come from a stranger: nothing in it is run, and sizes are bounded.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.harness.store import files, packed
from klab.harness.store.manifest import decode_manifest
from klab.harness.store.run import Run
from klab.harness.store.usage import Usage

if TYPE_CHECKING:
    from klab.harness.store.column_table import Columns, Numbers

RECORD = "archive.json"
MANIFEST = "manifest.json.gz"
GRADIENTS = "gradients.json.gz"
TUNING = "tuning.json"
GRID = "grid.yaml"
TABLES = ("cells", "evaluations", "metrics")
_FILES = (GRID, MANIFEST, GRADIENTS, TUNING, *(f"{name}.parquet" for name in TABLES))
_PACKED_BYTES = 2**25
_MOST_ROWS = 2**24
_REPORT = "report"


class Archive(Run):
    """An archive, opened as the run whose results it has. It has no folders of cells, and nothing changes in it.

    Attributes:
        record: `archive.json`.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.record = record
        file = path / MANIFEST
        data = self._unpacked(path, MANIFEST, files.TABLE_BYTES)
        if data is None:
            raise damaged_archive(file, "is missing")
        super().__init__(path, decode_manifest(data, file), read_only=True)

    @classmethod
    def open(cls, path: str | Path, read_only: bool = True) -> Archive:
        """The archive in the folder `path`.

        Raises:
            UserError: it is none, is of another schema, or one of its files is damaged, missing or too large.
        """
        path = Path(path).resolve()
        record = files.read_record(path / RECORD)
        if record is None:
            raise UserError(f"is not an archive (it has no {RECORD})", file=path, hint="`klab archive RUN` makes one.")
        _check(record, path / RECORD)
        return cls(path, record)

    @property
    def usage(self) -> Usage:
        """What the run had used."""
        return Usage(**{name: float(value) for name, value in self.record["usage"].items()})

    @property
    def span(self) -> tuple[float, float] | None:
        """When the first attempt began and the last one ended, in seconds since 1970; None where nothing was tried."""
        began, ended = self.record["began"], self.record["ended"]
        return None if began is None else (float(began), float(ended))

    @property
    def left_out(self) -> Mapping[str, Any]:
        """What the run had besides: by `metrics` the names of columns, by `completions` how many were stored."""
        return self.record["left_out"]  # type: ignore[no-any-return]

    def table(self, name: str) -> Columns:
        """One of `TABLES`.

        Raises:
            UserError: it is damaged, missing or too large.
        """
        from klab.harness.store import column_table

        file = f"{name}.parquet"
        data = self._bytes(self.path, file, column_table.FILE_BYTES)
        if data is None:
            raise damaged_archive(self.path / file, "is missing")
        try:
            return column_table.decoded(data, len(self.manifest["cells"]) if name == "cells" else _MOST_ROWS)
        except ValueError as error:
            raise damaged_archive(self.path / file, str(error)) from error

    def gradients_text(self) -> bytes | None:
        """What the exact lab measured, as JSON."""
        return self._unpacked(self.path, GRADIENTS, files.RECORD_BYTES)

    def changed_inputs(self, identity: str | None = None, missing: bool = True, bounded: bool = False) -> list[str]:
        """Nothing: where code, data and models lay beside the run is not known of an archive."""
        return []

    def _bytes(self, path: Path, name: str, largest: int) -> bytes | None:
        """A file of the archive; None where the archive was made without it."""
        digest = self.record["files"].get(name)
        if digest is None:
            return None
        try:
            with files.open_file(path / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size > largest:
                    most = f"{largest / 2**20:,.0f} MiB"
                    raise damaged_archive(
                        path / name, f"has {size / 2**20:,.0f} MiB, and such a file has {most} at most"
                    )
                data = file.readall()
        except (FileNotFoundError, NotADirectoryError):
            raise damaged_archive(path / name, "is missing") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise damaged_archive(path / name, f"is not the file that {RECORD} has the checksum of")
        return data

    def _unpacked(self, path: Path, name: str, largest: int) -> bytes | None:
        data = self._bytes(path, name, _PACKED_BYTES)
        try:
            return None if data is None else packed.unpacked(data, largest)
        except ValueError as error:
            raise damaged_archive(path / name, str(error)) from error


def open_run(path: str | Path, read_only: bool = False) -> Run:
    """The run in a folder, or the archive of one.

    Raises:
        UserError: as `Run.open` and `Archive.open` do.
    """
    return Archive.open(path) if is_archive(Path(path)) else Run.open(path, read_only)


def is_archive(path: Path) -> bool:
    """Whether the folder is an archive and not a run folder."""
    return (path / RECORD).is_file() and not (path / "manifest.json").exists()


def damaged_archive(file: Path, problem: str) -> UserError:
    """The mistake to raise for a file of an archive that cannot be what klab wrote."""
    return UserError(problem, file=file, hint="Get the archive again, or make it anew with `klab archive RUN`.")


def write(
    run: Run,
    out: Path,
    tables: Mapping[str, Mapping[str, Numbers | Sequence[str | None]]],
    head: Mapping[str, Any],
) -> None:
    """Write the archive of a run into the folder `out`, which is replaced as a whole where it is an archive; a report
    in it stays. The same results give the same bytes.

    Args:
        tables: by the names of `TABLES`, their columns.
        head: the entries of `archive.json` beside `files`.

    Raises:
        UserError: there is something else at this place.
        OSError: it cannot be written.
    """
    from klab.harness.store import column_table

    out = out.absolute()
    if out.is_symlink() or (out.exists() and not _may_replace(out)):
        raise UserError("is no archive: nothing is replaced there", file=out, hint="Choose another with --out.")
    found = {
        GRID: run.grid_text.encode(),
        MANIFEST: packed.packed((run.path / "manifest.json").read_bytes()),
        **{f"{name}.parquet": column_table.encoded(columns) for name, columns in tables.items()},
    }
    if (gradients := files.read_bytes(run.path / _REPORT / "gradients.json")) is not None:
        found[GRADIENTS] = packed.packed(gradients)
    if (tuning := files.read_bytes(run.path / TUNING)) is not None:
        found[TUNING] = tuning
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    found[RECORD] = files.encode_record({**head, "files": digests}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        fresh.mkdir()
        for name, data in found.items():
            files.replace(fresh / name, data)
        _exchange(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    files.sync_folder(out.parent)


def _exchange(fresh: Path, out: Path) -> None:
    """Put a new archive in the place of an old one, or where there was none."""
    if not out.exists():
        fresh.rename(out)
        return
    old = fresh.with_suffix(".old")
    out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        old.rename(out)
        raise
    if (old / _REPORT).is_dir():
        (old / _REPORT).rename(out / _REPORT)
    shutil.rmtree(old, ignore_errors=True)


def _may_replace(out: Path) -> bool:
    return out.is_dir() and ((out / RECORD).is_file() or not any(out.iterdir()))


def _check(record: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where this cannot be the record of an archive."""
    usage, left, digests = (record.get(key) for key in ("usage", "left_out", "files"))
    sound = (
        isinstance(usage, dict)
        and set(usage) == set(Usage.__dataclass_fields__)
        and all(_is_number(value) for value in usage.values())
        and isinstance(left, dict)
        and isinstance(left.get("metrics"), list)
        and all(isinstance(name, str) and len(name) <= 100 for name in left["metrics"])
        and type(left.get("completions")) is int
        and isinstance(digests, dict)
        and set(digests) <= set(_FILES)
        and all(isinstance(digest, str) for digest in digests.values())
        and "began" in record
        and "ended" in record
        and (record["began"] is None or (_is_number(record["began"]) and _is_number(record["ended"])))
    )
    if not sound:
        raise damaged_archive(file, "is not the record of an archive")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
