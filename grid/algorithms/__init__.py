"""Named algorithms: one short YAML each, with constants traced to the paper or the released code."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from klab.grid.errors import UserError
from klab.grid.yaml_document import parse_yaml, read_text

_FOLDER = Path(__file__).parent
_KEYS = ("title", "source", "objective", "training", "constants", "note")


@dataclass(frozen=True)
class Algorithm:
    """A published algorithm.

    Attributes:
        name, title: its key in grid files, and its name in print.
        source: citations, by the labels of `klab.grid.sources`.
        objective: axis values and parameters.
        training: training settings that belong to it (a critic, dynamic sampling); the grid file's override them.
        constants: where each constant comes from.
        note: what differs from the source.
    """

    name: str
    title: str
    source: str
    objective: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    constants: str = ""
    note: str = ""


@lru_cache(maxsize=1)
def algorithm_names() -> tuple[str, ...]:
    """All named algorithms, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@lru_cache(maxsize=256)
def load_algorithm(name: str) -> Algorithm:
    """A named algorithm.

    Raises:
        UserError: when there is none of this name.
    """
    if name not in algorithm_names():
        raise UserError("unknown algorithm", key="algorithm", value=name, allowed=algorithm_names())
    file = _FOLDER / f"{name}.yaml"
    data = parse_yaml(read_text(file), file)
    for key in data:
        if key not in _KEYS:
            raise UserError("unknown key", file=file, value=key, allowed=_KEYS)
    return Algorithm(name, **data)
