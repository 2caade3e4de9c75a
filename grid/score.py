"""The scores by which cells can be compared: names, what each measures, and whether more of it is better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from klab.grid.errors import UserError


class ScoreKind(NamedTuple):
    """A named score: what it is called in sentences, what it is, and whether a higher one is better.

    `argument` says what stands in parentheses behind the name: ``none``, ``optional`` or ``required``.
    """

    title: str
    meaning: str
    higher: bool = True
    argument: str = "none"


DEFAULT_SCORE = "reward"

HELD_OUT = {
    "reward": ScoreKind(
        "held-out reward",
        "mean reward of completions sampled at temperature 1 on held-out prompts, over the evaluations of the last "
        "tenth of training, weighted by their completions",
    ),
    "accuracy": ScoreKind(
        "held-out accuracy", "greedy accuracy on held-out prompts, mean of the evaluations of the last tenth"
    ),
    "pass_at_k": ScoreKind(
        "pass@k", "share of held-out prompts solved by one of k samples, over the evaluations of the last tenth"
    ),
    "objective": ScoreKind(
        "reward − β·KL",
        "held-out reward minus β times KL(policy || reference) in nats per trajectory, over the evaluations of the "
        "last tenth; β is the cell's own, or the number given",
        argument="optional",
    ),
    "reward_at_kl": ScoreKind(
        "held-out reward at KL",
        "held-out reward where KL(policy || reference) first reaches this many nats per trajectory, linear between the "
        "cell's own evaluations; missing where it never does",
        argument="required",
    ),
}
"""Scores from a cell's evaluations, which have one sampler for all cells."""

RESULTS = {
    "updates": ScoreKind("updates", "optimizer updates done"),
    "reward_final": ScoreKind(
        "training reward",
        "mean reward of the training rollouts of the last tenth of the updates, each cell with its own sampler",
    ),
    "reward_best": ScoreKind(
        "best training reward",
        "the highest moving average of the training reward over a tenth of the updates: the maximum of a noisy curve, "
        "which flatters noisy cells",
    ),
    "gap": ScoreKind("fall from best to final training reward", "reward_best - reward_final", higher=False),
    "accuracy_final": ScoreKind("accuracy at the last evaluation", "held-out greedy accuracy at the last evaluation"),
    "accuracy_best": ScoreKind("best held-out accuracy", "highest held-out greedy accuracy of any evaluation"),
    "reverse_kl_final": ScoreKind(
        "KL to the reference",
        "KL(policy || reference) per trajectory in nats, exact per token, at the last evaluation",
        higher=False,
    ),
    "reverse_kl_max": ScoreKind("largest KL to the reference", "largest reverse KL at any evaluation", higher=False),
    "collapsed": ScoreKind(
        "share of collapsed runs", "1 if the reward fell far below its best and stayed there", higher=False
    ),
    "collapse_update": ScoreKind("update of the collapse", "update at which it collapsed"),
    "nonfinite_updates": ScoreKind("non-finite updates", "updates with a non-finite loss or gradient", higher=False),
    "gradient_spikes": ScoreKind(
        "gradient spikes", "updates whose gradient norm stood far above its recent median", higher=False
    ),
    "ess_min": ScoreKind("smallest effective sample size", "smallest effective sample size of any update, as a share"),
    "seconds": ScoreKind("seconds", "wall-clock seconds of training on one worker", higher=False),
    "tokens": ScoreKind("tokens", "own tokens sampled", higher=False),
    "reward_timeouts": ScoreKind(
        "rewards that timed out",
        "uses of rewards that a time limit decided, in updates and evaluations",
        higher=False,
    ),
    "zero_gradient": ScoreKind(
        "runs without a gradient",
        "1 if the policy gradient was 0 in every update: it learnt nothing from its rewards",
        higher=False,
    ),
}
"""Numbers of a cell's `result.json`."""

SCORES = {**HELD_OUT, **RESULTS}

PARTS = "parts."
"""`parts.NAME` is the mean of one part of the reward, as the task names it, over the same evaluations as `reward`."""

LM_EVAL = "lm_eval."
"""`lm_eval.TASK.METRIC` is a metric of the section `evaluate` at the end of training; `lm_eval.TASK` its first one."""

LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter", "mse")
"""Metrics of lm-evaluation-harness of which less is better."""

FROM_0_TO_1 = (
    "reward",
    "accuracy",
    "pass_at_k",
    "reward_at_kl",
    "reward_final",
    "reward_best",
    "gap",
    "accuracy_final",
    "accuracy_best",
    "collapsed",
    "zero_gradient",
    "parts",
)
"""Kinds of scores that are rewards, or shares: five points of them mean the same in every study."""

TRAINING_REWARDS = ("reward_final", "reward_best", "gap")
"""Scores made of the rewards of rollouts."""

TRAINING_REWARD_SETTINGS = {
    "training.temperature": "rollouts are drawn at this temperature",
    "training.top_p": "rollouts are drawn from a part of the vocabulary",
    "training.sampler": "another sampler draws the rollouts",
    "training.lag": "rollouts come from an older policy",
    "training.behaviour": "another policy draws the rollouts",
    "training.updates_per_rollout": "a rollout is older than the last update",
    "training.minibatches": "a rollout is older than the last update",
    "training.equal_groups": "groups with equal rewards are left out or replaced",
    "training.truncated": "truncated completions count in the reward and not in the loss",
    "training.overlong_buffer": "training maximises the reward minus a charge for length",
    "training.overlong_penalty": "training maximises the reward minus a charge for length",
}
"""Settings that change what the training reward measures, with the reason; held-out scores are not touched by them."""

_ALIASES = {"training_reward": "reward_final"}
_FORM = re.compile(r"(?P<name>\w+)(?:\((?P<argument>[^()]*)\))?")


@dataclass(frozen=True, slots=True)
class Score:
    """A score that cells are compared by.

    Attributes:
        name: its canonical spelling, as in ``reward_at_kl(0.5)``.
        kind: the key in `SCORES`, ``parts`` or ``lm_eval``.
        title, meaning: for people.
        higher: whether a higher one is better.
        argument: the number in parentheses; None without one.
        part: the part of the reward, with ``parts``; task and metric, with ``lm_eval``.
    """

    name: str
    kind: str
    title: str
    meaning: str
    higher: bool = True
    argument: float | None = None
    part: str = ""

    @property
    def from_0_to_1(self) -> bool:
        """Whether a margin of equivalence in points of a reward has a meaning for it."""
        return self.kind in FROM_0_TO_1 or (self.kind == "lm_eval" and self.higher)


def parse_score(text: str, key: str = "score") -> Score:
    """The score that `text` names: ``reward``, ``reward_at_kl(0.5)``, ``objective(0.05)``, ``parts.format``, ….

    Args:
        key: where the text stands, for the error.

    Raises:
        UserError: for an unknown name, or a number in parentheses that is missing, out of place or no number ≥ 0.
    """
    written = text.strip() if isinstance(text, str) else ""
    if written.startswith(PARTS) and len(written) > len(PARTS):
        part = written.removeprefix(PARTS)
        meaning = f"mean of the part {part} of the reward, over the same completions as the held-out reward"
        return Score(written, "parts", f"{part} (part of the held-out reward)", meaning, part=part)
    if written.startswith(LM_EVAL) and len(written) > len(LM_EVAL):
        part = written.removeprefix(LM_EVAL)
        higher = not any(word in LOWER_IS_BETTER for word in part.split("."))
        return Score(
            written, "lm_eval", part, f"{part} of lm-evaluation-harness, on the final policy", higher, part=part
        )
    found = _FORM.fullmatch(written)
    name = found["name"] if found else written.partition("(")[0]
    name = _ALIASES.get(name, name)
    kind = SCORES.get(name)
    if found is None or kind is None:
        raise UserError("unknown score", key=key, value=text, allowed=spellings())
    if found["argument"] is None:
        if kind.argument == "required":
            raise UserError("needs a number in parentheses", key=key, value=text, hint=f"For example {name}(0.5).")
        return Score(name, name, kind.title, kind.meaning, kind.higher)
    if kind.argument == "none":
        raise UserError("takes nothing in parentheses", key=key, value=text, hint=f"Write {name}.")
    number = _number(found["argument"], key, text)
    shown = f"{number:g}"
    title = kind.title.replace("β", shown) if "β" in kind.title else f"{kind.title} {shown}"
    return Score(f"{name}({shown})", name, title, kind.meaning, kind.higher, number)


def parse_scores(texts: Iterable[str], key: str = "score") -> tuple[Score, ...]:
    """Several scores, each once, the first of them the primary one.

    Raises:
        UserError: as `parse_score`, and when there is none.
    """
    found = tuple({score.name: score for score in (parse_score(text, key) for text in texts)}.values())
    if not found:
        raise UserError("names no score", key=key, allowed=spellings())
    return found


def spellings() -> tuple[str, ...]:
    """How scores are written."""
    forms = {"none": "{}", "optional": "{}", "required": "{}(0.5)"}
    return (
        *(forms[kind.argument].format(name) for name, kind in SCORES.items()),
        *_ALIASES,
        f"{PARTS}NAME",
        f"{LM_EVAL}TASK.METRIC",
    )


def _number(text: str, key: str, value: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UserError("a number of at least 0 belongs in the parentheses", key=key, value=value)
    return number


def chosen_metric(part: str, metrics: Iterable[str]) -> str | None:
    """The metric of lm-evaluation-harness that ``lm_eval.PART`` names: the one of that name, else the first whose name
    begins with it; None where there is none."""
    known = list(metrics)
    return part if part in known else next((name for name in known if name.startswith(f"{part}.")), None)
