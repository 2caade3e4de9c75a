"""Special tokens: which of them end a turn, and which are no part of an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from klab.grid.errors import UserError
from klab.harness.policy.chat_template import turn_end_token
from klab.harness.policy.pretrained import GENERATION_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def eos_token_ids(
    tokenizer: PreTrainedTokenizerFast, generation_config: Mapping[str, Any] | None, vocab_size: int
) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's end-of-sequence token, those of the generation configuration, and the
    special token with which the chat template closes the assistant's turn (`<|im_end|>` of Qwen2.5's base models, whose
    end-of-sequence token is another).

    Raises:
        UserError: there is none that the model can generate.
    """
    listed = (generation_config or {}).get("eos_token_id")
    ids = [tokenizer.eos_token_id, turn_end_token(tokenizer), *(listed if isinstance(listed, list) else [listed])]
    found = frozenset(int(token) for token in ids if token is not None and 0 <= int(token) < vocab_size)
    if not found:
        raise UserError(
            "the tokenizer has no end-of-sequence token",
            file=tokenizer.name_or_path,
            hint=f"Set eos_token in tokenizer_config.json, or eos_token_id in {GENERATION_CONFIG}.",
        )
    return found


def trailing_special_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Special tokens that are no part of an answer when they stand at its end: all but the unknown token."""
    return frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def answer_tokens(tokens: Iterable[int], eos_token_ids: Collection[int], trailing: Collection[int]) -> tuple[int, ...]:
    """The tokens of a trajectory that are part of its text: no end-of-sequence tokens, and at the end no other special
    tokens.

    Args:
        eos_token_ids: see `eos_token_ids`.
        trailing: see `trailing_special_tokens`.
    """
    shown = [token for token in tokens if token not in eos_token_ids]
    while shown and shown[-1] in trailing:
        shown.pop()
    return tuple(shown)
