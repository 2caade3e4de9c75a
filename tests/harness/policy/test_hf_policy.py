"""Architectures that run through transformers compute what transformers computes, sampled, scored, adapted or saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from klab.grid import UserError
from klab.harness.policy.hf.policy import UNLIMITED_CONTEXT, TransformersPolicy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from tests.support.random_checkpoints import checkpoint
from tests.support.tiny_policy import ALPHABET, generators

FAMILIES = ("GPT2", "Gemma", "Gemma2", "Mistral", "OPT", "Bloom", "Mamba", "Llama")
PROMPTS = [[[4, 5, 6], [7, 8, 9, 10, 11], [3]], [[4, 5], [6]]]
LORA = SimpleNamespace(rank=2, alpha=4.0, targets="all-linear")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in folders:
            folders[family] = checkpoint(tmp_path_factory.mktemp(family), family, ALPHABET)
        return folders[family]

    return of


def drawn(policy: TransformersPolicy, plain: bool = False) -> list[Rollout]:
    return sample(policy, PROMPTS, generators([0, 1]), SamplingOptions(group_size=3, max_new_tokens=12), plain=plain)


def expected(model: Any, rollout: Rollout) -> Tensor:
    """Log-probabilities [N, T] of a model of transformers, one trajectory at a time."""
    found = torch.zeros_like(rollout.logp)
    for i, tokens in enumerate(rollout.tokens):
        prompt, length = rollout.prompts[i // rollout.group_size], int(rollout.present[i].sum())
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:length].tolist()])).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) - 1 + length]
        found[i, :length] = logp.gather(1, tokens[:length, None])[:, 0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_and_scored_as_transformers_does(made: Any, family: str) -> None:
    policy = TransformersPolicy.from_pretrained(made(family), [0, 1])
    assert policy.model.has_kv_cache == (family != "Mamba")
    rollouts, plain = drawn(policy), drawn(policy, plain=True)
    assert any(len(set(each.present.sum(1).tolist())) > 1 for each in rollouts), "none left before the others"
    scores = token_scores(policy, rollouts, logits=True, entropy=True, states=True)
    model = AutoModelForCausalLM.from_pretrained(made(family)).eval()
    for rollout, whole, score in zip(rollouts, plain, scores, strict=True):
        assert torch.equal(rollout.tokens, whole.tokens)
        torch.testing.assert_close(rollout.logp, score.logp, rtol=0, atol=1e-4)
        torch.testing.assert_close(score.logp, expected(model, rollout), rtol=0, atol=1e-4)
        assert score.logits is not None
        assert score.states is not None
        logp = score.logits.log_softmax(-1)
        torch.testing.assert_close(-(logp.exp() * logp).sum(-1)[rollout.mask], score.entropy[rollout.mask])
        if family in ("GPT2", "Llama"):  # others scale or cap what the output embedding gives
            head = model.get_output_embeddings().weight
            torch.testing.assert_close((score.states @ head.T)[rollout.mask], score.logits[rollout.mask])


def test_temperature_divides_the_logits(made: Any) -> None:
    policy = TransformersPolicy.from_pretrained(made("GPT2"), [0, 1])
    rollouts = drawn(policy)
    warm = token_scores(policy, rollouts, temperature=0.5)[0].logp
    logits = token_scores(policy, rollouts, logits=True)[0].logits
    assert logits is not None
    chosen = (logits / 0.5).log_softmax(-1).gather(-1, rollouts[0].tokens[..., None]).squeeze(-1)
    mask = rollouts[0].mask
    torch.testing.assert_close(warm[mask], chosen[mask])


def gradient(policy: TransformersPolicy, rollouts: list[Rollout]) -> dict[str, Tensor]:
    sums = [score.logp.square().sum() * (c + 1) for c, score in enumerate(token_scores(policy, rollouts))]
    torch.autograd.backward(sums)
    return {name: value.grad.clone() for name, value in policy.parameters.items() if value.grad is not None}


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "OPT"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradients_are_those_of_each_cell_alone_and_recomputed_ones_the_same(made: Any, family: str, lora: Any) -> None:
    policy = TransformersPolicy.from_pretrained(made(family), [0, 1], lora=lora)
    rollouts = drawn(policy)
    together = gradient(policy, rollouts)
    again = TransformersPolicy.from_pretrained(made(family), [0, 1], lora=lora, gradient_checkpointing=True)
    recomputed = gradient(again, rollouts)
    assert together.keys() == recomputed.keys() == policy.parameters.keys()
    assert all(torch.equal(value, recomputed[name]) for name, value in together.items())
    for cell, seed in enumerate([0, 1]):
        alone = TransformersPolicy.from_pretrained(made(family), [seed], lora=lora)
        (score,) = token_scores(alone, [rollouts[cell]])
        torch.autograd.backward(score.logp.square().sum() * (cell + 1))
        assert all(torch.equal(value.grad[0], together[name][cell]) for name, value in alone.parameters.items())


def test_gradients_are_those_of_transformers(made: Any) -> None:
    """Gemma's embedding is also its output layer: one parameter, with the gradient of both."""
    policy = TransformersPolicy.from_pretrained(made("Gemma"), dtype=torch.float64)
    rollout = sample(policy, PROMPTS[:1], generators([0]), SamplingOptions(group_size=1, max_new_tokens=6))[0]
    (score,) = token_scores(policy, [rollout])
    score.logp.sum().backward()
    model = AutoModelForCausalLM.from_pretrained(made("Gemma"), dtype=torch.float64)
    for i, prompt in enumerate(rollout.prompts):
        tokens = rollout.tokens[i, : int(rollout.present[i].sum())]
        logits = model(torch.tensor([prompt + tokens.tolist()])).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1).gather(1, tokens[:, None]).sum().backward()
    wanted = dict(model.named_parameters())
    assert policy.parameters.keys() == wanted.keys()
    assert not any("lm_head" in name for name in wanted)
    for name, value in policy.parameters.items():
        torch.testing.assert_close(value.grad[0], wanted[name].grad, rtol=1e-4, atol=1e-5)  # its norms are of 32 bits


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-5), (torch.bfloat16, 0.5), (torch.float16, 0.05)])
def test_precisions(made: Any, dtype: torch.dtype, near: float) -> None:
    single = TransformersPolicy.from_pretrained(made("GPT2"), [0, 1])
    rollouts = drawn(single)
    policy = TransformersPolicy.from_pretrained(made("GPT2"), [0, 1], dtype)
    assert {value.dtype for value in policy.parameters.values()} == {dtype}
    (found, _), (wanted, _) = (token_scores(each, rollouts) for each in (policy, single))
    assert found.logp.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.logp.float(), wanted.logp, rtol=0, atol=near)
    assert not torch.equal(found.logp.float(), wanted.logp)
    copy = token_scores(single.frozen_copy(dtype), rollouts)[0].logp
    assert torch.equal(copy, found.logp)


def test_adapters(made: Any, tmp_path: Path) -> None:
    base = TransformersPolicy.from_pretrained(made("GPT2"), [0, 1])
    policy = TransformersPolicy.from_pretrained(made("GPT2"), [5, 6], lora=LORA, dtype=torch.float32)
    assert all("lora_" in name for name in policy.parameters)
    rollouts = drawn(policy)
    reference = policy.frozen_copy()
    assert not reference.parameters
    held = next(iter(policy.shared))
    assert reference.shared[held].data_ptr() == policy.shared[held].data_ptr()
    wanted = token_scores(base, rollouts)
    for each in (policy, reference):
        assert all(torch.equal(a.logp, b.logp) for a, b in zip(token_scores(each, rollouts), wanted, strict=True))
    with torch.no_grad():
        for name, value in policy.parameters.items():
            assert ("lora_B" in name) != bool(value.any())
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    policy.save(tmp_path / "one", 1)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    found = token_scores(policy, rollouts)[1].logp
    torch.testing.assert_close(found, expected(model, rollouts[1]), rtol=0, atol=1e-4)
    assert not torch.allclose(found, wanted[1].logp, atol=0.01)
    assert torch.equal(token_scores(reference, rollouts)[1].logp, wanted[1].logp)
    assert torch.equal(token_scores(policy.frozen_copy(), rollouts)[1].logp, found)
    other = TransformersPolicy.from_pretrained(made("GPT2"), [0], lora=LORA)
    other.load(tmp_path / "one", 0)
    assert torch.equal(token_scores(other, rollouts[1:])[0].logp, found)
    assert torch.equal(token_scores(policy.select([1]), rollouts[1:])[0].logp, found)


def test_adapters_of_16_bit_weights_are_single_precision(made: Any) -> None:
    policy = TransformersPolicy.from_pretrained(made("Gemma"), [0, 1], torch.bfloat16, lora=LORA)
    assert {value.dtype for value in policy.parameters.values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16
    assert len(gradient(policy, drawn(policy))) == len(policy.parameters)


@pytest.mark.parametrize("family", ["GPT2", "Mistral"])
def test_saved_is_an_ordinary_checkpoint(made: Any, tmp_path: Path, family: str) -> None:
    policy = TransformersPolicy.from_pretrained(made(family), [0, 1])
    rollouts = drawn(policy)
    with torch.no_grad():
        for value in policy.parameters.values():
            value[1] *= 1.1
    policy.save(tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = token_scores(policy, rollouts)[1].logp
    torch.testing.assert_close(found, expected(model, rollouts[1]), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path)("12")["input_ids"] == policy.tokenizer("12")["input_ids"]
    dropouts = {name: value for name, value in model.config.to_dict().items() if "drop" in name and value}
    given = AutoModelForCausalLM.from_pretrained(made(family)).config.to_dict()
    assert dropouts == {name: value for name, value in given.items() if "drop" in name and value}
    again = TransformersPolicy.from_pretrained(made(family))
    again.load(tmp_path, 0)
    assert all(torch.equal(again.parameters[name][0], value[1]) for name, value in policy.parameters.items())
    with pytest.raises(UserError, match="another architecture"):
        again.load(made("OPT"), 0)


def test_a_model_without_a_context_of_its_own(made: Any) -> None:
    assert TransformersPolicy.from_pretrained(made("Bloom")).context_length == UNLIMITED_CONTEXT


def test_what_cannot_be_loaded(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable model configuration"):
        TransformersPolicy.from_pretrained(tmp_path)
    odd = SimpleNamespace(rank=2, alpha=4.0, targets=("c_attm",))
    with pytest.raises(UserError, match=r"policy\.lora\.targets: PEFT cannot adapt them.*c_attn"):
        TransformersPolicy.from_pretrained(made("GPT2"), lora=odd)
    from safetensors.torch import load_file, save_file

    folder = checkpoint(tmp_path / "torn", "GPT2", ALPHABET)
    state = load_file(folder / "model.safetensors")
    state.pop("transformer.ln_f.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the checkpoint has no tensor 'transformer\.ln_f\.weight'"):
        TransformersPolicy.from_pretrained(folder)


def test_adapters_without_peft(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"need the library PEFT.*klab\[lora\]"):
        TransformersPolicy.from_pretrained(made("GPT2"), lora=LORA)
