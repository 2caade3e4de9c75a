"""Decoding in fixed memory gives what decoding in growing memory gives, also when lanes end and slots run out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from klab.grid.errors import UserError
from klab.grid.schema.policy import Lora
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked import cuda_graph_decoding
from klab.harness.policy.stacked.cuda_graph_decoding import GraphCache, StaticCacheDecoder
from klab.harness.policy.stacked.kv_cache import KVCacheDecoder
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import decoder, generators

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph_decoding, "BLOCK", 8)
    monkeypatch.setattr(cuda_graph_decoding, "MIN_ROWS", 2)


def some_prompts(cells: int, count: int = 3) -> list[list[list[int]]]:
    draw = random.Random(5)
    return [[[draw.randint(3, 14) for _ in range(draw.randint(1, 6))] for _ in range(count)] for _ in range(cells)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_growing_memory(family: str, dtype: torch.dtype, tolerance: float) -> None:
    policy, prompts, draw = decoder(2, dtype=dtype, **FAMILIES[family]), some_prompts(2), random.Random(1)
    ways = [KVCacheDecoder(policy, prompts, 4), StaticCacheDecoder(policy, prompts, 4, GraphCache())]
    shapes = set()
    with torch.no_grad():
        logits = [way.start() for way in ways]
        lasting = [[draw.randint(1, 25) for _ in range(12)] for _ in range(2)]
        for step in range(26):
            opened = {c: [step < last for last in lasting[c]] for c in range(2) if step < max(lasting[c])}
            for c in opened if step else range(2):
                rows = [row for row in range(12) if step == 0 or step <= lasting[c][row]]
                torch.testing.assert_close(logits[1][c][rows], logits[0][c][rows], rtol=0, atol=tolerance)
            if not opened:
                break
            newest = {c: torch.tensor([draw.randint(3, 14) for _ in range(12)]) for c in opened}
            logits = [way.step(newest, opened) for way in ways]
            shapes.add((ways[1].num_rows, ways[1].runner.length))
    assert {rows for rows, _ in shapes} == {12, 6, 3}
    assert max(length for _, length in shapes) == 32


def answered(cell: int, trajectory: int, transcript: str) -> str | None:
    return "12=" if len(transcript) < 12 and trajectory % 2 else None


def rollouts(policy: StackedPolicy, cells: list[int]) -> Any:
    prompts = some_prompts(8)
    return sample(
        policy,
        [prompts[c] for c in cells],
        generators(cells),
        SamplingOptions(group_size=4, max_new_tokens=20),
        environment=answered,
    )


@pytest.mark.parametrize("adapters", [False, True])
def test_samples_are_the_same_and_memory_is_used_again(monkeypatch: pytest.MonkeyPatch, adapters: bool) -> None:
    policy = decoder(3, dtype=torch.float64)
    if adapters:
        policy = decoder(1, dtype=torch.float64).with_lora(Lora(rank=2), [0, 1, 2])
        with torch.no_grad():
            for value in policy.parameters.values():
                value.add_(0.1)
    expected = None
    for _ in range(2):  # weights change in place between rollouts
        monkeypatch.setenv(cuda_graph_decoding.VARIABLE, "growing")
        grown = rollouts(policy, [0, 1, 2])
        monkeypatch.setenv(cuda_graph_decoding.VARIABLE, "static")
        for mine, other in zip(rollouts(policy, [0, 1, 2]), grown, strict=True):
            assert torch.equal(mine.tokens, other.tokens)
            assert torch.equal(mine.mask, other.mask)
            torch.testing.assert_close(mine.logp, other.logp, rtol=0, atol=1e-12)
        assert any(not each.mask[each.present].all() for each in grown)  # the environment answered
        assert expected is None or not all(torch.equal(a.tokens, b) for a, b in zip(grown, expected, strict=True))
        expected = [each.tokens for each in grown]
        assert 1 < len(policy.graphs.runners) <= cuda_graph_decoding.MAX_RECORDINGS
        with torch.no_grad():
            for value in policy.parameters.values():
                value.mul_(1.1)
    assert isinstance(policy.decoder(some_prompts(3), 1), StaticCacheDecoder)
    policy.release_memory()
    assert not policy.graphs.runners


@pytest.mark.parametrize("static", [False, True])
def test_the_context_is_the_limit(static: bool) -> None:
    policy = decoder(1, max_position_embeddings=11)
    given = policy, [[[3, 4, 5]]], 2
    decoding = StaticCacheDecoder(*given, policy.graphs) if static else KVCacheDecoder(*given)
    newest, opened = {0: torch.tensor([6, 7])}, {0: [True, False]}
    with torch.no_grad():
        decoding.start()
        for _ in range(8):
            decoding.step(newest, opened)
        with pytest.raises(UserError, match="sequences of 12 tokens exceed the model's context"):
            decoding.step(newest, opened)


def test_an_unknown_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_graph_decoding.VARIABLE, raising=False)
    assert not cuda_graph_decoding.uses_static_cache(torch.device("cpu"))
    assert cuda_graph_decoding.uses_static_cache(torch.device("cuda"))
    monkeypatch.setenv(cuda_graph_decoding.VARIABLE, "statik")
    with pytest.raises(UserError, match=r"KLAB_DECODING.*did you mean 'static'"):
        cuda_graph_decoding.uses_static_cache(torch.device("cpu"))
