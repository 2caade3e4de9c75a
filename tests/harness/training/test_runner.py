"""What training does: rewards rise, on-policy ratios are 1, micro-batches change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from klab.grid import Objective
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store import Run
from klab.harness.training.data.prompts import encode_prompts
from klab.harness.training.data.rollouts import rollout_prompts
from klab.harness.training.optim.schedule import RolloutSchedule
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.harness.training.runtime.rng import generator
from klab.reports.schema import METRICS, METRICS_OF_SOME
from tests.support.training_records import MakeRun, finished, numbers, weights

# fmt: off
UPDATE = [
    "update", "rollout", "reward_mean", "reward_std", "correct", "k1", "k2", "k3", "kl_behaviour", "entropy",
    "gradient_norm", "ratio_mean", "ratio_max", "ess", "weight_mean", "clip_fraction", "informative_groups",
    "length_mean", "truncated", "loss", "tokens", "lr", "nonfinite",
]
PHASES = ["rollout", "reward", "reference", "forward", "backward", "step"]
EVALUATION = [
    "update", "accuracy", "reward", "reward_se", "completions", "pass_at_k", "k", "reverse_kl", "forward_kl", "entropy",
    "length", "parts", "samples", "seconds",
]
# fmt: on


def pack(run: Run) -> Pack:
    """All cells of a run, in memory, before their first update."""
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


def test_the_reward_rises(make_run: MakeRun) -> None:
    training = {"updates": 120, "prompts": 8, "evaluate_every": 120, "evaluation_prompts": 16}
    run = finished(make_run(training={**training, "evaluation_samples": 8, "checkpoint_updates": 999}))
    found = numbers(run, run.cells[0])
    first, last = found["evaluations"]
    assert first["reward"] < 0.2
    assert last["reward"] > 0.45
    assert found["result"]["reward_final"] > 0.45


def test_the_penalty_keeps_the_policy_near_the_reference(make_run: MakeRun) -> None:
    training = {"updates": 30, "evaluate_every": 30, "checkpoint_updates": 99}
    run = finished(make_run(training=training, objectives=[{"placement": "none"}, {"placement": "loss", "beta": 1.0}]))
    free, held = (numbers(run, identity)["result"]["reverse_kl_final"] for identity in run.cells)
    assert held < 0.5 * free


def test_on_policy_ratios_are_exactly_one(make_run: MakeRun) -> None:
    run = finished(make_run(objectives=[{"weight": "letters_task:gentle"}]))
    for row in numbers(run, run.cells[0])["metrics"]:
        assert (row["ratio_mean"], row["ratio_max"], row["ess"]) == (1.0, 1.0, 1.0)
        assert (row["weight_mean"], row["clip_fraction"], row["kl_behaviour"]) == (0.5, 0.0, 0.0)


def test_on_policy_every_weight_that_is_one_at_one_gives_the_same_bits(make_run: MakeRun) -> None:
    member = pack(make_run()).members[0]
    packs = [
        Pack([replace(member, cell=replace(member.cell, objective=Objective(placement="none", weight=weight, **more)))])
        for weight, more in [("one", {}), ("ppo_clip", {}), ("power", {"ratio": "sequence_mean"}), ("adaptive", {})]
    ]
    for each in packs:
        for _ in range(3):
            each.advance()
    for name, value in packs[0].policy.parameters.items():
        assert all(torch.equal(value, other.policy.parameters[name]) for other in packs[1:])


def test_off_policy_ratios_are_one_before_the_second_update_only(make_run: MakeRun) -> None:
    run = finished(make_run(training={"updates_per_rollout": 2}))
    rows = numbers(run, run.cells[0])["metrics"]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert second["ratio_max"] > 1.001
        assert first["rollout"] == second["rollout"]
        assert first["reward_mean"] == second["reward_mean"]


@pytest.mark.bits
@pytest.mark.parametrize("limit", [3, 4, 5, 9, 15])
@pytest.mark.parametrize(
    "objective",
    [
        {"placement": "loss", "weight": "ppo_clip", "aggregation": "token_mean"},
        {"weight": "adaptive", "ess": 0.99, "placement": "advantage_to_go", "kl_at": "current"},
        {"estimator": "full", "placement": "loss_corrected", "advantage": "batch_norm"},
        {"ratio": "sequence_mean", "path": "ratio", "advantage": "position_norm", "aggregation": "sequence_sum"},
    ],
    ids=["token mean", "adaptive", "full", "sequence ratio"],
)
def test_micro_batches_have_the_gradient_of_the_whole(make_run: MakeRun, limit: int, objective: dict[str, Any]) -> None:
    # a large adam_eps makes a small step proportional to its gradient
    common = {"updates": 3, "lag": 1, "adam_eps": 1.0, "clip_norm": None, "lr": 0.3}
    rows, params = [], []
    for name, more in (("whole", {}), ("pieces", {"micro_batch": limit})):
        run = pack(make_run(name, {**common, **more}, [objective], policy={"dtype": "float64"}))
        rows.append([run.advance()[0] for _ in range(3)])
        params.append({name: value.detach() for name, value in run.policy.parameters.items()})
    for name, value in params[0].items():
        torch.testing.assert_close(params[1][name], value, rtol=0, atol=1e-13)
    for whole, pieces in zip(*rows, strict=True):
        for key in ("loss", "k3", "ess", "entropy", "gradient_norm", "reward_mean", "tokens"):
            assert pieces[key] == pytest.approx(whole[key], rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize(("epochs", "lag"), [(1, 0), (1, 2), (2, 1), (2, 3)])
def test_a_lagged_rollout_comes_from_the_policy_of_that_many_updates_ago(
    make_run: MakeRun, epochs: int, lag: int
) -> None:
    run = make_run(training={"lag": lag, "updates_per_rollout": epochs})
    trained, past = pack(run), []
    for done in range(6):
        past.append({name: value.detach().clone() for name, value in trained.policy.parameters.items()})
        number, epoch, _ = RolloutSchedule(6, epochs, 1, lag).position(done)
        trained.collect_due_rollouts()
        if epoch == 0:
            member, experience = trained.members[0], trained.pending[0][0]
            old = StackedPolicy(trained.policy.config, trained.policy.tokenizer, past[max(0, done - lag)])
            examples = rollout_prompts(member, number)
            again = sample(
                old,
                [encode_prompts(old, member, examples)],
                [generator("rollout", number, member.cell.seed)],
                SamplingOptions(group_size=4, max_new_tokens=4),
            )[0]
            assert torch.equal(again.tokens, experience.rollout.tokens)
            assert torch.equal(again.logp, experience.rollout.logp)
            assert experience.number == number
        trained.advance()


def test_samples_of_the_reference_have_its_log_probabilities(make_run: MakeRun) -> None:
    trained = pack(make_run(training={"behaviour": "reference"}))
    for _ in range(3):
        trained.advance()
    trained.collect_due_rollouts()
    experience = trained.pending[0][0]
    torch.testing.assert_close(experience.rollout.logp, experience.reference_logprobs, rtol=0, atol=1e-5)


def test_greedy_baseline_scores_one_greedy_completion_per_prompt(make_run: MakeRun) -> None:
    trained = pack(make_run(objectives=[{"advantage": "greedy_baseline"}]))
    trained.collect_due_rollouts()
    experience, member = trained.pending[0][0], trained.members[0]
    examples = rollout_prompts(member, 0)
    greedy = sample(
        trained.policy,
        [encode_prompts(trained.policy, member, examples)],
        [torch.Generator()],
        SamplingOptions(group_size=1, max_new_tokens=4, greedy=True),
    )[0]
    rewards = [member.task.score(e, text).reward for e, text in zip(examples, greedy.texts, strict=True)]
    assert experience.greedy_rewards is not None
    assert experience.greedy_rewards.tolist() == [reward for reward in rewards for _ in range(4)]


def test_environment_tokens_are_nobodys_own(make_run: MakeRun) -> None:
    trained = pack(make_run(task={"name": "letters_task:Echo"}))
    rows = [trained.advance()[0] for _ in range(2)]
    assert not any(row["nonfinite"] for row in rows)
    trained.collect_due_rollouts()
    rollout = trained.pending[0][0].rollout
    assert bool((rollout.present & ~rollout.mask).any()), "no trajectory had a second turn"
    assert int(rollout.mask.sum(1).max()) <= 6


def test_the_saved_policy_is_an_ordinary_checkpoint(make_run: MakeRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished(make_run())
    folder = run.cell(run.cells[0]).policy
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("ab", add_special_tokens=False)["input_ids"] == [3, 4]
    assert model.state_dict()["model.norm.weight"].equal(weights(run, run.cells[0])["model.norm.weight"])


def test_a_row_holds_what_the_report_reads(make_run: MakeRun) -> None:
    run = finished(make_run())
    rows = run.cell(run.cells[0]).metrics()
    assert set(rows[0]) == {*UPDATE, *(f"seconds_{phase}" for phase in PHASES)} == set(METRICS)
    assert set(run.cell(run.cells[0]).evaluations()[0]) == set(EVALUATION)


def test_rows_of_some_cells_have_more_columns_that_the_report_knows(make_run: MakeRun) -> None:
    training: list[dict[str, Any]] = [
        {"critic": {}, "beta_control": {"target": 0.1}, "trust_region": {}, "updates": 1, "lag": 1},
        {"equal_groups": "refill", "sampler": {"temperature": 1.1}, "updates": 1},
        {"sampler": {"temperature": 1.1, "reject": {"high": 2.0}}, "updates": 1},
        {"equal_groups": "drop", "truncated": "mask", "overlong_buffer": 2, "updates": 1},
        {"entropy_control": {"target": 0.5}, "updates": 1},
    ]
    more: set[str] = set()
    for number, settings in enumerate(training):
        task = {"name": "letters_task:Overdue"}
        run = finished(make_run(f"run{number}", settings, [{"advantage": "gae"}], task=task))
        more |= set(run.cell(run.cells[0]).metrics()[0]) - set(METRICS)
    assert more == set(METRICS_OF_SOME)


def test_sets_that_are_too_small_are_named_once_in_the_output(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(training={"updates": 1, "prompts": 64, "evaluation_prompts": 640}, seeds=2)
    finished(run)
    said = capfd.readouterr().err
    held_out, train = 16, 48
    assert said.count(f"training.evaluation_prompts: 640, but {held_out} prompts are held out") == 1
    assert said.count(f"training.prompts: 64, but there are {train} to train on") == 1


def test_a_cell_whose_rewards_never_differ_is_marked_as_without_gradient(make_run: MakeRun) -> None:
    objectives = [{"beta": 0.0}, {"beta": 0.0, "advantage": "raw"}]
    run = make_run(training={"updates": 2}, task={"reward": "1"}, objectives=objectives)
    finished(run)
    still, moved = ((run.cell(identity).result() or {})["zero_gradient"] for identity in run.cells)
    assert (still, moved) == (True, False)
