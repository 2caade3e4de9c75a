"""The `training` section of a grid file: how rollouts are drawn, what is added to the loss, how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from klab.grid.schema.base import Count, NonNegative, Positive, Section

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Critic(Section):
    """A learned value function for the advantage `gae`; without one V = 0.

    ``model``: a copy of the starting policy with a linear value head, trained apart; ``head``: a linear value head on
    the policy's own trunk, into which the value loss flows with ``coefficient``. What is the critic's own (the head,
    and the copy below it) has an optimizer of its own with the settings of the policy's, but for its ``lr``, if given.

    The loss is ½·max((V − R̂)², (clip(V, V_old ± ``clip``) − R̂)²), a mean over the update's own tokens, with V_old as
    the rollout was drawn and R̂ = A + V_old before whitening (the code of Schulman et al. 2017; verl); a null ``clip``
    does not clip. During the first ``warmup_updates`` only the critic learns.
    """

    kind: Literal["model", "head"] = "model"
    lr: NonNegative | None = None
    clip: Positive | None = 0.2
    coefficient: Positive = 0.5
    warmup_updates: Annotated[int, Field(ge=0)] = 0


class BetaControl(Section):
    """Adaptive β (Ziegler et al. 2019, section 2.2): after each update β ← β·(1 + clip(KL/target − 1, ±0.2)/horizon).

    KL is the update's mean k3 per own token, to the reference, in nats. ``horizon`` is in updates: at 10, Ziegler's
    K_β = 0.1, β moves by 2% at most. The objective's β is the first one. An update that was skipped, or in which only a
    critic learned, leaves β as it is.
    """

    target: Positive
    horizon: Positive = 10.0


class TrustRegion(Section):
    """A penalty coefficient·KL(π_old‖π) in the loss, beside or instead of clipping (PPO-penalty, Schulman et al. 2017).

    π_old is the behaviour policy of the importance ratios; the KL is estimated by e^λ − 1 − λ with λ = ℓ − ℓ_old, and
    aggregated as the objective is. With a ``target`` the coefficient adapts once per rollout, to the mean KL per own
    token that its last update saw (`kl_behaviour`): it doubles above 1.5·target and halves below target/1.5, within a
    factor of 1024 of the first.
    """

    coefficient: Positive = 1.0
    target: Positive | None = None


class Sampler(Section):
    """Rollouts from another engine, in another precision or at another temperature than the trainer's.

    The sampler μ is the behaviour policy with its weights in ``dtype``, at ``temperature`` (those of the trainer unless
    given). The trainer computes π_old, the behaviour policy as it sees it, anew when the rollout is drawn; the
    importance ratio is to π_old. What to do about the difference to μ: ``none``: ignore it; ``ratio``: use μ as the
    behaviour policy of the importance ratio; ``tis``: multiply each token's surrogate by min(π_old/μ, cap), a constant
    (Yao et al. 2025); ``icepop``: by π_old/μ inside [low, high], 0 outside (arXiv:2510.18855). As in TRL and verl, a
    KL term of the loss is not multiplied.

    ``engine: vllm`` needs the extra ``vllm`` and a GPU. Its draws are not klab's, and not the same on every machine.
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

    ``equal_groups`` says what happens to groups whose rewards (the task's) are all equal: ``keep`` them, ``drop`` them
    from the update with their KL term (Reinforce-Rej; denominators count what is left, and an update of which nothing
    is left changes nothing), or ``refill`` with groups of new prompts, in at most ``refill_rounds`` further draws of
    ``prompts`` (DAPO's dynamic sampling; what is still missing then is filled with equal groups of the first draw).
    ``truncated: mask`` takes the tokens of trajectories that ran out of budget out of the loss, while their rewards
    count in the statistics of the advantage (DAPO's overlong filtering). With ``overlong_buffer`` the last so many
    tokens of the budget cost up to ``overlong_penalty`` of reward, linearly (DAPO's soft overlong punishment, eq. 13);
    the reward that is recorded is the task's.

    ``micro_batch`` (trajectories) and ``token_budget`` (tokens, prompts included) limit one forward pass; neither
    changes a gradient. Of tokens that are only sampled, 16 times the budget go together.
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
    checkpoint_updates: Count = 1000
    checkpoint_seconds: Positive = 60.0
    reward_seconds: Positive = 60.0

    @property
    def on_policy(self) -> bool:
        """Whether every importance ratio is 1 by construction."""
        fresh = self.optimizer_steps_per_rollout == 1 and self.lag == 0 and self.behaviour == "policy"
        return fresh and (self.sampler is None or self.sampler.correction != "ratio")

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer updates that one rollout serves."""
        return self.updates_per_rollout * self.minibatches


NUMERICALLY_IDLE = ("checkpoint_updates", "checkpoint_seconds", "reward_seconds", "reward_memory_gb")
"""Training settings that cannot change any number of a cell, hence no part of its identity."""

STACKABLE = ("lr", "schedule", "warmup_updates", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_norm")
"""Training settings that cells of one pack need not share: they act on one cell's slice only."""
