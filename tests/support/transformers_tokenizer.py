"""klab's character tokenizer as transformers has it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from klab.harness.policy.char_tokenizer import CharacterTokenizer


def character_tokenizer(alphabet: str, size: int | None = None) -> PreTrainedTokenizerFast:
    return CharacterTokenizer.of_alphabet(alphabet, size).for_transformers()
