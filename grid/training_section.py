"""The `training` section of a grid file: how rollouts are drawn, what is added to the loss, how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grid.fields import Count, NonNegative, Positive, Section

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Critic(Section):
    """A learned value function for the advantage `gae`; without one V = 0.

    ``model``: a copy of the policy with a value head, trained apart; ``head``: a value head on the policy's own trunk,
    whose loss is added to the policy's with ``coefficient``. ``clip`` bounds how far a value may move from the one at
    the rollout (the clipped value loss of Schulman et al. 2017's code); null does not clip. During the first
    ``warmup_updates`` only the critic learns. ``lr`` is that of the policy unless given.
    """

    kind: Literal["model", "head"] = "model"
    lr: NonNegative | None = None
    clip: Positive | None = 0.2
    coefficient: Positive = 0.5
    warmup_updates: Annotated[int, Field(ge=0)] = 0


class BetaControl(Section):
    """Adaptive β (Ziegler et al. 2019, section 2.2): after each update β ← β·(1 + clip(KL/target − 1, ±0.2)/horizon).

    KL is the update's mean k3 per own token, to the reference. ``horizon`` is in updates. The objective's β is the
    first one.
    """

    target: Positive
    horizon: Positive = 10.0


class TrustRegion(Section):
    """A penalty coefficient·KL(π_old‖π) in the loss, beside or instead of clipping (PPO-penalty, Schulman et al. 2017).

    With a ``target`` the coefficient adapts: it doubles after an update whose KL was above 1.5·target, and halves
    after one whose KL was below target/1.5.
    """

    coefficient: Positive = 1.0
    target: Positive | None = None


class Sampler(Section):
    """Rollouts from another engine, in another precision or at another temperature than the trainer's.

    The trainer recomputes π_old; what to do about the difference to the sampler μ: ``none``: ignore it; ``ratio``: use
    μ as the behaviour policy of the importance ratio; ``tis``: multiply the surrogate by min(π_old/μ, cap);
    ``icepop``: by π_old/μ inside [low, high], 0 outside.
    """

    engine: Literal["klab", "vllm"] = "klab"
    dtype: Dtype | None = None
    temperature: Positive | None = None
    correction: Literal["none", "ratio", "tis", "icepop"] = "none"
    cap: Annotated[float, Field(ge=1.0)] = 2.0
    low: NonNegative = 0.5
    high: Positive = 5.0


class TrainingSection(Section):
    """How a cell is trained.

    ``updates`` counts optimizer updates. A rollout of ``prompts`` × ``group_size`` trajectories serves
    ``updates_per_rollout`` passes of ``minibatches`` updates each. One call of a task's reward may take
    ``reward_seconds``.

    ``equal_groups`` says what happens to groups whose rewards are all equal: ``keep`` them, ``drop`` them from the
    update (Reinforce-Rej), or ``refill`` with groups of new prompts, in at most ``refill_rounds`` further draws
    (DAPO's dynamic sampling). ``truncated: mask`` takes trajectories that ran out of budget out of the loss (DAPO's
    overlong filtering); with ``overlong_buffer`` the last so many tokens of the budget cost up to
    ``overlong_penalty`` of reward, linearly (DAPO's soft overlong punishment).

    ``micro_batch`` (trajectories) and ``token_budget`` (tokens, prompts included) limit one forward pass; neither
    changes a gradient.
    """

    updates: Count = 100
    prompts: Count = 16
    group_size: Count = 8
    updates_per_rollout: Count = 1
    minibatches: Count = 1
    lag: Annotated[int, Field(ge=0)] = 0
    behaviour: Literal["policy", "reference"] = "policy"
    sampler: Sampler | None = None
    equal_groups: Literal["keep", "drop", "refill"] = "keep"
    refill_rounds: Count = 3
    truncated: Literal["keep", "mask"] = "keep"
    overlong_buffer: Count | None = None
    overlong_penalty: Positive = 1.0
    critic: Critic | None = None
    beta_control: BetaControl | None = None
    trust_region: TrustRegion | None = None
    lr: NonNegative = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    adam_eps: Positive = 1e-8
    clip_norm: Positive | None = 1.0
    max_new_tokens: Count | None = None
    max_prompt_tokens: Count | None = None
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    micro_batch: Count | None = None
    token_budget: Count | None = None
    evaluate_every: Count = 10
    evaluation_prompts: Count = 64
    evaluation_samples: Count = 4
    checkpoint_updates: Count = 50
    checkpoint_seconds: Positive = 60.0
    reward_seconds: Positive = 60.0

    @property
    def on_policy(self) -> bool:
        """Whether every importance ratio is 1 by construction."""
        fresh = self.updates_of_a_rollout == 1 and self.lag == 0 and self.behaviour == "policy"
        return fresh and (self.sampler is None or self.sampler.correction != "ratio")

    @property
    def updates_of_a_rollout(self) -> int:
        """Optimizer updates that one rollout serves."""
        return self.updates_per_rollout * self.minibatches


NUMERICALLY_IDLE = ("checkpoint_updates", "checkpoint_seconds", "reward_seconds")
"""Training settings that cannot change any number of a cell, hence no part of its identity."""
