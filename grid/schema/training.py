"""The `training` section of a grid file: how rollouts are drawn, what is added to the loss, how weights are updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from klab.grid.errors import UserError
from klab.grid.schema.base import Count, GrownSection, NonNegative, Positive, Section, Share
from klab.grid.schema.kl_term import BetaControl, ReferencePolicy, named_reference
from klab.grid.schema.sampler import Sampler


class Critic(Section):
    """A learned value function for the advantage `gae`; without one V = 0.

    The critic's own weights (the head, and with ``kind: model`` the copy below it) have an optimizer of their own with
    the policy's settings, except for ``lr``. The loss is ½·max((V − R̂)², (clip(V, V_old ± ``clip``) − R̂)²), a mean
    over the update's own tokens, with V_old as the rollout was drawn and R̂ = A + V_old before whitening (the code of
    Schulman et al. 2017; verl).
    """

    kind: Literal["model", "head"] = "model"
    """`model`: a copy of the starting policy with a linear value head; `head`: a linear value head on the policy's own
    trunk."""
    lr: NonNegative | None = None
    """Learning rate of the critic; null: the policy's."""
    clip: Positive | None = 0.2
    """Value clipping: how far V may move from V_old within a rollout; null does not clip."""
    coefficient: Positive = 0.5
    """Of the value loss that flows into the trunk, with `kind: head`."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """First updates, in which only the critic learns."""


class TrustRegion(Section):
    """A penalty coefficient·KL(π_old‖π) in the loss, beside or instead of clipping (PPO-penalty, Schulman et al. 2017).

    π_old is the behaviour policy of the importance ratios; the KL is estimated by e^λ − 1 − λ with λ = ℓ − ℓ_old, and
    aggregated as the objective is. With a ``target`` the coefficient adapts once per rollout, to the mean KL per own
    token that its last update saw (`kl_behaviour`): it doubles above 1.5·target and halves below target/1.5, within a
    factor of 1024 of the first.
    """

    coefficient: Positive = 1.0
    """Of the penalty; the first one where there is a `target`."""
    target: Positive | None = None
    """KL(π_old‖π) per own token, in nats, that the coefficient adapts to; null keeps it fixed."""


STOP_FIGURES = {
    "reward": ("held-out reward", "at least"),
    "accuracy": ("accuracy", "at least"),
    "pass_at_k": ("pass@k", "at least"),
    "reverse_kl": ("KL to the reference", "at most"),
}
"""The figures of an evaluation that `training.stop` looks at: in words, and which side of its bound each must be on."""


class StopBounds(GrownSection):
    """What a cell must reach, or keep to, so that `training.stop` lets it go on: figures of its evaluations on held-out
    prompts.
    """

    LATER = tuple(STOP_FIGURES)

    reward: float | None = None
    """Held-out reward, at least."""
    accuracy: Share | None = None
    """Greedy accuracy, at least."""
    pass_at_k: Share | None = None
    """pass@k, at least."""
    reverse_kl: Positive | None = None
    """KL to the reference in nats per trajectory, at most."""

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are set."""
        found = {name: getattr(self, name) for name in STOP_FIGURES}
        return {name: bound for name, bound in found.items() if bound is not None}


class StopRule(Section):
    """Ends a cell that is hopeless. After every evaluation from update ``after`` on, but for the last, the cell stops
    unless every bound holds for the mean of its last ``over`` evaluations.

    The rule looks at nothing but the cell's own evaluations, so that a cell stops at the same update alone, in a pack
    and after a kill. A figure that could not be measured (null) stops nothing. The cell's state is then `stopped`: it
    has a result, and its score is censored (reports/README.md says how it counts).
    """

    after: Count
    """Updates that every cell may make."""
    unless: StopBounds
    """The bounds, for example `{reward: 0.1, reverse_kl: 20}`: at least reward 0.1, and at most 20 nats."""
    over: Count = 1
    """Evaluations that are averaged, the newest ones after the first update."""

    @property
    def words(self) -> str:
        """The rule in words."""
        bounds = [f"{STOP_FIGURES[name][0]} {STOP_FIGURES[name][1]} {x:g}" for name, x in self.unless.bounds.items()]
        over = f" (mean of the last {self.over} evaluations)" if self.over > 1 else ""
        return f"from update {self.after} on unless {' and '.join(bounds)}{over}"

    @field_validator("unless", mode="after")
    @classmethod
    def _some(cls, given: StopBounds) -> StopBounds:
        if not given.bounds:
            raise UserError("names no bound", allowed=StopBounds.model_fields)
        return given


class EntropyControl(Section):
    """An adaptive entropy bonus (Skywork-OR1, He et al. 2025; TRL): the coefficient c, which begins at the objective's
    `entropy_bonus`, rises by `step` after every update whose entropy was at or below `target` and falls by it
    otherwise. The bonus is in the loss of the updates that follow one at or below the target.
    """

    target: Positive
    """Mean entropy of the policy at its own tokens that is to be kept, in nats."""
    step: Positive = 0.005
    """By how much c changes."""
    low: NonNegative = 0.0
    """Smallest c."""
    high: Positive = 1.0
    """Largest c."""

    @field_validator("high")
    @classmethod
    def _not_below_low(cls, given: float, info: ValidationInfo) -> float:
        if given < info.data.get("low", 0.0):
            raise UserError("must not be below low", key="high", value=given)
        return given


class TrlConfig(Section):
    """Further fields of `trl.GRPOConfig` by their names there, for cells with ``engine: trl``: `vllm_mode`, `optim`,
    `model_init_kwargs` and so on. A field that follows from other settings of the grid file is refused, naming them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @property
    def fields(self) -> dict[str, Any]:
        """The written fields."""
        return dict(self.model_extra or {})


class TrainingSection(GrownSection):
    """How a cell is trained.

    A rollout of ``prompts`` × ``group_size`` trajectories serves ``updates_per_rollout`` passes of ``minibatches``
    updates each.

    ``equal_groups: drop`` removes groups whose task rewards are all equal, and their KL term, from the update
    (Reinforce-Rej, Xiong et al. 2025): denominators count what is left, and an update of which nothing is left changes
    nothing. ``refill`` replaces them with groups of new prompts (dynamic sampling, Yu et al. 2025); what is still
    missing after ``refill_rounds`` is filled with equal groups of the first draw.

    ``truncated: mask`` removes truncated trajectories from the loss while their rewards count in the statistics of the
    advantage. With ``overlong_buffer`` the recorded reward stays the task's.
    """

    LATER = ("old_logprobs", "final_evaluation_samples", "engine", "trl", "stop", "reference", "entropy_control")

    engine: Literal["klab", "trl"] = "klab"
    """What trains the cell: klab's own engine, or `trl.GRPOTrainer` with klab's objective as its loss (extra `trl`)."""
    trl: TrlConfig | None = None
    """Further fields of `trl.GRPOConfig`, with `engine: trl`."""
    updates: Count = 100
    """Optimizer updates in all."""
    prompts: Count = 16
    """Prompts of a rollout."""
    group_size: Count = 8
    """Completions per prompt, G."""
    updates_per_rollout: Count = 1
    """Passes over each rollout."""
    minibatches: Count = 1
    """Updates of one pass; each has `prompts / minibatches` whole groups."""
    lag: Annotated[int, Field(ge=0)] = 0
    """Rollouts come from the policy of this many updates ago."""
    behaviour: Literal["policy", "reference"] = "policy"
    """Which policy draws the rollouts: the one that is trained, or the reference policy."""
    sampler: Sampler | None = None
    """Draw rollouts with another engine, precision or temperature than the trainer."""
    old_logprobs: Literal["auto", "sampler", "trainer"] = "auto"
    """Log-probabilities of π_old in importance ratios: as the `sampler` recorded them token by token, or computed anew
    by the `trainer` when the rollout is drawn, as with a sampler of its own. `auto`: `trainer` for policies of 16 bits,
    whose decoding rounds otherwise than their training (GSPO's clipping begins at 3e-4), else `sampler`."""
    equal_groups: Literal["keep", "drop", "refill"] = "keep"
    """What happens to groups whose rewards are all equal: `keep`, `drop` (Reinforce-Rej) or `refill` (dynamic
    sampling, DAPO)."""
    refill_rounds: Count = 3
    """Most further draws of `prompts` prompts with `equal_groups: refill`."""
    truncated: Literal["keep", "mask"] = "keep"
    """Trajectories that ran out of budget: `keep` them, or `mask` their tokens out of the loss (overlong filtering,
    DAPO)."""
    overlong_buffer: Count | None = None
    """Last tokens of the budget that cost reward, linearly (soft overlong punishment, DAPO, eq. 13); null: none do."""
    overlong_penalty: Positive = 1.0
    """Reward that a completion of the full budget loses with `overlong_buffer`."""
    critic: Critic | None = None
    """A learned value function for the advantage `gae`; null: V = 0."""
    beta_control: BetaControl | None = None
    """Let β follow a KL target, or a schedule; null: β is constant."""
    reference: ReferencePolicy | None = None
    """A reference policy that moves: `{update_every: 100}` resets it to the policy, `{ema: 0.99}` lets it trail,
    `rollout` is the policy that drew the rollout; null, or `fixed`: the policy that the cell starts from."""
    trust_region: TrustRegion | None = None
    """A penalty on KL(π_old‖π) in the loss; null: none."""
    entropy_control: EntropyControl | None = None
    """Let the coefficient of the entropy bonus follow a target; null: it is the objective's `entropy_bonus`."""
    lr: NonNegative = 1e-4
    """Learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 (linear, cosine) by the end of training."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (Loshchilov & Hutter 2019)."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""
    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Positive | None = 1.0
    """Largest gradient norm; longer gradients are scaled down to it; null does not clip."""
    max_new_tokens: Count | None = None
    """Completion budget; null: the task's."""
    max_prompt_tokens: Count | None = None
    """Longer prompts are left out; null: none are."""
    temperature: Positive = 1.0
    """Sampling temperature. Log-probabilities, ratios and KL are of the softmax of logits/temperature over the whole
    vocabulary, of the policy, the behaviour policy and the reference alike; evaluations are at temperature 1."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole vocabulary. Log-probabilities, ratios and KL stay those of the whole
    vocabulary, so that gradients are biased by what is cut off; a correction of the sampler is refused beside it."""
    micro_batch: Count | None = None
    """Most trajectories in one forward pass; changes memory and time, no gradient."""
    token_budget: Count | None = None
    """Most tokens, prompts included, in one forward pass; changes memory and time, no gradient. Sampling uses 16 times
    as many."""
    evaluate_every: Count = 10
    """Updates between evaluations on held-out prompts."""
    evaluation_prompts: Count = 64
    """Held-out prompts per evaluation."""
    evaluation_samples: Count = 4
    """Completions per held-out prompt; the k of pass@k."""
    final_evaluation_samples: Count | None = None
    """Completions per held-out prompt in the evaluation after the last update, which the default score is mostly made
    of; null: 32, or `evaluation_samples` if that is more."""
    checkpoint_updates: Count = 1000
    """Most updates between checkpoints."""
    checkpoint_seconds: Positive = 60.0
    """Most seconds between checkpoints."""
    reward_seconds: Positive = 60.0
    """Time limit of one call of a task's reward, in seconds."""
    stop: StopRule | None = None
    """End hopeless cells early, by a rule that the report knows of; null: all make all updates."""

    @field_validator("trl", mode="before")
    @classmethod
    def _nothing_written(cls, given: object) -> object:
        """An empty mapping is the same as none."""
        return None if isinstance(given, Mapping) and not given else given

    @field_validator("reference", mode="before")
    @classmethod
    def _reference_in_a_word(cls, given: object) -> object:
        return named_reference(given)

    @property
    def completions_at_the_end(self) -> int:
        """Completions per held-out prompt in the last evaluation."""
        return self.final_evaluation_samples or max(FINAL_SAMPLES, self.evaluation_samples)

    @property
    def recomputes_old(self) -> bool:
        """Whether the trainer computes π_old of every rollout though no sampler of its own draws it."""
        return self.old_logprobs == "trainer" and self.sampler is None and not self.on_policy

    @property
    def on_policy(self) -> bool:
        """Whether every importance ratio is 1 by construction."""
        fresh = self.optimizer_steps_per_rollout == 1 and self.lag == 0 and self.behaviour == "policy"
        return fresh and (self.sampler is None or self.sampler.correction != "ratio")

    @property
    def draws_from_reference(self) -> bool:
        """Whether every rollout is drawn from the policy that is the reference at that moment, and serves one update:
        policy and reference are then the same wherever they are compared."""
        reference = self.reference
        if reference is None or not self.on_policy:
            return False
        return reference.follows == "rollout" or (reference.update_every == 1 and reference.ema == 0.0)

    @property
    def last_draw(self) -> int:
        """Updates made when the last rollout is drawn."""
        rollouts = -(-self.updates // self.optimizer_steps_per_rollout)
        lag = 0 if self.behaviour == "reference" else self.lag
        return max(0, (rollouts - 1) * self.optimizer_steps_per_rollout - lag)

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer updates that one rollout serves."""
        return self.updates_per_rollout * self.minibatches


FINAL_SAMPLES = 32
"""Completions per held-out prompt in the last evaluation, unless the grid file says otherwise."""

NUMERICALLY_IDLE = (
    *("checkpoint_updates", "checkpoint_seconds", "reward_seconds", "reward_memory_gb", "label"),
    *("sharding", "offload"),
)
"""Settings that cannot change any number of a cell, hence no part of its identity. Sharing weights out among processes
rounds sums otherwise, as the number of processes does, which is no part of it either."""

STACKABLE = (
    *("lr", "schedule", "warmup_updates", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_norm"),
    *("stop", "beta_control", "trust_region"),
)
"""Training settings that cells of one pack need not share: they act on one cell's slice only."""
