"""From variants to cells: fills in named algorithms, drops parameters that do not apply, reports idle settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klab.grid.algorithms import load_algorithm
from klab.grid.catalogue import AXES, PARAMETERS, value_of
from klab.grid.cell import Cell
from klab.grid.engines import refuse_unsupported
from klab.grid.errors import UserError
from klab.grid.kl_settings import idle_kl_settings, refuse_kl_settings
from klab.grid.objective import Objective, split_value
from klab.grid.parameters import TERMS
from klab.grid.schema.sampler import check_sampled_policy
from klab.grid.schema.sections import PolicySection, Section, TrainingSection, load_section
from klab.grid.user_code import names_user_code
from klab.grid.variant import Variant

_TRAINING_DEFAULTS = {name: setting.default for name, setting in TrainingSection.model_fields.items()}
"""Defaults of the training section: what a setting without effect is replaced by, so that ids do not depend on it."""

NEUTRAL = {"divergence": "reverse", "placement": "none", "ratio": "none", "weight": "one", "path": "score"}
"""Values that mean "nothing": writing one on an axis that is idle anyway is correct, not a setting without effect."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A written objective section, and the objective that it describes."""

    written: Mapping[str, Any]
    algorithm: str | None
    objective: Objective


class CellBuilder:
    """Builds the cells of one grid file, validating each distinct section once, and records which settings act in some
    cell.

    Args:
        dtype: what `policy.dtype: auto` means in this file.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self._dtype = dtype
        self._precise: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        self._sections: dict[str, Section] = {}
        self._seen: dict[int, tuple[Mapping[str, Any], Section]] = {}
        self._chosen: dict[int, _Chosen] = {}
        self._objectives: dict[str, Objective] = {}
        self._settings: dict[Objective, Mapping[str, Any]] = {}
        self._merged: dict[tuple[str, int], tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        self._reasons: dict[str, str] = {}
        self._acting: set[str] = set()
        self._accounted: set[tuple[int, bool]] = set()

    def cell(self, variant: Variant, seed: int, count: bool = True) -> Cell:
        """The cell of a variant; with ``count``, `refuse_idle` takes its settings into account."""
        task = self._section("task", variant.sections["task"])
        policy = self._section("policy", self._written_policy(variant))
        chosen = self._objective(variant.sections["objective"])
        training = self._training(variant, chosen.algorithm)
        _refuse_groups_of_one(training, chosen.objective)
        _refuse_unseen_penalty(training, chosen.objective)
        if training.sampler is not None:
            check_sampled_policy(training.sampler, policy)  # type: ignore[arg-type]
        refuse_unsupported(training, policy, chosen.objective)  # type: ignore[arg-type]
        idle = idle_training(training, chosen.objective)
        if count:
            self._account(chosen, training.on_policy)
            self._account_training(variant.sections["training"], idle)
        training = _with_old_logprobs(_without_idle(training, idle), policy, idle)  # type: ignore[arg-type]
        _refuse_sharded(policy, training)
        refuse_kl_settings(training, policy, chosen.objective)  # type: ignore[arg-type]
        spellings = (variant.spelling,)
        return Cell(chosen.objective, task, policy, training, seed, chosen.algorithm, spellings)  # type: ignore[arg-type]

    def settings(self, variant: Variant, section: str) -> Mapping[str, Any]:
        """The settings of a variant's section as exclude rules see them, the named algorithm's filled in.

        In the objective, an axis is a mapping of its value's name and parameters, and every parameter also stands by
        itself.
        """
        if section == "task":
            return variant.sections[section]
        if section == "policy":
            return self._written_policy(variant)
        chosen = self._objective(variant.sections["objective"])
        if section == "training":
            return self._written_training(variant, chosen.algorithm)
        if chosen.objective not in self._settings:
            values = {
                axis: {"name": getattr(chosen.objective, axis), **chosen.objective.arguments(axis)} for axis in AXES
            }
            terms = {name: getattr(chosen.objective, name) for name in TERMS}
            self._settings[chosen.objective] = {**chosen.objective.settings(), **terms, **values}
        return {**self._settings[chosen.objective], "algorithm": variant.sections["objective"].get("algorithm")}

    def refuse_idle(self) -> None:
        """Raises UserError when a written setting has an effect in none of the cells built so far."""
        for key, reason in self._reasons.items():
            if key not in self._acting:
                raise UserError(
                    f"has no effect in any cell of this grid: {reason}.",
                    key=key,
                    hint="Remove it, or change what makes it idle.",
                )

    def _section(self, kind: str, given: Mapping[str, Any]) -> Section:
        known = self._seen.get(id(given))
        if known is not None and known[0] is given:
            return known[1]
        key = f"{kind}:{given!r}"
        if key not in self._sections:
            self._sections[key] = load_section(kind, given)
        self._seen[id(given)] = given, self._sections[key]
        return self._sections[key]

    def _written_policy(self, variant: Variant) -> Mapping[str, Any]:
        """The policy section with the precision that `dtype: auto` means."""
        written = variant.sections["policy"]
        if written.get("name") != "hf" or written.get("dtype", "auto") != "auto":
            return written
        known = self._precise.get(id(written))
        if known is None or known[0] is not written:
            known = self._precise[id(written)] = written, {**written, "dtype": self._dtype}
        return known[1]

    def _training(self, variant: Variant, algorithm: str | None) -> TrainingSection:
        return self._section("training", self._written_training(variant, algorithm))  # type: ignore[return-value]

    def _written_training(self, variant: Variant, algorithm: str | None) -> Mapping[str, Any]:
        """The training settings of the named algorithm, overridden by the written ones."""
        written = variant.sections["training"]
        own = load_algorithm(algorithm).training if algorithm else {}
        if algorithm and own:
            known = self._merged.get((algorithm, id(written)))
            if known is None or known[0] is not written:
                known = self._merged[algorithm, id(written)] = written, {**own, **written}
            written = known[1]
        return written

    def _objective(self, written: Mapping[str, Any]) -> _Chosen:
        known = self._chosen.get(id(written))
        if known is None or known.written is not written:
            algorithm, layered = _layers(written)
            applicable = _applicable(layered)
            key = repr(applicable)
            if key not in self._objectives:
                self._objectives[key] = Objective(**applicable)
            known = self._chosen[id(written)] = _Chosen(written, algorithm, self._objectives[key])
        return known

    def _account_training(self, written: Mapping[str, Any], idle: Mapping[str, str]) -> None:
        sampler = written.get("sampler")
        names = [*written, *(f"sampler.{name}" for name in (sampler if isinstance(sampler, Mapping) else ()))]
        for name in names:
            if name in idle:
                self._reasons.setdefault(f"training.{name}", idle[name])
            else:
                self._acting.add(f"training.{name}")

    def _account(self, chosen: _Chosen, on_policy: bool) -> None:
        if (id(chosen.written), on_policy) in self._accounted:
            return
        self._accounted.add((id(chosen.written), on_policy))
        objective = chosen.objective
        used = {name for axis in AXES for name in objective.arguments(axis)}.union(TERMS)
        idle = objective.canonical_form(on_policy).idle
        for key, value in chosen.written.items():
            if key == "algorithm":
                continue
            names = [key]
            if isinstance(value, Mapping) and not names_user_code(value.get("name")):
                names += [name for name in value if name != "name"]
            for name in names:
                if name in idle and getattr(objective, name) == NEUTRAL.get(name):
                    continue
                if name in idle:
                    self._reasons.setdefault(name, idle[name])
                elif name in AXES or name in used:
                    self._acting.add(name)
                else:
                    self._reasons.setdefault(name, "no chosen value uses this parameter")


def _refuse_groups_of_one(training: TrainingSection, objective: Objective) -> None:
    """Raises UserError where the reward would cancel: a trajectory compared with itself learns nothing from it."""
    if training.group_size == 1 and value_of("advantage", objective.advantage).group_centred:
        raise UserError(
            f"the advantage {objective.advantage!r} of a group of one does not depend on the reward",
            key="training.group_size",
            value=1,
            hint="Sample 2 or more completions per prompt, or choose an advantage that does not compare within the "
            "group, such as raw, batch_norm or gae.",
        )


def _refuse_unseen_penalty(training: TrainingSection, objective: Objective) -> None:
    """Raises UserError where an advantage would not see the penalty of long completions."""
    if training.overlong_buffer is not None and "reward_terms" in value_of("advantage", objective.advantage).needs:
        raise UserError(
            f"the advantage {objective.advantage!r} sees the terms of the task's reward, but no penalty of length",
            key="training.overlong_buffer",
            value=training.overlong_buffer,
            hint="Leave it out, or give the task a reward term for the length.",
        )


def _without_idle(training: TrainingSection, idle: Mapping[str, str]) -> TrainingSection:
    """The section with the default of every setting that has no effect."""
    defaults = {name: _TRAINING_DEFAULTS[name] for name in idle if "." not in name}
    sampler = training.sampler
    if sampler is not None and "sampler" not in defaults:
        fields = type(sampler).model_fields
        within = [name for _, _, name in (key.partition("sampler.") for key in idle) if name]
        defaults["sampler"] = sampler.model_copy(update={name: fields[name].default for name in within})
    changed = {name: value for name, value in defaults.items() if getattr(training, name) != value}
    return training.model_copy(update=changed) if changed else training


def _with_old_logprobs(training: TrainingSection, policy: PolicySection, idle: Mapping[str, str]) -> TrainingSection:
    """The section with what `old_logprobs: auto` means for this policy where that is not what the sampler recorded, and
    with `auto` where the setting asks for just that."""
    asked = training.old_logprobs
    meant = {"auto": "trainer"} if policy.dtype == "bfloat16" else {"sampler": "auto"}
    if asked not in meant or "old_logprobs" in idle:
        return training
    return training.model_copy(update={"old_logprobs": meant[asked]})


def _refuse_sharded(policy: Section, training: TrainingSection) -> None:
    """Raises UserError where a model whose weights are shared out among processes cannot be trained so."""
    if getattr(policy, "sharding", "none") == "none":
        return
    hint = "Leave policy.sharding out: every process then holds the whole model."
    if training.critic is not None:
        raise UserError(
            "critics are not shared out among processes, as policy.sharding: full asks",
            key="training.critic",
            value=training.critic.kind,
            hint=hint,
        )
    if training.sampler is not None and training.sampler.engine == "vllm":
        raise UserError(
            "is given whole models, and policy.sharding: full shares them out among processes",
            key="training.sampler.engine",
            value="vllm",
            allowed=("klab",),
            hint=hint,
        )


def idle_training(training: TrainingSection, objective: Objective) -> dict[str, str]:
    """Training settings that have no effect with this objective, and why."""
    idle = {}
    if training.on_policy:
        idle["old_logprobs"] = "every ratio is 1: one update per rollout"
    elif training.engine == "trl":
        idle["old_logprobs"] = "with training.engine: trl the trainer always computes them"
    elif training.sampler is not None:
        idle["old_logprobs"] = "beside training.sampler the trainer always computes them"
    if training.equal_groups != "refill":
        idle["refill_rounds"] = "only equal_groups: refill draws again"
    if training.engine != "trl":
        idle["trl"] = "only training.engine: trl reads it"
    if training.overlong_buffer is None:
        idle["overlong_penalty"] = "there is no overlong_buffer"
    if training.sampler is not None:
        idle |= {f"sampler.{name}": reason for name, reason in training.sampler.idle.items()}
    idle |= idle_kl_settings(training, objective)
    if training.critic is not None and objective.advantage != "gae" and not names_user_code(objective.advantage):
        idle["critic"] = "only the advantage 'gae' reads a critic's values"
    if training.trust_region is not None and training.on_policy:
        idle["trust_region"] = "every ratio is 1: one update per rollout"
    return idle


def _layers(section: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The named algorithm of an objective section, and its settings overridden by the written ones."""
    written = dict(section)
    named = written.pop("algorithm", None)
    if named is None:
        return None, written
    overrides: dict[str, Any] = {}
    if isinstance(named, Mapping):
        overrides = {key: value for key, value in named.items() if key != "name"}
        named = named.get("name")
    if not isinstance(named, str):
        raise UserError("not a name", key="algorithm", value=named)
    for key in overrides:
        if key not in AXES and key not in PARAMETERS:
            raise UserError("unknown key", key="algorithm", value=key, allowed=[*AXES, *PARAMETERS])
    return named, {**load_algorithm(named).objective, **overrides, **written}


def _applicable(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the parameters that no chosen value uses; those are validated, too."""
    chosen = {axis: split_value(axis, written.get(axis, AXES[axis].default)) for axis in AXES}
    used = {name for axis, (value, _) in chosen.items() for name in value_of(axis, value).parameters}.union(TERMS)
    own = {name for _, extra in chosen.values() for name in extra}
    result: dict[str, Any] = {}
    for key, value in written.items():
        if key in AXES:
            result[key] = dict(value) if isinstance(value, Mapping) else value
            continue
        if key not in PARAMETERS:
            raise UserError("unknown key", key=key, value=value, allowed=[*AXES, *PARAMETERS])
        PARAMETERS[key].validate(value)
        if key in used and key not in own:
            result[key] = value
    return result
