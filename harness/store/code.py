"""The user's code of a run: where it lay, digests of its files, and copies, so that the run keeps what made it.

For every name of the grid file that means user code (`klab.grid.user_code`) the manifest has the module's folder,
relative to the run folder, and the SHA-256 of its source and of every file of that folder that it imports, directly or
not. The files are copied to `code/<digest>/`. A cell uses the user's own files as long as they are the same, else the
copies. Of packages that are installed from an index only digests are kept.
"""

from __future__ import annotations

import ast
import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.grid.catalogue import AXES
from klab.grid.user_code import Location, locate, names_user_code, source_file
from klab.harness.store import files

if TYPE_CHECKING:
    from klab.grid import Cell

FOLDER = "code"
Record = dict[str, Any]
"""`folder` (relative to the run folder; None: installed), `module`, `by_file`, and `files`, from paths to digests."""


def names(cells: Iterable[Cell]) -> list[str]:
    """Every name of user code in these cells, once, in order."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    for cell in cells:
        for section in (cell.objective, cell.task):
            if id(section) in seen:
                continue
            seen.add(id(section))
            axes = (getattr(section, axis, None) for axis in AXES)
            rewards = (getattr(term, "name", None) for term in getattr(section, "reward", None) or ())
            for name in (*axes, getattr(section, "name", None), getattr(section, "environment", None), *rewards):
                if names_user_code(name):
                    found.setdefault(str(name))
    return list(found)


def record(names: Iterable[str], run: Path) -> dict[str, Record]:
    """The records of these names for the run in this folder, as the code is now. What cannot be found is left out."""
    found: dict[str, Record] = {}
    for name in names:
        try:
            location = locate(name)
        except UserError:
            continue
        home, installed = _home(location)
        if home is None:
            continue
        sources = _followed(home, location)
        found[name] = {
            "folder": None if installed else os.path.relpath(home, run),
            "module": location.module,
            "by_file": location.by_file,
            "files": {path: hashlib.sha256(data).hexdigest() for path, data in sources.items()},
        }
        if not installed:
            _copy(run / FOLDER / _digest(found[name]), sources)
    return found


def check(records: object, file: Path) -> None:
    """Raises a UserError, naming the file, where these are not records, or lead out of their folders."""
    valid = isinstance(records, Mapping) and all(
        names_user_code(name) and isinstance(each, Mapping) and _is_record(each) for name, each in records.items()
    )
    if not valid:
        raise files.damaged_file(file, "has no valid 'code'")


def _is_record(each: Mapping[str, Any]) -> bool:
    folder, module, digests = each.get("folder", 0), each.get("module"), each.get("files")
    return (
        isinstance(folder, str | None)
        and isinstance(module, str)
        and not set(module) & {"/", "\0"}
        and (bool(each.get("by_file")) or all(part.isidentifier() for part in module.split(".")))
        and isinstance(digests, Mapping)
        and all(isinstance(digest, str) for digest in digests.values())
        and not any(os.path.isabs(path) or ".." in Path(path).parts or "\0" in path for path in digests)
    )


def locations(records: Mapping[str, Record], run: Path) -> dict[str, Location]:
    """Where to load each name from: the user's own files while they are as recorded, else the run's copies.

    Raises:
        UserError: code that is neither there as recorded nor copied.
    """
    found = {}
    for name, each in records.items():
        if each["folder"] is None:
            continue
        attribute = name.rpartition(":")[2]
        home = Path(os.path.normpath(run / each["folder"]))
        if changed_files(each, home):
            home = run / FOLDER / _digest(each)
            if damaged := changed_files(each, home):
                raise UserError(
                    "the code that this run was made with has changed, and the run folder has no copy of it",
                    file=home / damaged[0],
                    value=name,
                )
        found[name] = Location(home, each["module"], attribute, bool(each["by_file"]))
    return found


def changed(records: Mapping[str, Record], run: Path, missing: bool = True) -> list[str]:
    """The files of the user's own folders that have other contents now; with ``missing``, also those that are gone."""
    found: dict[str, None] = {}
    for each in records.values():
        if each["folder"] is not None:
            home = Path(os.path.normpath(run / each["folder"]))
            different = changed_files(each, home)
            found.update(dict.fromkeys(path for path in different if missing or (home / path).exists()))
    return list(found)


def changed_files(record: Record, home: Path) -> list[str]:
    """The recorded files of which `home` has another version, or none."""
    changed = []
    for path, digest in record["files"].items():
        source = _read_source(home / path)
        if source is None or hashlib.sha256(source).hexdigest() != digest:
            changed.append(path)
    return changed


def _read_source(path: Path) -> bytes | None:
    """A regular file of a source's size, else None: a manifest may be a stranger's, and name devices or pipes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > files.RECORD_BYTES:
            return None
        with path.open("rb") as file:
            return file.read(status.st_size)
    except OSError:
        return None


def _home(location: Location) -> tuple[Path | None, bool]:
    """The folder that the module's name is relative to, and whether it is one of installed packages."""
    if location.folder is not None:
        return location.folder, False
    try:
        spec = find_spec(location.module.partition(".")[0])
    except (ImportError, ValueError):
        return None, False
    if spec is None:
        return None, False
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else ())]
    if not places:
        return None, False
    home = Path(places[0]).parent
    shared = {os.path.realpath(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return home, os.path.realpath(home) in shared or home.name in ("site-packages", "dist-packages")


def _followed(home: Path, location: Location) -> dict[str, bytes]:
    """The sources of a module and of all that it imports out of the same folder, by their path in it."""
    found: dict[str, bytes] = {}
    ahead = [location.module]
    seen = set(ahead)
    while ahead:
        module = ahead.pop()
        file = source_file(home, module)
        if file is None:
            continue
        data = file.read_bytes()
        found[str(file.relative_to(home))] = data
        wanted = [each for each in _imports(data, module, file.name == "__init__.py") if each not in seen]
        seen.update(wanted)
        ahead += wanted
    return dict(sorted(found.items()))


def _imports(source: bytes, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name that may be a module of the same folder which the source imports, and the packages around it.

    Where Python has a module of the name, an absolute import means that one, except within the package of the name.
    """
    parts = module.split(".")
    package = parts if is_package else parts[:-1]
    yield from _prefixes(".".join(package))

    def is_own(name: str) -> bool:
        top = name.partition(".")[0]
        return top not in sys.stdlib_module_names or (top == parts[0] and (len(parts) > 1 or is_package))

    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_own(alias.name):
                    yield from _prefixes(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            if not node.level and not is_own(stem):
                continue
            yield from _prefixes(stem)
            for alias in node.names:
                yield f"{stem}.{alias.name}" if stem else alias.name


def _prefixes(module: str) -> Iterator[str]:
    parts = module.split(".") if module else []
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _digest(record: Record) -> str:
    return hashlib.sha256(repr(sorted(record["files"].items())).encode()).hexdigest()[:16]


def _copy(folder: Path, sources: Mapping[str, bytes]) -> None:
    for path, data in sources.items():
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            files.replace(target, data, durable=False)
