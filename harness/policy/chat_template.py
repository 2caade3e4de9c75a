"""Chat templates: messages as the text or tokens that a model was trained on, with a fixed clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_ANSWER = "answer"


def apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], now: float | None, **settings: Any
) -> Any:
    """Messages in the tokenizer's chat template.

    Args:
        now: the time, in seconds since 1970 and shown in UTC, for templates that print the date; None: the clock's.
        settings: of transformers' `apply_chat_template`.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _clock_macro(time.time() if now is None else now) + template
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **settings)


@lru_cache(maxsize=8)
def _clock_macro(now: float) -> str:
    """A Jinja macro in place of transformers' function `strftime_now`, which reads the clock."""
    moment = datetime.fromtimestamp(now, UTC)
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in _DIRECTIVES]
    shown = "".join(f"|replace({word!r}, {moment.strftime(word)!r})" for word in directives)
    return "{%- macro strftime_now(format) -%}{{ format" + shown + " }}{%- endmacro -%}"


def turn_end_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token with which the chat template closes the assistant's message; None if there is none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = apply_chat_template(tokenizer, messages, 0.0, tokenize=False)
    except Exception:  # a template is a program: this one has no place for an answer
        return None
    after = str(text).rpartition(_ANSWER)[2].lstrip()
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = [token for token in special if after.startswith(token)]
    return special[max(closing, key=len)] if closing else None
