"""Claims C90-C93: where training comes to rest when the reference policy moves, or β falls to 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from klab.grid.schema.sections import BetaControl
from klab.harness.claims.claim import Evidence, claim
from klab.harness.exact.gradients import exact_gradient
from klab.harness.exact.instance import Instance
from klab.harness.exact.tabular import TabularPolicy

EXACT = 1e-12
RATE = 1.0
"""Learning rate of the bandits, which are trained with exact gradients."""

REFERENCE = np.log([0.1, 0.3, 0.6])
"""Logits of the policy that training starts from; the best arm is the least likely one."""

REWARD = np.asarray([1.0, 0.6, 0.0])
TIED = np.asarray([1.0, 1.0, 0.0])
"""Rewards with one best arm, and with two."""

Vector = NDArray[np.float64]
Moving = Callable[[Vector, Vector], Vector]
"""The next reference, from the last one and the policy, as logits."""

RULES: dict[str, Moving] = {
    "fixed": lambda reference, _: reference,
    "reset every update": lambda _, policy: policy.copy(),
    "ema 0.99": lambda reference, policy: 0.99 * reference + 0.01 * policy,
}


def probabilities(logits: Vector) -> Vector:
    weights = np.exp(logits - logits.max())
    found: Vector = weights / weights.sum()
    return found


def gradient(logits: Vector, reference: Vector, reward: Vector, beta: float) -> Vector:
    """Of E[R] − β·KL(π‖ref) of a softmax bandit, with respect to its logits: π∘(u − π·u), u = R − β·log(π/ref)."""
    policy = probabilities(logits)
    utility = reward - beta * np.log(policy / probabilities(reference))
    found: Vector = policy * (utility - policy @ utility)
    return found


def train(
    rule: str, beta: float | Callable[[int], float], updates: int, reward: Vector = REWARD, start: Vector = REFERENCE
) -> tuple[Vector, Vector]:
    """Policy and reference, as probabilities, after gradient ascent from the reference.

    Args:
        beta: constant, or by the number of the update, from 1.
    """
    move, logits, reference = RULES[rule], start.copy(), start.copy()
    for number in range(1, updates + 1):
        now = beta(number) if callable(beta) else beta
        logits = logits + RATE * gradient(logits, reference, reward, now)
        reference = move(reference, logits)
    return probabilities(logits), probabilities(reference)


def optimum(beta: float, reward: Vector = REWARD) -> Vector:
    """π_ref·e^{R/β}/Z."""
    return probabilities(REFERENCE + reward / beta)


def distance(here: Vector, there: Vector) -> float:
    """Total variation."""
    return float(np.abs(here - there).sum() / 2)


def divergence(here: Vector, there: Vector) -> float:
    """KL(here‖there), nats."""
    return float(here @ np.log(here / there))


@lru_cache(maxsize=1)
def gap_of_the_gradients() -> tuple[float, float]:
    """Largest relative difference that β = 1 makes to the exact gradient of sequences where the policy is its own
    reference; and that of this module's gradient of a bandit to the lab's."""
    largest = 0.0
    for seed in range(8):
        lab = Instance(3, 3, seed)
        plain, held = (exact_gradient(lab.behaviour, lab.behaviour, lab.reward, beta) for beta in (0.0, 1.0))
        largest = max(largest, float((plain - held).norm() / plain.norm()))
    logits = np.asarray([0.3, -0.4, 0.2])
    here, there = (TabularPolicy(torch.from_numpy(each)[None]) for each in (logits, REFERENCE))
    exact = exact_gradient(here, there, torch.from_numpy(REWARD), 0.5)[0].numpy()
    return largest, float(np.abs(gradient(logits, REFERENCE, REWARD, 0.5) - exact).max())


@claim(
    "C90",
    "T",
    "this book",
    "A reference reset to the policy after every exact gradient step takes the KL out of training, which then ends at "
    "the reward maximiser; a fixed one ends at pi_ref e^(r/beta)/Z.",
)
def reset_references_do_not_bind(evidence: Evidence) -> None:
    same, formula = gap_of_the_gradients()
    evidence.number("sequences, pi = ref: relative change of the exact gradient by beta 1", same)
    evidence.number("bandit: largest gap of the gradient used here to the lab's", formula)
    updates = 20_000
    reset, without, fixed = (
        train(rule, beta, updates)[0] for rule, beta in (("reset every update", 0.5), ("fixed", 0.0), ("fixed", 0.5))
    )
    evidence.number(f"bandit, {updates} updates: reset at beta .5, distance to no KL at all", distance(reset, without))
    evidence.headline("bandit: 1 - p(best), reset at beta .5", 1 - reset[0])
    evidence.number("bandit: 1 - p(best), fixed at beta .5", 1 - fixed[0])
    gap = evidence.number("bandit: fixed at beta .5, distance to pi_ref e^(r/beta)/Z", distance(fixed, optimum(0.5)))
    earlier = train("reset every update", 0.5, updates // 10)[0]
    ratio = evidence.number("tenfold updates divide 1 - p(best) by", (1 - earlier[0]) / (1 - reset[0]))
    evidence.stated("where policy and reference are one, the KL has no gradient", max(same, formula) < EXACT)
    evidence.stated("reset every update, training is training without a KL", distance(reset, without) < EXACT)
    evidence.stated("reset every update, training ends at the maximiser (1 - p falls as 1/updates)", 9 < ratio < 11)
    evidence.stated("fixed, it ends at the tilted reference", gap < 1e-9)
    evidence.remark(
        "So `reference: rollout`, or update_every: 1, with one update per rollout is no regulariser at all."
    )


@claim(
    "C91",
    "T",
    "this book",
    "Solving k problems at beta, the reference reset to each solution, ends where one problem at beta/k does: "
    "pi_0 e^(k r/beta)/Z.",
)
def resets_divide_beta(evidence: Evidence) -> None:
    start, gaps = REFERENCE, []
    for solved in range(1, 4):
        found = train("fixed", 1.0, 10_000, start=start)[0]
        start = np.log(found)
        gaps.append(
            evidence.number(
                f"k = {solved}, beta 1: distance to the optimum of beta 1/k", distance(found, optimum(1 / solved))
            )
        )
        evidence.headline(
            f"k = {solved}, beta 1: KL to the first reference", divergence(found, probabilities(REFERENCE))
        )
    evidence.stated("k solved problems at beta are one at beta/k", max(gaps) < 1e-9)
    evidence.remark("Rare resets are a schedule of beta, 1/(1 + number of resets), with a fixed reference.")


@claim(
    "C92",
    "O",
    "this book",
    "A reference that trails the policy as a moving average (EMA) brings training to rest between the optimum of a "
    "fixed reference and the reward maximiser.",
)
def trailing_references_only_delay(evidence: Evidence) -> None:
    failures: dict[tuple[str, int], float] = {}
    spans = (200, 2_000, 20_000)
    for updates in spans:
        for rule in RULES:
            found, reference = train(rule, 2.0, updates)
            failures[rule, updates] = 1 - float(found[0])
            evidence.number(f"beta 2, {updates} updates: 1 - p(best), {rule}", failures[rule, updates])
            if rule == "ema 0.99":
                near, far = divergence(found, reference), divergence(found, probabilities(REFERENCE))
    evidence.number("ema 0.99 in the end: KL to the trailing reference", near)
    evidence.number("ema 0.99 in the end: KL to the first policy", far)
    ratio = evidence.headline(
        "ema 0.99: ten times the updates divide 1 - p(best) by",
        failures["ema 0.99", spans[1]] / failures["ema 0.99", spans[2]],
    )
    evidence.stated("training with a trailing reference rests short of the maximiser", ratio < 2)
    evidence.restricted(
        "after any given number of updates it is between the two",
        all(
            failures["reset every update", each] < failures["ema 0.99", each] < failures["fixed", each]
            for each in spans
        ),
    )
    evidence.remark(
        "Where nothing moves any more the reference has caught up, and C90 holds: only the maximiser is at rest. The "
        "distance to the trailing reference stays small while that to the first policy grows to its largest value."
    )


@claim(
    "C93",
    "O",
    "this book",
    "With a fixed reference and beta falling slowly to 0, training ends at the reward maximiser that keeps the "
    "reference's proportions among equally good answers; without a KL, or with a reference reset every update, it does "
    "not.",
)
def falling_beta_keeps_proportions(evidence: Evidence) -> None:
    control = BetaControl(schedule="linear")

    def falling(updates: int) -> Vector:
        return train("fixed", lambda number: control.scheduled(1.0, number, updates), updates, TIED)[0]

    def odds(found: Vector) -> float:
        return float(found[1] / found[0])

    quick, slow = falling(2_000), falling(20_000)
    reset, without = (
        train(rule, beta, 20_000, TIED)[0] for rule, beta in (("reset every update", 1.0), ("fixed", 0.0))
    )
    evidence.number("odds of the two best arms under the reference", 3.0)
    evidence.number("beta falling linearly from 1 within 2,000 updates: the same odds in the end", odds(quick))
    evidence.headline("beta falling linearly from 1 within 20,000 updates: the same odds in the end", odds(slow))
    evidence.number("reset every update, 20,000 updates: the same odds", odds(reset))
    evidence.number("no KL, 20,000 updates: the same odds", odds(without))
    evidence.number("beta falling within 20,000 updates: 1 - p(best two)", slow[2])
    evidence.stated("in the reference's proportions, to 1%", abs(odds(slow) / 3.0 - 1) < 0.01)
    evidence.restricted("a falling beta ends among the best answers", slow[2] < 1e-3)
    evidence.restricted(
        "the slower it falls, the nearer to the reference's proportions", 3.0 < odds(slow) < odds(quick)
    )
    evidence.restricted("to 10% within 20,000 updates", odds(slow) < 3.3)
    evidence.restricted(
        "without a KL, or with resets, the likelier answer takes over", min(odds(reset), odds(without)) > 100
    )
    evidence.remark(
        "What beta holds is lost in the end, where the reward still pulls and beta no longer does. The gap closes "
        "slowly with the number of updates."
    )
