"""The part of vLLM's offline interface that klab calls, played by klab's decoder: vLLM itself needs a GPU.

It writes down what it is asked, in order, and refuses what vLLM 0.31.0 refuses; where that stands in vLLM's source is
said in each place (file:line of the 0.31.0 wheel).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from klab.grid.schema.policy import Lora
from klab.harness.policy.pretrained import read_config, read_tokenizer
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked.lora import Adapters
from klab.harness.policy.stacked.policy import StackedPolicy
from vllm.lora.request import LoRARequest

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}  # config/model.py:2316
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # config/lora.py:27
LOGPROBS_MODES = ("raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs")
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED |= {"up_proj": "gate_up_proj"}  # models/llama.py:475


@dataclass
class SamplingParams:
    """sampling_params.py:568-681; other names are errors there, as in any dataclass."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.temperature == 0.0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        assert all(isinstance(token, int) for token in self.stop_token_ids)


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


class Model:
    """The weights: those of the folder (`auto`), or some that nobody should read (`dummy`)."""

    def __init__(self, llm: LLM, folder: str, dtype: torch.dtype, load_format: str) -> None:
        self.llm, self.folder = llm, folder
        self.config, self.tokenizer = read_config(folder), read_tokenizer(folder)
        policy = StackedPolicy.from_pretrained(folder, dtype=dtype)
        if load_format == "dummy":
            policy = StackedPolicy.random(self.config, self.tokenizer, [99], dtype)
        self.state = {name: value.clone() for name, value in policy.named_weights(0)}

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        return [(fused(name), value) for name, value in self.state.items()]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if "weights" in self.llm.sleeping:  # unmapped memory: trl/generation/vllm_generation.py, sync_weights
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        received = []
        for name, value in weights:
            if name not in self.state:  # models/utils.py:426
                raise ValueError(f"There is no module or parameter named {name!r}")
            own = self.state[name]
            assert value.shape == own.shape, f"{name}: {value.shape}"  # layers/linear.py:592
            own.copy_(value)
            received.append((name, tuple(value.shape)))
        self.llm.log.append(("load", received))
        return {fused(name) for name, _ in received}

    def policy(self) -> StackedPolicy:
        with TemporaryDirectory() as home:
            self.config.save_pretrained(home)
            self.tokenizer.save_pretrained(home)
            save_file({name: value.contiguous() for name, value in self.state.items()}, f"{home}/model.safetensors")
            return StackedPolicy.from_pretrained(home, dtype=next(iter(self.state.values())).dtype)


def fused(name: str) -> str:
    return ".".join(FUSED.get(part, part) for part in name.split("."))


class LLM:
    """entrypoints/llm.py:180; every other keyword is an argument of `EngineArgs`, and unknown ones are errors."""

    started: list[LLM] = []  # noqa: RUF012

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        load_format: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.92,
        enable_sleep_mode: bool = False,
        enable_prefix_caching: bool | None = None,
        max_num_batched_tokens: int | None = None,
        distributed_executor_backend: str | None = None,
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ) -> None:
        if dtype not in DTYPES:  # config/model.py:2424
            raise ValueError(f"Unknown dtype: {dtype!r}")
        assert logprobs_mode in LOGPROBS_MODES
        assert max_lora_rank in LORA_RANKS
        assert 0 < gpu_memory_utilization <= 1
        assert generation_config == "vllm", "the model's own end tokens would stop generation"
        if distributed_executor_backend == "external_launcher":  # v1/executor/uniproc_executor.py:179-195
            assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
            assert all(int(os.environ[name]) >= 0 for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
        self.settings = {
            "gpu": gpu_memory_utilization,
            "load_format": load_format,
            "rank": max_lora_rank,
            "dtype": dtype,
        }
        self.max_model_len, self.mode, self.lora, self.can_sleep = (
            max_model_len,
            logprobs_mode,
            enable_lora,
            enable_sleep_mode,
        )
        self.sleeping: set[str] = set()
        self.log: list[tuple[str, Any]] = []
        self.model = Model(self, model, DTYPES[dtype], load_format)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self.model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        self._adapted: dict[int, str] = {}
        type(self).started.append(self)

    def sleep(self, level: int = 1) -> None:
        assert self.can_sleep, "Sleep mode is not enabled in the model config"
        assert not self.sleeping
        self.log.append(("sleep", level))
        self.sleeping = {"weights", "kv_cache"}
        if level == 2:  # device_allocator/sleep_mode_backend.py:127: nothing is offloaded
            for value in self.model.state.values():
                value.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert tags is not None
        assert set(tags) <= self.sleeping, "only a warning in vLLM, and nothing is woken"
        self.log.append(("wake", tags))
        self.sleeping -= set(tags)

    def reset_prefix_cache(self) -> bool:
        self.log.append(("reset", None))
        return True

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not self.sleeping, "the scheduler is paused: this call would never return"  # v1/engine/core.py:919
        assert len(prompts) == len(sampling_params)
        if lora_request is not None and not self.lora:
            raise ValueError("Got lora_request but LoRA is not enabled!")
        self.log.append(("generate", len(prompts)))
        policy = self.model.policy()
        if lora_request is not None:
            # an adapter of a known number is not read again: lora/request.py:18
            folder = self._adapted.setdefault(lora_request.lora_int_id, lora_request.lora_path)
            policy = adapted(policy, folder, self.settings["rank"])
        together: dict[int, list[int]] = {}
        for index, (prompt, each) in enumerate(zip(prompts, sampling_params, strict=True)):
            self._check(policy, prompt["prompt_token_ids"], each)
            together.setdefault(each.max_tokens, []).append(index)
        found: dict[int, RequestOutput] = {}
        for indices in together.values():
            listed = [prompts[index]["prompt_token_ids"] for index in indices]
            found |= zip(indices, self._drawn(policy, listed, sampling_params[indices[0]]), strict=True)
        return [found[index] for index in range(len(prompts))]

    def _check(self, policy: StackedPolicy, prompt: list[int], settings: SamplingParams) -> None:
        if self.max_model_len is not None and len(prompt) >= self.max_model_len:  # v1/engine/input_processor.py:540
            raise ValueError(f"The decoder prompt (length {len(prompt)}) is longer than the maximum model length")
        assert settings.seed is None
        assert settings.logprobs == 0
        assert settings.ignore_eos
        assert set(settings.stop_token_ids) == policy.eos_token_ids
        assert settings.temperature in (0.0, 1.0) if self.mode == "raw_logprobs" else settings.top_p == 1.0

    def _drawn(self, policy: StackedPolicy, prompts: list[list[int]], settings: SamplingParams) -> list[RequestOutput]:
        # v1/worker/gpu/sample/states.py:57: a request without a seed gets one of numpy's; here they share one
        seed = np.random.randint(2**31)
        longest = max(map(len, prompts))
        room = settings.max_tokens if self.max_model_len is None else self.max_model_len - longest
        rollout = sample(
            policy,
            [prompts],
            [torch.Generator().manual_seed(seed)],
            SamplingOptions(
                group_size=1,
                max_new_tokens=min(settings.max_tokens, room),
                temperature=settings.temperature or 1.0,
                top_p=settings.top_p,
                greedy=settings.temperature == 0.0,
            ),
        )[0]
        other = {policy.vocab_size + 1: Logprob(-9.0)}  # more entries than the drawn token are possible
        found = []
        for row, length in enumerate(rollout.present.sum(1).tolist()):
            tokens, values = rollout.tokens[row, :length].tolist(), rollout.logp[row, :length].tolist()
            logprobs = [{**other, token: Logprob(value)} for token, value in zip(tokens, values, strict=True)]
            found.append(RequestOutput([CompletionOutput(tokens, logprobs)]))
        return found


def adapted(base: StackedPolicy, folder: str, max_rank: int) -> StackedPolicy:
    """A policy with the adapters of a PEFT folder."""
    import json

    described = json.loads((Path(folder) / "adapter_config.json").read_text())
    if described["r"] > max_rank:  # lora/peft_helper.py, validate_legal
        raise ValueError(f"LoRA rank {described['r']} is greater than max_lora_rank {max_rank}.")
    section = Lora(rank=described["r"], alpha=described["lora_alpha"], targets=tuple(described["target_modules"]))
    assert Adapters.from_section(section, base.architecture).targets
    policy = base.with_lora(section, [0])
    policy.load(folder, 0)
    return policy
