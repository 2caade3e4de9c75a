"""A cell's bits (tokens, log-probabilities, gradients) are the same alone and in any place of any pack."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import decoder, generators

pytestmark = pytest.mark.bits

SETTINGS: dict[str, dict[str, Any]] = {
    "short": {"budget": 5, "group_size": 4},
    "long": {"budget": 40, "group_size": 5},
    "wide": {"budget": 4, "group_size": 8, "hidden_size": 64, "intermediate_size": 192, "prompts": 6},
    "large": {"budget": 4, "group_size": 4, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
    "qwen2": {"budget": 5, "group_size": 4, "family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"budget": 5, "group_size": 4, "family": "qwen3", "num_key_value_heads": 1},
}
PACKS = [[0, 1], [4, 0, 2], [3, 1, 0, 5, 2, 7, 6, 4]]
CELLS = 8


def prompts_of(cell: int, count: int, ragged: bool) -> list[list[int]]:
    draw = random.Random(cell)
    return [[draw.randint(3, 14) for _ in range(draw.randint(2, 5) if ragged else 5)] for _ in range(count)]


def selected(policy: StackedPolicy, cells: list[int]) -> StackedPolicy:
    parameters = {n: value.detach()[cells].clone().requires_grad_() for n, value in policy.parameters.items()}
    return StackedPolicy(policy.config, policy.tokenizer, parameters)


def life(
    policy: StackedPolicy, cells: list[int], prompts: list[list[list[int]]], group_size: int, budget: int
) -> list[tuple[Rollout, torch.Tensor, dict[str, torch.Tensor]]]:
    """Rollout, scores and gradients of every cell of a pack."""
    pack = selected(policy, cells)
    rollouts = sample(
        pack,
        [prompts[c] for c in cells],
        generators(cells),
        SamplingOptions(group_size=group_size, max_new_tokens=budget),
    )
    scores = token_scores(pack, rollouts)
    weights = [torch.linspace(-1, 2, s.logp.numel()).view(s.logp.shape) for s in scores]
    torch.autograd.backward([(w * s.logp).sum() for w, s in zip(weights, scores, strict=True)])
    found = []
    for position, (rollout, score) in enumerate(zip(rollouts, scores, strict=True)):
        gradients = {}
        for name, value in pack.parameters.items():
            assert value.grad is not None
            gradients[name] = value.grad[position]
        found.append((rollout, score.logp.detach(), gradients))
    return found


@pytest.mark.usefixtures("pack_invariant_kernels")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_bits_do_not_depend_on_the_pack(setting: str, ragged: bool) -> None:
    options = dict(SETTINGS[setting])
    budget, group_size, count = options.pop("budget"), options.pop("group_size"), options.pop("prompts", 3)
    policy = decoder(CELLS, options.pop("family", "llama"), **options)
    prompts = [prompts_of(cell, count, ragged) for cell in range(CELLS)]
    alone = {c: life(policy, [c], prompts, group_size, budget)[0] for c in range(CELLS)}
    for pack in PACKS:
        for cell, (rollout, logp, gradients) in zip(pack, life(policy, pack, prompts, group_size, budget), strict=True):
            expected, expected_logp, expected_gradients = alone[cell]
            assert torch.equal(rollout.tokens, expected.tokens)
            assert torch.equal(rollout.logp, expected.logp)
            assert torch.equal(logp, expected_logp)
            for name, value in gradients.items():
                assert torch.equal(value, expected_gradients[name]), (pack, cell, name)


def test_cells_of_equal_shapes_are_computed_together() -> None:
    policy = decoder(3)
    assert policy.stacks([(1, 2), (1, 2), (1, 2)]) == [[0, 1, 2]]
    assert policy.stacks([(1, 2), (3, 4), (1, 2)]) == [[0, 2], [1]]


def test_a_frozen_copy_holds_weights_that_all_cells_share_once() -> None:
    same, different = decoder(1), decoder(3)
    policy = selected(same, [0, 0, 0])
    frozen = policy.frozen_copy()
    assert {value.stride(0) for value in frozen.parameters.values()} == {0}
    assert all(value.stride(0) > 0 for value in different.frozen_copy().parameters.values())
    prompts = [prompts_of(cell, 3, ragged=True) for cell in range(3)]
    rollouts = sample(policy, prompts, generators(range(3)), SamplingOptions(group_size=4, max_new_tokens=5))
    with torch.no_grad():
        for own, held in zip(token_scores(policy, rollouts), token_scores(frozen, rollouts), strict=True):
            assert torch.equal(own.logp, held.logp)
        policy.parameters["norm"].add_(1.0)
    assert (frozen.parameters["norm"] == same.parameters["norm"]).all()
