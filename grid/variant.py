"""A variant: one configuration as the grid file writes it, before validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.errors import UserError
from klab.grid.schema.sections import TrainingSection

SECTIONS = ("task", "policy", "training", "objective")
_OBJECTIVE_KEYS = ("algorithm", *AXES, *PARAMETERS)

Change = tuple[str, Any]
"""A dotted key, and the value that an axis or a listed cell gives it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration as written: the four sections, and its changes from the baseline as ``key=value``."""

    sections: Mapping[str, Mapping[str, Any]]
    changes: tuple[str, ...] = ()

    @classmethod
    def from_sections(cls, data: Mapping[str, Any]) -> Variant:
        """The baseline: the sections as they stand in the grid file."""
        sections: dict[str, Mapping[str, Any]] = {}
        for name in SECTIONS:
            given = data.get(name, {"name": "tiny"} if name == "policy" else {})
            if isinstance(given, str) and name in ("task", "policy"):
                given = {"name": given}
            if isinstance(given, str) and name == "objective":
                given = {"algorithm": given}
            if not isinstance(given, Mapping):
                raise UserError("not a mapping", key=name, value=given)
            sections[name] = given
        for key in sections["objective"]:
            if key not in _OBJECTIVE_KEYS:
                raise UserError("unknown key", key="objective", value=key, allowed=_OBJECTIVE_KEYS)
        return cls(sections)

    @property
    def spelling(self) -> str:
        """The changes in one line; `baseline` where there are none."""
        return ", ".join(self.changes) or "baseline"


class VariantFactory:
    """Makes the variants of a baseline. Equal sections are one shared object, so that each is validated only once."""

    def __init__(self, baseline: Variant) -> None:
        self._baseline = baseline
        self._steps: dict[tuple[int, str, int], _Step] = {}
        self._distinct: dict[tuple[str, str], Mapping[str, Any]] = {
            (name, repr(section)): section for name, section in baseline.sections.items()
        }

    def variant(self, changes: Iterable[Change]) -> Variant:
        """The baseline with some dotted fields set. A field set to the value it already has is not a change.

        Raises:
            UserError: for an unknown key, or a section that is not a mapping.
        """
        sections = dict(self._baseline.sections)
        words = []
        for key, value in changes:
            name, _ = split_key(key)
            step = self._steps.get((id(sections[name]), key, id(value))) or self._step(sections[name], key, value)
            sections[name] = step.after
            if step.word is not None:
                words.append(step.word)
        return Variant(sections, tuple(words))

    def _step(self, before: Mapping[str, Any], key: str, value: Any) -> _Step:
        name, field = split_key(key)
        if field is not None:
            after: Mapping[str, Any] = _with(before, field, value)
        else:
            after = {**before, **as_mapping(key, value)} if name == "training" else as_mapping(key, value)
        word = f"{key}={format_value(value)}" if after != before else None
        after = self._distinct.setdefault((name, repr(after)), after)
        self._steps[id(before), key, id(value)] = step = _Step(before, value, after, word)
        return step


@dataclass(frozen=True, slots=True)
class _Step:
    """A section before and after one field is set. References to `before` and `value` keep their ids unique."""

    before: Mapping[str, Any]
    value: Any
    after: Mapping[str, Any]
    word: str | None


@lru_cache(maxsize=4096)
def split_key(key: str) -> tuple[str, str | None]:
    """The section and the field that a dotted key names; None stands for the whole section.

    Raises:
        UserError: for an unknown key.
    """
    if key in _OBJECTIVE_KEYS:
        return "objective", key
    if key in ("task", "policy", "training"):
        return key, None
    section, _, field = key.partition(".")
    if section == "objective" and field in _OBJECTIVE_KEYS:
        return "objective", field
    if section == "training" and field.partition(".")[0] in TrainingSection.model_fields:
        return section, field
    if section in ("task", "policy") and field:
        return section, field
    allowed = [
        *_OBJECTIVE_KEYS,
        *(f"training.{name}" for name in TrainingSection.model_fields),
        "task",
        "policy",
        "training",
    ]
    raise UserError("unknown axis", key="axes", value=key, allowed=allowed)


def format_value(value: Any) -> str:
    """An axis value in short, for labels and tables: ``power(q=0.5)``."""
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key}={format_value(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({rest})" if "name" in value and rest else str(value.get("name", rest))
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_mapping(key: str, value: object) -> Mapping[str, Any]:
    """The value as a mapping; a task or policy may be written by its name alone.

    Raises:
        UserError: when it is neither.
    """
    if isinstance(value, str) and key in ("task", "policy"):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise UserError("not a mapping", key=key, value=value)
    return value


def _with(section: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A section with one field set; a dotted field is set in the nested section (`critic.lr`)."""
    name, _, rest = field.partition(".")
    if not rest:
        return {**section, name: value}
    inside = section.get(name)
    return {**section, name: _with(inside if isinstance(inside, Mapping) else {}, rest, value)}
