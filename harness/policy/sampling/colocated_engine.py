"""vLLM's engine in this process, beside the trainer on its GPU, as TRL's colocate mode has it.

The weights are pushed from the trainer's memory, adapters merged into them; between rollouts the engine sleeps (level
2: weights and cache are freed) unless `training.sampler.sleep` is false. It is started from the folder or hub id that
the policy came from, with weights that nobody reads, so that its compiled code is found again by every cell and run.
With `adapters: requests` the base model stays in the engine (level 1: in the host's memory while it sleeps), and the
adapters go with every request.

Draws are repeatable as far as vLLM's arithmetic is: the generators that it draws from are seeded before every turn.
Everything that is called here is what TRL 1.16 calls, of vLLM 0.28 to 0.31.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from klab.grid.schema.sampler import VLLM_LORA_RANKS
from klab.harness.policy.policy import Policy
from klab.harness.policy.sampling.engine import Completion, EngineSettings, Request
from klab.harness.policy.sampling.sampler import SamplingOptions


class ColocatedEngine:
    """An `Engine` that holds vLLM's `LLM`. Processes that train together start theirs together."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._as_requests = settings.sampler.adapters == "requests"
        self._llm: Any = self._start()
        self._asleep = False
        self._complete = False
        self._adapters: Any = None
        self._adapter_count = 0
        self._home = TemporaryDirectory(prefix="klab-adapters-")

    @contextmanager
    def holding(self, policy: Policy, cell: int) -> Iterator[None]:
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer freed may be what the engine needs
            self._llm.wake_up(tags=["weights"])
        if self._as_requests:
            self._adapters = self._adapter_request(policy, cell)
        else:
            self._push(policy, cell)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vllm did not drop the keys and values of the policy before")
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        yield
        if self._settings.sampler.sleep:
            self._llm.sleep(level=1 if self._as_requests else 2)
            self._asleep = True

    def complete(
        self, requests: Sequence[Request], options: SamplingOptions, end_tokens: Sequence[int], seed: int
    ) -> list[Completion]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=1,
                temperature=0.0 if options.greedy else options.temperature,
                top_p=1.0 if options.greedy else options.top_p,
                max_tokens=request.budget,
                logprobs=0,
                stop_token_ids=list(end_tokens),
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.tokens} for request in requests]
        with _seeded(seed):
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapters)
        return [completion_of(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]

    def close(self) -> None:
        self._llm = None
        self._home.cleanup()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start(self) -> Any:
        from vllm import LLM

        settings = self._settings
        adapters: dict[str, Any] = {}
        if self._as_requests:
            rank = next(rank for rank in VLLM_LORA_RANKS if rank >= settings.lora_rank)
            adapters = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        with _launched():
            return LLM(
                model=settings.model,
                revision=settings.revision,
                dtype=settings.dtype,
                load_format="auto" if self._as_requests else "dummy",
                seed=0,
                max_model_len=settings.context,
                gpu_memory_utilization=settings.sampler.gpu_memory,
                enable_sleep_mode=settings.sampler.sleep,
                enable_prefix_caching=True,
                # a high default misleads the engine's estimate of what activations need (TRL)
                max_num_batched_tokens=4096,
                distributed_executor_backend="external_launcher",
                generation_config="vllm",  # the model's own end tokens and settings stay out
                logprobs_mode=settings.logprobs_mode,
                **adapters,
            )

    def _push(self, policy: Policy, cell: int) -> None:
        """Put one cell's weights into the engine.

        Raises:
            RuntimeError: some of the engine's weights were not among them.
        """
        model = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
        loaded = model.load_weights(policy.named_weights(cell))
        if self._complete:
            return
        missing = sorted({name for name, _ in model.named_parameters()} - set(loaded or ()))
        if missing:
            raise RuntimeError(f"vllm was not given {len(missing)} of its weights, the first is {missing[0]!r}")
        self._complete = True

    def _adapter_request(self, policy: Policy, cell: int) -> Any:
        """The adapters of one cell as vLLM reads them: a PEFT folder, with a number that no other adapters had."""
        from vllm.lora.request import LoRARequest

        self._adapter_count += 1
        folder = Path(self._home.name) / str(self._adapter_count)
        policy.save(folder, cell)
        return LoRARequest(f"klab-{self._adapter_count}", self._adapter_count, str(folder))


def completion_of(tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None) -> Completion:
    """A completion from vLLM's, with the log-probabilities that it was drawn with."""
    drawn = [int(token) for token in tokens]
    if logprobs is None or len(logprobs) != len(drawn):
        raise RuntimeError("vllm did not return a log-probability for every token")
    return Completion(drawn, [float(each[token].logprob) for token, each in zip(drawn, logprobs, strict=True)])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators that the engine draws from, seeded; afterwards they are as before."""
    state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(state)


@contextmanager
def _launched() -> Iterator[None]:
    """The environment in which vLLM's `external_launcher` finds its process group; afterwards it is as before."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    wanted = {
        "RANK": str(torch.distributed.get_rank() if group else 0),
        "WORLD_SIZE": str(torch.distributed.get_world_size() if group else 1),
        "LOCAL_RANK": str(torch.cuda.current_device() if torch.cuda.is_available() else 0),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
