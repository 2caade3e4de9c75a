"""The character tokenizer is an ordinary tokenizer of the transformers library."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from klab.grid.errors import UserError
from klab.harness.policy.init.char_tokenizer import character_tokenizer


def test_one_token_per_character_and_back() -> None:
    tokenizer = character_tokenizer("0123 +=\n")
    text = "10+2 =\n3"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("x")["input_ids"] == [2]


def test_it_survives_ordinary_files(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("ab+", size=16)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert len(again) == 16
    assert again("a+b")["input_ids"] == tokenizer("a+b")["input_ids"]
    assert again.decode(again("a+b")["input_ids"]) == "a+b"
    assert again.eos_token_id == 1


@pytest.mark.parametrize(("alphabet", "size"), [("", None), ("aa", None), ("abc", 5)])
def test_an_alphabet_that_cannot_work_is_a_mistake(alphabet: str, size: int | None) -> None:
    with pytest.raises(UserError, match="alphabet"):
        character_tokenizer(alphabet, size)
