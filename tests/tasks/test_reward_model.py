"""A sequence classifier with one output is a reward; anything else is a mistake."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.grid.errors import UserError
from klab.tasks import Example
from klab.tasks.reward_model import ROWS, TOKENS, RewardModel, batches
from klab.tasks.rewards import Rewards
from tests.support.transformers_tokenizer import character_tokenizer

EXAMPLE = Example("ab", "")


def checkpoint(folder: Path, labels: int = 1, template: str | None = None, safe: bool = True) -> str:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = character_tokenizer("abcd")
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        num_labels=labels,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return str(folder)


def logit(folder: str, text: str) -> float:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return float(model(**tokens).logits)


def test_the_reward_is_the_logit(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "plain")
    rewards = Rewards([{"model": folder, "weight": 2.0}, {"name": "exact", "weight": 0.0}])
    score = rewards.score(EXAMPLE, "cd")
    assert score.parts["model"] == pytest.approx(logit(folder, "abcd"), abs=1e-6)
    assert score.reward == 2.0 * score.parts["model"]
    assert not score.correct
    assert rewards.score(EXAMPLE, "dc").reward != score.reward
    assert rewards.score(EXAMPLE, "").parts["model"] == pytest.approx(logit(folder, "ab"), abs=1e-6)


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "plain")
    long = RewardModel(folder)(EXAMPLE, "abcd" * 50 + "dcbadcba")
    assert long.value == pytest.approx(logit(folder, "dcbadcba"), abs=1e-6)


def test_its_own_chat_template_is_used(tmp_path: Path) -> None:
    template = "{% for turn in messages %}{{ 'c' if turn.role == 'user' else 'd' }}{{ turn.content }}{% endfor %}"
    folder = checkpoint(tmp_path / "chat", template=template)
    assert RewardModel(folder)(EXAMPLE, "ba").value == pytest.approx(logit(folder, "cabdba"), abs=1e-6)


@pytest.mark.parametrize(
    ("made", "message"),
    [({"labels": 2}, "has one output, this one has 2"), ({"safe": False}, "no reward model could be loaded")],
)
def test_unsuitable_checkpoints(tmp_path: Path, made: dict[str, Any], message: str) -> None:
    folder = checkpoint(tmp_path / "odd", **made)
    with pytest.raises(UserError, match=rf"task\.reward\.model: .*{message}"):
        RewardModel(folder)


def test_a_causal_model_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path / "causal")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(UserError, match=r"not a sequence classifier: the checkpoint has no score\.weight"):
        RewardModel(folder)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward model could be loaded"):
        Rewards({"model": str(tmp_path / "nowhere")})


def test_a_model_that_gives_nan(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(checkpoint(tmp_path / "nan"))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"task\.reward\.model: a reward must be finite \(got nan\)"):
        Rewards({"model": str(folder)}).score(EXAMPLE, "c")


TEXTS = ["", "a", "cd", "abcdabcdabcd", "b", "dd", "abca", "ab", "dcb", "cd"] * 5


def test_many_at_once_have_the_rewards_that_they_have_alone(tmp_path: Path) -> None:
    model = RewardModel(checkpoint(tmp_path / "plain"))
    examples = [Example("ab"[: 1 + i % 2], "") for i in range(len(TEXTS))]
    together = [verdict.value for verdict in model.verdicts(examples, TEXTS)]
    alone = [model(example, text).value for example, text in zip(examples, TEXTS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together == [verdict.value for verdict in model.verdicts(examples, TEXTS)]
    assert len({round(value, 6) for value in together}) > 5


def test_rewards_of_many_are_the_rewards_of_each(tmp_path: Path) -> None:
    rewards = Rewards([{"model": checkpoint(tmp_path / "plain"), "weight": 0.5}, "exact"])
    examples = [Example("ab", text[:2]) for text in TEXTS]
    for many, example, text in zip(rewards.score_all(examples, TEXTS), examples, TEXTS, strict=True):
        one = rewards.score(example, text)
        assert many.reward == pytest.approx(one.reward, abs=1e-6)
        assert many.correct == one.correct == (example.answer == text)
        assert many.parts.keys() == one.parts.keys() == {"model", "exact"}


def test_a_model_without_padding_reads_one_at_a_time(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "plain"))
    with_padding = [v.value for v in RewardModel(str(folder)).verdicts([EXAMPLE] * 10, TEXTS[:10])]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    alone = [v.value for v in RewardModel(str(folder)).verdicts([EXAMPLE] * 10, TEXTS[:10])]
    assert alone == pytest.approx(with_padding, abs=1e-6)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 6_000), max_size=100), st.sampled_from([1, 4, ROWS]))
def test_batches_are_small_and_hold_every_text_once(lengths: list[int], rows: int) -> None:
    found = batches(lengths, rows)
    assert sorted(text for batch in found for text in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[text] for text in batch)
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * longest <= TOKENS
    for one, two in pairwise(found):
        assert max(lengths[text] for text in one) <= min(lengths[text] for text in two)
