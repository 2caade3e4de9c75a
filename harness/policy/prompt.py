"""Between texts and the token ids that a model was made for: chat templates, special tokens, end tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from klab.grid.errors import UserError

ChatTemplate = Literal["auto", "always", "never"]
GENERATION = "generation_config.json"


@lru_cache(maxsize=16384)
def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: str, chat: ChatTemplate = "auto", now: float | None = None
) -> tuple[int, ...]:
    """Token ids of a prompt.

    With a chat template it is the user's one message, and the assistant's turn is opened; the template brings its
    special tokens itself. Without one, the tokenizer adds those that open a text (Gemma's `<bos>`), none that ends it.

    Args:
        now: the time, in seconds since 1970 and shown in UTC, that templates which print the date are given; a run has
            one for all its cells. None: the clock's.

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
        return _opened(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    try:
        return tuple(_templated(tokenizer, messages, now, tokenize=True, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"the chat template of the tokenizer failed: {type(error).__name__}: {error}",
            file=tokenizer.name_or_path,
            key="policy.chat_template",
            value=chat,
            hint="chat_template: never takes prompts as they are.",
        ) from error


def _templated(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], now: float | None, **settings: Any
) -> Any:
    """The chat template of some messages; what it prints of the date is that of the time given."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _clock(time.time() if now is None else now) + template
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **settings)


_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


@lru_cache(maxsize=8)
def _clock(now: float) -> str:
    """A Jinja macro in place of transformers' function `strftime_now`, which reads the clock."""
    moment = datetime.fromtimestamp(now, UTC)
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in _DIRECTIVES]
    shown = "".join(f"|replace({word!r}, {moment.strftime(word)!r})" for word in directives)
    return "{%- macro strftime_now(format) -%}{{ format" + shown + " }}{%- endmacro -%}"


def _opened(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(prompt)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return ids
    bare = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return bare if len(ids) == len(bare) else ids[:-1]


def read_generation(folder: str | Path) -> dict[str, Any] | None:
    """What stands in a checkpoint's `generation_config.json`; None where there is no such file.

    Raises:
        UserError: it is not a JSON mapping.
    """
    file = Path(folder) / GENERATION
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", file=file) from error
    if not isinstance(found, dict):
        raise UserError("not a mapping", file=file)
    return found


def end_tokens(
    tokenizer: PreTrainedTokenizerFast, generation: Mapping[str, Any] | None, vocabulary: int
) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's end token, those of the generation configuration, and the special
    token with which the chat template closes the assistant's turn (`<|im_end|>` of Qwen2.5's base models, whose end
    token is another).

    Raises:
        UserError: there is none that the model can write.
    """
    listed = (generation or {}).get("eos_token_id")
    turn_end = _turn_end(tokenizer, tokenizer.chat_template)
    ids = [tokenizer.eos_token_id, turn_end, *(listed if isinstance(listed, list) else [listed])]
    found = frozenset(int(token) for token in ids if token is not None and 0 <= int(token) < vocabulary)
    if not found:
        raise UserError(
            "the tokenizer has no end token",
            file=tokenizer.name_or_path,
            hint=f"Set eos_token in tokenizer_config.json, or eos_token_id in {GENERATION}.",
        )
    return found


_ANSWER = "answer"


@lru_cache(maxsize=64)
def _turn_end(tokenizer: PreTrainedTokenizerFast, template: str | None) -> int | None:
    """The special token that follows the assistant's message in the chat template; None where none does."""
    if not template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _templated(tokenizer, messages, 0.0, tokenize=False)
    except Exception:  # a template is a program: this one has no place for an answer
        return None
    after = str(text).rpartition(_ANSWER)[2].lstrip()
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = [token for token in special if after.startswith(token)]
    return special[max(closing, key=len)] if closing else None


def closing_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Special tokens that are no part of an answer when they stand at its end: all but the unknown token."""
    return frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def write_generation(folder: Path, generation: Mapping[str, Any] | None) -> None:
    """The inverse of `read_generation`."""
    if generation is not None:
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> None:
    """Raises UserError where the tokenizer writes tokens (special ones apart) that the model's embedding lacks."""
    if tokenizer.vocab_size > vocabulary:
        raise _strangers(tokenizer, vocabulary, f"it has {tokenizer.vocab_size} tokens")


def check_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> None:
    """Raises UserError where one of some tokens has no row in the model's embedding."""
    largest = max(ids, default=0)
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise _strangers(tokenizer, vocabulary, f"it gives token {largest} ({token!r})")


def _strangers(tokenizer: PreTrainedTokenizerFast, vocabulary: int, found: str) -> UserError:
    return UserError(
        f"the tokenizer does not belong to the model: {found}, the model's embedding has {vocabulary}",
        file=tokenizer.name_or_path,
        key="policy.model",
        hint="Take the tokenizer that the model was trained with, or enlarge the model's embedding.",
    )
