"""Prompts as token ids: chat templates, the special tokens that open a text, and a cache of what was encoded."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

from klab.grid.errors import UserError
from klab.harness.policy.chat_template import apply_chat_template
from klab.harness.policy.pretrained import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ChatTemplate = Literal["auto", "always", "never"]

MAX_CACHED_PROMPTS = 16384


class PromptEncoder:
    """Encodes prompts for a model, each text once: the same prompts return in every epoch and for every cell.

    Args:
        vocab_size: rows of the model's embedding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
        self._cached = lru_cache(maxsize=MAX_CACHED_PROMPTS)(partial(_checked_ids, tokenizer, vocab_size))

    def __call__(self, prompt: str, chat: ChatTemplate = "auto", now: float | None = None) -> tuple[int, ...]:
        """Token ids of a prompt, see `prompt_ids`.

        Raises:
            UserError: also where the model has no embedding for one of them.
        """
        return self._cached(prompt, chat, now)


def _checked_ids(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, prompt: str, chat: ChatTemplate, now: float | None
) -> tuple[int, ...]:
    ids = prompt_ids(tokenizer, prompt, chat, now)
    check_ids(ids, tokenizer, vocab_size)
    return ids


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: str, chat: ChatTemplate = "auto", now: float | None = None
) -> tuple[int, ...]:
    """Token ids of a prompt.

    With a chat template, the prompt is the user's only message and the assistant's turn is opened; the template adds
    its special tokens itself. Without one, the tokenizer adds those that begin a text (Gemma's `<bos>`); one that ends
    the text is removed.

    Args:
        chat: `auto` applies the template if the tokenizer has one, `always` insists on it, `never` ignores it.
        now: the time for templates that print the date, see `apply_chat_template`; a run has one for all its cells.

    Raises:
        UserError: the template fails, or there is none and `chat` is `always`.
    """
    if chat == "always" and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            file=tokenizer.name_or_path,
            key="policy.chat_template",
            value=chat,
            allowed=("auto", "never"),
        )
    if chat == "never" or not tokenizer.chat_template:
        return _without_eos(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    try:
        return tuple(apply_chat_template(tokenizer, messages, now, tokenize=True, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"the chat template of the tokenizer failed: {type(error).__name__}: {error}",
            file=tokenizer.name_or_path,
            key="policy.chat_template",
            value=chat,
            hint="chat_template: never takes prompts as they are.",
        ) from error


def _without_eos(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(prompt)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return ids
    bare = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return bare if len(ids) == len(bare) else ids[:-1]
