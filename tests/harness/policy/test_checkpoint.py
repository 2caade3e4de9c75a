"""Stacked policies read and writes ordinary Hugging Face checkpoints and compute what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from klab.grid.errors import UserError
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import ALPHABET, configuration, decoder, written
from tests.support.transformers_tokenizer import character_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_grouped_biased_tied": (
        "llama",
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama_llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
}


def saved(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random transformers model of an architecture, every parameter (norms, biases) away from its initial value."""
    family, extra = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(family, **extra), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **changes)
    character_tokenizer(ALPHABET).save_pretrained(folder)
    return model.eval()


def all_logits(policy: StackedPolicy, rows: list[list[int]], plain: bool = False) -> torch.Tensor:
    """[rows, length − 1, V], the logits after every token but the last of rows of one length."""
    rollout = written([row[:1] for row in rows], [row[1:] for row in rows])
    with torch.no_grad():
        logits = token_scores(policy, [rollout], logits=True, plain=plain)[0].logits
    assert logits is not None
    return logits


ROWS = torch.randint(3, 15, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    with torch.no_grad():
        expected = model(ROWS).logits[:, :-1]
    policy = StackedPolicy.from_pretrained(tmp_path)
    for plain in (False, True):
        torch.testing.assert_close(all_logits(policy, ROWS.tolist(), plain), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_llama3", "qwen2", "qwen3"])
def test_logits_equal_those_of_transformers_to_float64(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    for kind in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):  # transformers' norms round to float32 in every precision
        monkeypatch.setattr(kind, "forward", norm)
    model = saved(tmp_path, name, torch.float64)
    with torch.no_grad():
        expected = model(ROWS).logits[:, :-1]
    found = all_logits(StackedPolicy.from_pretrained(tmp_path, dtype=torch.float64), ROWS.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_survives_loading_and_saving_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "given", name)
    StackedPolicy.from_pretrained(tmp_path / "given", cells=2).save(tmp_path / "again", 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(model)
    for (key, first), (_, second) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(first, second), key
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("12+3=")["input_ids"] == [4, 5, 13, 6, 14]


def test_a_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    policy = StackedPolicy.from_pretrained(tmp_path)
    assert torch.equal(policy.parameters["embedding"][0], model.get_input_embeddings().weight)


def test_load_replaces_one_cell_only(tmp_path: Path) -> None:
    policy = decoder(3)
    before = {name: value.detach().clone() for name, value in policy.parameters.items()}
    decoder(2).save(tmp_path, 1)
    policy.load(tmp_path, 2)
    for name, value in policy.parameters.items():
        assert torch.equal(value[:2], before[name][:2])
        assert torch.equal(value[2], before[name][1])
        assert value.is_leaf
        assert value.requires_grad


def test_a_frozen_copy_shares_no_memory_and_needs_no_gradient() -> None:
    policy = decoder(1)
    reference = policy.frozen_copy()
    assert not any(value.requires_grad for value in reference.parameters.values())
    before = {name: value.clone() for name, value in reference.parameters.items()}
    with torch.no_grad():
        for value in policy.parameters.values():
            value.add_(1.0)
    for name, value in reference.parameters.items():
        assert torch.equal(value, before[name])


def test_cells_of_one_checkpoint_share_no_memory(tmp_path: Path) -> None:
    decoder(1).save(tmp_path, 0)
    policy = StackedPolicy.from_pretrained(tmp_path, cells=2)
    with torch.no_grad():
        policy.parameters["embedding"][0].zero_()
    assert policy.parameters["embedding"][1].abs().sum() > 0


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable model configuration"):
        StackedPolicy.from_pretrained(tmp_path / "nowhere")
    GPT2LMHeadModel(GPT2Config(vocab_size=15, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"stacked engine.*gpt2"):
        StackedPolicy.from_pretrained(tmp_path / "gpt2")
    decoder(1).save(tmp_path / "small", 0)
    with pytest.raises(UserError, match="another architecture"):
        decoder(1, num_hidden_layers=1).load(tmp_path / "small", 0)
    with pytest.raises(UserError, match="dynamic"):
        decoder(1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UserError, match="sliding"):
        decoder(1, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    (tmp_path / "small" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no readable weights"):
        StackedPolicy.from_pretrained(tmp_path / "small")
