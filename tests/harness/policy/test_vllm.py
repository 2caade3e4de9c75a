"""vLLM behind the sampling interface, its engine played by klab's own decoder (`engine/vllm.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from klab.grid.errors import UserError
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder
from klab.harness.policy.sampling.vllm import (
    VllmSampler,
    add_completion,
    replace_checkpoint,
    require_vllm,
    vllm_sampler,
)
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.harness.policy.test_rollout import PROMPTS, assert_same
from tests.support.tiny_policy import decoder, generators

ENGINE = Path(__file__).parent / "engine"


def answering(cell: int, trajectory: int, transcript: str) -> str | None:
    """Doubles what was written, for the even trajectories, until it has five characters."""
    return None if trajectory % 2 or len(transcript) >= 5 else transcript + "="


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_message_says_what_to_install() -> None:
    for ask in (require_vllm, lambda: vllm_sampler(None)):
        with pytest.raises(UserError, match=r"training\.sampler\.engine: vllm is not installed .* 'klab\[vllm\]'"):
            ask()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ENGINE)
    monkeypatch.delitem(__import__("sys").modules, "vllm", raising=False)
    yield import_module("vllm")
    monkeypatch.delitem(__import__("sys").modules, "vllm", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_so(engine: Any) -> None:
    with pytest.raises(UserError, match=r"vllm needs a GPU, and this process sees none .* resources\.gpus"):
        vllm_sampler("bfloat16")


def test_what_an_engine_returns_becomes_the_rollout_that_klab_would_have_drawn(engine: Any) -> None:
    policy = decoder(1, dtype=torch.float64)
    rollout = sample(
        policy, [PROMPTS], generators([7]), SamplingOptions(group_size=4, max_new_tokens=9), environment=answering
    )[0]
    assert bool((rollout.present & ~rollout.mask).any())
    assert 0 < int(rollout.truncated.sum()) < 12
    builder = TrajectoryBuilder(policy, 0, PROMPTS, SamplingOptions(4, 9), answering)
    for row in range(12):
        turns: list[list[tuple[int, float]]] = [[]]
        for token, value, own, there in zip(
            *(x[row].tolist() for x in (rollout.tokens, rollout.logp, rollout.mask, rollout.present)), strict=True
        ):
            if there and own:
                turns[-1].append((token, value))
            elif there and turns[-1]:
                turns.append([])
        for turn in filter(None, turns):
            logprobs = [{token: engine.Logprob(value), 99: engine.Logprob(-1.0)} for token, value in turn]
            add_completion(builder, row, engine.CompletionOutput([token for token, _ in turn], logprobs))
    assert builder.finished
    assert_same(builder.build(), rollout)


def test_an_engine_without_log_probabilities_is_an_error(engine: Any) -> None:
    builder = TrajectoryBuilder(decoder(), 0, PROMPTS, SamplingOptions(1, 9), None)
    for logprobs in (None, [{3: engine.Logprob(0.0)}]):
        with pytest.raises(RuntimeError, match="a log-probability for every token"):
            add_completion(builder, 0, engine.CompletionOutput([3, 4], logprobs))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_are_those_of_the_policies_as_they_are_now(engine: Any, temperature: float) -> None:
    policy, sampler = decoder(2, dtype=torch.float64), VllmSampler(None)

    def drawn() -> list[Any]:
        return sampler(
            policy,
            [PROMPTS, PROMPTS[:2]],
            generators([1, 2]),
            SamplingOptions(group_size=6, max_new_tokens=12, temperature=temperature),
            environment=answering,
        )

    before = drawn()
    assert_same(drawn()[0], before[0])
    with torch.no_grad():
        for value in policy.parameters.values():
            value.mul_(1.1)
    after = drawn()
    assert not torch.equal(before[0].tokens, after[0].tokens)
    for rollout, scores in zip(after, token_scores(policy, after, temperature=temperature), strict=True):
        torch.testing.assert_close(rollout.logp, scores.logp, rtol=0, atol=1e-11)
        assert len(set(rollout.texts)) > 6  # every trajectory has a seed of its own
        assert int(rollout.mask.sum(1).max()) <= 12
    assert any(bool((rollout.present & ~rollout.mask).any()) for rollout in after)
    assert engine.LLM.started == 1
    assert sampler._engine.dtype == "float64"
    assert sampler._engine.settings["max_model_len"] == 512


def test_another_temperature_needs_other_log_probabilities_hence_another_engine(engine: Any) -> None:
    policy, sampler = decoder(), VllmSampler("float64")
    for temperature in (1.0, 0.5, 0.5):
        rollout = sampler(
            policy, [PROMPTS], generators([1]), SamplingOptions(group_size=2, max_new_tokens=4, temperature=temperature)
        )[0]
        scores = token_scores(policy, [rollout], temperature=temperature)[0].logp
        torch.testing.assert_close(rollout.logp, scores, rtol=0, atol=1e-5)
    assert engine.LLM.started == 2
    assert sampler._engine.dtype == "float64"


def test_whoever_reads_the_old_weights_keeps_them(tmp_path: Path) -> None:
    policy = decoder()
    replace_checkpoint(policy, 0, tmp_path / "policy")
    with safe_open(tmp_path / "policy" / "model.safetensors", "pt") as opened:
        with torch.no_grad():
            policy.parameters["norm"].fill_(2.0)
        replace_checkpoint(policy, 0, tmp_path / "policy")
        assert opened.get_tensor("model.norm.weight").tolist() == [1.0] * 32
    assert StackedPolicy.from_pretrained(tmp_path / "policy").parameters["norm"].tolist() == [[2.0] * 32]
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ["policy"]
