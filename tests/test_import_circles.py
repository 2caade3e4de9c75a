"""No module of klab imports itself by way of others, not even where the import stands inside a function."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

ROOMS = ("grid", "tasks", "harness", "reports")


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every module with the modules that it imports; imports for type checkers alone don't count."""
    place = tmp_path_factory.mktemp("links")
    (place / "klab").mkdir()
    for room in ROOMS:
        (place / "klab" / room).symlink_to(Path(__file__).parents[1] / room)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        graph = grimp.build_graph("klab", exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach one another, found by removing what imports nothing that is left."""
    left = {module: set(found) for module, found in imports.items()}
    while True:
        ends = {module for module, found in left.items() if not found & left.keys()}
        ends |= {module for module in left if not any(module in found for found in left.values())}
        if not ends:
            return [set(left)] if left else []
        left = {module: found for module, found in left.items() if module not in ends}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_way_of_others(imports: dict[str, set[str]]) -> None:
    assert len(imports) > 200
    assert circles(imports) == []
