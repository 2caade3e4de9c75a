"""A small policy: a tokenizer and weights made from the task's own text, the same every time, never over another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from klab.grid.errors import UserError
from klab.grid.schema.sections import CustomTask, SmallPolicy
from klab.harness.policy.init.bpe_tokenizer import bpe_tokenizer
from klab.harness.policy.init.initial_policy import initial_policy, policy_digest, policy_in_folder
from klab.harness.policy.init.sft_warmup import solution_rollout, with_prompts
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.fruit_task import Fruit

POLICY = SmallPolicy(hidden=16, layers=1, intermediate=16, heads=2, kv_heads=1, vocabulary=320, warmup_accuracy=0.25)
TASK = CustomTask(name="tests.support.fruit_task:Fruit")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy in a folder of the user's."""
    folder = tmp_path_factory.mktemp("small") / "model"
    found = policy_in_folder(folder, POLICY, Fruit(), TASK)
    assert found.new
    assert 0.25 <= found.record["accuracy"] <= 0.5
    assert found.record == json.loads((folder / "warmup.json").read_text())
    return folder


TOKENIZER = bpe_tokenizer([each.prompt + each.solution for each in Fruit().split("train")], 300)


@given(st.text())
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert len(ids) <= len(text.encode())


def test_words_of_the_text_are_merged_and_digits_are_not() -> None:
    assert len(TOKENIZER) <= 300
    assert TOKENIZER.tokenize("Number 123 likes pears") == ["Number", "Ġ", "1", "2", "3", "Ġlikes", "Ġpears"]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)


def test_whole_texts_are_scored_as_transformers_scores_them(made: Path) -> None:
    policy, examples = StackedPolicy.from_pretrained(made), Fruit().split("train")[:5]
    rollout = with_prompts(solution_rollout(policy, Fruit(), examples))
    logp = token_scores(policy, [rollout])[0].logp
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), policy.tokenizer
    for row, example in enumerate(examples):
        ids = torch.tensor([[*tokenizer(example.prompt + example.solution)["input_ids"], tokenizer.eos_token_id]])
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        own = rollout.mask[row]
        assert rollout.tokens[row, own].tolist() == ids[0, 1:].tolist()
        assert torch.allclose(logp[row, own], expected, atol=1e-5)


def test_two_runs_have_the_same_bits_and_one_that_is_there_is_left(made: Path, tmp_path: Path) -> None:
    shared = initial_policy(POLICY, Fruit(), TASK, tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "warmup.json"):
        assert (made / name).read_bytes() == (shared / name).read_bytes()
    before = (made / "model.safetensors").stat()
    again = policy_in_folder(made, POLICY, Fruit(), TASK, lambda *step: pytest.fail("made again"))
    assert not again.new
    assert (made / "model.safetensors").stat() == before


def test_it_is_an_ordinary_checkpoint(made: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(made).config
    assert (config.model_type, config.num_key_value_heads) == ("qwen2", 1)
    assert config.vocab_size <= 320
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.decode(tokenizer("Number 7 likes")["input_ids"]) == "Number 7 likes"


@pytest.mark.parametrize("change", [{"hidden": 20}, {"vocabulary": 310}, {"warmup_seed": 1}])
def test_settings_are_its_name(change: dict[str, Any]) -> None:
    other = POLICY.model_copy(update=change)
    assert policy_digest(other, TASK) != policy_digest(POLICY, TASK)


def test_nothing_is_overwritten(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other settings \(policy\.hidden, policy\.warmup_seed\)"):
        policy_in_folder(made, POLICY.model_copy(update={"hidden": 20, "warmup_seed": 1}), Fruit(), TASK)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        policy_in_folder(tmp_path, POLICY, Fruit(), TASK)
    assert json.loads((made / "warmup.json").read_text())["policy"]["hidden"] == 16


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy_in_folder(tmp_path / "model", POLICY, Fruit(), TASK, interrupt)
    assert not list(tmp_path.iterdir())
