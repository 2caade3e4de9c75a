"""Settings of a variant, and whether they are what a rule or a claim of the grid file asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from klab.grid.schema.sections import default_of
from klab.grid.variant import Variant

Settings = Callable[[Variant, str], Mapping[str, Any]]
"""A variant's settings in one section, the named algorithm's filled in (`CellBuilder.settings`)."""


def setting_of(variant: Variant, settings: Settings, where: tuple[str, str | None]) -> Any:
    """The setting that a split key (`split_key`) names, its default where the file does not set it; None without."""
    section, field = where
    present: Any = settings(variant, section)
    if field is not None:
        first, *inner = field.split(".")
        present = present[first] if first in present else default_of(section, present, first)
        for part in inner:
            present = present.get(part) if isinstance(present, Mapping) else None
    return present


def is_same(present: Any, wanted: Any) -> bool:
    """Whether a setting is what is asked for: a list asks for any of its entries, a mapping for some of the keys."""
    if isinstance(wanted, list):
        return any(is_same(present, option) for option in wanted)
    if isinstance(wanted, Mapping):
        present = present if isinstance(present, Mapping) else {"name": present}
        return all(is_same(present.get(key), value) for key, value in wanted.items())
    if isinstance(present, Mapping):
        return bool(present.get("name") == wanted)
    return bool(present == wanted)
