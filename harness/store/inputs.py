"""What a run was made from besides its grid file and code: datasets, checkpoints, and commits of what lies on the hub.

Each file or folder that a cell's task or policy names is recorded with a SHA-256 of its contents, so that another
version of it is noticed before cells that were trained on the two are compared. They are no part of a cell's id.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid.user_code import names_user_code
from klab.harness.store import files
from klab.harness.store.machine import cache_folder

if TYPE_CHECKING:
    from klab.grid import Cell

Record = dict[str, str]
"""`path`, relative to the run folder, and `sha256`; or `commit` for a model or dataset on the hub."""

_CHUNK = 1 << 22
_MOST_FILES, _MOST_BYTES = 10_000, 1 << 28
_PATHS = ("path", "held_out_path", "model")
"""Settings of klab's own tasks and policies that name files, folders, models and datasets; any of a user's task may."""
_HUB_KEYS = {"policy.model": "models", "task.path": "datasets", "task.name": "packages"}
_PACKAGES = {"reasoning_gym": "reasoning-gym", "verifiers": "verifiers"}
"""Tasks whose problems or scores a package makes, by name: its version is recorded as their commit."""


def record(cells: Iterable[Cell], run: Path) -> dict[str, Record]:
    """The records of everything that these cells name, as it is now, by setting and name: `task.path sums.jsonl`."""
    digests, found = Digests(), {}
    around = {run, *run.parents}
    for label, key, name in _named(_sections(cells)):
        if key == "task.name":
            if version := _commit("packages", name):
                found[label] = {"commit": version}
            continue
        path = Path(name).expanduser()
        if path.exists() and path.resolve() in around:
            continue  # "/" as a separator, say: a folder that the run itself changes is no input of it
        if path.exists():
            found[label] = {"path": os.path.relpath(path.absolute(), run), "sha256": digests.of(path) or ""}
        elif key in _HUB_KEYS and (commit := _commit(_HUB_KEYS[key], name)):
            found[label] = {"commit": commit}
    digests.save()
    return found


def labels(cells: Iterable[Cell]) -> list[str]:
    """The labels of everything that exists, here or on the hub, and that these cells name."""
    return [
        label
        for label, key, name in _named(_sections(cells))
        if (key != "task.name" and Path(name).expanduser().exists())
        or (key in _HUB_KEYS and _commit(_HUB_KEYS[key], name))
    ]


def renewed(records: Mapping[str, Record], run: Path) -> dict[str, Record]:
    """The same records with the digests and commits of now; those of what is gone stay as they are."""
    digests, found = Digests(), {}
    for label, each in records.items():
        if "sha256" in each:
            now = digests.of(Path(os.path.normpath(run / each["path"])))
            found[label] = {**each, "sha256": now or each["sha256"]}
        else:
            found[label] = {"commit": _hub_commit(label) or each["commit"]}
    digests.save()
    return found


def used_by(resolved: Mapping[str, Any]) -> set[str]:
    """The labels of everything that a cell names, from its settings as a manifest has them; it need not exist."""
    sections = ((kind, resolved.get(kind)) for kind in ("task", "policy"))
    return {label for label, _, _ in _named((kind, each) for kind, each in sections if isinstance(each, Mapping))}


def changed(records: Mapping[str, Record], run: Path, missing: bool = True, bounded: bool = False) -> list[str]:
    """The labels of what has other contents or another commit now; with ``missing``, also of files that are gone.

    Args:
        bounded: of `Digests`; what it leaves out counts as gone.
    """
    digests, found = Digests(bounded), []
    for label, each in records.items():
        if "sha256" in each:
            now = digests.of(Path(os.path.normpath(run / each["path"])))
            if now != each["sha256"] and (missing or now is not None):
                found.append(label)
        else:
            if _hub_commit(label) not in (each["commit"], None):
                found.append(label)
    digests.save()
    return found


def check(records: object, file: Path) -> None:
    """Raises UserError, naming the file, where these are not records."""
    valid = isinstance(records, Mapping) and all(
        isinstance(each, Mapping)
        and all(isinstance(value, str) and "\0" not in value for value in each.values())
        and ({"path", "sha256"} <= each.keys() or "commit" in each)
        for each in records.values()
    )
    if not valid:
        raise files.damaged_file(file, "has no valid 'inputs'")


class Digests:
    """SHA-256 of files and folders. Those of large files are kept between processes, by path, size and time.

    Args:
        bounded: for records that a stranger may have written, who can name any place. A large file is read only where
            this machine has read it before, and no more than `_MOST_FILES` files and `_MOST_BYTES` bytes are; there is
            no digest of anything else.
    """

    def __init__(self, bounded: bool = False) -> None:
        self._bounded = bounded
        self._files_left, self._bytes_left = _MOST_FILES, _MOST_BYTES
        self._file = cache_folder() / "digests.json"
        self._known: dict[str, list[Any]] = {}
        self._fresh = False
        with suppress(OSError, ValueError):
            loaded = json.loads(self._file.read_text())
            self._known = loaded if isinstance(loaded, dict) else {}

    def of(self, path: Path) -> str | None:
        """The digest of a regular file, or of a folder's names and regular files; None where there is neither."""
        try:
            return self._of(path)
        except _OverBound:
            return None

    def _of(self, path: Path) -> str | None:
        try:
            mode = path.stat().st_mode
        except OSError:
            return None
        if stat.S_ISREG(mode):
            return self._of_file(path)
        if not stat.S_ISDIR(mode):
            return None
        digest = hashlib.sha256()
        for folder, folders, names in os.walk(path):
            self._count_against_bound(0)
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            for name in sorted(names):
                file = Path(folder, name)
                if file.is_file() and not name.startswith("."):
                    digest.update(f"{file.relative_to(path)}\0{self._of_file(file)}\n".encode())
        return digest.hexdigest()

    def save(self) -> None:
        """Keep new digests; where that cannot be done they are computed again next time."""
        if self._fresh:
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                files.replace(self._file, json.dumps(self._known).encode(), durable=False)
            self._fresh = False

    def _of_file(self, path: Path) -> str:
        name, status = os.path.realpath(path), path.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == mark:
            return str(known[-1])
        self._count_against_bound(status.st_size, known is not None)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while status.st_size and (chunk := file.read(_CHUNK)):
                digest.update(chunk)
        if status.st_size > _CHUNK:
            self._known[name] = [*mark, digest.hexdigest()]
            self._fresh = True
        return digest.hexdigest()

    def _count_against_bound(self, size: int, known: bool = False) -> None:
        if not self._bounded:
            return
        self._files_left -= 1
        if size > _CHUNK and not known:
            raise _OverBound
        self._bytes_left -= 0 if known else size
        if min(self._files_left, self._bytes_left) < 0:
            raise _OverBound


class _OverBound(Exception):
    """More files than a bounded digest reads."""


def _sections(cells: Iterable[Cell]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks and policies of cells, those that they share once."""
    seen: set[int] = set()
    for cell in cells:
        for kind, section in (("task", cell.task), ("policy", cell.policy)):
            if id(section) not in seen:
                seen.add(id(section))
                yield kind, section.model_dump(mode="json")


def _named(sections: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str, str]]:
    """Label, key and name of every file, folder, model and dataset that tasks and policies name, once."""
    told: set[str] = set()
    for kind, section in sections:
        own = names_user_code(section.get("name"))
        package = section.get("name") if kind == "task" else None
        if package in _PACKAGES and f"task.name {package}" not in told:
            told.add(f"task.name {package}")
            yield f"task.name {package}", "task.name", package
        for key, name in _texts(kind, {key: value for key, value in section.items() if key != "name"}):
            if not own and key.rpartition(".")[2] not in _PATHS:
                continue
            label = f"{key} {name}"
            if label not in told:
                told.add(label)
                yield label, key, name


def _texts(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value and "\0" not in value and "\n" not in value and len(value) < 4096:
        yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(f"{key}.{name}", each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(key, each)


def _hub_commit(label: str) -> str | None:
    key, _, name = label.partition(" ")
    return _commit(_HUB_KEYS[key], name) if key in _HUB_KEYS else None


def _commit(kind: str, name: str) -> str | None:
    """The commit of a model or dataset of the hub that is in the cache of this machine; the version of a package."""
    if kind == "packages":
        with suppress(metadata.PackageNotFoundError, KeyError):
            return metadata.version(_PACKAGES[name])
        return None
    if name.count("/") > 1 or not name.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum():
        return None
    home = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    try:
        return (Path(home) / f"{kind}--{name.replace('/', '--')}" / "refs" / "main").read_text().strip() or None
    except OSError:
        return None
