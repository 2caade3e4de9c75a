"""Problems and scores of reasoning-gym, made in the process of a `Worker`: plain data in, plain data out.

A problem depends on its request alone: Python's and numpy's global generators are seeded for each, and the process is
to have `PYTHONHASHSEED` set, because several generators draw from sets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any

from klab.grid.errors import UserError
from klab.tasks.answered import answered

GENERATED = ("seed", "size")
"""Fields of every configuration that are klab's to set."""


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What one request asks for.

    Args:
        request: `parts` (dataset, weight, parameters, level of each) and `size`; with `entries` (a stream's seed, the
            first index and how many), the problems from there on, each `[question, answer, metadata, solved]`, where
            `solved` says whether the scorer gives its answer 1; with `scores`, rows `[seed, index, text]` for the
            score of each text as the answer to that problem; else the names of system prompts with their texts.

    Returns:
        `{"found": …}`, or `{"mistake": …}`, the fields of a UserError about the parts.
    """
    return answered(partial(_found, request))


def _found(request: Mapping[str, Any]) -> Any:
    if "entries" in request:
        seed, first, count = request["entries"]
        return [_entry(request, seed, index) for index in range(first, first + count)]
    if "scores" in request:
        return [_score(request, *row) for row in request["scores"]]
    from reasoning_gym.utils import SYSTEM_PROMPTS

    return dict(SYSTEM_PROMPTS)


def dataset_names() -> list[str]:
    """The names of all datasets but the composite, in alphabetical order."""
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def configuration(part: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The fields of a dataset's configuration, without seed and size, from a part's level and parameters.

    Raises:
        UserError: unknown dataset, parameter or attribute, or a level that there is not.
    """
    import reasoning_gym.factory as factory

    name = part["dataset"]
    if name not in dataset_names():
        raise UserError("unknown dataset", key=f"{key}dataset", value=name, allowed=dataset_names())
    known = [each.name for each in fields(factory.DATASETS[name][1]) if each.name not in GENERATED]
    for parameter in part["parameters"]:
        if parameter in GENERATED:
            hint = f"Write it as task.{parameter}."
            raise UserError("is not for the dataset to say", key=f"{key}parameters", value=parameter, hint=hint)
        if parameter not in known:
            raise UserError(f"unknown parameter of {name}", key=f"{key}parameters", value=parameter, allowed=known)
    levelled = {} if part["level"] is None else _levelled(name, part["level"], f"{key}level")
    return {**{field: value for field, value in levelled.items() if field in known}, **part["parameters"]}


def _levelled(name: str, level: int | Mapping[str, int], key: str) -> dict[str, Any]:
    import reasoning_gym.factory as factory

    if not factory.has_curriculum(name):
        raise UserError("has no curriculum", key=key, value=name, allowed=sorted(factory.CURRICULA))
    curriculum = factory.create_curriculum(name)
    highest = max((len(each.levels) - 1 for each in curriculum.attributes.values()), default=0)
    if not isinstance(level, Mapping):
        if level > highest:
            raise UserError(f"the highest level of {name} is {highest}", key=key, value=level)
        curriculum.set_global_level(level)
    else:
        for attribute, each in level.items():
            if attribute not in curriculum.attributes:
                known = list(curriculum.attributes)
                raise UserError(f"unknown attribute of {name}'s curriculum", key=key, value=attribute, allowed=known)
            top = len(curriculum.attributes[attribute].levels) - 1
            if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each <= top:
                raise UserError(f"levels are whole numbers from 0 to {top}", key=f"{key}.{attribute}", value=each)
            curriculum.set_attr_level(attribute, each)
    made = curriculum.generate_configuration()
    return {each.name: getattr(made, each.name) for each in fields(made)}


@lru_cache(maxsize=4)
def _dataset(written: str, size: int, seed: int) -> Any:
    import reasoning_gym.factory as factory
    from reasoning_gym.composite import DatasetSpec

    parts = json.loads(written)
    _seed_globals(seed)
    if len(parts) == 1:
        settings = configuration(parts[0], "")
        return _made(
            lambda: factory.create_dataset(parts[0]["dataset"], **settings, seed=seed, size=size), "parameters"
        )
    specs = []
    for number, part in enumerate(parts):
        key = f"datasets.{number}."
        settings = configuration(part, key)
        # alone first, so that a mistake is known to be this one's
        _made(lambda: factory.create_dataset(part["dataset"], **settings, seed=seed, size=size), f"{key}parameters")  # noqa: B023
        specs.append(DatasetSpec(part["dataset"], part["weight"], settings))
    return _made(lambda: factory.create_dataset("composite", datasets=specs, seed=seed, size=size), "datasets")


def _made(make: Any, key: str) -> Any:
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # validate() asserts, and types are not looked at
        raise UserError(f"the dataset cannot be made: {type(error).__name__}: {error}", key=key) from error


@lru_cache(maxsize=65536)
def _problem(written: str, size: int, seed: int, index: int) -> Any:
    dataset = _dataset(written, size, seed)
    _seed_globals(seed + index)
    return _made(lambda: dataset[index], "parameters")


def _entry(request: Mapping[str, Any], seed: int, index: int) -> list[Any]:
    written, size = json.dumps(request["parts"]), request["size"]
    entry = _problem(written, size, seed, index)
    text = entry["answer"] if isinstance(entry["answer"], str) else ""
    metadata = {name: value for name, value in entry["metadata"].items() if isinstance(value, (str, int, float))}
    return [entry["question"], text, metadata, bool(text) and _score(request, seed, index, text) >= 1.0]


def _score(request: Mapping[str, Any], seed: int, index: int, text: str) -> float:
    """The scorer's number; 0 where it raises or gives none, which it may on what a policy writes."""
    written, size = json.dumps(request["parts"]), request["size"]
    entry, dataset = _problem(written, size, seed, index), _dataset(written, size, seed)
    _seed_globals(seed + index)
    try:
        found = float(dataset.score_answer(text, entry))
    except Exception:
        return 0.0
    return found if found - found == 0.0 else 0.0


def _seed_globals(seed: int) -> None:
    """Some generators draw from the global generators."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
