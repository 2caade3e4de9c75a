"""The user's own code: how a grid file names it, where it lies, and how it is imported without shadowing anything.

It is named by import path, ``package.module:name``, or by file, ``./weights.py:name``. A file is relative to the grid
file. An import path is looked up in the working folder first and among installed modules second, whatever else bears
the same name: the user's ``queue.py`` is found as ``queue:name``, while ``import queue`` still means Python's module
everywhere, in the user's own code too. That is so because

* klab starts every Python process with a safe path (`python_command`), hence without the working folder;
* a folder comes onto ``sys.path`` when code in it is loaded, and comes last;
* a module whose name is taken is imported under a private name, ``_klab_user_<digest of the folder>.<module>``.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from klab.grid.errors import UserError

_PRIVATE = "_klab_user_"
_HINT = "It is looked for in the working folder, then among installed modules; ./file.py:name names a file."


@dataclass(frozen=True, slots=True)
class Location:
    """Where a piece of user code is: ``attribute`` of ``module``, which lies in ``folder``.

    ``folder`` is None for a module that is installed. ``by_file`` says that the module was named by its file.
    """

    folder: Path | None
    module: str
    attribute: str
    by_file: bool = False

    @property
    def source(self) -> Path | None:
        """The module's source file in its folder."""
        return source_file(self.folder, self.module) if self.folder is not None else None


@dataclass
class _Search:
    """Where this process looks: the grid file's folder, and names whose place is known already."""

    grid_folder: Path | None = None
    known: Mapping[str, Location] = field(default_factory=dict)


_search = _Search()
_on_path: set[str] = set()


def names_user_code(name: object) -> bool:
    """Whether an axis value, a reward or a task names the user's own code, by import path or by file."""
    if not isinstance(name, str) or ":" not in name:
        return False
    module, _, attribute = name.rpartition(":")
    if not all(part.isidentifier() for part in attribute.split(".")):
        return False
    if module.endswith(".py"):
        return "\0" not in module
    return all(part.isidentifier() for part in module.split("."))


@contextmanager
def searching(grid_folder: Path | None = None, known: Mapping[str, Location] | None = None) -> Iterator[None]:
    """Within the block, find files relative to ``grid_folder``, and the names in ``known`` where it says.

    Outside of any block files are relative to the working folder. Blocks may stand within each other.
    """
    before = _search.grid_folder, _search.known
    _search.grid_folder = grid_folder if grid_folder is not None else before[0]
    _search.known = {**before[1], **(known or {})}
    try:
        yield
    finally:
        _search.grid_folder, _search.known = before


def locate(name: str, key: str | None = None) -> Location:
    """Where the code of this name is. Imports nothing.

    Args:
        name: an import path or a file, with the name of what is in it.
        key: the setting that names it, for the message.

    Raises:
        UserError: there is no such file.
    """
    if name in _search.known:
        return _search.known[name]
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py"):
        file = Path(os.path.abspath((_search.grid_folder or Path.cwd()) / module))
        if not file.is_file():
            hint = "A file is relative to the grid file." if not Path(module).is_absolute() else None
            raise UserError(f"there is no file {file}", key=key, value=name, hint=hint)
        return Location(file.parent, file.stem, attribute, by_file=True)
    folder = Path.cwd()
    if module.partition(".")[0] == "klab":
        return Location(None, module, attribute)
    return Location(folder if source_file(folder, module) else None, module, attribute)


def load(name: str, key: str | None = None) -> Any:
    """The function or class of this name.

    Raises:
        UserError: there is no such file, module or attribute. Errors of the module's own code propagate.
    """
    return load_from(locate(name, key), name, key)


def load_from(location: Location, name: str, key: str | None = None) -> Any:
    """What lies at this location; ``name`` and ``key`` are for messages."""
    try:
        module = _imported(location)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{location.module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"there is no module {error.name!r}", key=key, value=name, hint=_HINT) from error
    found: Any = module
    for part in location.attribute.split("."):
        if not hasattr(found, part):
            written = name.rpartition(":")[0]
            offered = [
                f"{written}:{each}"
                for each, value in vars(found).items()
                if callable(value) and each[0] != "_" and getattr(value, "__module__", None) == module.__name__
            ]
            raise UserError(f"{written!r} has no {part!r}", key=key, value=name, allowed=offered)
        found = getattr(found, part)
    return found


def source_file(folder: Path, module: str) -> Path | None:
    """The source of a module or package that lies in this folder."""
    base = folder.joinpath(*module.split("."))
    for file in (base.parent / f"{base.name}.py", base / "__init__.py"):
        if file.is_file():
            return file
    return None


def is_installed(module: str) -> bool:
    """Whether an optional package is installed; one that lies in a folder of the user's code does not count."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and not any(_lies_in(spec, Path(folder)) for folder in _on_path)


def python_command(*arguments: str) -> list[str]:
    """The command that runs this Python without the working folder on its path."""
    return [sys.executable, "-P", *arguments]


def leave_out_working_folder() -> None:
    """Take the working folder out of the part of ``sys.path`` that comes before the standard library, and out of
    ``PYTHONPATH``, where an empty entry means it.
    """
    here = os.path.realpath(os.getcwd())

    def kept(entries: Sequence[str]) -> list[str]:
        return [entry for entry in entries if os.path.realpath(entry or here) != here]

    library = sysconfig.get_path("stdlib")
    first = next((i for i, entry in enumerate(sys.path) if os.path.realpath(entry) == os.path.realpath(library)), 0)
    sys.path[:first] = kept(sys.path[:first])
    given = os.environ.get("PYTHONPATH")
    if given is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept(given.split(os.pathsep)))


def _imported(location: Location) -> ModuleType:
    if location.folder is None:
        return importlib.import_module(location.module)
    importlib.invalidate_caches()
    folder = str(location.folder)
    if folder not in sys.path:
        sys.path.append(folder)
        _on_path.add(folder)
    if not location.by_file and _is_free(location.module.partition(".")[0], location.folder):
        return importlib.import_module(location.module)
    root = _PRIVATE + hashlib.sha256(folder.encode()).hexdigest()[:12]
    if root not in sys.modules:
        package = ModuleType(root)
        package.__path__ = [folder]
        sys.modules[root] = package
    if not any(isinstance(finder, _PrivateFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PrivateFinder())
    try:
        return importlib.import_module(f"{root}.{location.module}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith(f"{root}."):
            error.name = error.name.removeprefix(f"{root}.")
        raise


def _is_free(top: str, folder: Path) -> bool:
    """Whether a plain import of the top-level name ``top`` finds what lies in ``folder``."""
    try:
        spec = find_spec(top)
    except ValueError:  # a module without a specification, as `__main__`
        return False
    return spec is not None and _lies_in(spec, folder)


def _lies_in(spec: ModuleSpec, folder: Path) -> bool:
    places = list(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))
    wanted = os.path.realpath(folder)
    return bool(places) and all(os.path.dirname(os.path.realpath(place)) == wanted for place in places)


class _PrivateFinder:
    """Finds modules under a private name, and lets packages among them import themselves by their own name."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_PRIVATE) or path is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _PrivateLoader(spec.loader.name, spec.loader.path)
        return spec


class _PrivateLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        root, _, inner = module.__name__.partition(".")
        top = inner.partition(".")[0]
        if hasattr(sys.modules.get(f"{root}.{top}", module), "__path__"):
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _self_import(root, top)}
        super().exec_module(module)


def _self_import(root: str, top: str) -> Any:
    """An ``__import__`` for the modules of the private package ``root.top``, to which ``top`` means that package."""

    def import_(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        if level or name.partition(".")[0] != top:
            return builtins.__import__(name, globals, locals, fromlist, level)
        found = builtins.__import__(f"{root}.{name}", globals, locals, fromlist, 0)
        return found if fromlist else sys.modules[f"{root}.{top}"]

    return import_
