"""Token scores: merged prefixes give what full forward passes give, in value and in gradient."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from klab.harness.policy.prefix_tree import build_prefix_tree
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import TokenScores, token_scores
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import decoder, written


def ragged(seed: int, prompts: int = 3, group_size: int = 4, longest: int = 6, alphabet: int = 2) -> Rollout:
    """Trajectories of different lengths over few characters, so that many share prefixes and some are identical."""
    draw = random.Random(seed)
    starts = [[draw.randint(3, 14) for _ in range(draw.randint(1, 7))] for _ in range(prompts)]
    rows = [
        [draw.randint(3, 2 + alphabet) for _ in range(draw.randint(1, longest))] for _ in range(prompts * group_size)
    ]
    return written(starts, rows, dtype=torch.float64)


def gradients(policy: StackedPolicy, scores: list[TokenScores]) -> dict[str, Tensor]:
    """Of a loss that weighs every token differently."""
    loss = torch.zeros((), dtype=torch.float64)
    for score in scores:
        weight = torch.linspace(-1, 2, score.logp.numel(), dtype=torch.float64).view(score.logp.shape)
        loss = loss + (weight * score.logp).sum()
        if score.entropy is not None and score.entropy.requires_grad:
            loss = loss + (weight.flip(1) * score.entropy).sum()
    names = list(policy.parameters)
    return dict(zip(names, torch.autograd.grad(loss, [policy.parameters[n] for n in names]), strict=True))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shape", ["row_per_group", "row_per_trajectory"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merging_changes_neither_values_nor_gradients(shape: str, family: str, entropy: bool) -> None:
    size = {"row_per_group": {}, "row_per_trajectory": {"group_size": 12, "longest": 20, "alphabet": 5}}[shape]
    rollout = ragged(0, **size)
    assert (rollout.prefix_tree(MAX_EXPLICIT_KEYS).attn_bias is None) == (shape == "row_per_trajectory")
    policy = decoder(1, family, torch.float64, num_key_value_heads=2)
    merged = token_scores(policy, [rollout], entropy=True, logits=True, entropy_gradient=entropy)
    plain = token_scores(policy, [rollout], entropy=True, logits=True, plain=True, entropy_gradient=entropy)
    assert merged[0].entropy is not None
    assert merged[0].entropy.requires_grad == entropy
    for name in ("logp", "entropy", "logits"):
        torch.testing.assert_close(getattr(merged[0], name), getattr(plain[0], name), rtol=0, atol=1e-10)
    expected = gradients(policy, plain)
    for name, value in gradients(policy, merged).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)
        assert value.abs().sum() > 0


def test_identical_trajectories_are_forwarded_once() -> None:
    once = written([[3, 4]], [[5, 6, 7, 1]])
    often = written([[3, 4]], [[5, 6, 7, 1]] * 8)
    assert len(often.prefix_tree(MAX_EXPLICIT_KEYS).tokens) == len(once.prefix_tree(MAX_EXPLICIT_KEYS).tokens)
    policy = decoder(1)
    scores = token_scores(policy, [often])[0].logp
    assert torch.equal(scores, token_scores(policy, [once])[0].logp.expand(8, -1))


def test_every_distinct_prefix_is_forwarded_once() -> None:
    rollout = written([[3, 4], [3]], [[5, 6, 1], [5, 7, 1], [5, 6, 1], [8, 1], [8, 1], [1]])
    built = build_prefix_tree(rollout.prompts, rollout.groups, rollout.tokens, rollout.present.sum(1), 96)
    # prompts 3 4 | 3, then 5, 5 6, 5 7 of the first and 8 of the second; the rest is padding (zeros)
    assert sorted(built.tokens[:7].tolist()) == [3, 3, 4, 5, 6, 7, 8]
    assert not built.tokens[7:].any()


def test_log_probabilities_equal_those_of_transformers(tmp_path: Path) -> None:
    policy, rollout = decoder(1, "qwen2", num_key_value_heads=2), ragged(3)
    policy.save(tmp_path, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = token_scores(policy, [rollout], temperature=0.7)[0].logp
    for row, group in enumerate(rollout.groups.tolist()):
        own = rollout.tokens[row, : int(rollout.mask[row].sum())]
        start = len(rollout.prompts[group])
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(rollout.prompts[group]), own))[None]).logits[0, start - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, own[:, None])[:, 0]
        torch.testing.assert_close(found[row, : len(own)], expected, rtol=0, atol=1e-5)
        assert not found[row, len(own) :].any()


def test_environment_tokens_are_read_but_not_scored() -> None:
    own = [[True, True, False, False, True], [True, True, True, True, True]]
    rows = [[5, 1, 7, 8, 1], [5, 6, 7, 8, 1]]
    policy = decoder(1, dtype=torch.float64)
    score = token_scores(policy, [written([[3, 4]], rows, own)], entropy=True)[0]
    everything = token_scores(policy, [written([[3, 4]], rows)], entropy=True)[0]
    mask = torch.tensor(own)
    assert torch.equal(score.logp[mask], everything.logp[mask])
    assert not score.logp[~mask].any()
    assert score.entropy is not None
    assert not score.entropy[~mask].any()


def test_temperature_divides_logits_and_entropy_is_that_of_the_tempered_distribution() -> None:
    policy, rollout = decoder(1, dtype=torch.float64), ragged(1)
    plain = token_scores(policy, [rollout], logits=True)[0]
    warm = token_scores(policy, [rollout], temperature=2.0, logits=True, entropy=True)[0]
    assert plain.logits is not None
    assert warm.logits is not None
    assert warm.entropy is not None
    torch.testing.assert_close(warm.logits, plain.logits / 2)
    logp = warm.logits.log_softmax(-1)
    mask = rollout.mask
    torch.testing.assert_close(warm.entropy[mask], -(logp.exp() * logp).sum(-1)[mask])
    torch.testing.assert_close(warm.logp[mask], logp.gather(-1, rollout.tokens.unsqueeze(-1))[..., 0][mask])


def test_a_subset_of_groups_scores_as_it_does_within_the_whole() -> None:
    policy, rollout = decoder(1, dtype=torch.float64), ragged(5)
    whole = token_scores(policy, [rollout])[0].logp
    part = token_scores(policy, [rollout.select_prompts([2, 0])])[0].logp
    torch.testing.assert_close(part, torch.cat((whole[8:12], whole[0:4])), rtol=0, atol=1e-12)


def test_no_gradient_is_kept_without_a_graph() -> None:
    policy = decoder(1)
    with torch.no_grad():
        assert not token_scores(policy, [ragged(0)])[0].logp.requires_grad
    assert not token_scores(policy.frozen_copy(), [ragged(0)])[0].logp.requires_grad
    assert token_scores(policy, [ragged(0)])[0].logp.requires_grad
