"""A sequence classifier with one output is a reward; anything else is a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grid.mistake import Mistake
from harness.policy.tokenizer import character_tokenizer
from tasks import Example
from tasks.reward_model import RewardModel
from tasks.rewards import Rewards

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
    with pytest.raises(Mistake, match=rf"task\.reward\.model: .*{message}"):
        RewardModel(folder)


def test_a_causal_model_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path / "causal")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(Mistake, match=r"not a sequence classifier: the checkpoint has no score\.weight"):
        RewardModel(folder)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="no reward model could be loaded"):
        Rewards({"model": str(tmp_path / "nowhere")})


def test_a_model_that_gives_nan(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(checkpoint(tmp_path / "nan"))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Mistake, match=r"task\.reward\.model: a reward must be finite \(got nan\)"):
        Rewards({"model": str(folder)}).score(EXAMPLE, "c")
