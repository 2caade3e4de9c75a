"""Evaluation: pass@k by enumeration, divergences by brute force, and the same prompts for every cell."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

import klab.harness.training.evaluation as module
from klab.harness.policy.scores import token_scores
from klab.harness.training.data.generate import generate
from klab.harness.training.data.rollouts import rollout_prompts
from klab.harness.training.data.scoring import score_completions
from klab.harness.training.evaluation import held_out, pass_at_k, sampling_error, sequence_divergence
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, finished, numbers


def trained(make_run: MakeRun, updates: int = 3, **settings: Any) -> Pack:
    run = make_run(training={"lr": 0.03}, **settings)
    pack = Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])
    for _ in range(updates):
        pack.advance()
    return pack


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * correct + [False] * (n - correct), k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 5"):
        pass_at_k(4, 1, 5)


def test_divergences_are_zero_before_the_first_update(make_run: MakeRun) -> None:
    row = trained(make_run, updates=0).evaluate()[0]
    assert row["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["forward_kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_divergence_is_the_sum_of_exact_conditional_ones(make_run: MakeRun) -> None:
    pack = trained(make_run)
    rollouts = generate(
        pack.policy, pack.members, [held_out(pack.members[0])], 3, ("test",), pack.settings.max_new_tokens
    )
    found, entropy = sequence_divergence(pack.policy, pack.reference, rollouts, pack.settings.max_new_tokens)
    p, q = (token_scores(each, rollouts, logits=True, plain=True)[0].logits for each in (pack.policy, pack.reference))
    assert p is not None
    assert q is not None
    mine, other = (torch.distributions.Categorical(logits=each.detach()) for each in (p, q))
    mask = rollouts[0].mask
    expected = (torch.distributions.kl_divergence(mine, other) * mask).sum(1)
    torch.testing.assert_close(found[0].float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy[0].float(), (mine.entropy() * mask).sum(1), rtol=1e-4, atol=1e-5)
    assert float(found[0].mean()) > 0.01


def test_the_divergence_agrees_with_the_sampled_estimate(make_run: MakeRun) -> None:
    """k1 summed over own tokens has the same mean (Rao-Blackwell); 6,000 samples, five standard errors."""
    pack = trained(make_run)
    rollouts = generate(
        pack.policy, pack.members, [held_out(pack.members[0])], 1000, ("test",), pack.settings.max_new_tokens
    )
    exact = sequence_divergence(pack.policy, pack.reference, rollouts, pack.settings.max_new_tokens)[0][0]
    with torch.no_grad():
        mine, other = (token_scores(each, rollouts)[0].logp for each in (pack.policy, pack.reference))
    sampled = (mine - other).double().sum(1)
    error = float(sampled.std()) / len(sampled) ** 0.5
    assert abs(float(exact.mean() - sampled.mean())) < 5 * error
    assert float(exact.std()) < float(sampled.std())


def test_a_row_has_the_reverse_kl_of_fresh_samples_and_the_forward_kl_of_the_references(make_run: MakeRun) -> None:
    pack = trained(make_run, updates=6)
    row = pack.evaluate()[0]
    members, samples = pack.members, pack.members[0].cell.training.evaluation_samples
    examples = [held_out(pack.members[0])]
    drawn = pack.settings.completions_after(row["update"])
    fresh = generate(pack.policy, members, examples, drawn, ("evaluation", row["update"]), pack.settings.max_new_tokens)
    kept = generate(
        pack.reference,
        members,
        examples,
        samples,
        ("evaluation of the reference",),
        pack.settings.max_new_tokens,
        seeded=False,
    )
    expected = {}
    for name, rollouts in (("reverse_kl", fresh), ("forward_kl", kept)):
        p, q = (token_scores(each, rollouts, logits=True)[0].logits for each in (pack.policy, pack.reference))
        assert p is not None
        assert q is not None
        mine, anchor = (torch.distributions.Categorical(logits=each.detach().double()) for each in (p, q))
        pair = (mine, anchor) if name == "reverse_kl" else (anchor, mine)
        expected[name] = float((torch.distributions.kl_divergence(*pair) * rollouts[0].mask).sum(1).mean())
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert abs(expected["forward_kl"] - expected["reverse_kl"]) > 1e-2 * expected["reverse_kl"]


def test_the_last_evaluation_draws_more_and_says_how_sure_its_reward_is(make_run: MakeRun) -> None:
    pack = trained(make_run, updates=0)
    training = pack.members[0].cell.training
    before = pack.evaluate()[0]
    for _ in range(training.updates):
        pack.advance()
    after = pack.evaluate()[0]
    prompts = len(held_out(pack.members[0]))
    assert before["completions"] == prompts * training.evaluation_samples
    assert after["completions"] == prompts * 32
    assert before["k"] == after["k"] == training.evaluation_samples
    fresh = generate(
        pack.policy,
        pack.members,
        [held_out(pack.members[0])],
        32,
        ("evaluation", after["update"]),
        pack.settings.max_new_tokens,
    )[0]
    scores = score_completions(pack.members, 0, held_out(pack.members[0]), fresh)
    rewards = torch.tensor([score.reward for score in scores], dtype=torch.float64).reshape(prompts, 32)
    assert after["reward"] == pytest.approx(float(rewards.mean()))
    assert after["reward_se"] == pytest.approx(float((rewards.var(1) / 32).sum().sqrt()) / prompts)
    correct = torch.tensor([float(score.correct) for score in scores]).reshape(prompts, 32).sum(1)
    draws = [pass_at_k(32, int(count), training.evaluation_samples) for count in correct]
    assert after["pass_at_k"] == pytest.approx(sum(draws) / prompts)


def test_the_sampling_error_is_the_spread_of_repeated_evaluations() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.1, 0.5, 0.9])
    draws = (torch.rand(4000, 3, 8, generator=generator) < levels[:, None]).double()
    spread = float(draws.mean(dim=(1, 2)).std())
    errors = [sampling_error(each.flatten().tolist(), 8) for each in draws[:500]]
    known = torch.tensor([error for error in errors if error is not None], dtype=torch.float64)
    assert float((known**2).mean().sqrt()) == pytest.approx(spread, rel=0.05)
    assert sampling_error([1.0, 0.0], 1) is None
    assert sampling_error([1.0, float("nan")], 2) is None


def test_chunks_do_not_change_the_divergence(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = trained(make_run)
    rollouts = generate(
        pack.policy, pack.members, [held_out(pack.members[0])], 3, ("test",), pack.settings.max_new_tokens
    )
    whole = sequence_divergence(pack.policy, pack.reference, rollouts, pack.settings.max_new_tokens)
    monkeypatch.setattr(module, "_LOGITS", 200)
    pieces = sequence_divergence(pack.policy, pack.reference, rollouts, pack.settings.max_new_tokens)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(other[0], one[0], rtol=1e-4, atol=1e-6)


def test_logits_that_are_not_numbers_are_not_a_small_divergence(make_run: MakeRun) -> None:
    pack = trained(make_run)
    with torch.no_grad():
        next(iter(pack.policy.parameters.values())).fill_(float("nan"))
    row = pack.evaluate()[0]
    assert (row["reverse_kl"], row["forward_kl"], row["entropy"]) == (None, None, None)


def test_every_cell_is_examined_on_the_same_held_out_prompts(make_run: MakeRun) -> None:
    pack = trained(make_run, updates=0, seeds=3)
    asked = [[example.prompt for example in held_out(member)] for member in pack.members]
    assert asked[0] == asked[1] == asked[2]
    assert len(set(asked[0])) == 6
    learned = {example.prompt for example in pack.members[0].task.split("train")}
    assert not learned & set(asked[0])


def test_training_prompts_depend_on_seed_and_rollout(make_run: MakeRun) -> None:
    first, second = trained(make_run, updates=0, seeds=2).members
    asked = [[e.prompt for e in rollout_prompts(m, n)] for m, n in [(first, 0), (first, 0), (first, 1), (second, 0)]]
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]
    assert asked[0] != asked[3]
    assert len(set(asked[0])) == len(asked[0])


def test_a_row_shows_completions_with_their_rewards(make_run: MakeRun) -> None:
    run = finished(make_run())
    row = numbers(run, run.cells[0])["evaluations"][-1]
    assert len(row["samples"]) == 4
    for sample in row["samples"]:
        assert sample["reward"] == sample["completion"].count(sample["prompt"][0]) / 4
    assert row["k"] == 3
    assert set(row["parts"]) == {"length"}
