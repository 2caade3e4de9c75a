"""Sampling: what is drawn, what is recorded, and that caching and merging change nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.categorical import UniformSlice, sample_tokens, uniform_numbers
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import Environment, SamplingOptions, TranscribingEnvironment
from klab.harness.policy.scores import token_scores
from tests.support.tiny_policy import decoder, generators

PROMPTS = [[3, 4, 5, 13, 14], [6, 13, 7], [8, 9, 10, 3, 4, 13, 14]]


def assert_same(first: Rollout, second: Rollout, atol: float = 0.0) -> None:
    for name in ("tokens", "mask", "present", "truncated"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    torch.testing.assert_close(first.logp, second.logp, rtol=0, atol=atol)
    assert first.texts == second.texts
    assert first.prompts == second.prompts
    assert first.group_size == second.group_size


@pytest.mark.parametrize(("group_size", "budget"), [(4, 5), (6, 30), (1, 3)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_caching_and_merging_draw_what_full_passes_draw(group_size: int, budget: int, family: str) -> None:
    policy = decoder(1, family, torch.float64, num_key_value_heads=2)
    found = [
        sample(
            policy,
            [PROMPTS],
            generators([7]),
            SamplingOptions(group_size=group_size, max_new_tokens=budget),
            plain=plain,
        )[0]
        for plain in (False, True)
    ]
    assert found[0].tokens.shape[1] == min(budget, int(found[0].present.sum(1).max()))
    assert_same(*found, atol=1e-11)


def test_recorded_log_probabilities_are_the_scores_of_the_tempered_policy() -> None:
    policy = decoder(1, dtype=torch.float64)
    rollout = sample(
        policy, [PROMPTS], generators([1]), SamplingOptions(group_size=5, max_new_tokens=6, temperature=0.8, top_p=0.6)
    )[0]
    scores = token_scores(policy, [rollout], temperature=0.8)[0].logp
    torch.testing.assert_close(rollout.logp, scores, rtol=0, atol=1e-11)
    assert not rollout.logp[~rollout.mask].any()


def test_a_trajectory_ends_with_its_end_token_or_its_budget() -> None:
    rollout = sample(decoder(1), [PROMPTS], generators([0]), SamplingOptions(group_size=20, max_new_tokens=12))[0]
    for row in range(60):
        tokens = rollout.tokens[row][rollout.present[row]].tolist()
        assert (1 in tokens) != bool(rollout.truncated[row])
        assert tokens.index(1) == len(tokens) - 1 if 1 in tokens else len(tokens) == 12
        written = "".join("-" if token == 1 else "p" if token == 0 else "x" for token in tokens)
        shown = written.rstrip("-p")  # special tokens at the end are no part of the text
        assert len(rollout.texts[row].replace("<pad>", "x").replace("<unk>", "x")) == len(shown)
    assert 0 < rollout.truncated.sum() < 60
    assert not rollout.tokens[~rollout.present].any()


def numbers(rows: int) -> Tensor:
    return uniform_numbers(torch.Generator().manual_seed(0), rows, torch.device("cpu"))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(40_000, -1)
    chosen, logp = sample_tokens(logits, numbers(len(logits)), 1.0)
    shares = torch.bincount(chosen, minlength=4) / len(chosen)
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.01, rtol=0)
    torch.testing.assert_close(logp, logits[0].log_softmax(0)[chosen])


@pytest.mark.parametrize(("top_p", "allowed"), [(0.5, {2}), (0.7, {1, 2}), (0.95, {0, 1, 2}), (1e-9, {2})])
def test_top_p_draws_from_the_smallest_likely_set_and_records_the_full_distribution(
    top_p: float, allowed: set[int]
) -> None:
    logits = torch.tensor([[0.1, 0.25, 0.6, 0.05]]).log().expand(4000, -1)
    chosen, logp = sample_tokens(logits, numbers(len(logits)), top_p)
    assert set(chosen.tolist()) == allowed
    torch.testing.assert_close(logp, logits[0][chosen])


def test_greedy_takes_the_most_likely_token_and_leaves_the_generator_alone() -> None:
    policy, seeds = decoder(1), generators([3])
    before = seeds[0].get_state()
    rollout = sample(policy, [PROMPTS], seeds, SamplingOptions(group_size=2, max_new_tokens=6, greedy=True))[0]
    assert torch.equal(seeds[0].get_state(), before)
    assert torch.equal(rollout.tokens[0::2], rollout.tokens[1::2])
    logits = token_scores(policy, [rollout], logits=True)[0].logits
    assert logits is not None
    assert torch.equal(logits.argmax(-1)[rollout.mask], rollout.tokens[rollout.mask])


def test_one_uniform_number_per_trajectory_and_step() -> None:
    policy, seeds, expected = decoder(1), generators([3]), generators([3])
    rollout = sample(policy, [PROMPTS], seeds, SamplingOptions(group_size=2, max_new_tokens=4))[0]
    for _ in range(rollout.tokens.shape[1]):
        torch.rand(6, 1, generator=expected[0], dtype=torch.float64)
    assert torch.equal(seeds[0].get_state(), expected[0].get_state())


@pytest.mark.parametrize("plain", [False, True])
def test_an_environment_takes_turns_and_its_tokens_are_not_the_policys(plain: bool) -> None:
    policy, seen = decoder(1, dtype=torch.float64), []

    def environment(cell: int, trajectory: int, transcript: str) -> str | None:
        seen.append((cell, trajectory, transcript))
        return "7=" if "7=" not in transcript else None

    rollout = sample(
        policy,
        [PROMPTS],
        generators([2]),
        SamplingOptions(group_size=8, max_new_tokens=10),
        environment=environment,
        plain=plain,
    )[0]
    answered = rollout.present & ~rollout.mask
    assert answered.sum() > 0
    assert set(answered.sum(1).tolist()) <= {0, 2}
    for row in range(24):
        written = rollout.tokens[row][rollout.present[row]].tolist()
        own = rollout.mask[row][rollout.present[row]].tolist()
        assert sum(own) <= 10
        if False in own:
            at = own.index(False)
            assert written[at - 1] == 1
            assert written[at : at + 2] == policy.tokenizer("7=")["input_ids"]
            text = policy.tokenizer.decode([t for t, o in zip(written, own, strict=True) if o and t != 1])
            assert rollout.texts[row] == re.sub("(<pad>)+$", "", text)  # special tokens at the end are no text
    assert {cell for cell, _, _ in seen} == {0}
    scores = token_scores(policy, [rollout])[0].logp
    torch.testing.assert_close(rollout.logp, scores, rtol=0, atol=1e-11)


def test_a_rollout_survives_a_flat_dictionary() -> None:
    rollout = sample(decoder(1), [PROMPTS], generators([0]), SamplingOptions(group_size=3, max_new_tokens=5))[0]
    again = Rollout.from_dict(rollout.to_dict())
    assert_same(again, rollout)
    assert all(isinstance(v, torch.Tensor | list) for v in rollout.to_dict().values())


def test_rows_are_whole_groups() -> None:
    rollout = sample(decoder(1), [PROMPTS], generators([0]), SamplingOptions(group_size=3, max_new_tokens=5))[0]
    assert rollout.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    part = rollout.select_prompts(slice(1, 3))
    assert part.prompts == PROMPTS[1:]
    assert torch.equal(part.tokens, rollout.tokens[3:])
    assert part.texts == rollout.texts[3:]
    assert part.groups.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("cut", [1, 2])
def test_prompts_sampled_apart_are_the_prompts_sampled_together(cut: int) -> None:
    policy, size = decoder(1, dtype=torch.float64), 2

    def drawn(prompts: list[list[int]], generator: torch.Generator | UniformSlice) -> Rollout:
        return sample(policy, [prompts], [generator], SamplingOptions(group_size=size, max_new_tokens=40, top_p=0.9))[0]

    whole = drawn(PROMPTS, generators([4])[0])
    total = size * len(PROMPTS)
    parts = [
        drawn(PROMPTS[:cut], UniformSlice(generators([4])[0], 0, total)),
        drawn(PROMPTS[cut:], UniformSlice(generators([4])[0], size * cut, total)),
    ]
    assert {part.tokens.shape[1] for part in parts} != {whole.tokens.shape[1]}  # one of them is padded
    assert_same(Rollout.concatenate(parts), whole, atol=1e-12)


def test_mistakes_are_named() -> None:
    policy = decoder(1, max_position_embeddings=8)
    with pytest.raises(UserError, match="empty"):
        sample(policy, [[[]]], generators([0]), SamplingOptions(group_size=1, max_new_tokens=2))
    with pytest.raises(UserError, match="context"):
        sample(policy, [PROMPTS], generators([0]), SamplingOptions(group_size=8, max_new_tokens=20))
    with pytest.raises(ValueError, match="1 cells"):
        sample(policy, [PROMPTS, PROMPTS], generators([0]), SamplingOptions(group_size=1, max_new_tokens=2))


def test_texts_are_transcripts_for_the_cells_whose_tasks_score_these() -> None:
    policy = decoder(2, dtype=torch.float64)

    def answer(cell: int, trajectory: int, transcript: str) -> str | None:
        return "7=" if "7=" not in transcript else None

    def texts(environment: Environment) -> list[list[str]]:
        options = SamplingOptions(group_size=8, max_new_tokens=10)
        return [each.texts for each in sample(policy, [PROMPTS] * 2, generators([2, 3]), options, environment)]

    own, both = texts(answer), texts(TranscribingEnvironment(answer, frozenset([1])))
    assert both[0] == own[0]
    answered = [(mine, text) for mine, text in zip(own[1], both[1], strict=True) if mine != text]
    assert answered
    for mine, text in answered:
        before, found, after = text.partition("7=")
        assert (before + after, found) == (mine, "7=")
