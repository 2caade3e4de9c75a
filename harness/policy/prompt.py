"""Between texts and the token ids that a model was made for: chat templates, special tokens, end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from klab.grid.errors import UserError

ChatTemplate = Literal["auto", "always", "never"]
GENERATION = "generation_config.json"


@lru_cache(maxsize=16384)
def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, chat: ChatTemplate = "auto") -> tuple[int, ...]:
    """Token ids of a prompt.

    With a chat template it is the user's one message, and the assistant's turn is opened; the template brings its
    special tokens itself. Without one, the tokenizer adds those that open a text (Gemma's `<bos>`), none that ends it.

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
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"the chat template of the tokenizer failed: {type(error).__name__}: {error}",
            file=tokenizer.name_or_path,
            key="policy.chat_template",
            value=chat,
            hint="chat_template: never takes prompts as they are.",
        ) from error


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
    """The tokens that end a turn: the tokenizer's end token, and those of the generation configuration.

    Raises:
        UserError: there is none that the model can write.
    """
    listed = (generation or {}).get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    found = frozenset(int(token) for token in ids if token is not None and 0 <= int(token) < vocabulary)
    if not found:
        raise UserError(
            "the tokenizer has no end token",
            file=tokenizer.name_or_path,
            hint=f"Set eos_token in tokenizer_config.json, or eos_token_id in {GENERATION}.",
        )
    return found


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
