"""Packed layers over cells of unequal sizes: the numbers of the reference path, and exact gradients."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked import grouped_ops
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS
from klab.harness.policy.stacked.grouped_ops import Segments, grouped_linear, grouped_linear_backward
from klab.harness.policy.stacked.kv_cache import KVCacheDecoder
from klab.harness.policy.stacked.layer_weights import LayerWeights
from klab.harness.policy.stacked.packed_decoding import PackedDecoder
from klab.harness.policy.stacked.packed_layers import final_norm, layer
from klab.harness.policy.stacked.packed_layout import AttentionRows, PackedLayout
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import decoder, generators

BIASES = {"attention_bias": True, "mlp_bias": True}


def rollouts(policy: StackedPolicy, counts: list[int], budget: int) -> list[Rollout]:
    """Unequal numbers of ragged prompts per cell."""
    draw = random.Random(0)
    prompts = [[[draw.randint(3, 14) for _ in range(draw.randint(2, 6))] for _ in range(count)] for count in counts]
    return sample(
        policy,
        prompts,
        generators(range(len(counts))),
        SamplingOptions(group_size=4, max_new_tokens=budget),
        plain=False,
    )


def gradients(
    policy: StackedPolicy, drawn: list[Rollout], plain: bool
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    scores = token_scores(policy, drawn, entropy=True, states=True, plain=plain)
    terms = []
    for score in scores:
        assert score.states is not None
        weights = torch.linspace(-1, 2, score.logp.numel(), dtype=score.logp.dtype).view(score.logp.shape)
        terms.append((weights * score.logp).sum() + score.states.square().sum())
    torch.autograd.backward(terms)
    found = {}
    for name, value in policy.parameters.items():
        assert value.grad is not None
        found[name], value.grad = value.grad, None
    return [part for score in scores for part in (score.logp, score.entropy, score.states) if part is not None], found


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize(("counts", "budget"), [([1, 5, 3], 5), ([2, 3], 40)], ids=["by group", "by trajectory"])
def test_the_plain_path_has_the_same_numbers_and_gradients(counts: list[int], budget: int, biases: bool) -> None:
    policy = decoder(len(counts), dtype=torch.float64, **(BIASES if biases else {}))
    drawn = rollouts(policy, counts, budget)
    assert policy.packable
    assert ("gate_up_bias" in {name.rpartition(".")[2] for name in policy.parameters}) == biases
    numbers, found = gradients(policy, drawn, plain=False)
    expected_numbers, expected = gradients(policy, drawn, plain=True)
    for one, other in zip(numbers, expected_numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10, msg=name)


def test_cells_whose_rows_are_too_long_are_computed_apart() -> None:
    policy = decoder(2, dtype=torch.float64)
    draw = random.Random(1)
    prompts = [
        [[draw.randint(3, 14) for _ in range(length)] for length in lengths]
        for lengths in ([4, 6], [MAX_EXPLICIT_KEYS] * 2)
    ]
    drawn = sample(policy, prompts, generators([0, 1]), SamplingOptions(group_size=3, max_new_tokens=4))
    assert [r.prefix_tree(MAX_EXPLICIT_KEYS).token_of_slot.shape[1] <= MAX_EXPLICIT_KEYS for r in drawn] == [
        True,
        False,
    ]
    _, found = gradients(policy, drawn, plain=False)
    _, expected = gradients(policy, drawn, plain=True)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10, msg=name)


def test_gradients_by_finite_differences() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    policy = decoder(2, dtype=torch.float64, **sizes, **BIASES)
    bias = torch.full((1, 2, 2), -torch.inf, dtype=torch.float64).triu_(1)
    index = np.array
    rows = [
        AttentionRows(
            index([3, 4, 5]),
            index([0, 1, 1]),
            index([[0, 1], [0, 2]]),
            index([0, 1, 3]),
            index([1, 2]),
            bias,
            one_slot_per_token=False,
        ),
        AttentionRows(
            index([6, 7]), index([0, 1]), index([[0, 1]]), index([0, 1]), index([1]), bias, one_slot_per_token=False
        ),
    ]
    layout = PackedLayout([0, 1], rows, num_heads=2, total=2)
    cosines, sines = policy.rotary(layout.positions, torch.float64, layout.position_limit)
    rotary = cosines.unsqueeze(1), sines.unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    stacked = LayerWeights.of_layer(policy.parameters, 0)
    scale = policy.parameters["norm"]

    def whole(x: torch.Tensor, scale: torch.Tensor, *stacked: torch.Tensor) -> torch.Tensor:
        inner = layer(x, stacked, layout, rotary, 1e-6, last=False)
        return final_norm(layer(inner, stacked, layout, rotary, 1e-6, last=True), scale, layout, 1e-6)

    assert torch.autograd.gradcheck(whole, (x, scale, *stacked), fast_mode=True)


def test_sampling_writes_what_stacked_cells_write() -> None:
    policy = decoder(3, dtype=torch.float64)
    draw = random.Random(2)
    prompts = [[[draw.randint(3, 14) for _ in range(draw.randint(2, 6))] for _ in range(count)] for count in (1, 4, 2)]

    def drawn(kind: type) -> list[Rollout]:
        policy.decoder = lambda prompts, size, plain=False: kind(policy, prompts, size)  # type: ignore[method-assign]
        return sample(policy, prompts, generators(range(3)), SamplingOptions(group_size=4, max_new_tokens=60))

    for one, other in zip(drawn(PackedDecoder), drawn(KVCacheDecoder), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logp, other.logp, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_attention_weights_is_that_of_autograd() -> None:
    """torch has no public function for it; the one used here must stay what autograd itself calls, to the bit."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 5, 9, generator=generator, requires_grad=True)
    gate = torch.randn(6, 5, generator=generator, requires_grad=True)
    grad, probs = torch.randn(6, 5, 9, generator=generator), scores.softmax(-1)
    (expected,) = torch.autograd.grad(probs, scores, grad)
    assert torch.equal(torch.ops.aten._softmax_backward_data(grad, probs.detach(), -1, probs.dtype), expected)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(gate), gate, grad[..., 0])
    found = torch.empty(6, 5)
    torch.ops.aten.silu_backward.grad_input(grad[..., 0], gate.detach(), grad_input=found)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"intermediate_size": 40}),
    ],
    ids=["norms on heads", "grouped heads", "odd widths"],
)
def test_other_architectures_are_stacked(family: str, changes: dict[str, int]) -> None:
    assert not decoder(1, family, **changes).packable
    assert decoder(1).packable


def test_products_in_one_call_have_the_bits_of_products_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = Segments([5, 0, 48, 1])
    x, grad = (torch.randn(54, width, generator=generator) for width in (32, 48))
    weight, bias = torch.randn(4, 32, 48, generator=generator), torch.randn(4, 48, generator=generator)

    def found() -> list[torch.Tensor]:
        back = grouped_linear_backward(grad, x, weight, bias, cells)
        return [grouped_linear(x, weight, bias, cells), *(each for each in back if each is not None)]

    together = found()
    monkeypatch.setattr(grouped_ops, "HAS_GROUPED_MM", False)
    for one, other in zip(found(), together, strict=True):
        assert torch.equal(one, other)
    assert not together[2][1].any()
    for cell, (part, given) in enumerate(zip(x.split(cells.sizes), grad.split(cells.sizes), strict=True)):
        torch.testing.assert_close(together[2][cell], part.t() @ given)
        torch.testing.assert_close(together[3][cell], given.sum(0))


def test_attention_of_cells_with_rows_of_one_shape_is_computed_together() -> None:
    def rows(groups: int, slots: int) -> AttentionRows:
        every = np.arange(groups * slots)
        bias = torch.full((1, slots, slots), -torch.inf).triu_(1)
        return AttentionRows(every, every % slots, every.reshape(groups, slots), every, None, bias)

    def together(heads: int) -> list[int]:
        layout = PackedLayout([0, 1, 3, 4], [rows(2, 4), rows(2, 7), rows(2, 4), rows(2, 7)], heads, total=5)
        assert layout.segments.sizes == [8, 14, 0, 8, 14]
        return sorted(batch.shape[0] for batch in layout.batches)

    assert together(heads=8) == [2, 2]
    assert together(heads=2) == [1, 1, 2]  # 7 × 7 weights of 2 × 2 matrices end between two multiples of 64 bytes
