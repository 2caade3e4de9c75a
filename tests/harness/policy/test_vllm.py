"""vLLM behind the sampling interface, its engine played by klab's own decoder (`engine/vllm`)."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from klab.grid.errors import UserError
from klab.grid.schema.policy import Lora
from klab.grid.schema.sampler import Sampler
from klab.harness.policy.hf.policy import TransformersPolicy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.colocated_engine import ColocatedEngine, completion_of
from klab.harness.policy.sampling.engine import EngineSettings
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder
from klab.harness.policy.sampling.vllm import VllmSampler, keep_engine, require_vllm, vllm_sampler
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.harness.policy.test_rollout import PROMPTS, assert_same
from tests.support.played_vllm import vllm
from tests.support.random_checkpoints import checkpoint
from tests.support.tiny_policy import ALPHABET, decoder, generators

__all__ = ["vllm"]

SETTINGS = EngineSettings(Sampler(engine="vllm"), "nowhere", None, "float32", 512, "processed_logprobs")
MERGED = ["wake", "load", "reset", "wake", "generate", "sleep"]


def answering(cell: int, trajectory: int, transcript: str) -> str | None:
    """Doubles what was written, for the even trajectories, until it has five characters."""
    return None if trajectory % 2 or len(transcript) >= 5 else transcript + "="


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_message_says_what_to_install() -> None:
    for ask in (require_vllm, lambda: vllm_sampler(SETTINGS)):
        with pytest.raises(UserError, match=r"training\.sampler\.engine: vllm is not installed .* 'klab\[vllm\]'"):
            ask()


def start(tmp_path: Path, family: str = "llama", seeds: int = 1, lora: Lora | None = None) -> StackedPolicy:
    """A policy from a folder, which is what the engine is started from; its weights are no longer the folder's."""
    decoder(1, family).save(tmp_path / "start")
    policy = StackedPolicy.from_pretrained(tmp_path / "start", cells=1 if lora else seeds)
    policy = policy if lora is None else policy.with_lora(lora, range(seeds))
    policy.origin = str(tmp_path / "start")
    with torch.no_grad():
        for at, value in enumerate(policy.parameters.values()):
            drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(at))
            value.add_(0.1 * drawn)
    return policy


def engine_of(policy: Any, lora_rank: int = 0, **sampler: Any) -> VllmSampler:
    asked = replace(SETTINGS, model=policy.origin, sampler=Sampler(engine="vllm", **sampler), lora_rank=lora_rank)
    return VllmSampler(ColocatedEngine(asked))


def options(**changes: Any) -> SamplingOptions:
    return SamplingOptions(**{"group_size": 6, "max_new_tokens": 12, **changes})


def assert_drawn_from(policy: Any, rollouts: list[Rollout], temperature: float = 1.0) -> None:
    for rollout, scores in zip(rollouts, token_scores(policy, rollouts, temperature=temperature), strict=True):
        torch.testing.assert_close(rollout.logp, scores.logp.detach(), rtol=0, atol=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_so(vllm: Any) -> None:
    with pytest.raises(UserError, match=r"vllm needs a GPU, and this process sees none .* resources\.gpus"):
        vllm_sampler(SETTINGS)


def test_what_an_engine_returns_becomes_the_rollout_that_klab_would_have_drawn(vllm: Any) -> None:
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
            logprobs = [{token: vllm.Logprob(value), 99: vllm.Logprob(-1.0)} for token, value in turn]
            completion = completion_of([token for token, _ in turn], logprobs)
            builder.add_turn(row, completion.tokens, completion.logprobs)
    assert builder.finished
    assert_same(builder.build(), rollout)


def test_an_engine_without_log_probabilities_is_an_error(vllm: Any) -> None:
    for logprobs in (None, [{3: vllm.Logprob(0.0)}]):
        with pytest.raises(RuntimeError, match="a log-probability for every token"):
            completion_of([3, 4], logprobs)


def test_rollouts_are_those_of_the_policies_as_they_are_now(vllm: Any, tmp_path: Path) -> None:
    policy = start(tmp_path, seeds=2)
    sampler = engine_of(policy)

    def drawn(temperature: float = 1.0) -> list[Rollout]:
        tempered = options(temperature=temperature)
        return sampler(policy, [PROMPTS, PROMPTS[:2]], generators([1, 2]), tempered, environment=answering)

    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(os.environ))
    first = drawn()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert dict(os.environ) == before[2]
    assert_same(drawn()[0], first[0])  # no request has a seed of its own: the generators are seeded
    with torch.no_grad():
        for value in policy.parameters.values():
            value.mul_(1.1)
    after = drawn()
    assert not torch.equal(first[0].tokens, after[0].tokens)
    assert_drawn_from(policy, after)
    assert_drawn_from(policy, drawn(0.7), 0.7)
    for rollout in after:
        assert len(set(rollout.texts)) > 6
        assert int(rollout.mask.sum(1).max()) <= 12
    assert any(bool((rollout.present & ~rollout.mask).any()) for rollout in after)
    (started,) = vllm.LLM.started[-1:]
    assert len([each for each in vllm.LLM.started if each is started]) == 1
    assert started.settings == {"gpu": 0.3, "load_format": "dummy", "rank": 16, "dtype": "float32"}
    assert started.max_model_len == 512


def test_greedy_completions_are_the_policys(vllm: Any, tmp_path: Path) -> None:
    policy = start(tmp_path)
    greedy = options(greedy=True, group_size=1)
    found = engine_of(policy)(policy, [PROMPTS], generators([1]), greedy)[0]
    assert torch.equal(found.tokens, sample(policy, [PROMPTS], generators([1]), greedy)[0].tokens)


def test_the_engine_sleeps_between_rollouts_and_forgets_its_cache(vllm: Any, tmp_path: Path) -> None:
    policy = start(tmp_path)
    sampler = engine_of(policy)
    for _ in range(2):
        sampler(policy, [PROMPTS], generators([1]), options())
    log = vllm.LLM.started[-1].log
    assert [event for event, _ in log] == [*[each for each in MERGED if each != "wake"], *MERGED]
    assert [what for event, what in log if event == "wake"] == [["weights"], ["kv_cache"]]
    assert {what for event, what in log if event == "sleep"} == {2}
    awake = engine_of(policy, sleep=False)
    for _ in range(2):
        awake(policy, [PROMPTS], generators([1]), options())
    assert [event for event, _ in vllm.LLM.started[-1].log] == ["load", "reset", "generate"] * 2


def test_an_environment_that_fails_leaves_an_engine_that_goes_on(vllm: Any, tmp_path: Path) -> None:
    policy = start(tmp_path)
    sampler = engine_of(policy)

    def failing(cell: int, trajectory: int, transcript: str) -> str | None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sampler(policy, [PROMPTS], generators([1]), options(), environment=failing)
    assert_drawn_from(policy, sampler(policy, [PROMPTS], generators([1]), options()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_are_pushed_under_the_names_and_in_the_shapes_of_transformers(
    vllm: Any, tmp_path: Path, family: str
) -> None:
    policy = start(tmp_path, family)
    engine_of(policy)(policy, [PROMPTS], generators([1]), options())
    policy.save(tmp_path / "saved", 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    (pushed,) = [what for event, what in vllm.LLM.started[-1].log if event == "load"]
    assert dict(pushed) == {name: tuple(value.shape) for name, value in model.named_parameters()}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in policy.named_weights(0):
        assert torch.equal(value, saved[name])


@pytest.mark.parametrize("adapters", ["merged", "requests"])
def test_adapters_are_merged_or_go_with_the_requests(vllm: Any, tmp_path: Path, adapters: Any) -> None:
    policy = start(tmp_path, seeds=2, lora=Lora(rank=3, alpha=8.0))
    sampler = engine_of(policy, 3, adapters=adapters)
    first = sampler(policy, [PROMPTS, PROMPTS], generators([1, 2]), options())
    assert_drawn_from(policy, first)
    with torch.no_grad():
        for value in policy.parameters.values():
            value.mul_(0.5)
    second = sampler(policy, [PROMPTS, PROMPTS], generators([1, 2]), options())
    assert_drawn_from(policy, second)
    started = vllm.LLM.started[-1]
    events = [event for event, _ in started.log]
    if adapters == "merged":
        assert events.count("load") == 4
    else:
        assert "load" not in events
        assert started.settings["rank"] == 8  # the smallest that vLLM has room for
        assert started.settings["load_format"] == "auto"
        assert {what for event, what in started.log if event == "sleep"} == {1}
        assert len(started._adapted) == 4


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_merged_weights_of_a_transformers_policy_are_pefts(tmp_path: Path, family: str) -> None:
    from peft import AutoPeftModelForCausalLM

    folder = checkpoint(tmp_path, family, ALPHABET)
    policy = TransformersPolicy.from_pretrained(folder, [0, 1], lora=Lora(rank=2, alpha=4.0))
    policy.origin = str(folder)
    whole, untouched = AutoModelForCausalLM.from_pretrained(folder), policy.frozen_copy()  # new adapters are left off
    with torch.no_grad():
        for name, value in policy.parameters.items():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    base = {name: value.clone() for name, value in policy.shared.items()}
    policy.save(tmp_path / "adapters", 1)
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").merge_and_unload()
    found = dict(policy.named_weights(1))
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in whole.named_parameters()}
    for name, value in merged.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert all(torch.equal(policy.shared[name], value) for name, value in base.items())  # merging leaves no trace
    off = dict(untouched.named_weights(0))
    assert all(torch.equal(off[name], value) for name, value in whole.named_parameters())


def test_an_engine_that_lacks_weights_is_not_drawn_from(vllm: Any, tmp_path: Path) -> None:
    policy = start(tmp_path)
    decoder(1, "qwen2").save(tmp_path / "start")  # has biases that the policy does not have
    with pytest.raises(RuntimeError, match=r"was not given 2 of its weights, the first is .*qkv_proj\.bias'"):
        engine_of(policy)(policy, [PROMPTS], generators([1]), options())


def test_an_engine_runs_on_as_long_as_it_will_do(vllm: Any, tmp_path: Path) -> None:
    for changes, will in [
        ({"context": 100}, True),
        ({"context": 513}, False),
        ({"dtype": "bfloat16"}, False),
        ({"model": "elsewhere"}, False),
        ({"logprobs_mode": "raw_logprobs"}, False),
        ({"sampler": Sampler(engine="vllm", gpu_memory=0.5)}, False),
    ]:
        assert SETTINGS.will_do(replace(SETTINGS, **changes)) == will  # type: ignore[arg-type]
    settings = replace(SETTINGS, model=start(tmp_path).origin)
    kept = keep_engine(ColocatedEngine(settings), settings)
    assert vllm_sampler(replace(settings, context=80)) is kept
