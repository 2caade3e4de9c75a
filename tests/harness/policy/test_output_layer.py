"""Log-probabilities of transformers' models chunk by chunk are those of the whole logits, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klab.harness.policy.footprint import MAX_LOGITS
from klab.harness.policy.hf.output_layer import chunked_log_softmax, known_finish
from klab.harness.policy.hf.policy import TransformersPolicy
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import TokenScores, token_scores
from tests.support.peak_memory import PeakMemory
from tests.support.random_checkpoints import LATER, SIZES, checkpoint
from tests.support.tiny_policy import ALPHABET, generators

PROMPTS = [[[4, 5, 6], [7, 8, 9, 10, 11], [3]], [[4, 5], [6]]]
LORA = SimpleNamespace(rank=2, alpha=4.0, targets="all-linear")
MORE = {
    "Cohere": {**LATER, "logit_scale": 0.3},
    "Granite": {**LATER, "logits_scaling": 3.0},
    "Phi": {name: value for name, value in LATER.items() if name != "head_dim"},  # its output layer has a bias
}


def measured(policy: TransformersPolicy, **options: Any) -> tuple[list[TokenScores], dict[str, Tensor]]:
    rollouts = sample(policy, PROMPTS, generators([0, 1]), SamplingOptions(group_size=3, max_new_tokens=6))
    scores = token_scores(policy, rollouts, entropy=True, states=True, **options)
    torch.autograd.backward([each.logp.square().sum() * (c + 1) for c, each in enumerate(scores)])
    found = {name: value.grad.clone() for name, value in policy.parameters.items() if value.grad is not None}
    for value in policy.parameters.values():
        value.grad = None
    return scores, found


@pytest.mark.parametrize(
    ("family", "lora"), [*((family, None) for family in ("GPT2", "Gemma2", "Mamba", *MORE)), ("GPT2", LORA)]
)
def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, lora: Any) -> None:
    monkeypatch.setitem(SIZES, family, MORE.get(family, SIZES.get(family, {})))
    start = checkpoint(tmp_path, family, ALPHABET)
    precisions = {torch.float32: 1e-6}
    if family in ("GPT2", "Phi"):
        precisions |= {torch.float64: 1e-10, torch.bfloat16: 0.05}
    for dtype, near in precisions.items():
        policy = TransformersPolicy.from_pretrained(start, [0, 1], dtype, lora=lora)
        assert policy.model.finish is not None
        scores, gradients = measured(policy, temperature=0.7)
        with monkeypatch.context() as patch:
            patch.setitem(MAX_LOGITS, "cpu", 5 * policy.vocab_size)
            again, found = measured(policy, temperature=0.7)
        assert gradients.keys() == found.keys()
        for left, right in zip(scores, again, strict=True):
            torch.testing.assert_close(left.logp, right.logp, rtol=near, atol=near)
            torch.testing.assert_close(left.entropy, right.entropy, rtol=near, atol=near)
            torch.testing.assert_close(left.states, right.states, rtol=0, atol=0)
        for name, value in gradients.items():
            torch.testing.assert_close(found[name], value, rtol=near, atol=near * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_right(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_LOGITS, "cpu", 22)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, shift = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((7, 3), (11, 3), (11,))
    )
    tokens = torch.randint(0, 11, (7,), generator=draw)
    wanted = (hidden, weight, shift) if bias else (hidden, weight)

    def scored(*given: Tensor) -> tuple[Tensor, Tensor]:
        h, w, *b = given
        shift = b[0] if b else None
        return chunked_log_softmax(h, w, shift, lambda z: torch.tanh(z / 3) * 3, tokens, 0.7, True, True)

    assert torch.autograd.gradcheck(scored, wanted)
    assert torch.autograd.gradcheck(lambda *given: scored(*given)[0], wanted)


def test_what_a_model_makes_of_its_logits_is_recognized_or_left_whole() -> None:
    head = nn.Linear(4, 9)

    def finish_of(model: Callable[[Tensor], Tensor], **config: Any) -> Any:
        return known_finish(head, SimpleNamespace(**config), model)

    assert finish_of(lambda z: z) is not None
    capped = finish_of(lambda z: 30 * torch.tanh(z / 30), final_logit_softcapping=30.0)
    assert capped is not None
    assert float(capped(torch.tensor(1e9))) == 30.0
    assert finish_of(lambda z: z / 8, logits_scaling=8.0, final_logit_softcapping=None) is not None
    assert finish_of(lambda z: 30 * torch.tanh(z / 30)) is None  # a cap that the configuration does not name
    assert finish_of(lambda z: z + 1e-4) is None
    assert finish_of(lambda z: z[..., :-1]) is None
    assert known_finish(nn.Sequential(head), SimpleNamespace(), lambda z: z) is None


def test_memory_does_not_grow_with_tokens_times_vocabulary(tmp_path: Path) -> None:
    """At the vocabulary of Qwen2.5, 151,936 tokens, one layer deep: 480 rows of logits would be 292 MB."""
    start = checkpoint(tmp_path, "GPT2", ALPHABET, vocab_size=151_936, n_layer=1, n_embd=16)
    policy = TransformersPolicy.from_pretrained(start)
    rollouts = sample(policy, [[[4, 5, 6]]], generators([0]), SamplingOptions(group_size=24, max_new_tokens=20))
    rows = int(rollouts[0].mask.sum())
    assert rows * policy.vocab_size > 4 * MAX_LOGITS["cpu"]
    with PeakMemory() as memory:
        (scores,) = token_scores(policy, rollouts, entropy=True)
        held = memory.now
        scores.logp.sum().backward()
    assert held < 4 * rows * policy.vocab_size / 50
    weights = 4 * sum(value.numel() for value in policy.parameters.values())
    assert memory.peak < 6 * 4 * MAX_LOGITS["cpu"] + 2 * weights
    assert memory.peak < 1.6 * 4 * rows * policy.vocab_size
