"""Everything about a grid that needs no training: its code, data and models are loaded and tried once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from klab.grid import Cell, Objective, UserError, user_code
from klab.grid.catalogue import AXES
from klab.grid.engines import engine_notes
from klab.grid.kl_settings import reference_notes, refuse_late_logits
from klab.grid.schema.evaluate import Evaluations
from klab.grid.schema.sections import load_section
from klab.grid.schema.training import TrainingSection
from klab.grid.user_code import names_user_code
from klab.harness.policy.footprint import Footprint, Workload
from klab.harness.preflight.memory import (
    MemoryEstimate,
    Sizes,
    estimate_memory,
    memory_keys,
    pretrained_sizes,
    stacked_sizes,
    tiny_architecture,
    tiny_sizes,
    workload,
)
from klab.harness.preflight.process import Finding
from klab.harness.training.data.notes import divergence_notes, sampling_notes, small_set_notes
from klab.tasks.task import Example, Score, SplitName, Task, alphabet_of, lists_prompts, load_task, require_solutions

T = TypeVar("T")
Model = tuple[Any, Any]
"""A tokenizer and a configuration of transformers."""

_UNREACHABLE = ("ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ProxyError")
"""Errors that mean that the hub cannot be asked, by name: they come from several packages."""


def check(cells: Sequence[Cell], file: Path) -> Iterator[Finding | MemoryEstimate]:
    """What is wrong with these cells of the grid file, what may surprise, and what memory they need at least.

    What cells share is looked at once.
    """
    with user_code.searching(file.parent):
        for objective in dict.fromkeys(cell.objective for cell in cells if cell.objective.is_custom):
            yield from _objective(objective, file)
        tasks: dict[str, Task | None] = {}
        models: dict[str, Model | None] = {}
        sizes: dict[tuple[str, str], Sizes | None] = {}
        estimated: set[tuple[str, ...]] = set()
        warmed: set[tuple[str, str]] = set()
        engines: set[object] = set()
        for cell, memory_key in zip(cells, memory_keys(cells), strict=True):
            if cell.training.engine == "trl" and cell.training.trl not in engines:
                engines.add(cell.training.trl)
                yield from _tried(partial(_check_trl, cell.training), file, "training.trl")
            if cell.training.reference is not None and cell.objective.is_custom:
                yield from _tried(partial(_check_reference, cell), file, "training.reference")
            task_key, policy_key = cell.task.model_dump_json(), cell.policy.model_dump_json()
            if task_key not in tasks:
                tasks[task_key] = yield from _tried(partial(load_and_score, cell.task), file, "task", cell.task.name)
            if (
                (task := tasks[task_key]) is not None
                and cell.policy.name != "hf"
                and (task_key, cell.policy.name) not in warmed
            ):
                warmed.add((task_key, cell.policy.name))
                ready = alphabet_of if cell.policy.name == "tiny" else require_solutions
                yield from _tried(partial(ready, task), file, "policy")
            if policy_key not in models:
                models[policy_key] = yield from _tried(partial(load_model, cell.policy), file, "policy")
            model = models[policy_key]
            if task is None:
                continue
            known = (*sampling_notes(cell.training), *divergence_notes(cell.objective), *engine_notes(cell.training))
            for note in (*small_sets(cell, task), *known, *reference_notes(cell.training)):
                yield Finding(f"{file}: {note}", False)
            readable = True
            if model is not None and lists_prompts(task):
                readable = bool((yield from _tried(partial(check_prompts, cell, task, model), file, "policy")))
            size_key = (policy_key, task.alphabet or "")
            if size_key not in sizes:
                sizes[size_key] = yield from _tried(partial(model_sizes, cell.policy, model, task), file, "policy")
            size = sizes[size_key] if cell.training.engine == "klab" else None  # what TRL needs is not known
            if size is not None and readable and memory_key not in estimated:
                estimated.add(memory_key)
                yield estimate_memory(cell, size, *passes(cell, task, model))


def check_evaluations(section: Mapping[str, Any] | None, file: Path) -> Iterator[Finding]:
    """Whether the tasks of the section `evaluate` exist; nothing without one."""
    if section is not None:
        yield from _tried(partial(_check_lm_eval, section), file, "evaluate")


def _check_lm_eval(section: Mapping[str, Any]) -> None:
    from klab.harness.training.final_evaluation import require_lm_eval
    from klab.harness.training.lm_eval_process import check_tasks

    evaluations: Evaluations = load_section("evaluate", section)  # type: ignore[assignment]
    require_lm_eval(evaluations)
    check_tasks(evaluations.lm_eval)


def _check_trl(training: TrainingSection) -> None:
    from klab.harness.engines.trl.settings import check_fields

    check_fields(training)


def _check_reference(cell: Cell) -> None:
    """What is known of built-in values when a grid file is read (`klab.grid.kl_settings`), of the user's own."""
    from klab.harness.objective import axis_functions

    if "logits_reference" in axis_functions(cell.objective).needs:
        refuse_late_logits(cell.training, "an axis value of your own that asks for logits_reference")


def _objective(objective: Objective, file: Path) -> Iterator[Finding]:
    """Try the user's own values: each beside built-in ones, so that it is known which is wrong, then all together."""
    from klab.harness.preflight.toy_batch import try_objective

    settings, found = objective.settings(), False
    for axis in AXES:
        name = getattr(objective, axis)
        if names_user_code(name):
            alone = Objective(**{axis: settings[axis]})
            for finding in _tried(partial(try_objective, alone, axis), file, axis, name):
                found = True
                yield finding
    if not found:
        yield from _tried(partial(try_objective, objective), file, "objective")


def _tried(work: Callable[[], T], file: Path, key: str, name: str | None = None) -> Generator[Finding, None, T | None]:
    """The result of some work; where it raises, None, and a finding about it."""
    try:
        return work()
    except UserError as error:
        unreachable = _unreachable(error)
        note = "; not checked, for the hub cannot be reached" if unreachable else ""
        yield Finding(_line(f"{error.with_location(file=file)}{note}"), not unreachable)
    except Exception as error:
        yield Finding(_line(f"{file}: {key}: {name or 'this'} raised {_described(error)}"), True)
    return None


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if any(kind.__name__ in _UNREACHABLE for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def _described(error: Exception) -> str:
    """The error and the line of code that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/klab/" not in frame.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _line(text: str) -> str:
    return " ".join(text.split())


def load_and_score(section: Any) -> Task:
    """The task of a section, after both splits were read and a reference answer of each was scored.

    Reward models are left out: loading one takes the memory of a job.

    Raises:
        UserError: whatever keeps the task from being used.
    """
    terms = getattr(section, "reward", None)
    if terms and any(term.model is not None for term in terms):
        for term in terms:
            local = term.model is not None and term.model.startswith((".", "/", "~"))
            if local and not Path(term.model).expanduser().is_dir():
                raise UserError("no such folder", key="task.reward", value=term.model)
        section = section.model_copy(update={"reward": tuple(term for term in terms if term.model is None) or "exact"})
    task = load_task(section)
    names: tuple[SplitName, ...] = ("train", "held_out")
    for name in names:
        examples = task.split(name)
        if not len(examples):
            raise UserError(f"the split {name!r} is empty", key="task.name", value=section.name)
        score: object = task.score(examples[0], examples[0].solution or examples[0].answer)
        if not isinstance(score, Score):
            problem = f"score returns a {type(score).__name__}, not a klab.tasks.Score"
            raise UserError(problem, key="task.name", value=section.name)
    return task


def model_sizes(policy: Any, model: Model | None, task: Task) -> Sizes | None:
    """How large a policy is; None where that is not known.

    Raises:
        UserError: an engine or adapters that the model cannot have.
    """
    if policy.name == "small":
        return stacked_sizes(policy, tiny_architecture(policy, policy.vocabulary))
    if policy.name == "tiny":
        return tiny_sizes(policy, task.alphabet) if task.alphabet else None
    return pretrained_sizes(policy, model[1]) if model is not None else None


def passes(cell: Cell, task: Task, model: Model | None) -> tuple[Footprint | None, Workload | None]:
    """What passes through a pretrained model take, and how many tokens go through it at once; None of a tiny one."""
    if model is None:
        return None, None
    from klab.harness.policy.load import engine_for

    tokenizer, config = model
    policy: Any = cell.policy
    limit = cell.training.max_prompt_tokens
    lengths = [length for _, length in prompt_lengths(task, tokenizer, policy.chat_template)]
    longest = max((length for length in lengths if limit is None or length <= limit), default=limit or 1)
    new = cell.training.max_new_tokens or task.max_new_tokens
    return Footprint.of(policy, config, engine_for(policy, config)), workload(cell, longest, new)


def small_sets(cell: Cell, task: Task) -> Iterator[str]:
    """Sets with fewer prompts than are asked of them: allowed, but not what was written."""
    return small_set_notes(cell.training, len(task.split("train")), len(task.split("held_out")))


def load_model(policy: Any) -> Model | None:
    """Tokenizer and configuration of a pretrained model, whose weights are not looked at; None where it is made here.

    Raises:
        UserError: there is no such model, or no tokenizer and end token that belong to it.
    """
    if policy.name != "hf":
        return None
    from klab.harness.policy.pretrained import (
        check_vocabulary,
        model_folder,
        read_config,
        read_generation_config,
        read_tokenizer,
    )
    from klab.harness.policy.special_tokens import eos_token_ids

    folder = model_folder(policy.model, policy.revision, allow_patterns=_SMALL_FILES)
    config = read_config(folder, policy.trust_remote_code)
    vocabulary = config.get_text_config().vocab_size
    tokenizer = read_tokenizer(folder, policy.trust_remote_code)
    check_vocabulary(tokenizer, vocabulary)
    eos_token_ids(tokenizer, read_generation_config(folder), vocabulary)
    return tokenizer, config


_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
"""Of a model on the hub these suffice: its configuration and its tokenizer."""

_LONGEST = 64
"""Prompts that are counted in tokens: those with the most characters."""


def check_prompts(cell: Cell, task: Task, model: Model) -> bool:
    """See that the template works, and that the longest prompts leave room for their completions: True, or an error.

    Raises:
        UserError: a template that fails, or a prompt that is too long.
    """
    tokenizer, config = model
    policy: Any = cell.policy
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    new = cell.training.max_new_tokens or task.max_new_tokens
    limit = cell.training.max_prompt_tokens
    for prompt, count in prompt_lengths(task, tokenizer, policy.chat_template):
        if context is not None and (limit is None or count <= limit) and count > context - new + 1:
            raise UserError(
                f"a prompt of {count} tokens and {new} new ones exceed the model's context of {context}",
                key="task",
                value=prompt if len(prompt) <= 60 else prompt[:60] + "…",
                hint=f"training.max_prompt_tokens: {max(1, context - new + 1)} leaves such prompts out.",
            )
    return True


def prompt_lengths(task: Task, tokenizer: Any, chat_template: Any) -> Iterator[tuple[str, int]]:
    """The prompts of a task with the most characters, and how many tokens they have."""
    from klab.harness.policy.prompt import prompt_ids

    prompts = [each.prompt for name in ("train", "held_out") for each in _looked_at(task, name)]
    for prompt in sorted(prompts, key=len)[-_LONGEST:]:
        yield prompt, len(prompt_ids(tokenizer, prompt, chat_template))


_DRAWN = 1024
"""Examples that are looked at of a split whose examples are drawn when they are asked for: it may have a million."""


def _looked_at(task: Task, name: SplitName) -> Sequence[Example]:
    """A split's examples; of those that a rule draws, some from everywhere."""
    split = task.split(name)
    if lists_prompts(task) or len(split) <= _DRAWN:
        return split
    return [split[i * len(split) // _DRAWN] for i in range(_DRAWN)]
