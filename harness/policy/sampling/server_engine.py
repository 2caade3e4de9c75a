"""A vLLM server as the sampler: a cell whose sampler is another job, or stands on other GPUs.

TRL's client talks to it: completions over vLLM's OpenAI-compatible endpoint, weights over NCCL into the server's
weight-transfer engine, as `trl vllm-serve` starts it:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \\
        --logprobs-mode processed_logprobs --max-model-len LONGEST

The server draws with generators of its own: its draws are not repeatable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from klab.grid.errors import UserError
from klab.harness.policy.policy import Policy
from klab.harness.policy.sampling.engine import Completion, EngineSettings, Request
from klab.harness.policy.sampling.sampler import SamplingOptions

WAIT_SECONDS = 240.0
"""How long a server may take to answer, as in TRL."""


class ServerEngine:
    """An `Engine` on a server.

    Raises:
        UserError: TRL is not installed, the server does not answer, or it was started with other settings than it
            needs.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._url = str(settings.sampler.url)
        self._metadata: list[tuple[str, str, list[int]]] = []
        try:
            from trl.generation.vllm_client import VLLMClient
        except ImportError as error:
            raise UserError(
                f"TRL's client of vllm cannot be imported: {error}",
                key="training.sampler.url",
                value=self._url,
                hint="Install it with pip install 'klab[vllm]'.",
            ) from error
        try:
            self._client: Any = VLLMClient(
                base_url=self._url, group_port=settings.sampler.group_port, connection_timeout=WAIT_SECONDS
            )
            self._check(self._client.get_server_info())
        except (ConnectionError, OSError, RuntimeError) as error:
            raise UserError(str(error), key="training.sampler.url", value=self._url) from error
        self._connected = False

    def _check(self, configuration: dict[str, Any]) -> None:
        """Raises UserError where the server returns other log-probabilities, or takes no sequence of this length."""
        model, settings = configuration["model_config"], self._settings
        for name, wanted, serves in (
            ("logprobs-mode", settings.logprobs_mode, model["logprobs_mode"] == settings.logprobs_mode),
            ("max-model-len", settings.context, model["max_model_len"] >= settings.context),
        ):
            if not serves:
                raise UserError(
                    f"the server must be started with --{name} {wanted}", key="training.sampler.url", value=self._url
                )

    @contextmanager
    def holding(self, policy: Policy, cell: int) -> Iterator[None]:
        if not self._connected:
            self._client.init_communicator(device="cuda")  # the current one, which is the policy's
            self._connected = True
        if not self._metadata:
            self._metadata = [
                (name, str(value.dtype).removeprefix("torch."), list(value.shape))
                for name, value in policy.named_weights(cell)
            ]
        contiguous = ((name, value.contiguous()) for name, value in policy.named_weights(cell))
        self._client.update_named_params(self._metadata, contiguous)
        self._client.reset_prefix_cache()
        yield

    def complete(
        self, requests: Sequence[Request], options: SamplingOptions, end_tokens: Sequence[int], seed: int
    ) -> list[Completion]:
        by_budget: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_budget[request.budget].append(index)
        found: dict[int, Completion] = {}
        for budget, indices in by_budget.items():
            answer = self._client.generate(
                [requests[index].tokens for index in indices],
                n=1,
                temperature=0.0 if options.greedy else options.temperature,
                top_p=1.0 if options.greedy else options.top_p,
                max_tokens=budget,
                logprobs=0,
                generation_kwargs={"stop_token_ids": list(end_tokens), "ignore_eos": True},
            )
            found |= dict(zip(indices, map(_completion, *_columns(answer)), strict=True))
        return [found[index] for index in range(len(requests))]

    def close(self) -> None:
        self._client.close_communicator()


def _columns(answer: dict[str, Any]) -> tuple[Any, Any, Any]:
    if answer["logprobs"] is None:
        raise RuntimeError("the vllm server did not return log-probabilities")
    return answer["completion_ids"], answer["logprobs"], answer["logprob_token_ids"]


def _completion(tokens: list[int], logprobs: list[list[float | None]], ids: list[list[int]]) -> Completion:
    """A completion from TRL's client, which sorts what the server returned of each position."""
    if not len(tokens) == len(logprobs) == len(ids):
        raise RuntimeError("the vllm server did not return a log-probability for every token")
    values = []
    for token, position, named in zip(tokens, logprobs, ids, strict=True):
        value = position[named.index(token)]
        values.append(float("nan") if value is None else float(value))
    return Completion(tokens, values)
