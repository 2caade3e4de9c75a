"""Log-probabilities in chunks are those of the whole, in value and gradient, and hold no more than a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klab.grid.schema.policy import Lora
from klab.harness.policy.footprint import MAX_LOGITS
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import TokenScores, token_scores
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import decoder, written

VOCABULARY = 300


def some() -> Rollout:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 7, (n,), generator=draw).tolist() for n in (1, 9, 4, 12, 3, 12, 7, 2)]
    own = [[i % 4 != 2 for i in range(len(row))] for row in rows]
    return written([[3, 4, 5], [6]], rows, own, dtype=torch.float64)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made, but for those of the sizes given."""

    def __init__(self, but: set[int]) -> None:
        super().__init__()
        self.but, self.elements = but, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor) and each.numel() not in self.but:
                self.elements = max(self.elements, each.numel())
        return out


def scored(
    policy: StackedPolicy, rollouts: list[Rollout], **options: Any
) -> tuple[list[TokenScores], list[torch.Tensor]]:
    scores = token_scores(policy, rollouts, entropy=True, states=True, **options)
    for value in policy.parameters.values():
        value.grad = None
    factors = torch.linspace(-1, 2, scores[0].logp.numel()).view_as(scores[0].logp)
    loss = sum((factors * s.logp).sum() for s in scores)
    if options.get("entropy_gradient"):
        loss = loss + sum((factors.flip(1) * s.entropy).sum() for s in scores if s.entropy is not None)
    torch.autograd.backward(loss)
    return scores, [value.grad for value in policy.parameters.values() if value.grad is not None]


@pytest.mark.parametrize("chunk", [VOCABULARY, 3 * VOCABULARY + 7, 19 * VOCABULARY])
@pytest.mark.parametrize("case", ["untied", "tied", "adapters"])
def test_chunks_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch, case: str, chunk: int) -> None:
    policy = decoder(2, dtype=torch.float64, vocab_size=VOCABULARY, tie_word_embeddings=case == "tied")
    if case == "adapters":
        policy = decoder(1, dtype=torch.float64, vocab_size=VOCABULARY).with_lora(Lora(rank=2), [0, 1])
        with torch.no_grad():
            for value in policy.parameters.values():
                value.add_(0.1)
    for temperature, entropy in ((1.0, False), (0.7, True)):
        rollouts = [some(), some()]
        whole, gradients = scored(policy, rollouts, temperature=temperature, entropy_gradient=entropy)
        monkeypatch.setitem(MAX_LOGITS, "cpu", chunk)
        chunked, same = scored(policy, rollouts, temperature=temperature, entropy_gradient=entropy)
        monkeypatch.undo()
        for mine, other in zip(chunked, whole, strict=True):
            for name in ("logp", "entropy", "states"):
                torch.testing.assert_close(getattr(mine, name), getattr(other, name), rtol=0, atol=1e-12)
            assert not mine.logp[~rollouts[0].mask].any()
        assert len(gradients) == len(same) == len(policy.parameters)
        for gradient, other_gradient in zip(same, gradients, strict=True):
            torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=1e-12)


def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows = 3000, 4
    policy, rollout = decoder(1, dtype=torch.float64, vocab_size=vocabulary), some()
    weights = {vocabulary * 32}
    with Largest(weights) as whole:
        scored(policy, [rollout])
    monkeypatch.setitem(MAX_LOGITS, "cpu", rows * vocabulary + 1)
    with Largest(weights) as chunked:
        scored(policy, [rollout])
    assert chunked.elements == rows * vocabulary
    assert (
        whole.elements == len(rollout.prefix_tree(MAX_EXPLICIT_KEYS).output_index) * vocabulary > 9 * chunked.elements
    )


def test_the_bits_of_a_cell_in_chunks_do_not_depend_on_its_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_LOGITS, "cpu", 5 * VOCABULARY)
    pack, mate = decoder(2, vocab_size=VOCABULARY), decoder(2, vocab_size=VOCABULARY)
    alone = StackedPolicy(
        mate.config, mate.tokenizer, {n: v.detach()[1:].requires_grad_() for n, v in mate.parameters.items()}
    )
    (_, together), gradients = scored(pack, [some(), some()])
    (single,), own = scored(alone, [some()])
    assert torch.equal(together.logp, single.logp)
    for mine, other in zip(gradients, own, strict=True):
        assert torch.equal(mine[1], other[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [2**24, 5 * VOCABULARY])
def test_logits_of_16_bit_weights_are_float32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    """The same hidden states through the same output layer, once in float64: only the logits' precision differs."""
    monkeypatch.setitem(MAX_LOGITS, "cpu", chunk)
    policy, rollout = decoder(1, dtype=dtype, vocab_size=VOCABULARY), some()
    with torch.no_grad():
        policy.parameters["head"].mul_(8.0)  # logits of 10 and more
    (scores,) = token_scores(policy, [rollout], states=True, entropy=True)
    assert scores.logp.dtype == torch.float32
    assert scores.states is not None
    logits = scores.states.double() @ policy.parameters["head"][0].double()
    assert logits.abs().max() > 16
    expected = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
    mask = rollout.mask
    torch.testing.assert_close(scores.logp[mask].double(), expected[mask], rtol=0, atol=2e-5)
    rounded = logits.to(dtype).double().log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
    assert (rounded - expected)[mask].abs().max() > 1e-3
    scores.logp.sum().backward()
    assert {value.grad.dtype for value in policy.parameters.values() if value.grad is not None} == {dtype}


def test_a_bfloat16_policy_is_close_to_the_float32_policy_of_the_same_weights() -> None:
    narrow, rollout = decoder(1, dtype=torch.bfloat16, vocab_size=VOCABULARY), some()
    wide = StackedPolicy(narrow.config, narrow.tokenizer, {n: v.detach().float() for n, v in narrow.parameters.items()})
    wide.parameters = {name: value.requires_grad_() for name, value in wide.parameters.items()}
    (mine,), gradients = scored(narrow, [rollout])
    (theirs,), exact = scored(wide, [rollout])
    assert (mine.logp - theirs.logp)[rollout.mask].abs().mean() < 0.02
    for gradient, other in zip(gradients, exact, strict=True):
        assert (gradient.float() - other).norm() < 0.05 * other.norm()
