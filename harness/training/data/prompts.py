"""A cell's prompts: those of its task that fit the model, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from klab.grid.cell import Cell
from klab.grid.errors import UserError
from klab.harness.policy.policy import Policy
from klab.harness.policy.pretrained import checkpoint_config, checkpoint_tokenizer
from klab.harness.policy.prompt import ChatTemplate, prompt_ids
from klab.tasks.task import Example, SplitName, Task, lists_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from klab.harness.training.packed_cell import PackedCell

_SHOWN = 60


def encode_prompts(policy: Policy, member: PackedCell, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of the examples' prompts.

    Raises:
        UserError: a chat template that fails, a token that the model does not have, or a prompt that with its
            completion would exceed the context.
    """
    chat, room = chat_template(member.cell), policy.context_length - member.max_new_tokens + 1
    found = []
    for example in examples:
        ids = list(policy.encode_prompt(example.prompt, chat, member.now))
        if len(ids) > room:
            raise _too_long(example, len(ids), policy.context_length, member.max_new_tokens)
        found.append(ids)
    return found


def chat_template(cell: Cell) -> ChatTemplate:
    """Whether the cell's prompts are wrapped by the tokenizer's template; a tiny policy's has none."""
    chosen: ChatTemplate = getattr(cell.policy, "chat_template", "never")
    return chosen


class PromptLengths:
    """Token counts of prompts, measured once per task, split, tokenizer and template.

    The cells of one call share an instance, so that a thousand cells of one task tokenize it once.
    """

    def __init__(self) -> None:
        self._lengths: dict[tuple[str, ...], list[int]] = {}
        self._tokenizers: dict[tuple[str, bool], PreTrainedTokenizerFast] = {}
        self._contexts: dict[tuple[str, bool], int | None] = {}

    def measure(
        self, split: Sequence[Example], name: SplitName, cell: Cell, start: Path, now: float | None
    ) -> list[int]:
        """Tokens of every prompt of a split of the cell's task."""
        chat = chat_template(cell)
        key = (str(start), chat, name, cell.task.model_dump_json(), str(now))
        if len(self._lengths.get(key, ())) != len(split):
            model = (str(start), _trusted(cell))
            if model not in self._tokenizers:
                self._tokenizers[model] = checkpoint_tokenizer(*model)
            tokenizer = self._tokenizers[model]
            self._lengths[key] = [len(prompt_ids(tokenizer, example.prompt, chat, now)) for example in split]
        return self._lengths[key]

    def context(self, cell: Cell, start: Path) -> int | None:
        """Positions that the model of a checkpoint has; None where its config does not say."""
        model = (str(start), _trusted(cell))
        if model not in self._contexts:
            config = checkpoint_config(*model).get_text_config()
            self._contexts[model] = getattr(config, "max_position_embeddings", None)
        return self._contexts[model]


def prompts_that_fit(
    task: Task,
    name: SplitName,
    cell: Cell,
    start: Path,
    max_new_tokens: int,
    now: float | None = None,
    lengths: PromptLengths | None = None,
) -> Sequence[Example]:
    """A split of a cell's task without the prompts that are longer than `training.max_prompt_tokens`.

    Every prompt is measured, so that one that is too long is found before the first update; those of a task with an
    alphabet, which makes prompts without end, only where there is a limit.

    Args:
        start: the folder of the starting policy, whose tokenizer counts.
        now: the time that templates which print the date are given.
        lengths: what has been measured before.

    Raises:
        UserError: no prompt is left; or one that is left would exceed the context with its completion.
    """
    split, limit = task.split(name), cell.training.max_prompt_tokens
    if limit is None and not lists_prompts(task):
        return split
    known = lengths or PromptLengths()
    tokens = known.measure(split, name, cell, start, now)
    kept = range(len(split)) if limit is None else [i for i, length in enumerate(tokens) if length <= limit]
    if not kept:
        raise UserError(
            f"every prompt of the split {name!r} is longer: the shortest has {min(tokens)} tokens",
            key="training.max_prompt_tokens",
            value=limit,
        )
    context = known.context(cell, start)
    longest = max(kept, key=lambda i: tokens[i])
    if context is not None and tokens[longest] > context - max_new_tokens + 1:
        raise _too_long(split[longest], tokens[longest], context, max_new_tokens)
    return split if len(kept) == len(split) else [split[i] for i in kept]


def _trusted(cell: Cell) -> bool:
    return bool(getattr(cell.policy, "trust_remote_code", False))


def _too_long(example: Example, length: int, context: int, new: int) -> UserError:
    shown = example.prompt if len(example.prompt) <= _SHOWN else example.prompt[:_SHOWN] + "…"
    if length > context:
        return UserError(
            f"a prompt has {length} tokens, the model's context {context}",
            key="task",
            value=shown,
            hint=f"training.max_prompt_tokens: {max(1, context - new + 1)} leaves such prompts out.",
        )
    return UserError(
        f"a prompt of {length} tokens and {new} new ones exceed the model's context of {context}",
        key="task",
        value=shown,
        hint=f"Lower training.max_new_tokens, or leave such prompts out with training.max_prompt_tokens: "
        f"{max(1, context - new + 1)}.",
    )
