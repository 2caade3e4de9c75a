"""A sampler that is not the trainer's policy: what it records, what is corrected, and that no mate matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from klab.grid import Objective, UserError, parse_grid
from klab.grid.schema.sections import Rejection, Sampler, load_section
from klab.harness.objective import TokenBatch
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.data.prompts import encode_prompts
from klab.harness.training.data.rollouts import rollout_prompts
from klab.harness.training.data.sampler_mismatch import correction_weights, mismatch_metrics
from klab.harness.training.forward import ForwardPass
from klab.harness.training.loss import token_batch
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.harness.training.runtime.rng import generator
from tests.harness.objective.enumeration import Enumeration
from tests.support.random_batches import gradient
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

HOT = {"temperature": 1.5}
OWN = torch.ones(1, 4, dtype=torch.bool)


def pack(run: Run) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def test_corrections_are_the_published_ones() -> None:
    old, sampled = logs(0.9, 0.5, 0.1, 0.3), logs(0.2, 0.5, 0.4, 0.2)  # ratios 4.5, 1, 0.25, 1.5
    factors = {
        kind: correction_weights(Sampler(correction=kind, cap=2.0, low=0.5, high=5.0), old, sampled, OWN)
        for kind in ("tis", "icepop")
    }
    torch.testing.assert_close(factors["tis"], torch.tensor([[2.0, 1.0, 0.25, 1.5]]).double())
    torch.testing.assert_close(factors["icepop"], torch.tensor([[4.5, 1.0, 0.0, 1.5]]).double())
    for kind in ("none", "ratio"):
        assert correction_weights(Sampler(correction=kind), old, sampled, OWN) is None


def test_the_mismatch_is_measured_over_own_tokens() -> None:
    old, sampled = logs(0.9, 0.5, 0.1, 0.3), logs(0.2, 0.5, 0.4, 0.2)
    mask = torch.tensor([[True, True, True, False]])
    found = mismatch_metrics(Sampler(correction="tis"), old, sampled, mask)
    kl = sum(r - 1 - torch.tensor(r).double().log().item() for r in (4.5, 1.0, 0.25)) / 3
    assert found["sampler_kl"] == pytest.approx(kl)
    assert found["sampler_ess"] == pytest.approx(5.75**2 / (3 * (4.5**2 + 1 + 0.25**2)))
    assert found["correction_mean"] == pytest.approx((2.0 + 1.0 + 0.25) / 3)
    assert mismatch_metrics(Sampler(), old, sampled, mask)["correction_mean"] == 1.0
    assert set(mismatch_metrics(Sampler(), old, sampled, mask & False).values()) == {0.0}


def test_the_level_of_a_sequence_multiplies_the_ratios_of_its_own_tokens() -> None:
    old, sampled = logs(0.9, 0.5, 0.1, 0.3), logs(0.2, 0.5, 0.4, 0.2)  # 4.5 · 1 · 0.25 = 1.125; the last is not own
    mask = torch.tensor([[True, True, True, False]])
    whole = {"level": "sequence"}

    def first(**settings: Any) -> float:
        factors = correction_weights(Sampler(**settings), old, sampled, mask)
        assert factors is not None
        assert len(set(factors[mask].tolist())) == 1
        return float(factors[0, 0])

    assert first(correction="tis", cap=2.0, **whole) == pytest.approx(1.125)
    assert first(correction="tis", cap=1.1, **whole) == pytest.approx(1.1)
    assert first(correction="tis", floor=1.2, **whole) == pytest.approx(1.2)
    assert first(correction="icepop", low=1.2, **whole) == 0.0


def test_rejection_leaves_out_whom_it_names() -> None:
    old, sampled = logs(0.9, 0.5, 0.1, 0.3), logs(0.2, 0.5, 0.4, 0.2)
    mask = torch.tensor([[True, True, True, False]])
    mean = 1.125 ** (1 / 3)
    for reject, kept in [
        ({"high": mean * 1.001, "low": mean * 0.999}, [1, 1, 1]),
        ({"high": mean * 0.999}, [0, 0, 0]),
        ({"high": 1.2, "low": 1.1, "over": "sum"}, [1, 1, 1]),
        ({"high": 4.0, "over": "token"}, [0, 1, 1]),  # low is 1/4
        ({"high": 1.0, "divergence": "k2", "over": "token"}, [0, 1, 1]),  # ½·log² of 4.5 and 0.25: 1.131, 0.961
        ({"high": 1.0, "divergence": "k2", "over": "max"}, [0, 0, 0]),
        ({"high": 1.22, "divergence": "k3", "over": "mean"}, [1, 1, 1]),  # 1.9959, 0, 0.6363: mean 0.8774
        ({"high": 0.87, "divergence": "k3", "over": "mean"}, [0, 0, 0]),
    ]:
        sampler = Sampler(reject=Rejection(**reject))
        factors = correction_weights(sampler, old, sampled, mask)
        assert factors is not None
        assert factors[mask].tolist() == kept, reject
        share = mismatch_metrics(sampler, old, sampled, mask)["sampler_rejected"]
        assert share == pytest.approx(1 - sum(kept) / 3)
    both = Sampler(correction="tis", cap=2.0, reject=Rejection(high=4.0, over="token"))
    assert correction_weights(both, old, sampled, mask)[mask].tolist() == pytest.approx([0.0, 1.0, 0.25])


@pytest.mark.parametrize("sampler", [HOT, {"dtype": "bfloat16"}, {"dtype": "float64", "temperature": 0.5}])
def test_rollouts_come_from_the_sampler_and_the_trainer_looks_at_them_anew(
    make_run: MakeRun, sampler: dict[str, Any]
) -> None:
    trained = pack(make_run(training={"sampler": sampler, "temperature": 0.8}))
    trained.advance()
    trained.collect_due_rollouts()
    member, experience = trained.members[0], trained.pending[0][0]
    dtype = getattr(torch, sampler.get("dtype", "float32"))
    copies = {name: value.detach().to(dtype) for name, value in trained.policy.parameters.items()}
    mu = StackedPolicy(trained.policy.config, trained.policy.tokenizer, copies)
    again = sample(
        mu,
        [encode_prompts(mu, member, rollout_prompts(member, 1))],
        [generator("rollout", 1, 0)],
        SamplingOptions(group_size=4, max_new_tokens=4, temperature=sampler.get("temperature", 0.8)),
    )[0]
    assert torch.equal(again.tokens, experience.rollout.tokens)
    assert torch.equal(again.logp, experience.rollout.logp)
    seen = token_scores(trained.policy, [experience.rollout], temperature=0.8)[0].logp
    assert experience.old_logprobs is not None
    assert torch.equal(experience.old_logprobs, seen.detach())
    assert not torch.allclose(experience.old_logprobs, experience.rollout.logp.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "ratio", "tis", "icepop"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_ratio_is_to_the_trainer_unless_it_is_asked_to_be_to_the_sampler(
    make_run: MakeRun, kind: str, epochs: int
) -> None:
    bounds = {"tis": {"cap": 1.1}, "icepop": {"low": 0.8, "high": 1.2}}
    sampler = {**HOT, "correction": kind, **bounds.get(kind, {})}
    trained = pack(make_run(training={"sampler": sampler, "updates_per_rollout": epochs}))
    trained.collect_due_rollouts()
    member, experience = trained.members[0], trained.pending[0][0]
    assert experience.old_logprobs is not None
    now = experience.old_logprobs + 0.25
    batch = token_batch(member, experience, ForwardPass(now, now))
    if kind == "ratio":
        assert torch.equal(batch.logp_behaviour, experience.rollout.logp)
    else:
        assert torch.equal(batch.logp_behaviour, now if epochs == 1 else experience.old_logprobs)
    if kind in ("none", "ratio"):
        assert batch.correction is None
    else:
        ratio = (experience.old_logprobs - experience.rollout.logp).exp()
        inside = (ratio >= 0.8) & (ratio <= 1.2)
        expected = ratio.clamp(max=1.1) if kind == "tis" else torch.where(inside, ratio, 0.0)
        assert torch.equal(batch.correction, expected)


def test_the_record_has_the_mismatch_where_there_is_a_sampler(make_run: MakeRun) -> None:
    names = {"sampler_kl", "sampler_ess", "correction_mean"}
    trained = [
        pack(make_run(name, {"sampler": s})) for name, s in (("plain", None), ("hot", {**HOT, "correction": "tis"}))
    ]
    rows = [each.advance()[0] for each in trained]
    assert set(rows[1]) - set(rows[0]) == names
    assert rows[1]["sampler_kl"] > 1e-3
    assert 0.5 < rows[1]["sampler_ess"] < 1
    assert rows[1]["correction_mean"] != 1.0
    assert rows[1]["ratio_max"] == 1.0  # on policy: the ratio is to the trainer's own policy


@pytest.mark.parametrize(
    ("sampler", "more"),
    [
        ({"dtype": "bfloat16", "correction": "tis"}, {"lag": 1}),
        ({**HOT, "correction": "icepop"}, {"updates_per_rollout": 2, "equal_groups": "refill"}),
        ({"dtype": "bfloat16", "correction": "ratio"}, {"micro_batch": 8}),
        ({**HOT, "correction": "tis", "level": "sequence", "reject": {"high": 1.5}}, {"micro_batch": 8}),
    ],
    ids=["bfloat16", "hot", "ratio", "sequence"],
)
def test_interrupted_and_packed_cells_end_with_the_same_bits(
    make_run: MakeRun, sampler: dict[str, Any], more: dict[str, Any]
) -> None:
    training = {**more, "sampler": sampler, "updates": 3, "evaluate_every": 3}
    objectives = [{"advantage": "greedy_baseline"}, {"placement": "loss"}]
    packed = finished(make_run("packed", training, objectives, seeds=2))
    broken = make_run("broken", training, objectives, seeds=2)
    for identity in broken.cells:
        for _ in range(2):
            run_cells(broken.path, [identity], stop=StopAfter(1))
        run_cells(broken.path, [identity])
        assert_same(packed, broken, identity)
    assert {row["nonfinite"] for each in packed.cells for row in numbers(packed, each)["metrics"]} == {False}


def corrected(space: Enumeration, objective: Objective, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected gradient of trajectories from μ with their correction, and that of trajectories from π_old."""
    policy, old, mu, reference = (space.policy(seed) for seed in range(4))
    rewards = torch.randn(len(space.sequences), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    number, here = len(space.sequences), space.logp(mu)
    batch = TokenBatch(
        logp=space.logp(policy),
        logp_behaviour=space.logp(old),
        logp_reference=space.logp(reference),
        mask=torch.ones(number, space.steps, dtype=torch.bool),
        rewards=rewards,
        groups=torch.zeros(number, dtype=torch.long),
        max_new_tokens=space.steps,
        correction=correction_weights(sampler, space.logp(old), here, torch.ones_like(here, dtype=torch.bool)),
    )
    coefficients = number * gradient(objective, batch)
    found = space.derivative(lambda z: (here.sum(1).exp() * (coefficients * space.logp(z)).sum(1)).sum(), policy)
    return found, space.loss_gradient(objective, policy, old, reference, rewards)


@pytest.mark.parametrize("weight", ["one", "ratio", "ppo_clip"])
@pytest.mark.parametrize("placement", ["none", "reward", "advantage"])
def test_without_a_cap_a_tokens_correction_is_exact(weight: str, placement: str) -> None:
    objective = Objective(
        weight=weight, placement=placement, advantage="raw", aggregation="sequence_sum", ratio="token"
    )
    found, truth = corrected(Enumeration(5, 1), objective, Sampler(correction="tis", cap=1e9))
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    wide = Sampler(correction="icepop", low=0.0, high=1e9)
    torch.testing.assert_close(corrected(Enumeration(5, 1), objective, wide)[0], truth, rtol=0, atol=1e-12)
    # what makes it inexact: a cap, no correction at all, and tokens that follow others
    for space, sampler in [
        (Enumeration(5, 1), Sampler(correction="tis", cap=1.1)),
        (Enumeration(5, 1), Sampler()),
        (Enumeration(3, 2), Sampler(correction="tis", cap=1e9)),
    ]:
        biased, truth = corrected(space, objective, sampler)
        assert float((biased - truth).norm() / truth.norm()) > 0.02


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"training\.sampler\.low: must not exceed training\.sampler\.high \(got 2"):
        load_section("training", {"sampler": {"correction": "icepop", "low": 2.0, "high": 1.0}})
    for sampler, message in [
        ({"correction": "tis", "floor": 3.0}, r"sampler\.floor: must not exceed training\.sampler\.cap \(got 3"),
        ({"reject": {"high": 2.0, "divergence": "k3", "low": 0.1}}, r"sampler\.reject\.low: only k1 has a lower bound"),
        ({"reject": {"high": 2.0, "over": "max"}}, r"sampler\.reject\.over: .* two sides .*token, sum, mean"),
        ({"reject": {"high": 0.5}}, r"sampler\.reject\.low: must not exceed .* Below 1, also set"),
        ({"reject": {"hgh": 0.5, "high": 1.0}}, r"sampler\.reject: unknown key \(got 'hgh'\); did you mean 'high'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_section("training", {"sampler": sampler})
    with pytest.raises(UserError, match=r"sampler\.reject: corrects by a ratio of softmaxes"):
        load_section("training", {"sampler": {"reject": {"high": 2.0}}, "top_p": 0.9})
    vllm = {"sampler": {"engine": "vllm"}, "top_p": 0.9}
    assert load_section("training", vllm)
    with pytest.raises(
        UserError, match=r"training\.top_p: vllm records .* Set it to 1, or the temperature \(0\.7\) to 1"
    ):
        load_section("training", {**vllm, "temperature": 0.7})


def test_a_setting_of_the_sampler_without_effect_is_named_and_makes_no_other_cell() -> None:
    def cells(**sampler: Any) -> list[str]:
        study = {"name": "x", "task": {"name": "addition"}, "policy": {"name": "tiny"}}
        return [cell.id for cell in parse_grid(yaml.safe_dump({**study, **sampler}), "x.yaml").cells]

    with pytest.raises(UserError, match=r"training\.sampler\.cap: has no effect in any cell .* correction: tis"):
        cells(training={"sampler": {"correction": "icepop", "cap": 3.0}})
    axes = {"training.sampler.correction": ["none", "tis"], "training.sampler.level": ["token", "sequence"]}
    assert len(set(cells(training={"sampler": {"temperature": 1.5}}, axes=axes))) == 3
    rejections = {"training.sampler.reject": [None, {"high": 2.0}, {"high": 2.0, "over": "token"}]}
    assert len(set(cells(training={"sampler": {"temperature": 1.5}}, axes=rejections))) == 3
    bounds = {"training.sampler.reject.high": [1.5, 2.0]}
    assert len(set(cells(training={"sampler": {"reject": {"high": 3.0}}}, axes=bounds))) == 2


def test_settings_that_came_later_do_not_change_older_ids() -> None:
    written = Sampler(correction="tis", cap=3.0).model_dump(mode="json")
    assert list(written) == ["engine", "dtype", "temperature", "correction", "cap", "low", "high"]
    changed = Sampler(level="sequence", correction="tis", reject=Rejection(high=2.0))
    assert Sampler.model_validate(changed.model_dump(mode="json")) == changed
