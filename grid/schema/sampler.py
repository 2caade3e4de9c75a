"""The `training.sampler` section of a grid file: who draws the rollouts, and what corrects for the difference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from klab.grid.errors import UserError
from klab.grid.schema.base import GrownSection, NonNegative, Positive, Section
from klab.grid.schema.policy import PolicySection

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

VLLM_TEMPERATURES = (0.01, 2.0)
"""What `vllm.SamplingParams` takes: lower ones are raised without an error, higher ones refused."""
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM's engine can be started with (`vllm.config.lora.MaxLoRARanks`)."""
IDLE_SAMPLER_SETTINGS = ("url", "group_port", "gpu_memory", "sleep")
"""Settings of a sampler that say where and how it runs, and are no part of a cell's identity."""


class Rejection(Section):
    """Tokens or whole trajectories on which sampler and trainer disagree leave the surrogate: their factor is 0.

    With λ = log(π_old/μ), ``k1`` keeps where ``low`` ≤ e^s ≤ ``high`` with s = λ, ``k2`` where ½λ² and ``k3`` where
    e^λ − 1 − λ is at most ``high``; ``over`` takes each token by itself, or the sum, mean or largest of a
    trajectory's own tokens. ``divergence: k1, over: mean`` is the rejection by the geometric mean of the ratios. The
    criteria are those of verl's rollout correction, whose bounds of k1 are on μ/π_old. As with the other corrections
    denominators and the KL term of the loss stay what they are.
    """

    divergence: Literal["k1", "k2", "k3"] = "k1"
    """What is compared, see above."""
    over: Literal["token", "sum", "mean", "max"] = "mean"
    """Each token by itself, or the sum, mean or largest of a trajectory's tokens."""
    high: Positive
    """Largest value that is kept: of e^s with k1, of the divergence with k2 and k3."""
    low: NonNegative | None = None
    """Smallest e^s that is kept with k1; null: 1/`high`."""

    @property
    def lower_bound(self) -> float:
        """The smallest ratio that is kept with k1."""
        return 1.0 / self.high if self.low is None else self.low


class Sampler(GrownSection):
    """Rollouts from another engine, in another precision or at another temperature than the trainer's.

    The sampler μ is the behaviour policy with its weights in ``dtype``, at ``temperature`` (those of the trainer unless
    given). The trainer computes π_old, the behaviour policy as it sees it, anew when the rollout is drawn; the
    importance ratio is to π_old. What to do about the difference to μ: ``none``: ignore it; ``ratio``: use μ as the
    behaviour policy of the importance ratio; ``tis``: multiply each token's surrogate by π_old/μ truncated to
    [floor, cap], a constant (Yao et al. 2025); ``icepop``: by π_old/μ inside [low, high], 0 outside (Ling Team 2025).
    ``level`` takes the ratio of each token, or the product over a trajectory's own tokens for all of them (TRL, verl).
    As in TRL and verl, a KL term of the loss is not multiplied.

    ``engine: vllm`` also draws the completions of evaluations and of greedy baselines. Its draws are not those of
    klab's engine, and not the same on every machine; a server's are not repeatable.
    """

    LATER = ("level", "floor", "reject", "adapters", "url", "group_port", "gpu_memory", "sleep")

    engine: Literal["klab", "vllm"] = "klab"
    """What draws the rollouts; `vllm` needs the extra `vllm` and a GPU."""
    url: str | None = None
    """A server of vLLM that draws (`http://host:8000`), with weights sent to it as TRL does; null: an engine in the
    trainer's process."""
    group_port: Annotated[int, Field(ge=1, le=65535)] = 51216
    """Port over which the weights go to the server."""
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of the GPU's memory for vLLM's weights and cache, in the trainer's process."""
    sleep: bool = True
    """Whether vLLM frees its memory between rollouts, in the trainer's process."""
    adapters: Literal["merged", "requests"] = "merged"
    """How vLLM gets the adapters of `policy.lora`: merged into the weights, or with every request."""
    dtype: Dtype | None = None
    """Precision of the sampler's weights; null: the trainer's."""
    temperature: Positive | None = None
    """Temperature of the sampler; null: the trainer's."""
    correction: Literal["none", "ratio", "tis", "icepop"] = "none"
    """What is done about the difference between sampler and trainer, see above."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of `tis` and `icepop`: of each token, or of the whole trajectory."""
    floor: NonNegative = 0.0
    """Smallest factor of `tis`."""
    cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest factor of `tis`."""
    low: NonNegative = 0.5
    """Smallest π_old/μ that `icepop` keeps."""
    high: Positive = 5.0
    """Largest π_old/μ that `icepop` keeps."""
    reject: Rejection | None = None
    """Leave out tokens or trajectories on which sampler and trainer disagree, beside any correction; null: none."""

    @property
    def multiplies(self) -> bool:
        """Whether tokens' surrogates get a factor."""
        return self.correction in ("tis", "icepop") or self.reject is not None

    @property
    def share_while_training(self) -> float:
        """Share of the trainer's GPU that stays with the sampler during updates."""
        return self.gpu_memory if self.engine == "vllm" and self.url is None and not self.sleep else 0.0

    @property
    def idle(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and why."""
        found: dict[str, str] = {}
        if self.correction != "tis":
            found |= dict.fromkeys(("floor", "cap"), "it belongs to correction: tis")
        if self.correction != "icepop":
            found |= dict.fromkeys(("low", "high"), "it belongs to correction: icepop")
        if self.correction not in ("tis", "icepop"):
            found["level"] = "only the corrections tis and icepop weigh tokens"
        if self.engine != "vllm":
            found |= dict.fromkeys(("url", "group_port", "gpu_memory", "sleep", "adapters"), "only vllm has it")
        elif self.url is None:
            found["group_port"] = "there is no url of a server"
        else:
            found |= dict.fromkeys(("gpu_memory", "sleep", "adapters"), "the server at url has its own")
        return found


def check_sampler(sampler: Sampler, top_p: float, temperature: float) -> None:
    """Check the settings of a sampler against one another and against the trainer's.

    Args:
        top_p: of the trainer, and so of the sampler.
        temperature: of the trainer.

    Raises:
        UserError: they contradict one another.
    """
    if sampler.low > sampler.high:
        raise UserError("must not exceed training.sampler.high", key="training.sampler.low", value=sampler.low)
    if sampler.floor > sampler.cap:
        raise UserError("must not exceed training.sampler.cap", key="training.sampler.floor", value=sampler.floor)
    if sampler.reject is not None:
        _check_rejection(sampler.reject)
    if top_p < 1.0:
        for key, value in (("correction", sampler.correction), ("reject", sampler.reject)):
            if value not in ("none", None):
                raise UserError(
                    "corrects by a ratio of softmaxes over the whole vocabulary, but top_p draws from a part of it",
                    key=f"training.sampler.{key}",
                    value=value if isinstance(value, str) else None,
                    hint=f"Set training.top_p to 1, or leave the {'correction' if key == 'correction' else key} out.",
                )
    temperature = sampler.temperature or temperature
    if sampler.engine == "vllm" and not VLLM_TEMPERATURES[0] <= temperature <= VLLM_TEMPERATURES[1]:
        raise UserError(
            "vllm draws at temperatures from {:g} to {:g}".format(*VLLM_TEMPERATURES),
            key="training.temperature" if sampler.temperature is None else "training.sampler.temperature",
            value=temperature,
        )
    if sampler.engine == "vllm" and top_p < 1.0 and temperature != 1.0:
        raise UserError(
            "vllm records log-probabilities either before the temperature or after top-p",
            key="training.top_p",
            value=top_p,
            hint=f"Set it to 1, or the temperature ({temperature:g}) to 1.",
        )


def check_processes(sampler: Sampler, count: int) -> None:
    """Raises UserError where several processes would send their weights to one server."""
    if sampler.url is not None and count > 1:
        raise UserError(
            f"a server takes its weights from one process, and {count} train the cell",
            key="training.sampler.url",
            value=sampler.url,
            hint="Set resources.processes to 1, or leave url out: every process then has an engine of its own.",
        )


def check_sampled_policy(sampler: Sampler, policy: PolicySection) -> None:
    """Raises UserError where a sampler cannot run a policy."""
    if sampler.engine != "vllm":
        return
    if (sampler.dtype or policy.dtype) == "float64":
        key = "policy.dtype" if sampler.dtype is None else "training.sampler.dtype"
        raise UserError("vllm has no float64", key=key, value="float64", hint="training.sampler.dtype: float32 has it.")
    rank = 0 if policy.lora is None else policy.lora.rank
    if sampler.adapters == "requests":
        if policy.lora is None:
            raise UserError(
                "the policy has no adapters", key="training.sampler.adapters", value="requests", hint="Set policy.lora."
            )
        if rank > VLLM_LORA_RANKS[-1]:
            raise UserError(
                f"vllm takes adapters of rank {VLLM_LORA_RANKS[-1]} at most",
                key="policy.lora.rank",
                value=rank,
                hint="training.sampler.adapters: merged takes any.",
            )


def _check_rejection(reject: Rejection) -> None:
    key = "training.sampler.reject"
    if reject.divergence != "k1":
        if reject.low is not None:
            raise UserError("only k1 has a lower bound", key=f"{key}.low", value=reject.low, hint="Leave it out.")
    elif reject.over == "max":
        raise UserError(
            "k1 has no largest disagreement: it has two sides", key=f"{key}.over", value="max", allowed=_OVER_K1
        )
    elif reject.lower_bound > reject.high:
        hint = None if reject.low is not None else f"Below 1, also set {key}.low."
        raise UserError(f"must not exceed {key}.high", key=f"{key}.low", value=reject.lower_bound, hint=hint)


_OVER_K1 = ("token", "sum", "mean")
