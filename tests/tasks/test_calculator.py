"""The calculator answers in the middle of an episode, and what it says belongs to the environment."""

from __future__ import annotations

import re

import pytest
import torch

from klab.grid.errors import UserError
from klab.grid.schema.sections import TinyPolicy, load_section
from klab.harness.policy.init.initial_policy import tiny_config
from klab.harness.policy.init.sft_warmup import solution_rollout
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.tasks import Example, load_task
from klab.tasks.calculator import Calculator
from klab.tasks.task import TURN_END
from tests.support.transformers_tokenizer import character_tokenizer

EXAMPLE = Example("12*34=", "408", f"[12*34]{TURN_END}408")


def test_problems_solve_themselves() -> None:
    task = load_task(load_section("task", {"name": "calculator", "digits": 3}))
    train, held_out = task.split("train"), task.split("held_out")
    for example in [*train[:50], *held_out[:50]]:
        a, b = map(int, re.fullmatch(r"(\d{3})\*(\d{3})=", example.prompt).groups())  # type: ignore[union-attr]
        assert example.answer == str(a * b)
        call, answer = example.solution.split(TURN_END)
        assert task.respond(example, call) == f"={a * b};"
        assert task.respond(example, f"{call}={a * b};{answer}") is None
        score = task.score(example, call + answer)
        assert (score.reward, score.correct, dict(score.parts)) == (1.0, True, {"calls": 1.0})
        assert len(call + answer) + 2 <= task.max_new_tokens
        assert set(example.prompt + call + answer) <= set(str(task.alphabet))
    assert not {e.prompt for e in train[:500]} & {e.prompt for e in held_out[:500]}


@pytest.mark.parametrize(
    ("transcript", "answer"),
    [
        ("[12*3]", "=36;"),
        ("so[(1+2)*3]", "=9;"),
        ("[1-2]", "=-1;"),
        ("[12*]", "=;"),
        ("[]", "=;"),
        ("]", "=;"),
        ("[[1+1]", "=2;"),
        ("[99999999*99999999]", "=;"),
        ("[" + "9*" * 100 + "9]", "=;"),
        ("[1+1", None),
        ("36", None),
        ("", None),
        ("[12*3]=36;[36*2]", None),  # one call only
        ("[1+]=;[1+1]", None),
    ],
)
def test_what_the_calculator_says(transcript: str, answer: str | None) -> None:
    assert Calculator().respond(EXAMPLE, transcript) == answer


def test_several_calls() -> None:
    task = Calculator(calls=2)
    assert task.respond(EXAMPLE, "[12*3]=36;[36*2]") == "=72;"
    assert task.respond(EXAMPLE, "[12*3]=36;[36*2]=72;[1+1]") is None


@pytest.mark.parametrize(
    ("own", "reward"), [("[12*34]408", 1.0), ("408", 1.0), ("[12*34]", 0.0), ("[12*34]409", 0.0), ("", 0.0)]
)
def test_the_answer_is_what_follows_the_last_bracket(own: str, reward: float) -> None:
    assert Calculator().score(EXAMPLE, own).reward == reward


def test_wrong_settings() -> None:
    for settings in ({"digits": 1}, {"calls": 0}):
        with pytest.raises(UserError):
            Calculator(**settings)


def policy_for(task: Calculator) -> StackedPolicy:
    tokenizer = character_tokenizer(task.alphabet)
    section = TinyPolicy(hidden=32, layers=1, heads=2, intermediate=64)
    config = tiny_config(section, len(tokenizer), int(tokenizer.eos_token_id), int(tokenizer.pad_token_id), 256)
    return StackedPolicy.random(config, tokenizer, [0])


def spelled(policy: StackedPolicy, rollout: Rollout, row: int, own: bool) -> str:
    chosen = rollout.present[row] & (rollout.mask[row] == own)
    return str(policy.tokenizer.decode(rollout.tokens[row][chosen]))


def test_a_policy_learns_to_call_and_its_environments_tokens_are_in_no_loss() -> None:
    torch.set_num_threads(1)
    task = Calculator()
    policy = policy_for(task)
    examples = [EXAMPLE, Example("20*20=", "400", f"[20*20]{TURN_END}400")]
    reference = solution_rollout(policy, task, examples)
    assert spelled(policy, reference, 0, own=True) == "[12*34]<end>408<end>"
    assert spelled(policy, reference, 0, own=False) == "=408;"
    assert reference.texts == ["[12*34]408", "[20*20]400"]

    optimizer = torch.optim.Adam(list(policy.parameters.values()), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        logp = token_scores(policy, [reference])[0].logp
        assert not logp[~reference.mask].any()
        torch.autograd.backward(-logp.sum() / reference.mask.sum())
        optimizer.step()

    prompts = policy.tokenizer([e.prompt for e in examples], add_special_tokens=False)["input_ids"]
    rollout = sample(
        policy,
        [prompts],
        [torch.Generator().manual_seed(0)],
        SamplingOptions(group_size=2, max_new_tokens=task.max_new_tokens, greedy=True),
        environment=lambda cell, row, transcript: task.respond(examples[row // 2], transcript),
    )[0]
    assert rollout.texts == ["[12*34]408"] * 2 + ["[20*20]400"] * 2
    assert [spelled(policy, rollout, row, own=False) for row in range(4)] == ["=408;"] * 2 + ["=400;"] * 2
    assert not rollout.logp[~rollout.mask].any()
    assert all(task.score(examples[row // 2], text).correct for row, text in enumerate(rollout.texts))
