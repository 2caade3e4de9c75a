"""Loading and checking the sections of a grid file other than the objective; and the `resources` section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from klab.grid.errors import UserError
from klab.grid.schema.analysis import AnalysisPlan, Stop
from klab.grid.schema.base import Count, Minutes, Positive, Section
from klab.grid.schema.budget import Budget
from klab.grid.schema.claim import Claim
from klab.grid.schema.evaluate import Evaluations
from klab.grid.schema.kl_term import BetaControl, ReferencePolicy
from klab.grid.schema.notify import Notify
from klab.grid.schema.policy import POLICIES, HfPolicy, Lora, PolicySection, ScratchPolicy, SmallPolicy, TinyPolicy
from klab.grid.schema.sampler import Rejection, Sampler, check_sampler
from klab.grid.schema.task import (
    TASKS,
    AdditionTask,
    BanditTask,
    CalculatorTask,
    CountdownTask,
    CustomTask,
    FileTask,
    Gsm8kTask,
    MathTask,
    ProxyTask,
    ReasoningTask,
    RewardTable,
    RewardTerm,
    TabularTask,
    TaskSection,
    VerifiersTask,
    WordProblemsTask,
    check_table,
)
from klab.grid.schema.training import (
    NUMERICALLY_IDLE,
    Critic,
    EntropyControl,
    StopBounds,
    StopRule,
    TrainingSection,
    TrustRegion,
)
from klab.grid.user_code import names_user_code

__all__ = [
    "NUMERICALLY_IDLE",
    "POLICIES",
    "TASKS",
    "AdditionTask",
    "AnalysisPlan",
    "BanditTask",
    "BetaControl",
    "Budget",
    "CalculatorTask",
    "Claim",
    "CountdownTask",
    "Critic",
    "CustomTask",
    "EntropyControl",
    "Evaluations",
    "FileTask",
    "Gsm8kTask",
    "HfPolicy",
    "Launcher",
    "Lora",
    "MathTask",
    "Notify",
    "PolicySection",
    "ProxyTask",
    "ReasoningTask",
    "ReferencePolicy",
    "Rejection",
    "Resources",
    "RewardTerm",
    "Sampler",
    "Section",
    "SmallPolicy",
    "Stop",
    "StopBounds",
    "StopRule",
    "TabularTask",
    "TaskSection",
    "TinyPolicy",
    "TrainingSection",
    "TrustRegion",
    "VerifiersTask",
    "WordProblemsTask",
    "default_of",
    "load_section",
    "parse_gpus",
]


class Launcher(Section):
    """What starts the processes that train a cell of `training.engine: trl`: torchrun, or accelerate with a
    configuration of its own (FSDP, DeepSpeed). klab adds the numbers of processes and nodes, and where they meet.
    """

    accelerate: str | None = None
    """Configuration file of accelerate, relative to the grid file or to the working folder; null: torchrun."""


class Resources(Section):
    """What one job gets, and how many cells it trains.

    On this machine ``cells_per_job``, ``max_parallel``, ``cpus``, ``gpus`` and ``processes`` apply, and ``memory_gb``
    is compared with what cells need at least; the others are Slurm's.
    """

    cells_per_job: Count | None = None
    """Cells that one job trains, stacked where their shapes agree; null: planned from measured step times."""
    processes: Count | None = None
    """Processes per node that train every cell of the job together; null: one per GPU, or one."""
    max_parallel: Count | None = None
    """Most jobs at a time; null: as many as the machine or the cluster lets."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs per node, with a type if need be: `a100:4`."""
    gpu_type: str | None = None
    """Type of the GPUs, as Slurm names it; `gpus: a100:4` sets both."""
    cpus: Count = 1
    """Threads per process."""
    memory_gb: Positive = 4.0
    """Memory per node, in GB; `klab plan` says what the cells need at least."""
    minutes: Minutes = 240
    """Time limit of a job: minutes, `hours:minutes:seconds` or `days-hours:minutes:seconds`."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    qos: str | None = None
    """Slurm quality of service."""
    constraint: str | None = None
    """Slurm node constraint."""
    nodes: Count = 1
    """Nodes per job."""
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    """Network interface by which processes on several nodes meet and exchange numbers (`ib0`), of the same name on all;
    null: that of the first node's host name."""
    collective_minutes: Minutes = 60
    """Longest that processes of a job wait for one another while all of them are alive, for slow rewards say."""
    exclude: str | None = None
    """Slurm nodes to avoid."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the job (`module load …`)."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further sbatch options by name (`mail-type: END`), which replace klab's own; false leaves an option out."""
    python: str | None = None
    """Python on the nodes, when it is not the launcher's; inside the container where there is one (`python3`)."""
    container: str | None = None
    """Image in which jobs run, by apptainer (`image.sif`); klab must be installed in it."""
    launcher: Launcher | None = None
    """What starts the processes of cells of `training.engine: trl`: `torchrun`, or `{accelerate: config.yaml}`; null:
    torchrun on this machine, where there are several."""
    profile: str | None = None
    """Name of a profile in the user's config file, whose settings override these."""

    @model_validator(mode="before")
    @classmethod
    def _split_gpu_type(cls, given: Any) -> Any:
        """Reads `gpus: a100:4` as four GPUs of the type a100."""
        gpus = given.get("gpus") if isinstance(given, Mapping) else None
        if isinstance(gpus, str):
            return {**given, **parse_gpus(gpus, "gpus")}
        return given

    @field_validator("launcher", mode="before")
    @classmethod
    def _named_launcher(cls, given: Any) -> Any:
        """`torchrun` stands for a launcher without a configuration."""
        if isinstance(given, str) and given != "torchrun":
            raise UserError(
                "unknown launcher", key="launcher", value=given, allowed=("torchrun",), hint="Or {accelerate: FILE}."
            )
        return {} if given == "torchrun" else given

    @property
    def processes_per_node(self) -> int:
        return self.processes or max(1, self.gpus)

    @property
    def processes_per_job(self) -> int:
        """The processes of a job, over all of its nodes, which train together."""
        return self.nodes * self.processes_per_node


def parse_gpus(text: str, key: str) -> dict[str, Any]:
    """`gpus`, and `gpu_type` where one is named, from `4` or `a100:4`.

    Args:
        key: where the text stands, for the error.

    Raises:
        UserError: it is neither.
    """
    kind, colon, count = text.strip().rpartition(":")
    if not count.isdecimal() or (colon and not kind):
        raise UserError("not a number of GPUs, nor type:number", key=key, value=text, hint="Write 4, or a100:4.")
    return {"gpus": int(count)} | ({"gpu_type": kind} if kind else {})


def load_section(kind: str, given: object) -> Section:
    """A section from its mapping.

    Args:
        kind: ``task``, ``policy``, ``training``, ``resources``, ``analysis``, ``budget``, ``notify``, ``evaluate``, or
            ``claims.0``, the first entry of `claims`.
        given: what the grid file contains.

    Raises:
        UserError: naming the key, the value, and the nearest valid one.
    """
    if not isinstance(given, Mapping):
        raise UserError("not a mapping", key=kind, value=given)
    model = _model(kind, given)
    try:
        section = model.model_validate(dict(given))
    except ValidationError as error:
        raise _user_error(kind, model, error) from None
    if isinstance(section, TrainingSection):
        _check_training(section)
    if isinstance(section, ScratchPolicy):
        _check_heads(section)
    if isinstance(section, HfPolicy):
        _check_sharding(section)
    if isinstance(section, Resources) and section.gpus and section.processes_per_node > section.gpus:
        raise UserError(
            f"each process needs a GPU of its own, and a node has {section.gpus} of them for the job",
            key="resources.processes",
            value=section.processes,
            hint="resources.gpus: 0 trains on processors.",
        )
    if isinstance(section, RewardTable):
        check_table(section)
    return section


def default_of(kind: str, given: Mapping[str, Any], field: str) -> Any:
    """What a field of a section is where the grid file does not set it; None for one that has no default."""
    models: Mapping[str, type[Section]] = {"training": TrainingSection}
    model = {**TASKS, **POLICIES, **models}.get(kind if kind in models else str(given.get("name")))
    if model is None or field not in model.model_fields or model.model_fields[field].is_required():
        return None
    return model.model_fields[field].default


_UNNAMED: Mapping[str, type[Section]] = {
    "training": TrainingSection,
    "resources": Resources,
    "analysis": AnalysisPlan,
    "budget": Budget,
    "notify": Notify,
    "evaluate": Evaluations,
    "claims": Claim,
}
"""Sections of which there is one kind."""


def _model(kind: str, given: Mapping[str, Any]) -> type[Section]:
    if (section := kind.partition(".")[0]) in _UNNAMED:
        return _UNNAMED[section]
    models = TASKS if kind == "task" else POLICIES
    name = given.get("name")
    if name is None:
        raise UserError("the name is missing", key=f"{kind}.name", allowed=models)
    if kind == "task" and names_user_code(name):
        return CustomTask
    if not isinstance(name, str) or name not in models:
        raise UserError(f"unknown {kind}", key=f"{kind}.name", value=name, allowed=models)
    return models[name]


_NUMBERS_EXPECTED = {
    "int_parsing": "a whole number belongs here",
    "int_from_float": "a whole number belongs here",
    "int_type": "a whole number belongs here",
    "float_parsing": "a number belongs here",
    "float_type": "a number belongs here",
}
"""What pydantic's error types mean, in the user's words."""


def _user_error(kind: str, model: type[Section], error: ValidationError) -> UserError:
    errors = error.errors()
    # where a required key is missing, a misspelt one says more
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    first = first if errors[0]["type"] == "missing" else errors[0]
    cause = first.get("ctx", {}).get("error")
    path = [str(part) for part in first["loc"] if "[" not in str(part)]  # a union's branch is no part of the file
    key = ".".join((kind, *path))
    if isinstance(cause, UserError):
        if path and cause.key == path[-1]:  # of a field of a section within the section
            return cause.with_location(prefix=".".join((kind, *path[:-1])))
        return cause.with_location(prefix=kind if cause.key else key)
    if first["type"] == "string_type" and isinstance(first.get("input"), int | float):
        written = first["input"]
        return UserError("text belongs here", key=key, value=written, hint=f"Put it in quotes: '{written}'.")
    if first["type"] == "extra_forbidden":
        inner = _inner(model, path[:-1])
        return UserError("unknown key", key=".".join((kind, *path[:-1])), value=path[-1], allowed=inner.model_fields)
    if first["type"] == "missing":
        return UserError("missing", key=key)
    allowed = _choices(str(first.get("ctx", {}).get("expected", ""))) if first["type"] == "literal_error" else ()
    if first["type"] in _NUMBERS_EXPECTED:
        return UserError(_NUMBERS_EXPECTED[first["type"]], key=key, value=first.get("input"))
    problem = "unknown value" if allowed else first["msg"][:1].lower() + first["msg"][1:]
    return UserError(problem, key=key, value=first.get("input"), allowed=allowed)


def _inner(model: type[Section], path: Sequence[str]) -> type[Section]:
    """The section inside a section that a path of keys leads to."""
    for name in path:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        found = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
        model = next((each for each in found if issubclass(each, Section)), model)
    return model


def _choices(expected: str) -> tuple[str, ...]:
    return tuple(word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",") if word.strip())


def _check_training(section: TrainingSection) -> None:
    if section.prompts % section.minibatches:
        raise UserError(
            f"does not divide the {section.prompts} prompts of a rollout: minibatches are whole groups",
            key="training.minibatches",
            value=section.minibatches,
        )
    if section.completions_at_the_end < section.evaluation_samples:
        raise UserError(
            f"is less than the {section.evaluation_samples} of training.evaluation_samples, of which pass@k is made",
            key="training.final_evaluation_samples",
            value=section.final_evaluation_samples,
        )
    if section.max_new_tokens is not None and (section.overlong_buffer or 0) > section.max_new_tokens:
        raise UserError(
            f"exceeds the {section.max_new_tokens} tokens of training.max_new_tokens",
            key="training.overlong_buffer",
            value=section.overlong_buffer,
        )
    if section.equal_groups != "keep" and section.group_size == 1:
        raise UserError("the rewards of a group of one are always equal", key="training.group_size", value=1)
    if section.sampler is not None:
        check_sampler(section.sampler, section.top_p, section.temperature)
    if section.critic is not None:
        _check_critic(section.critic)
    if section.stop is not None:
        _check_stop(section.stop, section)


def _check_stop(rule: StopRule, training: TrainingSection) -> None:
    """Refuse rules that look at nothing, or at fewer evaluations than they average."""
    every = training.evaluate_every
    first = -(-rule.after // every) * every
    if first >= training.updates:
        raise UserError(
            f"is never looked at: there is no evaluation between it and the last of {training.updates} updates",
            key="training.stop.after",
            value=rule.after,
            hint=f"training.evaluate_every is {every}.",
        )
    if rule.over > first // every:
        raise UserError(
            f"is more than the {first // every} evaluations that a cell has by update {first}",
            key="training.stop.over",
            value=rule.over,
            hint=f"Write a larger training.stop.after, or a smaller training.evaluate_every than {every}.",
        )


def _check_critic(critic: Critic) -> None:
    if critic.kind == "model" and critic.coefficient != Critic().coefficient:
        raise UserError(
            "has no effect on a critic of kind 'model'",
            key="training.critic.coefficient",
            value=critic.coefficient,
            hint="Its step size is training.critic.lr; or choose kind: head.",
        )


def _check_sharding(section: HfPolicy) -> None:
    if section.sharding == "full" and section.engine == "stacked":
        raise UserError(
            "weights are shared out among processes on the transformers engine only",
            key="policy.sharding",
            value="full",
            hint="Leave policy.engine out, or write transformers; sharding: none trains in the stacked engine.",
        )
    if section.offload != "none" and section.sharding == "none":
        raise UserError(
            "has no effect without policy.sharding: full",
            key="policy.offload",
            value=section.offload,
            allowed=("none",),
        )


def _check_heads(section: ScratchPolicy) -> None:
    if section.hidden % section.heads or (section.hidden // section.heads) % 2:
        raise UserError(
            "must be an even multiple of policy.heads",
            key="policy.hidden",
            value=section.hidden,
            hint=f"heads: {section.heads}.",
        )
    if section.kv_heads is not None and section.heads % section.kv_heads:
        raise UserError("must divide policy.heads", key="policy.kv_heads", value=section.kv_heads)
