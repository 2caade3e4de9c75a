"""Recorded decoding steps draw what a CPU draws, also where rows end, are moved, or outgrow their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked import block_decoding, recorded_steps
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.emulated_device.device import EmulatedDevices
from tests.support.tiny_policy import ALPHABET, configuration, generators
from tests.support.transformers_tokenizer import character_tokenizer

PROMPTS = [[[3, 4, 5, 6], [7, 8], [9]], [[4], [5, 6, 7], [8, 9]]]


def answered(cell: int, trajectory: int, transcript: str) -> str | None:
    return "12=" * 30 if len(transcript) < 40 and trajectory % 2 else None


def rollouts(device: str, environment: Any = None, **options: Any) -> tuple[StackedPolicy, list[Rollout]]:
    config = configuration("qwen2", num_hidden_layers=1, num_key_value_heads=2)
    tokenizer = character_tokenizer(ALPHABET)
    policy = StackedPolicy.random(config, tokenizer, [0, 1], dtype=torch.float64, device=device)
    settings = SamplingOptions(**{"group_size": 4, "max_new_tokens": 40, **options})
    return policy, sample(policy, PROMPTS, generators([0, 1]), settings, environment=environment)


@pytest.mark.parametrize(
    "options",
    [{}, {"greedy": True}, {"temperature": 0.8, "top_p": 0.7}, {"environment": answered}],
    ids=["drawn", "greedy", "nucleus", "environment"],
)
def test_rollouts_are_those_of_the_cpu(
    device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for module in (block_decoding, recorded_steps):
        monkeypatch.setattr(module, "MIN_ROWS", 2)
        monkeypatch.setattr(module, "MIN_LENGTH", 32)
    _, expected = rollouts("cpu", **options)
    policy, found = rollouts("emulated:0", **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens.cpu().equal(theirs.tokens)
        assert mine.mask.cpu().equal(theirs.mask)
        assert mine.texts == theirs.texts
        torch.testing.assert_close(mine.logp.cpu(), theirs.logp, rtol=0, atol=1e-12)
    memory = policy.steps.memory
    assert memory is not None
    if "environment" in options:
        assert any(not each.mask[each.present].all() for each in expected)  # it answered
        assert memory.length > 96
    else:
        assert memory.length == 48
    assert device.replays > 40
    assert all(graph.kept_bytes == 0 for graph in policy.steps.recorded.values())


def test_what_the_host_knows_of_a_rollout_goes_with_it(device: EmulatedDevices) -> None:
    _, (rollout, other) = rollouts("emulated:0")
    device.reset_counts()
    parts = [rollout, rollout.select_prompts([2, 0]), rollout.slice_rows(4, 12), rollout.slice_rows(5, 7)]
    parts.append(Rollout.concatenate([rollout, other]).select_prompts(slice(1, 4)))
    for part in parts:
        part.prefix_tree(None)
        part.prefix_tree(96)
    assert device.num_waits == 0
    for part in parts:
        assert part.on_host.tokens.equal(part.tokens.cpu())
        assert part.on_host.mask.equal(part.mask.cpu())
        assert part.on_host.lengths.equal(part.present.sum(1).cpu())
    again = Rollout.from_dict(parts[-1].to_dict(), "emulated:0")
    assert again.tokens.cpu().equal(parts[-1].tokens.cpu())
    assert again.on_host.lengths.equal(parts[-1].on_host.lengths)
