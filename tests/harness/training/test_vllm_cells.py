"""Cells whose rollouts, evaluations and greedy baselines vLLM draws, its engine played by klab's own decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.grid import UserError, parse_grid
from klab.grid.schema.sampler import Sampler
from klab.harness.cli.checked import require_samplers
from klab.harness.policy.sampling.colocated_engine import ColocatedEngine
from klab.harness.policy.sampling.engine import EngineSettings
from klab.harness.policy.sampling.vllm import close_engine, keep_engine
from klab.harness.policy.scores import token_scores
from klab.harness.training.data.samplers import longest_sequence
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.played_vllm import vllm
from tests.support.training_records import MakeRun

__all__ = ["vllm"]

WRITTEN: dict[str, Any] = {"engine": "vllm", "correction": "tis", "level": "sequence", "gpu_memory": 0.2}


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_cell_trains_and_is_evaluated_through_the_engine(
    vllm: Any,
    make_run: MakeRun,
    lora: Any,
) -> None:
    sampler = Sampler(**WRITTEN)
    run = make_run(
        training={"sampler": WRITTEN, "updates": 2, "evaluate_every": 2, "token_budget": 40},
        objectives=[{"advantage": "greedy_baseline"}, {"placement": "loss"}],
        policy={"lora": lora},
    )
    members = [prepare_cell(run, run.cell(identity))[0] for identity in run.cells]
    packs = [Pack([member]) for member in members]
    context = longest_sequence(packs[0].policy, members)
    rank, model = 0 if lora is None else 2, packs[0].policy.origin
    settings = EngineSettings(sampler, model, None, "float32", context, "processed_logprobs", rank)
    keep_engine(ColocatedEngine(settings), settings)
    for pack, greedy in zip(packs, (1, 0), strict=True):
        if greedy == 0:
            close_engine()  # an engine belongs to one checkpoint path and its cells
            keep_engine(ColocatedEngine(settings), settings)
        pack.collect_due_rollouts()
        log = vllm.LLM.started[-1].log
        # whatever the token budget is, all is asked for at once
        assert [n for event, n in log if event == "generate"] == [16, 4][: 1 + greedy]
        experience = pack.pending[0][0]
        seen = token_scores(pack.policy, [experience.rollout])[0].logp
        torch.testing.assert_close(experience.rollout.logp, seen.detach(), rtol=0, atol=1e-4)
        row = pack.advance()[0]
        assert row["sampler_kl"] < 1e-6
        assert row["correction_mean"] == pytest.approx(1.0, abs=1e-3)
        before = len(log)
        (evaluation,) = pack.evaluate()
        assert [n for event, n in log[before:] if event == "generate"] == [6, 18]
        assert evaluation["k"] == 3
    assert vllm.LLM.started[-1].max_model_len == context


def test_the_longest_sequence_is_the_longest_prompt_with_its_budget(make_run: MakeRun) -> None:
    run = make_run(training={"max_new_tokens": 5, "max_prompt_tokens": 9})
    member = prepare_cell(run, run.cell(run.cells[0]))[0]
    policy = Pack([member]).policy
    interactive = getattr(member.task, "interactive", True) or member.task.alphabet is not None
    assert longest_sequence(policy, [member]) == (policy.context_length if interactive else 14)


GRID = """
name: fast
task: {{name: addition, digits: 2}}
policy: {{name: tiny{policy}}}
training: {{updates: 3, sampler: {{engine: vllm{sampler}}}}}
resources: {{processes: 2}}
"""


@pytest.mark.parametrize(
    ("sampler", "policy", "message"),
    [
        (", dtype: float64", "", r"training\.sampler\.dtype: vllm has no float64"),
        ("", ", dtype: float64", r"policy\.dtype: vllm has no float64"),
        (", temperature: 2.5", "", r"training\.sampler\.temperature: vllm draws at temperatures from 0\.01 to 2"),
        (", adapters: requests", "", r"training\.sampler\.adapters: the policy has no adapters"),
        (", adapters: requests", ", lora: {rank: 600}", r"policy\.lora\.rank: vllm takes adapters of rank 512"),
        (", group_port: 7", "", r"training\.sampler\.group_port: has no effect .* no url of a server"),
        (", gpu_memory: 0.4, url: 'http://a:1'", "", r"training\.sampler\.gpu_memory: has no effect"),
    ],
)
def test_what_the_engine_cannot_is_refused_by_plan(sampler: str, policy: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_grid(GRID.format(sampler=sampler, policy=policy), "fast.yaml")


def test_a_server_is_for_one_process(vllm: Any) -> None:
    grid = parse_grid(GRID.format(sampler=", url: 'http://a:1'", policy=""), "fast.yaml")
    with pytest.raises(UserError, match=r"training\.sampler\.url: .* from one process, and 2 train the cell"):
        require_samplers(grid)
    elsewhere = parse_grid(GRID.format(sampler=", url: 'http://b:2'", policy=""), "fast.yaml")
    assert grid.cells[0].id == elsewhere.cells[0].id
