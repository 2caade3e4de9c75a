"""The named algorithm that an objective is nearest to, and what differs from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from klab.grid.algorithms import Algorithm, algorithm_names, load_algorithm
from klab.grid.catalogue import AXES
from klab.grid.objective import Objective
from klab.grid.parameters import TERMS
from klab.grid.schema.training import TrainingSection

_AXIS, _NUMBER, _SETTING = 100, 10, 1
"""How much a different value of an axis counts, a different parameter of the same value, and a training setting."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """A named algorithm, and what an objective has instead of what it has.

    Attributes:
        algorithm: the named algorithm.
        differences: ``key: own value instead of its value``, the larger ones first; empty for the algorithm itself.
    """

    algorithm: Algorithm
    differences: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Both in words."""
        who = f"{self.algorithm.title} ({self.algorithm.name}; {self.algorithm.source})"
        if not self.differences:
            return f"This is {who}."
        return f"Nearest named algorithm: {who}. Differs in {'; '.join(self.differences)}."


def nearest(objective: Objective, on_policy: bool = False, training: TrainingSection | None = None) -> Nearest:
    """The named algorithm with the fewest differences: in values of axes, then in their parameters, then in training
    settings that belong to the algorithm.

    What has no effect under the schedule is no difference. Among equally near ones the first that was published.
    """
    on_policy = on_policy if training is None else training.on_policy
    own = objective.canonical(on_policy)
    found = []
    for algorithm, theirs in _published(on_policy):
        differences = [*_differences(own, theirs), *_terms(own, theirs), *_settings(algorithm.training, training)]
        found.append((sum(weight for weight, _ in differences), algorithm, differences))
    _, algorithm, differences = min(found, key=lambda each: (each[0], _year(each[1])))
    return Nearest(algorithm, tuple(text for _, text in sorted(differences, key=lambda each: -each[0])))


@lru_cache(maxsize=2)
def _published(on_policy: bool) -> tuple[tuple[Algorithm, dict[str, Any]], ...]:
    """The named algorithms with their canonical forms."""
    found = (load_algorithm(name) for name in algorithm_names())
    return tuple((each, Objective(**each.objective).canonical(on_policy)) for each in found)


def _year(algorithm: Algorithm) -> str:
    """The year of its source; those without one come last."""
    found = re.search(r"\b(?:19|20)\d\d", algorithm.source)
    return found[0] if found else "later"


def _differences(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Differences of two canonical forms with their weights."""
    for axis in AXES:
        mine, other = own.get(axis), theirs.get(axis)
        if mine != other:
            yield _AXIS, f"{axis}: {_chosen(own, axis)} instead of {_chosen(theirs, axis)}"
            continue
        for key in dict.fromkeys((*own, *theirs)):
            if key.startswith(f"{axis}.") and own.get(key) != theirs.get(key):
                yield _NUMBER, f"{key.partition('.')[2]}: {_plain(own.get(key))} instead of {_plain(theirs.get(key))}"


def _chosen(form: Mapping[str, Any], axis: str) -> str:
    """The value of an axis in a canonical form, from which reverse KL is left out."""
    default = AXES[axis].default if axis == "divergence" and "estimator" in form else "without effect"
    return str(form.get(axis, default))


def _terms(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Differences of what belongs to no axis."""
    for name in TERMS:
        if own.get(name) != theirs.get(name):
            yield _AXIS, f"{name}: {_plain(own.get(name))} instead of {_plain(theirs.get(name))}"


def _settings(belonging: Mapping[str, Any], training: TrainingSection | None) -> Iterator[tuple[int, str]]:
    """Training settings of an algorithm that a cell does not have."""
    if training is None:
        return
    has, theirs = (each.model_dump(mode="json") for each in (training, TrainingSection(**belonging)))
    for key, value in belonging.items():
        if has.get(key) is None or (not isinstance(value, Mapping) and has[key] != theirs[key]):
            yield _SETTING, f"training.{key}: {_plain(has.get(key))} instead of {_plain(value)}"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
