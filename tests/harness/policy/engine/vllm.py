"""The part of vLLM's offline interface that klab calls, played by klab's decoder: vLLM itself needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked.policy import StackedPolicy


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    index: int = 0


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput] = field(default_factory=list)


class LLM:
    started = 0

    def __init__(self, model: str, dtype: str, logprobs_mode: str, generation_config: str, **settings: Any) -> None:
        type(self).started += 1
        assert generation_config == "vllm"  # the model's own end tokens and settings stay out
        self.model, self.dtype, self.mode, self.settings = model, dtype, logprobs_mode, settings
        self.collective_rpc("reload_weights")

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        self.policy = StackedPolicy.from_pretrained(self.model, dtype=getattr(torch, self.dtype))

    def reset_prefix_cache(self) -> None: ...

    def generate(
        self, prompts: list[dict[str, list[int]]], settings: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        return [self._one(prompt["prompt_token_ids"], each) for prompt, each in zip(prompts, settings, strict=True)]

    def _one(self, prompt: list[int], settings: SamplingParams) -> RequestOutput:
        assert settings.ignore_eos
        assert set(settings.stop_token_ids) == self.policy.eos_token_ids
        assert (self.mode == "raw_logprobs") == (settings.temperature in (0.0, 1.0))
        rollout = sample(
            self.policy,
            [[prompt]],
            [torch.Generator().manual_seed(settings.seed)],
            SamplingOptions(
                group_size=1,
                max_new_tokens=settings.max_tokens,
                temperature=settings.temperature or 1.0,
                top_p=settings.top_p,
                greedy=settings.temperature == 0.0,
            ),
        )[0]
        tokens = rollout.tokens[0].tolist()
        other = {self.policy.vocab_size + 1: Logprob(-9.0)}  # more entries than the drawn token are possible
        logprobs = [{**other, t: Logprob(v)} for t, v in zip(tokens, rollout.logp[0].tolist(), strict=True)]
        return RequestOutput([CompletionOutput(tokens, logprobs)])
