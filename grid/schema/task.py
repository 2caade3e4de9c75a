"""The task section of a grid file: one model per task, and the terms that a reward is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from klab.grid.errors import UserError
from klab.grid.schema.base import Count, GrownSection, NonNegative, Positive, Section
from klab.grid.user_code import names_user_code

REWARDS = ("exact", "math", "format")
"""Rewards that come with the package: the same text, the same mathematical value, a marked final answer."""

LARGEST_TABLE = 2**16
"""Most entries of a reward table."""


class AdditionTask(GrownSection):
    """Sums of two n-digit numbers; the answer is written with the least significant digit first."""

    LATER = ("prompt_order",)

    name: Literal["addition"] = "addition"
    digits: Annotated[int, Field(ge=1, le=40)] = 2
    """Digits of each number."""
    prompt_order: Literal["most", "least"] = "most"
    """The digit that the summands begin with: `least` lets a tiny policy learn sums of many digits."""


class CountdownTask(Section):
    """Reach a target from given numbers with +, − and ×."""

    name: Literal["countdown"] = "countdown"
    numbers: Annotated[int, Field(ge=2, le=6)] = 3
    """Numbers that are given."""
    largest: Annotated[int, Field(ge=2, le=99)] = 9
    """Largest of them."""
    target_max: Annotated[int, Field(ge=1, le=9999)] = 30
    """Largest target."""


class CalculatorTask(Section):
    """Products of two n-digit numbers, with a calculator that answers at most ``calls`` times."""

    name: Literal["calculator"] = "calculator"
    digits: Annotated[int, Field(ge=2, le=4)] = 2
    """Digits of each number."""
    calls: Annotated[int, Field(ge=1, le=8)] = 1
    """Calculator calls per episode, at most."""


class WordProblemsTask(Section):
    """Short stories with one sentence of working per step and a marked answer, in GSM8K's manner."""

    name: Literal["word_problems"] = "word_problems"
    steps: Annotated[int, Field(ge=1, le=6)] = 1
    """How often something is added or taken away."""
    largest: Annotated[int, Field(ge=5, le=99)] = 20
    """Largest number that a problem names."""


class RewardTable(Section):
    """A reward table, drawn from ``seed`` or listed."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn rewards."""
    rewards: tuple[float, ...] | None = None
    """The rewards, one per entry; null: drawn from `seed`."""

    @property
    def size(self) -> int:
        """Entries of the table."""
        return 1


class BanditTask(RewardTable):
    """One token, one reward per arm."""

    name: Literal["bandit"] = "bandit"
    arms: Annotated[int, Field(ge=2, le=26)] = 4
    """Number of arms."""

    @property
    def size(self) -> int:
        return self.arms


class TabularTask(RewardTable):
    """``horizon`` tokens over ``symbols`` letters, one reward per word, words in lexicographic order."""

    name: Literal["tabular"] = "tabular"
    symbols: Annotated[int, Field(ge=2, le=26)] = 3
    """Letters of the alphabet, V."""
    horizon: Annotated[int, Field(ge=1, le=16)] = 2
    """Tokens of a word, H; the table has V^H rewards."""

    @property
    def size(self) -> int:
        return int(self.symbols**self.horizon)


class StringsTask(Section):
    """Strings of a small alphabet with a graded reward in 0..1: weights of symbols and of pairs of neighbours, drawn
    from ``seed``, less the cost of repetition. The starting policy writes strings at random."""

    name: Literal["strings"] = "strings"
    symbols: Annotated[int, Field(ge=2, le=26)] = 8
    """Letters of the alphabet."""
    length: Annotated[int, Field(ge=2, le=128)] = 16
    """Symbols of a string."""
    repetition: NonNegative = 20.0
    """Cost of repetition: it is taken off the logit of the reward, times the square of the string's concentration."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the weights."""


GoldTask = AdditionTask | CountdownTask | CalculatorTask | BanditTask | TabularTask | StringsTask
_GOLD: dict[str, type[Section]] = {
    "addition": AdditionTask,
    "countdown": CountdownTask,
    "calculator": CalculatorTask,
    "bandit": BanditTask,
    "tabular": TabularTask,
    "strings": StringsTask,
}


class ProxyTask(Section):
    """A task whose reward is a proxy: a small reward model, trained on pairs of completions of the starting policy that
    the ``gold`` task's own reward ranks. Its logit is scaled to mean 0 and standard deviation 1 over completions of the
    starting policy. The gold reward is recorded as a part, and judges what is correct."""

    name: Literal["proxy"] = "proxy"
    gold: GoldTask
    """The task whose reward is the truth: a name, or a mapping with `name` and its settings."""
    pairs: Count = 256
    """Pairs of completions with different gold rewards that the reward model learns from."""
    layers: Count = 1
    """Layers of the reward model."""
    hidden: Annotated[int, Field(ge=8, multiple_of=8)] = 32
    """Width of the reward model."""
    epochs: Count = 20
    """Passes over the pairs."""
    proxy_seed: Annotated[int, Field(ge=0)] | None = 0
    """Seed of the reward model: its first weights, its pairs and their order; null: the cell's own, so that every seed
    has a reward model of its own and differences between seeds include those between reward models."""

    def of_cell(self, seed: int) -> ProxyTask:
        """This section with the reward model's seed, for a cell of the given seed."""
        return self if self.proxy_seed is not None else self.model_copy(update={"proxy_seed": seed})

    @field_validator("gold", mode="before")
    @classmethod
    def _gold(cls, given: object) -> object:
        section = {"name": given} if isinstance(given, str) else given
        name = section.get("name") if isinstance(section, Mapping) else getattr(section, "name", None)
        if name not in _GOLD:
            raise UserError(
                "not a task whose reward is known exactly",
                key="gold",
                value=name,
                allowed=_GOLD,
                hint="With a dataset of yours, name a reward model of yours: reward: [{model: FOLDER}, ...].",
            )
        if isinstance(section, Mapping):
            for key in section:
                if key not in _GOLD[name].model_fields:
                    raise UserError("unknown key", key="gold", value=str(key), allowed=_GOLD[name].model_fields)
            return _GOLD[str(name)].model_validate(section)
        return section


REWARD_MODEL = tuple(name for name in ProxyTask.model_fields if name not in ("name", "gold"))
"""Fields of a proxy that say how its reward model is made: what they vary is an axis, and not another task."""


def same_task(task: Section) -> str:
    """A text that two sections have in common where cells may be compared: they are one task."""
    return task.model_dump_json(exclude=set(REWARD_MODEL) if isinstance(task, ProxyTask) else None)


class RewardTerm(GrownSection):
    """One term of a reward: a function by its ``name`` or a sequence classifier as ``model``, and its weight."""

    LATER = ("messages", "part")

    name: str | None = None
    """`exact`, `math`, `format`, or a function of your own (`my_package.rewards:score`, `./rewards.py:score`)."""
    model: str | None = None
    """Hub id or folder of a sequence classifier with one output."""
    weight: float = 1.0
    """Factor of the term; 0 reports it without rewarding it."""
    part: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Name of the term in the records; null: the function's, or `model`. What is called `gold` is taken for the truth
    behind the reward, and drawn against it."""
    messages: bool = False
    """Whether a function of your own takes prompts and completions as lists of chat messages, as TRL gives them for
    conversational datasets."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardTerm:
        if (self.name is None) == (self.model is None):
            raise UserError("a reward has either a name or a model", key="reward", value=self.model_dump())
        if self.messages and not (self.name is not None and names_user_code(self.name)):
            raise UserError("only functions of your own take messages", key="reward.messages", value=True)
        if self.name is not None and self.name not in REWARDS and not names_user_code(self.name):
            raise UserError(
                "unknown reward",
                key="reward",
                value=self.name,
                allowed=REWARDS,
                hint="A function of your own is written package.module:function.",
            )
        return self


def listed_terms(given: object) -> list[Any]:
    """The terms of a reward as mappings; a name stands for `{name: …}`, and one term for a list of one."""
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    if not each:
        raise UserError("a reward needs at least one term", key="reward", value=given)
    terms = []
    for one in each:
        term = {"name": one} if isinstance(one, str) else one
        if isinstance(term, Mapping):
            for key in term:
                if key not in RewardTerm.model_fields:
                    raise UserError("unknown key", key="reward", value=str(key), allowed=RewardTerm.model_fields)
        elif not isinstance(term, RewardTerm):
            raise UserError("a reward is a name, or a mapping with a name or a model", key="reward", value=one)
        terms.append(term)
    return terms


def reward_terms(given: object) -> tuple[RewardTerm, ...]:
    """The terms of a reward, as `RewardedTask.reward` takes them.

    Raises:
        UserError: naming the key, the value, and the nearest valid one.
    """
    try:
        return tuple(RewardTerm.model_validate(term) for term in listed_terms(given))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause.with_location(prefix="task") from None
        raise UserError(first["msg"], key="task.reward", value=first["input"]) from None
    except UserError as error:
        raise error.with_location(prefix="task") from None


class RewardedTask(Section):
    """A task whose rewards are chosen in the grid file."""

    reward: tuple[RewardTerm, ...] = (RewardTerm(name="exact"),)
    """Terms of the reward: a name, a term, or a list of them."""
    reward_seconds: Positive = 10.0
    """Time limit of one call of a reward function, in seconds."""
    reward_memory_gb: Positive | None = 8.0
    """Memory limit of the reward functions' process, in GB; null: none."""
    label: str | None = None
    """The task's name in reports; by default `file(sums.parquet)` and the like."""

    @field_validator("reward", mode="before")
    @classmethod
    def _terms(cls, given: object) -> list[Any]:
        return listed_terms(given)


_MATH = (RewardTerm(name="math"), RewardTerm(name="format", weight=0.0))


class Gsm8kTask(RewardedTask):
    """Grade-school word problems whose answers end in ``#### n``; ``path`` is anything of the same columns."""

    name: Literal["gsm8k"] = "gsm8k"
    path: str = "openai/gsm8k"
    """Dataset with the columns `question` and `answer`."""
    prompt: str = "{question}\nThink step by step and end with #### and the answer.\n"
    """Template of the prompt."""
    reward: tuple[RewardTerm, ...] = _MATH


class MathTask(RewardedTask):
    r"""Competition problems whose answers stand in ``\boxed{}``; without ``path``, MATH with MATH-500 held out."""

    name: Literal["math"] = "math"
    path: str | None = None
    """Dataset with the columns `problem` and `answer`; null: MATH, with MATH-500 held out."""
    prompt: str = "{problem}\nThink step by step and put the answer in \\boxed{}.\n"
    """Template of the prompt."""
    reward: tuple[RewardTerm, ...] = _MATH


class FileTask(RewardedTask):
    """A dataset of the user's own: a file, a folder, or a hub id."""

    name: Literal["file"] = "file"
    path: str
    """File (JSONL, JSON, CSV, TSV, Parquet), folder or hub id."""
    prompt: str
    """A column, or a template with `{column}`."""
    answer: str | None = None
    """Column of the right answer."""
    solution: str | None = None
    """Column of a worked solution, on which the tiny policy is warmed up."""
    config: str | None = None
    """Configuration of a hub dataset."""
    train: str | None = None
    """Split to train on; null: `train`."""
    held_out: str | None = None
    """Split to evaluate on; null: the test or validation split, else a part that is set aside."""
    held_out_path: str | None = None
    """Another dataset to evaluate on."""
    alphabet: str | None = None
    """Characters of the tiny policy; null: those of the dataset."""
    max_new_tokens: Count = 256
    """Completion budget."""


class TrlEnvironmentTask(FileTask):
    """A dataset whose prompts are asked in an environment of your own, written as for TRL's `environment_factory`: a
    class with `reset(**columns)`, tools as its public methods and, if it owns the reward, `get_reward()`.

    Episodes are replayed from their transcripts, so that an environment must answer the same when asked the same.
    """

    name: Literal["trl_environment"] = "trl_environment"  # type: ignore[assignment]
    environment: str
    """`package.module:Class` or `./file.py:Class`."""
    calls: Count = 8
    """Calls per episode, at most."""
    opens: Annotated[str, Field(min_length=1)] = "<tool_call>"
    """What stands before a call, `{"name": …, "arguments": {…}}`."""
    closes: Annotated[str, Field(min_length=1)] = "</tool_call>"
    """What stands behind a call, at the end of a turn."""
    response: str = "\n<tool_response>\n{response}\n</tool_response>\n"
    """The answer to a call, with `{response}`, and whatever the model's chat format has between turns."""
    describe: bool = True
    """Whether prompts begin with the tools' signatures and docstrings."""
    reward: tuple[RewardTerm, ...] | None = None  # type: ignore[assignment]
    """Terms beside the environment's own reward; null: none."""

    @field_validator("reward", mode="before")
    @classmethod
    def _terms(cls, given: object) -> list[Any] | None:  # type: ignore[override]
        return None if given is None else listed_terms(given)

    @model_validator(mode="after")
    def _named(self) -> TrlEnvironmentTask:
        if not names_user_code(self.environment):
            hint = "Write package.module:Class or ./file.py:Class."
            raise UserError("names no class", key="environment", value=self.environment, hint=hint)
        head, place, _ = self.response.partition("{response}")
        if not place or not head.strip():
            hint = "Something must stand before it, by which answers are told from what the policy writes."
            raise UserError("needs a beginning and {response}", key="response", value=self.response, hint=hint)
        return self


class Named(Section):
    """Values by names that a library decides on."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @property
    def values(self) -> dict[str, Any]:
        """What is written, by name."""
        return dict(self.model_extra or {})


class ReasoningPart(Section):
    """One dataset of a composite, in ``task.datasets``."""

    dataset: str
    """A dataset of reasoning-gym."""
    weight: Positive = 1.0
    """Share of the prompts, in proportion to the other weights."""
    parameters: Named = Named()
    """Fields of the dataset's configuration, by name."""
    level: Annotated[int, Field(ge=0)] | Named | None = None
    """As `level` of the task."""


class ReasoningTask(Section):
    """Generated problems of reasoning-gym (Stojanovski et al. 2025), each dataset with its own scorer (extra
    `reasoning`).

    Generators and scorers run in a process of their own. A completion that its scorer cannot read, or that takes more
    than ``reward_seconds`` or ``reward_memory_gb``, is worth 0.
    """

    name: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str | None = None
    """A dataset of reasoning-gym: `chain_sum`, `countdown`, `zebra_puzzles`, …"""
    datasets: tuple[ReasoningPart, ...] = ()
    """Instead of `dataset`, several in one: `dataset`, `weight`, `parameters` and `level` of each."""
    parameters: Named = Named()
    """Fields of the dataset's configuration, by name: `{max_terms: 3, max_digits: 2}`."""
    level: Annotated[int, Field(ge=0)] | Named | None = None
    """Level of the dataset's curriculum: a number for all of its attributes, or a number for each, by name; every
    level includes those below. `parameters` come second. Null: the dataset's defaults."""
    prompt: str = "{question}\n"
    """Template of the prompt: `{question}` and fields of the problem's metadata that are text or numbers."""
    answer: Literal["plain", "tags"] = "plain"
    """Where the answer is: the whole completion, or what stands between the last `<answer>` and `</answer>`."""
    instruction: str | None = None
    """Before every prompt: the name of a system prompt of reasoning-gym (`default`, `simple`, `direct`, …) or a text of
    your own; null: `default` with `answer: tags`, else none."""
    size: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Problems that are generated to train on; those whose prompts are held out are left out."""
    held_out: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Problems that are generated to evaluate on; each prompt counts once."""
    seed: Annotated[int, Field(ge=0, le=2047)] = 0
    """Seed of the problems, the same for all cells; no two seeds, nor training and held-out problems, share a
    generator's seed."""
    max_new_tokens: Count | None = None
    """Completion budget; null: one token per character of the longest answer and one for the end, with `answer: tags`
    512."""
    reward_seconds: Positive = 10.0
    """Time limit of one score, in seconds."""
    reward_memory_gb: Positive | None = 8.0
    """Memory limit of the process of generators and scorers, in GB; null: none."""
    label: str | None = None
    """The task's name in reports."""

    @model_validator(mode="after")
    def _one_source(self) -> ReasoningTask:
        if (self.dataset is None) == (not self.datasets):
            raise UserError("has either a dataset or a list of datasets", key="dataset", value=self.dataset)
        names = [part.dataset for part in self.datasets]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise UserError("stands twice", key="datasets", value=repeated)
        if self.datasets and (self.parameters.values or self.level is not None):
            raise UserError(
                "has no effect beside several datasets",
                key="parameters" if self.parameters.values else "level",
                value=self.parameters.values or self.level,
                hint="Write it in the list's entries.",
            )
        return self

    @property
    def parts(self) -> tuple[ReasoningPart, ...]:
        """The datasets, also where there is one."""
        if self.dataset is None:
            return self.datasets
        return (ReasoningPart(dataset=self.dataset, parameters=self.parameters, level=self.level),)


class VerifiersTask(Section):
    """An environment written for Prime Intellect's `verifiers` (extra `verifiers`): its dataset, its system prompt, its
    rubric and, where there are several turns, its answers and tools.

    The environment runs in a process of its own, through the library's own rollout, in which the policy's turns are the
    model's responses: no server takes part. Episodes are replayed from their transcripts, so that an environment must
    answer the same when asked the same. A completion whose scoring takes more than ``reward_seconds`` or
    ``reward_memory_gb`` is worth 0.
    """

    name: Literal["verifiers"] = "verifiers"
    environment: str
    """The name of an installed environment (`gsm8k`, `owner/my-env`), or `package.module:function` or
    `./env.py:load_environment`, a function that returns one."""
    arguments: Named = Named()
    """Arguments of `load_environment`, by name."""
    prompt: str = "{messages}"
    """Template of the prompt: `{messages}`, and columns of the dataset that are text or numbers."""
    message: str = "{content}"
    """Template of each chat message in `{messages}`: `{role}` and `{content}`."""
    separator: str = "\n\n"
    """What stands between the chat messages."""
    solution: str | None = None
    """Template of a reference completion, on which the tiny policy is warmed up, made of the dataset's columns:
    `{answer}`; null: none."""
    correct: str | None = None
    """The reward function that says what is right, by giving at least 1; null: right is what earns at least 1."""
    response: str = "\n<{role}>\n{content}\n</{role}>\n"
    """The environment's messages between two turns, with `{role}`, `{content}` and whatever the model's chat format has
    there."""
    opens: Annotated[str, Field(min_length=1)] = "<tool_call>"
    """What stands before a call, `{"name": …, "arguments": {…}}`."""
    closes: Annotated[str, Field(min_length=1)] = "</tool_call>"
    """What stands behind a call."""
    describe: bool = True
    """Whether prompts begin with the tools as JSON Schema."""
    max_new_tokens: Count = 512
    """Completion budget."""
    reward_seconds: Positive = 10.0
    """Time limit of one score or answer, in seconds."""
    reward_memory_gb: Positive | None = 8.0
    """Memory limit of the environment's process, in GB; null: none."""
    label: str | None = None
    """The task's name in reports."""

    @field_validator("response")
    @classmethod
    def _told_apart(cls, given: str) -> str:
        if "{content}" not in given or not given.partition("{")[0].strip():
            hint = "Something must stand before it, by which answers are told from what the policy writes."
            raise UserError("needs a beginning and {content}", key="response", value=given, hint=hint)
        return given

    @field_validator("environment")
    @classmethod
    def _function(cls, given: str) -> str:
        """The function, also of an environment that goes by its name, which the library turns into a module's so."""
        if names_user_code(given):
            return given
        module = given.replace("-", "_").rpartition("/")[2]
        if not module.isidentifier():
            hint = "Write an environment's name, package.module:function or ./file.py:function."
            raise UserError("names no environment", key="environment", value=given, hint=hint)
        return f"{module}:load_environment"


class CustomTask(Section):
    """A task of the user's own, ``package.module:Class``; ``label`` is its name in reports, every other key goes to its
    constructor."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str
    """`package.module:Class` or `./file.py:Class`."""
    label: str | None = None
    """The task's name in reports."""


TaskSection = (
    AdditionTask
    | CountdownTask
    | CalculatorTask
    | WordProblemsTask
    | BanditTask
    | TabularTask
    | StringsTask
    | ProxyTask
    | Gsm8kTask
    | MathTask
    | FileTask
    | TrlEnvironmentTask
    | ReasoningTask
    | VerifiersTask
    | CustomTask
)
TASKS: dict[str, type[Section]] = {
    "addition": AdditionTask,
    "countdown": CountdownTask,
    "calculator": CalculatorTask,
    "word_problems": WordProblemsTask,
    "bandit": BanditTask,
    "tabular": TabularTask,
    "strings": StringsTask,
    "proxy": ProxyTask,
    "gsm8k": Gsm8kTask,
    "math": MathTask,
    "file": FileTask,
    "trl_environment": TrlEnvironmentTask,
    "reasoning_gym": ReasoningTask,
    "verifiers": VerifiersTask,
}


def check_table(section: RewardTable) -> None:
    """Raises UserError where the listed rewards are not one per word, or the table is too large."""
    size = section.size
    if size > LARGEST_TABLE:
        raise UserError(
            f"a table of {size} rewards is over the limit of {LARGEST_TABLE}",
            key="task",
            value=section.name,
            hint="Take fewer symbols, or a shorter horizon.",
        )
    if section.rewards is not None and len(section.rewards) != size:
        raise UserError(f"{len(section.rewards)} rewards for a table of {size}", key="task.rewards")
