"""Decoding block by block in fixed memory gives what decoding in growing memory gives, whenever rows end or fill up."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from klab.grid.errors import UserError
from klab.grid.schema.policy import Lora
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked import block_decoding, decoding_memory, recorded_steps
from klab.harness.policy.stacked.block_decoding import VARIABLE, StaticBlockDecoder
from klab.harness.policy.stacked.decoding_memory import bucket, halvings
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import decoder, generators

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (block_decoding, recorded_steps):
        monkeypatch.setattr(module, "MIN_ROWS", 2)
        monkeypatch.setattr(module, "MIN_LENGTH", 4)
    for module in (block_decoding, recorded_steps, decoding_memory):
        if hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(StaticBlockDecoder, "max_steps", 5)
    monkeypatch.setattr(recorded_steps, "MAX_DRAWN_LOGITS", 5 * 2 * 15)  # of five rows of two cells at once


def some_prompts(cells: int, count: int = 3) -> list[list[list[int]]]:
    draw = random.Random(5)
    return [[[draw.randint(3, 14) for _ in range(draw.randint(1, 6))] for _ in range(count)] for _ in range(cells)]


def answered(cell: int, trajectory: int, transcript: str) -> str | None:
    return "12=" * 5 if len(transcript) < 12 and trajectory % 2 else None


def rollouts(policy: StackedPolicy, environment: Any = None, **options: Any) -> list[Rollout]:
    settings = SamplingOptions(**{"group_size": 4, "max_new_tokens": 23, **options})
    prompts = some_prompts(policy.cells)
    return sample(policy, prompts, generators(range(policy.cells)), settings, environment=environment)


def assert_same_rollouts(mine: list[Rollout], others: list[Rollout], tolerance: float) -> None:
    for each, other in zip(mine, others, strict=True):
        assert torch.equal(each.tokens, other.tokens)
        assert torch.equal(each.mask, other.mask)
        assert torch.equal(each.truncated, other.truncated)
        assert each.texts == other.texts
        torch.testing.assert_close(each.logp, other.logp, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"greedy": True}, {"temperature": 0.7, "top_p": 0.8}, {"environment": answered}],
    ids=["drawn", "greedy", "nucleus", "environment"],
)
def test_rollouts_are_those_of_growing_memory(
    monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    policy = decoder(2, dtype=torch.float64, **FAMILIES[family])
    monkeypatch.setenv(VARIABLE, "growing")
    grown = rollouts(policy, **options)
    monkeypatch.setenv(VARIABLE, "static")
    assert_same_rollouts(rollouts(policy, **options), grown, 1e-12)
    lengths = torch.cat([each.present.sum(1) for each in grown])
    assert "greedy" in options or len(lengths.unique()) > 3  # rows end at different times, and fewer are decoded
    if "environment" in options:
        assert any(not each.mask[each.present].all() for each in grown)


def test_memory_is_used_again_while_weights_change_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = decoder(1, dtype=torch.float64).with_lora(Lora(rank=2), [0, 1, 2])
    with torch.no_grad():
        for value in policy.parameters.values():
            value.add_(0.1)
    before = None
    for _ in range(2):
        monkeypatch.setenv(VARIABLE, "growing")
        grown = rollouts(policy)
        monkeypatch.setenv(VARIABLE, "static")
        assert_same_rollouts(rollouts(policy), grown, 1e-12)
        memory = policy.steps.memory
        assert before is None or before is memory
        before = memory
        with torch.no_grad():
            for value in policy.parameters.values():
                value.mul_(1.1)
    policy.release_memory()
    assert policy.steps.memory is None


def test_some_cells_are_decoded_in_the_memory_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, options = decoder(3, dtype=torch.float64), SamplingOptions(group_size=4, max_new_tokens=9)
    monkeypatch.setenv(VARIABLE, "static")
    prompts = some_prompts(3)
    whole = sample(policy, prompts, generators([0, 1, 2]), options)
    memory = policy.steps.memory
    some = policy.select([2, 0])
    part = sample(some, [prompts[2], prompts[0]], generators([2, 0]), options)
    assert_same_rollouts(part, [whole[2], whole[0]], 1e-12)
    last = sample(some.select([0]), [prompts[2]], generators([2]), options)
    assert_same_rollouts(last, [whole[2]], 1e-12)
    assert policy.steps.memory is memory
    assert some.steps.memory is None


@pytest.mark.parametrize("way", ["growing", "static"])
def test_the_context_is_the_limit(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv(VARIABLE, way)
    policy = decoder(1, max_position_embeddings=11)
    given = [[[3, 4, 5], [3]]], generators([0])
    fits = sample(policy, *given, SamplingOptions(group_size=3, max_new_tokens=9))[0]
    assert fits.present.sum(1).max() == 9
    with pytest.raises(UserError, match="sequences of 12 tokens exceed the model's context"):
        sample(policy, *given, SamplingOptions(group_size=3, max_new_tokens=10))


def test_a_row_of_nan_does_not_reach_the_next_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that no token has reached is masked, which 0 · NaN would survive."""
    monkeypatch.setenv(VARIABLE, "static")
    policy = decoder(1)
    expected = rollouts(policy)
    assert policy.steps.memory is not None
    policy.steps.memory.kv.fill_(torch.nan)
    assert_same_rollouts(rollouts(policy), expected, 0.0)


def test_sizes_are_few_and_at_most_a_half_too_large() -> None:
    sizes = sorted({bucket(count, 1) for count in range(1, 200)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(count <= bucket(count, 1) <= max(1.5 * count, 2) for count in range(1, 5000))
    assert bucket(5, 8) == 8
    assert halvings(96, 8) == [12, 24, 48, 96]
    assert halvings(8, 8) == [8]


def test_an_unknown_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not block_decoding.uses_static_cache(torch.device("cpu"))
    assert block_decoding.uses_static_cache(torch.device("cuda"))
    monkeypatch.setenv(VARIABLE, "statik")
    with pytest.raises(UserError, match=r"KLAB_DECODING.*did you mean 'static'"):
        block_decoding.uses_static_cache(torch.device("cpu"))
