"""The character tokenizer does what transformers does with its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from klab.grid.errors import UserError
from klab.harness.policy.char_tokenizer import CharacterTokenizer
from klab.harness.policy.pretrained import checkpoint_tokenizer

ADDITION = CharacterTokenizer.of_alphabet("0123456789+=")
THEIRS = ADDITION.for_transformers()


def test_one_token_per_character_and_back() -> None:
    tokenizer = CharacterTokenizer.of_alphabet("0123 +=\n")
    text = "10+2 =\n3"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("x")["input_ids"] == [2]


@given(st.lists(st.text(alphabet="0123456789+= x\nß<>") | st.sampled_from(["<end>", "1<pad>2", "<unk>", "< end>"])))
def test_texts_have_the_tokens_that_transformers_gives_them(texts: list[str]) -> None:
    for special in (False, True):
        mine = ADDITION(texts, add_special_tokens=special)["input_ids"] if texts else []
        assert mine == [THEIRS(text, add_special_tokens=special)["input_ids"] for text in texts]
        assert mine == [ADDITION(text, add_special_tokens=special)["input_ids"] for text in texts]
    for ids in mine:
        assert ADDITION.decode(ids) == THEIRS.decode(ids, skip_special_tokens=False)


@given(st.lists(st.integers(0, len(ADDITION) - 1)))
def test_tokens_have_the_text_that_transformers_gives_them(ids: list[int]) -> None:
    assert ADDITION.decode(ids) == THEIRS.decode(ids, skip_special_tokens=False)
    assert [ADDITION.convert_ids_to_tokens(token) for token in ids] == THEIRS.convert_ids_to_tokens(ids)


def test_what_policies_ask_it_is_what_transformers_says() -> None:
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "vocab_size", "chat_template"):
        assert getattr(ADDITION, name) == getattr(THEIRS, name), name
    assert sorted(ADDITION.all_special_ids) == sorted(THEIRS.all_special_ids)
    assert len(ADDITION) == len(THEIRS)


@pytest.mark.parametrize("size", [None, 16])
def test_its_files_are_those_of_transformers(tmp_path: Path, size: int | None) -> None:
    tokenizer = CharacterTokenizer.of_alphabet("ab+", size)
    tokenizer.save_pretrained(tmp_path / "mine")
    tokenizer.for_transformers().save_pretrained(tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == names
    for name in names:
        assert (tmp_path / "mine" / name).read_text() == (tmp_path / "theirs" / name).read_text()


def test_it_survives_ordinary_files(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer.of_alphabet("ab+", size=16)
    tokenizer.save_pretrained(tmp_path / "first")
    again = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert isinstance(again, PreTrainedTokenizerFast)
    assert len(again) == 16
    assert again("a+b")["input_ids"] == tokenizer("a+b")["input_ids"]
    assert again.decode(again("a+b")["input_ids"]) == "a+b"
    assert again.eos_token_id == 1
    again.save_pretrained(tmp_path / "second")  # with notes of where it came from
    for folder in ("first", "second"):
        read = CharacterTokenizer.read(tmp_path / folder)
        assert read is not None
        assert read("a+b")["input_ids"] == tokenizer("a+b")["input_ids"]
        assert read.name_or_path == str(tmp_path / folder)


def changed(folder: Path, file: str, **values: object) -> None:
    ADDITION.save_pretrained(folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
        ("tokenizer_config.json", {"bos_token": "<end>"}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer.json", {"added_tokens": []}),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}}),
        ("tokenizer.json", {"model": None}),
    ],
)
def test_another_tokenizer_is_read_by_transformers(tmp_path: Path, file: str, values: dict[str, object]) -> None:
    changed(tmp_path, file, **values)
    assert CharacterTokenizer.read(tmp_path) is None
    if file == "tokenizer_config.json":
        assert isinstance(checkpoint_tokenizer(tmp_path), PreTrainedTokenizerFast)


def test_a_template_beside_it_is_not_passed_over(tmp_path: Path) -> None:
    ADDITION.save_pretrained(tmp_path)
    assert isinstance(checkpoint_tokenizer(tmp_path), CharacterTokenizer)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}=")
    assert checkpoint_tokenizer(tmp_path).chat_template == "{{ messages[0].content }}="


@pytest.mark.parametrize(("alphabet", "size"), [("", None), ("aa", None), ("abc", 5)])
def test_an_alphabet_that_cannot_work_is_a_mistake(alphabet: str, size: int | None) -> None:
    with pytest.raises(UserError, match="alphabet"):
        CharacterTokenizer.of_alphabet(alphabet, size)
