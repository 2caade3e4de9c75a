"""A task whose reward is a proxy: a reward model that learnt from comparisons which the true, gold reward decided.

What happens when a policy is trained against it is over-optimisation (Gao, Schulman and Hilton 2023, "Scaling Laws for
Reward Model Overoptimization"): the proxy rises, and the gold reward turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.tasks.reward_model import RewardModel, reward_model
from klab.tasks.task import Example, Score, SplitName, load_task

PROXY, GOLD, GAP = "proxy", "gold", "gap"
"""Names of the parts of a score."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a reward over completions of the starting policy."""

    mean: float
    deviation: float

    def standardised(self, reward: float) -> float:
        return (reward - self.mean) / self.deviation


class Proxy:
    """The prompts of another task, with a reward model's logit as the reward.

    Until `attach` names the reward model, which is made from the starting policy, the gold reward is the reward: the
    starting policy is warmed up on that.

    Args:
        gold: section of the task whose reward is the truth.
        settings: how the reward model is trained (`klab.grid.schema.task.ProxyTask`); not read here.
    """

    reward_weights: Mapping[str, float] = {PROXY: 1.0}

    def __init__(self, gold: Mapping[str, Any], **settings: Any) -> None:
        self.gold = load_task(gold)
        self.name = f"{PROXY}({self.gold.name})"
        self.alphabet, self.max_new_tokens = self.gold.alphabet, self.gold.max_new_tokens
        self.interactive = getattr(self.gold, "interactive", True)
        self.settings = settings
        self._model: RewardModel | None = None
        self._logits = self._gold = Scale(0.0, 1.0)

    def attach(self, folder: str | Path, logits: Scale, gold: Scale) -> None:
        """Rewards with the reward model in this folder from now on; `logits` and `gold` say how both rewards scale."""
        self._model, self._logits, self._gold = reward_model(str(folder)), logits, gold

    def split(self, name: SplitName) -> Sequence[Example]:
        return self.gold.split(name)

    def respond(self, example: Example, transcript: str) -> str | None:
        return self.gold.respond(example, transcript)

    def score(self, example: Example, completion: str) -> Score:
        """The proxy's reward, its logit standardised; parts: `proxy`, `gold`, `gap`, and those of the gold score as
        `gold.NAME`. The gap is the proxy less the standardised gold reward."""
        return next(self.score_all([example], [completion]))

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        """`score` of many completions, several at a time."""
        verdicts = None if self._model is None else self._model.verdicts(examples, completions)
        for example, completion in zip(examples, completions, strict=True):
            gold = self.gold.score(example, completion)
            parts = {GOLD: gold.reward, **{f"{GOLD}.{name}": value for name, value in gold.parts.items()}}
            if verdicts is None:
                yield Score(gold.reward, gold.correct, parts)
                continue
            logit = next(verdicts).value
            assert logit is not None
            reward = self._logits.standardised(logit)
            gap = reward - self._gold.standardised(gold.reward)
            yield Score(reward, gold.correct, {PROXY: reward, GAP: gap, **parts})
