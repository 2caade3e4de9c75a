"""The sections of a grid file beside the objective, each a frozen, validated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from grid.catalogue import is_import_path
from grid.fields import Count, NonNegative, Positive, Section
from grid.mistake import Mistake
from grid.task_sections import (
    TASKS,
    AdditionTask,
    BanditTask,
    CalculatorTask,
    CountdownTask,
    CustomTask,
    FileTask,
    Gsm8kTask,
    MathTask,
    RewardTable,
    RewardTerm,
    TabularTask,
    TaskSection,
    check_table,
)

__all__ = [
    "NUMERICALLY_IDLE",
    "POLICIES",
    "TASKS",
    "AdditionTask",
    "BanditTask",
    "CalculatorTask",
    "CountdownTask",
    "CustomTask",
    "FileTask",
    "Gsm8kTask",
    "HfPolicy",
    "MathTask",
    "PolicySection",
    "Resources",
    "RewardTerm",
    "Section",
    "TabularTask",
    "TaskSection",
    "TinyPolicy",
    "TrainingSection",
    "load_section",
]


class TinyPolicy(Section):
    """A small transformer from scratch, warmed up on the task's solutions; it is also the reference policy."""

    name: Literal["tiny"] = "tiny"
    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    hidden: Annotated[int, Field(ge=4, le=4096)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    heads: Count = 4
    kv_heads: Count | None = None
    intermediate: Count = 192
    warmup_accuracy: Annotated[float, Field(ge=0.2, le=0.5)] = 0.35
    warmup_updates_max: Count = 4000
    warmup_seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["float32", "float64"] = "float32"


class HfPolicy(Section):
    """A pretrained causal language model from a hub id or a folder."""

    name: Literal["hf"] = "hf"
    model: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"


PolicySection = TinyPolicy | HfPolicy
POLICIES: dict[str, type[Section]] = {"tiny": TinyPolicy, "hf": HfPolicy}


class TrainingSection(Section):
    """How a cell is trained.

    ``updates`` counts optimizer updates. A rollout of ``prompts`` × ``group_size`` trajectories serves
    ``updates_per_rollout`` passes of ``minibatches`` updates each. One call of a task's reward may take
    ``reward_seconds``.
    """

    updates: Count = 100
    prompts: Count = 16
    group_size: Count = 8
    updates_per_rollout: Count = 1
    minibatches: Count = 1
    lag: Annotated[int, Field(ge=0)] = 0
    behaviour: Literal["policy", "reference"] = "policy"
    lr: NonNegative = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    adam_eps: Positive = 1e-8
    clip_norm: Positive | None = 1.0
    max_new_tokens: Count | None = None
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    micro_batch: Count | None = None
    evaluate_every: Count = 10
    evaluation_prompts: Count = 64
    evaluation_samples: Count = 4
    checkpoint_updates: Count = 50
    checkpoint_seconds: Positive = 60.0
    reward_seconds: Positive = 60.0

    @property
    def on_policy(self) -> bool:
        """Whether every importance ratio is 1 by construction."""
        return self.updates_per_rollout * self.minibatches == 1 and self.lag == 0 and self.behaviour == "policy"

    @property
    def updates_of_a_rollout(self) -> int:
        """Optimizer updates that one rollout serves."""
        return self.updates_per_rollout * self.minibatches


NUMERICALLY_IDLE = ("checkpoint_updates", "checkpoint_seconds", "reward_seconds")
"""Training settings that cannot change any number of a cell, hence no part of its identity."""


class Resources(Section):
    """What one job gets, and how many cells it runs; locally, ``cells_per_job`` and ``max_parallel`` count."""

    cells_per_job: Count | None = None
    max_parallel: Count | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Count = 1
    memory_gb: Positive = 4.0
    minutes: Count = 240
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: Count = 1
    exclude: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    profile: str | None = None


def load_section(kind: str, given: object) -> Section:
    """A section from its mapping.

    Args:
        kind: ``task``, ``policy``, ``training`` or ``resources``.
        given: what stands in the grid file.

    Raises:
        Mistake: naming the key, the value, and the nearest valid one.
    """
    if not isinstance(given, Mapping):
        raise Mistake("not a mapping", key=kind, value=given)
    model = _model(kind, given)
    try:
        section = model.model_validate(dict(given))
    except ValidationError as error:
        raise _mistake(kind, model, error) from None
    if isinstance(section, TrainingSection):
        _check_training(section)
    if isinstance(section, TinyPolicy):
        _check_tiny(section)
    if isinstance(section, RewardTable):
        check_table(section)
    return section


def _model(kind: str, given: Mapping[str, Any]) -> type[Section]:
    if kind == "training":
        return TrainingSection
    if kind == "resources":
        return Resources
    models = TASKS if kind == "task" else POLICIES
    name = given.get("name")
    if name is None:
        raise Mistake("the name is missing", key=f"{kind}.name", allowed=models)
    if kind == "task" and is_import_path(name):
        return CustomTask
    if not isinstance(name, str) or name not in models:
        raise Mistake(f"unknown {kind}", key=f"{kind}.name", value=name, allowed=models)
    return models[name]


def _mistake(kind: str, model: type[Section], error: ValidationError) -> Mistake:
    first = error.errors()[0]
    mistake = first.get("ctx", {}).get("error")
    if isinstance(mistake, Mistake):
        return mistake.located(prefix=kind)
    key = ".".join((kind, *(str(part) for part in first["loc"])))
    if first["type"] == "extra_forbidden":
        return Mistake("unknown key", key=kind, value=str(first["loc"][-1]), allowed=model.model_fields)
    if first["type"] == "missing":
        return Mistake("missing", key=key)
    allowed = _choices(str(first.get("ctx", {}).get("expected", ""))) if first["type"] == "literal_error" else ()
    problem = "unknown value" if allowed else first["msg"][:1].lower() + first["msg"][1:]
    return Mistake(problem, key=key, value=first.get("input"), allowed=allowed)


def _choices(expected: str) -> tuple[str, ...]:
    return tuple(word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",") if word.strip())


def _check_training(section: TrainingSection) -> None:
    if section.prompts % section.minibatches:
        raise Mistake(
            f"does not divide the {section.prompts} prompts of a rollout: minibatches are whole groups",
            key="training.minibatches",
            value=section.minibatches,
        )


def _check_tiny(section: TinyPolicy) -> None:
    if section.hidden % section.heads or (section.hidden // section.heads) % 2:
        raise Mistake(
            "must be an even multiple of policy.heads",
            key="policy.hidden",
            value=section.hidden,
            hint=f"heads: {section.heads}.",
        )
    if section.kv_heads is not None and section.heads % section.kv_heads:
        raise Mistake("must divide policy.heads", key="policy.kv_heads", value=section.kv_heads)
