"""Which fields a study varies, what each configuration's value on them is called, and in what order and colour values
appear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from klab.grid import Cell
from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.parameters import TERMS
from klab.grid.schema.sections import NUMERICALLY_IDLE, Section
from klab.grid.schema.task import REWARD_MODEL, ProxyTask, RewardedTask, RewardTerm
from klab.grid.user_code import names_user_code

_NEUTRAL = ("none", "one")
_OUTSIDE = ("task",)
_TITLES = {
    "training.lr": "learning rate",
    "policy.name": "policy",
    "beta": "KL coefficient β",
    "task.pairs": "preference pairs",
}
_TITLES |= {"task.hidden": "reward model's width", "task.layers": "reward model's layers"}
_TITLES |= {"task.epochs": "reward model's epochs", "task.proxy_seed": "reward model's seed"}


@dataclass(frozen=True, slots=True)
class VariedAxis:
    """A field that differs between configurations: its key, a title, and its values in the order used everywhere."""

    key: str
    title: str
    values: tuple[str, ...]

    @property
    def short(self) -> str:
        """The key without its section, for labels: ``lr`` for ``training.lr``."""
        return self.key.removeprefix("training.").removeprefix("objective.").removeprefix("task.")


def shown(value: Any) -> str:
    """A setting in few characters."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if names_user_code(value):
        return str(value).rpartition(":")[2]
    if isinstance(value, Section):
        return _shown_section(value)
    return str(value)


def _shown_section(value: Section) -> str:
    """Settings within a setting: the kind, if it has one, and what differs from the defaults; ``model(lr=0.001)``."""
    first = next(iter(type(value).model_fields), None)
    kind = getattr(value, first) if first is not None else None
    given = value.model_dump(mode="json", exclude_defaults=True)
    rest = ", ".join(f"{key}={shown(each)}" for key, each in given.items() if key != first or not isinstance(kind, str))
    if isinstance(kind, str):
        return f"{shown(kind)}({rest})" if rest else shown(kind)
    return rest or "yes"


def task_label(cell: Cell) -> str:
    """The task's name in reports: its `label`; with a dataset that one's name, `file(sums.parquet)`; else the task with
    its first parameter and those that are not at their defaults, `addition(digits=2)`."""
    task = cell.task
    if label := getattr(task, "label", None):
        return str(label)
    data = task.model_dump(mode="json")
    name = shown(data["name"])
    if isinstance(task, RewardedTask):
        path = str(data.get("path") or "")
        known = path == type(task).model_fields["path"].default
        return name if known or not path else f"{name}({PurePath(path).name or path})"
    if isinstance(task, ProxyTask):
        return f"{name}({_with_parameters(task.gold)})"
    return _with_parameters(task)


def _with_parameters(task: Section) -> str:
    data = task.model_dump(mode="json")
    name, fields = shown(data["name"]), type(task).model_fields
    keys = [key for key in data if key not in ("name", "label")]
    told = [key for key in keys if key == keys[0] or key not in fields or getattr(task, key) != fields[key].default]
    rest = ", ".join(f"{key}={shown(data[key])}" for key in told)
    return f"{name}({rest})" if rest else name


def task_labels(cells: Mapping[str, Cell]) -> dict[str, str]:
    """By group, the label of its task; where several tasks would have the same one, with the settings that differ.

    Proxies of one gold reward are one task, however their reward models were made: that is an axis.
    """
    plain = {group: task_label(cell) for group, cell in cells.items()}
    settings = {
        group: {key: _setting(value) for key, value in cell.task if key not in _untold(cell.task)}
        | {key: _setting(value) for key, value in (cell.task.model_extra or {}).items()}
        for group, cell in cells.items()
    }
    alike: dict[str, list[str]] = {}
    for group, label in plain.items():
        alike.setdefault(label, []).append(group)
    for label, groups in alike.items():
        keys = list(dict.fromkeys(key for group in groups for key in settings[group]))
        differing = [key for key in keys if len({settings[group].get(key) for group in groups}) > 1]
        for group in groups if differing else ():
            rest = ", ".join(f"{key}={settings[group].get(key, 'none')}" for key in differing)
            plain[group] = f"{label[:-1]}, {rest})" if label.endswith(")") else f"{label}({rest})"
    return plain


def _untold(task: Section) -> tuple[str, ...]:
    return ("name", *NUMERICALLY_IDLE, *(REWARD_MODEL if isinstance(task, ProxyTask) else ()))


def _setting(value: Any) -> str:
    if isinstance(value, tuple) and value and all(isinstance(each, RewardTerm) for each in value):
        terms = [(each.name or each.model or "", each.weight) for each in value]
        return " + ".join(shown(name) if weight == 1 else f"{weight:g}·{shown(name)}" for name, weight in terms)
    return shown(value)


def axis_table(
    cells: Mapping[str, Cell], written: Collection[str] = (), tuned: Collection[str] = ()
) -> tuple[tuple[VariedAxis, ...], dict[str, dict[str, str | None]]]:
    """The varied axes of some configurations, and every configuration's value on them.

    Args:
        cells: one cell per configuration, by group.
        written: the keys under ``axes`` in the grid files; a parameter that stands there is an axis of its own,
            others are part of
            the value they belong to (``power(q=0.25)``).
        tuned: keys whose value every configuration chose for itself: no axes.

    Returns:
        The axes, and by group the value on each axis; None where the axis is inactive in that configuration.
    """
    own = {key.removeprefix("objective.") for key in written}
    fields = {group: _without(_fields(cell, own), tuned) for group, cell in cells.items()}
    keys = list(dict.fromkeys(key for values in fields.values() for key in values))
    parameters = _varied_parameters(fields)
    labelled = {
        group: {key: _label(key, values, parameters) for key in keys if not isinstance(key, tuple)}
        for group, values in fields.items()
    }
    if "algorithm" in own:
        implied = {key for key in (*AXES, *PARAMETERS) if key not in own}
        keys = [key for key in keys if key not in implied]
    axes = []
    for key in keys:
        if isinstance(key, tuple) or key in _OUTSIDE:
            continue
        values = dict.fromkeys(row[key] for row in labelled.values() if row[key] is not None)
        if len(values) > 1:
            axes.append(
                VariedAxis(key, _title(key), tuple(_ordered(key, [value for value in values if value is not None])))
            )
    kept = tuple(sorted(axes, key=lambda axis: _rank(axis.key)))
    return kept, {group: {axis.key: row[axis.key] for axis in kept} for group, row in labelled.items()}


def group_labels(
    axes: Sequence[VariedAxis], values: Mapping[str, Mapping[str, str | None]], baseline: str | None
) -> dict[str, str]:
    """A unique short name per configuration: its differences from the baseline, or its values where there is none."""
    base = values.get(baseline or "", {})
    clear = _clear_values(axes)
    labels: dict[str, str] = {}
    for group, row in values.items():
        differing = [
            axis for axis in axes if row[axis.key] is not None and (not base or row[axis.key] != base[axis.key])
        ]
        if group == baseline:
            label = "baseline"
        else:
            brief = clear if len(differing) > 2 else set()
            names = [str(row[axis.key]) for axis in differing]
            words = [
                name if name in brief else f"{axis.short} {name}" for axis, name in zip(differing, names, strict=True)
            ]
            label = ", ".join(words) or group[:40]
        labels[group] = label
    counts: dict[str, int] = {}
    for label in labels.values():
        counts[label] = counts.get(label, 0) + 1
    return {group: label if counts[label] == 1 else f"{label} #{group[-8:]}" for group, label in labels.items()}


def value_words(axes: Sequence[VariedAxis], row: Mapping[str, str | None]) -> str:
    """What a configuration is on the varied axes, in few words: ``placement loss, k3, ppo_clip``."""
    clear = _clear_values(axes)
    shown = [(axis, row[axis.key]) for axis in axes]
    return ", ".join(value if value in clear else f"{axis.short} {value}" for axis, value in shown if value is not None)


def _clear_values(axes: Sequence[VariedAxis]) -> set[str]:
    """Values that say by themselves which axis they belong to: words that only one axis has."""
    everything = [value for axis in axes for value in axis.values]
    known = [name for axis in AXES.values() for name in axis.values]
    return {
        value
        for value in everything
        if everything.count(value) == 1 and known.count(value.partition("(")[0]) == 1 and value not in _NEUTRAL
    }


def _fields(cell: Cell, own: Collection[str]) -> dict[Any, Any]:
    """Flat settings: axes and sections by dotted key, parameters that are part of a value by (axis, parameter)."""
    form = cell.objective.canonical_form(cell.training.on_policy)
    result: dict[Any, Any] = {}
    if "algorithm" in own:
        result["algorithm"] = cell.algorithm
    for axis in AXES:
        value = getattr(cell.objective, axis)
        if axis == "placement" or (axis not in form.idle and axis in form.canonical):
            result[axis] = form.canonical.get(axis)
        else:
            result[axis] = value if value in _NEUTRAL else None
    for key, value in form.canonical.items():
        axis, _, parameter = key.partition(".")
        if parameter:
            result[parameter if parameter in own or parameter == "beta" else (axis, parameter)] = value
    result |= {name: getattr(cell.objective, name) for name in TERMS}
    result["task"] = task_label(cell)
    if isinstance(cell.task, ProxyTask):
        result |= {f"task.{name}": _reward_model_setting(cell, name) for name in REWARD_MODEL}
    for section in ("policy", "training"):
        for name, value in getattr(cell, section):
            if not name.startswith("checkpoint_") and name != "micro_batch":
                result[f"{section}.{name}"] = shown(value)
    return result


def _reward_model_setting(cell: Cell, name: str) -> str:
    value = getattr(cell.task, name)
    return "the cell's" if name == "proxy_seed" and value is None else shown(value)


def _without(fields: Mapping[Any, Any], tuned: Collection[str]) -> dict[Any, Any]:
    names = {".".join(key.removeprefix("objective.").split(".")[:2]) for key in tuned}
    return {key: value for key, value in fields.items() if (key[1] if isinstance(key, tuple) else key) not in names}


def _varied_parameters(fields: Mapping[str, Mapping[Any, Any]]) -> set[tuple[str, str, str]]:
    """(axis, value, parameter) where the parameter differs between configurations with that value."""
    seen: dict[tuple[str, str, str], set[str]] = {}
    for row in fields.values():
        for key, value in row.items():
            if isinstance(key, tuple) and row.get(key[0]) is not None:
                seen.setdefault((key[0], str(row[key[0]]), key[1]), set()).add(shown(value))
    return {key for key, values in seen.items() if len(values) > 1}


def _label(key: str, row: Mapping[Any, Any], parameters: set[tuple[str, str, str]]) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if key not in AXES:
        return shown(value)
    extra = ", ".join(
        f"{name[1]}={shown(item)}"
        for name, item in row.items()
        if isinstance(name, tuple) and name[0] == key and (key, str(value), name[1]) in parameters
    )
    return f"{shown(value)}({extra})" if extra else shown(value)


def _title(key: str) -> str:
    if key in AXES:
        return AXES[key].title
    if key in PARAMETERS:
        return _TITLES.get(key, key)
    return _TITLES.get(key) or key.removeprefix("training.").replace("_", " ")


def _rank(key: str) -> tuple[int, int]:
    order = ["algorithm", *AXES, *PARAMETERS]
    return (0, order.index(key)) if key in order else (1, 0)


def _ordered(key: str, values: list[str]) -> list[str]:
    catalogue = list(AXES[key].values) if key in AXES else []

    def position(value: str) -> tuple[int, float, str]:
        name = value.partition("(")[0]
        if name in catalogue:
            return 0, catalogue.index(name), value
        try:
            return 1, float(value), ""
        except ValueError:
            return 2, 0.0, ""

    return sorted(values, key=position)
