"""A cell: one objective on one task with one policy, one training schedule and one seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.errors import UserError
from klab.grid.objective import Objective
from klab.grid.schema.sampler import IDLE_SAMPLER_SETTINGS
from klab.grid.schema.sections import (
    NUMERICALLY_IDLE,
    PolicySection,
    Section,
    TaskSection,
    TrainingSection,
    load_section,
)

_NO_IDENTITY: Any = {
    **dict.fromkeys(NUMERICALLY_IDLE, True),
    "sampler": dict.fromkeys(IDLE_SAMPLER_SETTINGS, True),
}
"""What model_dump leaves out of a section: settings that cannot change a number."""

ID_VERSION = 2
"""Version of the id algorithm, part of what is hashed; raised whenever the same cell would get another id."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a study with one seed.

    Attributes:
        objective, task, policy, training, seed: what is trained; together the cell's identity.
        algorithm: the named algorithm that the objective came from, if any; no part of the identity.
        spellings: how the grid file wrote this cell, several ways where they have one canonical form; no part of the
            identity.
    """

    objective: Objective
    task: TaskSection
    policy: PolicySection
    training: TrainingSection
    seed: int
    algorithm: str | None = field(default=None, compare=False)
    spellings: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def group(self) -> str:
        """The id without the seed: cells of one group are repetitions of one configuration."""
        return self._named(hashlib.sha256(self.identity.encode()))

    @cached_property
    def id(self) -> str:
        """Readable values and 8 hexadecimal digits of the hash of the resolved cell; safe as a folder name."""
        return self._named(hashlib.sha256(f"{self.identity}@{self.seed}".encode()), self.seed)

    @property
    def identity(self) -> str:
        """The text that ids are hashes of, apart from the seed: id version, active settings and sections, as JSON."""
        return f"[{ID_VERSION},{self.objective.canonical_text(self.training.on_policy)},{self.sections}]"

    @cached_property
    def sections(self) -> str:
        """Task, policy and training as JSON, without what cannot change a number."""
        return _sections_json(self.task, self.policy, self.training)

    def with_seeds(self, seeds: Iterable[int]) -> list[Cell]:
        """The same configuration with other seeds."""
        digest = hashlib.sha256(self.identity.encode())
        cells = []
        for seed in seeds:
            seeded = digest.copy()
            seeded.update(f"@{seed}".encode())
            cell = replace(self, seed=seed)
            # fills the cached properties
            cell.__dict__.update(id=self._named(seeded, seed), group=self.group, sections=self.sections)
            cells.append(cell)
        return cells

    def _named(self, digest: Any, seed: int | None = None) -> str:
        readable = _readable(self.objective, self.training.on_policy)
        return f"{readable}{'' if seed is None else f'-s{seed}'}-{digest.hexdigest()[:8]}"

    def canonical(self) -> dict[str, Any]:
        """Everything that can change a number of this cell: active settings only, with defaults filled in."""
        return {
            "objective": self.objective.canonical(self.training.on_policy),
            "task": self.task.model_dump(mode="json"),
            "policy": self.policy.model_dump(mode="json", exclude=_NO_IDENTITY),
            "training": self.training.model_dump(mode="json", exclude=_NO_IDENTITY),
            "seed": self.seed,
        }

    def resolved(self) -> dict[str, Any]:
        """All settings, as plain data; `Cell.from_resolved` is the inverse.

        Cells share the dictionaries of their sections, which therefore must not be changed.
        """
        return {
            "id": self.id,
            "id_version": ID_VERSION,
            "algorithm": self.algorithm,
            "objective": _objective_data(self.objective),
            "task": _section_data(self.task),
            "policy": _section_data(self.policy),
            "training": _section_data(self.training),
            "seed": self.seed,
            "spellings": list(self.spellings),
        }

    @classmethod
    def from_resolved(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that `resolved` described.

        Raises:
            UserError: for missing or invalid settings, or an id that these settings do not have.
        """
        for key in ("objective", "task", "policy", "training", "seed"):
            if key not in data:
                raise UserError("missing", key=key)
        if not isinstance(data["objective"], Mapping):
            raise UserError("not a mapping", key="objective", value=data["objective"])
        if isinstance(data["seed"], bool) or not isinstance(data["seed"], int):
            raise UserError("not an integer", key="seed", value=data["seed"])
        unknown = [key for key in data["objective"] if key not in AXES and key not in PARAMETERS]
        if unknown:
            raise UserError("unknown key", key="objective", value=unknown[0], allowed=[*AXES, *PARAMETERS])
        cell = cls(
            Objective(**data["objective"]),
            load_section("task", data["task"]),  # type: ignore[arg-type]
            load_section("policy", data["policy"]),  # type: ignore[arg-type]
            load_section("training", data["training"]),  # type: ignore[arg-type]
            data["seed"],
            data.get("algorithm"),
            tuple(data.get("spellings", ())),
        )
        if data.get("id_version") == ID_VERSION and data.get("id", cell.id) != cell.id:
            raise UserError(
                "does not belong to these settings", key="id", value=data["id"], hint=f"They have {cell.id}."
            )
        return cell


@lru_cache(maxsize=65536)
def _section_data(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")


@lru_cache(maxsize=65536)
def _sections_json(*sections: Section) -> str:
    return ",".join(map(_section_json, sections))


@lru_cache(maxsize=65536)
def _section_json(section: Section) -> str:
    return json.dumps(section.model_dump(mode="json", exclude=_NO_IDENTITY), sort_keys=True)


@lru_cache(maxsize=65536)
def _objective_data(objective: Objective) -> dict[str, Any]:
    return objective.settings()


@lru_cache(maxsize=65536)
def _readable(objective: Objective, on_policy: bool) -> str:
    canonical = objective.canonical_form(on_policy).canonical
    words = []
    for axis in AXES.values():
        name = canonical.get(axis.name)
        if name is None or (axis.name in ("aggregation", "path") and name == axis.default):
            continue
        words.append(name.split(":")[-1])
        for key, value in objective.arguments(axis.name).items():
            default = PARAMETERS[key].default if key in PARAMETERS else None
            if f"{axis.name}.{key}" in canonical and value != default:
                words.append(f"{key}{_number(value)}")
    words += [f"{key}{_number(value)}" for key, value in objective.terms.items()]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:120]


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
