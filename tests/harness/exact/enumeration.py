"""The lab written a second time, differently: plain Python over prefixes as tuples, no tensors, no shared code.

A policy is a dict from prefix to the next symbol's probabilities; a gradient is a dict from (prefix, symbol) to float.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable

Policy = dict[tuple[int, ...], list[float]]
Gradient = dict[tuple[tuple[int, ...], int], float]


def policy_of(logits: list[list[float]]) -> Policy:
    """Rows of logits in breadth-first order as a policy."""
    vocabulary, policy, prefixes = len(logits[0]), {}, [()]
    rows = iter(logits)
    while len(policy) < len(logits):
        for prefix in prefixes:
            row = next(rows)
            total = sum(math.exp(x) for x in row)
            policy[prefix] = [math.exp(x) / total for x in row]
        prefixes = [(*prefix, v) for prefix in prefixes for v in range(vocabulary)]
    return policy


def sequences(policy: Policy, end: int | None = None) -> list[tuple[int, ...]]:
    """Every complete trajectory, depth first."""
    vocabulary = len(policy[()])

    def grow(prefix: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        if prefix not in policy or (prefix and prefix[-1] == end):
            yield prefix
        else:
            for v in range(vocabulary):
                yield from grow((*prefix, v))

    return list(grow(()))


def log_probs(policy: Policy, sequence: tuple[int, ...]) -> list[float]:
    return [math.log(policy[sequence[:j]][v]) for j, v in enumerate(sequence)]


def probability(policy: Policy, sequence: tuple[int, ...]) -> float:
    return math.prod(policy[sequence[:j]][v] for j, v in enumerate(sequence))


def add_scores(into: Gradient, policy: Policy, sequence: tuple[int, ...], coefficients: list[float]) -> None:
    """into += sum_j coefficients[j] * grad log pi(token j)."""
    for j, (token, c) in enumerate(zip(sequence, coefficients, strict=True)):
        for v, p in enumerate(policy[sequence[:j]]):
            into[sequence[:j], v] += c * ((1.0 if v == token else 0.0) - p)


def as_rows(gradient: Gradient, policy: Policy) -> list[list[float]]:
    prefixes = sorted(policy, key=lambda prefix: (len(prefix), prefix))
    return [[gradient[prefix, v] for v in range(len(policy[()]))] for prefix in prefixes]


VALUE: dict[str, Callable[[float], float]] = {
    "k1": lambda k: k,
    "k2": lambda k: k * k / 2,
    "k3": lambda k: math.exp(-k) - 1 + k,
    "abs": abs,
    "k3_plus": lambda k: math.exp(-k) - 1 + k,
}
SLOPE: dict[str, Callable[[float], float]] = {
    "k1": lambda k: 1.0,
    "k2": lambda k: k,
    "k3": lambda k: 1 - math.exp(-k),
    "abs": lambda k: math.copysign(1.0, k),
    "k3_plus": lambda k: k,
}


def ratio_shares(kind: str, length: int) -> list[list[float]]:
    """shares[j][i]: how much of token i's log-ratio is in log rho_j."""
    table = []
    for j in range(length):
        cover = {
            "none": [0.0] * length,
            "token": [float(i == j) for i in range(length)],
            "sequence_mean": [1 / length] * length,
            "future_mean": [float(i >= j) / (length - j) for i in range(length)],
            "sequence_product": [1.0] * length,
            "future_product": [float(i >= j) for i in range(length)],
            "prefix_product": [float(i <= j) for i in range(length)],
        }
        table.append(cover[kind])
    return table


def log_rho_and_slopes(kind: str, lam: list[float], advantages: list[float]) -> tuple[list[float], list[list[float]]]:
    """log rho_j, and its derivative to every log-ratio."""
    length = len(lam)
    if kind == "prefix_minimum":
        least = [min(range(j), key=lambda i: (lam[i], -i)) if j else None for j in range(length)]
        slopes = [[float(i == j) + float(i == least[j]) for i in range(length)] for j in range(length)]
    elif kind == "clipped_mean":
        free = [(x <= 0.4 if a > 0 else x >= -0.4) if a else False for x, a in zip(lam, advantages, strict=True)]
        stuck = sum(math.copysign(0.4, a) for a, inside in zip(advantages, free, strict=True) if a and not inside)
        slopes = [[inside / length for inside in free]] * length
        mean = (stuck + sum(x for x, inside in zip(lam, free, strict=True) if inside)) / length
        return [mean] * length, slopes
    else:
        slopes = ratio_shares(kind, length)
    return [sum(s * x for s, x in zip(row, lam, strict=True)) for row in slopes], slopes


def _within_budget(lam: list[float], before: list[float], at: int) -> bool:
    """Whether CPPO's budget leaves room for a token: position weights from 1 to 0.8, limit 0.15, budget 0.02."""
    moved = [p * abs(math.exp(each) - 1) for p, each in zip(before, lam, strict=True)]
    shares = [1 - 0.2 * place / max(1, len(lam) - 1) for place in range(len(lam))]
    ordered, point = sorted(moved), 0.9 * (len(moved) - 1)
    below = math.floor(point)
    quantile = ordered[below] + (point - below) * (ordered[min(below + 1, len(moved) - 1)] - ordered[below])
    mean = min(max(quantile, 0.02), 0.04)
    left = sum(share * (mean - each) for share, each in zip(shares[:at], moved[:at], strict=True))
    return shares[at] * moved[at] <= min(0.15, 0.15 + left)


def weight_of(kind: str, rho: float, advantage: float, lam: list[float], at: int, before: list[float]) -> float:
    """The weight of token `at` of a trajectory with the log-ratios `lam` and the probabilities `before` under the
    behaviour policy, at the catalogue's defaults."""
    probability_before = before[at]
    low, high = 0.8, 1.2
    clipped = min(max(rho, low), high)
    inside = (rho - clipped) * advantage <= 0
    if kind == "sigmoid":
        p = 1 / (1 + math.exp(-(1.0 if advantage > 0 else 1.05) * (rho - 1)))
        return 4 * rho * p * (1 - p)
    if kind in ("dppo_tv", "dppo_kl"):
        old, new = probability_before, probability_before * math.exp(lam[at])
        others = [max(0.0, 1 - p) for p in (old, new)]
        kl = old * math.log(old / new) + others[0] * math.log((others[0] + 1e-8) / (others[1] + 1e-8))
        far = abs(new - old) > 0.15 if kind == "dppo_tv" else kl > 0.05
        return 0.0 if far and (new > old) == (advantage > 0) else min(rho, 20.0)
    if kind in ("cppo_tv", "drpo_tv", "tv_band"):
        moved = probability_before * (math.exp(lam[at]) - 1)
        sign = (advantage > 0) - (advantage < 0)
        if kind == "drpo_tv":  # no probability is above 1
            moved = min(1.0, probability_before * math.exp(lam[at])) - min(1.0, probability_before)
            return rho * (1 - sign * moved / 12.5)
        if kind == "tv_band":
            return rho if abs(moved) <= 0.1 else 0.0
        return rho if advantage * (rho - 1) <= 0 or _within_budget(lam, before, at) else 0.0
    if kind == "log_clip":
        if advantage > 0:
            return rho if math.log(rho) <= 0.05 * math.sqrt(at + 1) else 0.0
        far = math.log(rho) < -0.025 * math.sqrt(at + 1) or math.log(rho) > 0.05 * math.sqrt(at + 1)
        return 0.0 if advantage < 0 and far else rho
    if kind == "future_kl":
        factor = math.exp(sum(0.5 ** ((i - at) / 32) * lam[i] for i in range(at, len(lam))))
        factor = min(max(factor, 1.0), 1.2)
        return (min(factor, 1.0) if advantage < 0 and rho > 4.0 else factor) * (rho if inside else 0.0)
    k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    return {
        "two_sided_clip": 0.0 if not inside or rho > 4.0 else rho,
        "sequence_kl_mask": 0.0 if not inside or (advantage < 0 and -sum(lam) / len(lam) > 0.2) else rho,
        "sequence_max_mask": 0.0 if any(math.exp(x) - 1 - x > 0.5 for x in lam) else rho,
        "gamma_kernel": rho**k * math.exp(rate * (1 - rho)),
        "tapered": 1.0 if advantage > 0 else min(rho, 1.0),
        "one": 1.0,
        "ratio": rho,
        "ppo_clip": rho if inside else 0.0,
        "dual_clip": 0.0 if not inside or (advantage < 0 and rho > 3.0) else rho,
        "truncate": min(rho, 1.2),
        "clamp": clipped,
        "truncate_clip": min(rho, high) if inside else 0.0,
        "power": math.sqrt(rho),
        "mask": rho if 0.5 <= rho <= 2.0 else 0.0,
    }[kind]


def coefficients(
    sequence: tuple[int, ...], current: Policy, behaviour: Policy, reference: Policy, reward: float, baseline: float,
    *, estimator: str = "k1", placement: str = "none", ratio: str = "none", weight: str = "one", beta: float = 0.0,
    mean_scale: bool = False,
) -> list[float]:  # fmt: skip
    """Coefficient of each token's score in the gradient ascent direction of one trajectory, summed over tokens."""
    new, old, ref = (log_probs(policy, sequence) for policy in (current, behaviour, reference))
    length = len(sequence)
    kappa = [a - b for a, b in zip(new, ref, strict=True)]
    rollout = [VALUE[estimator](a - b) for a, b in zip(old, ref, strict=True)]
    scale = beta / length if mean_scale else beta
    lam = [a - b for a, b in zip(new, old, strict=True)]
    returns = [reward - baseline] * length
    if placement == "reward":
        returns = [r - scale * sum(rollout) for r in returns]
    elif placement in ("reward_to_go", "reward_and_loss"):
        returns = [r - scale * sum(rollout[j:]) for j, r in enumerate(returns)]
    elif placement == "advantage":
        returns = [r - beta * rollout[j] for j, r in enumerate(returns)]
    elif placement in ("advantage_to_go", "advantage_and_loss"):
        returns = [r - beta * sum(rollout[j:]) for j, r in enumerate(returns)]
    log_rho, shares = log_rho_and_slopes(ratio, lam, returns)
    rho = [math.exp(x) for x in log_rho]
    before = [math.exp(each) for each in old]
    found = [weight_of(weight, rho[j], returns[j], lam, j, before) * returns[j] for j in range(length)]
    for j in range(length):
        if weight == "tv_band":  # its penalty, 0.001·λ²
            found[j] -= 0.002 * lam[j]
        slope = SLOPE[estimator](kappa[j])
        if placement in ("loss", "reward_and_loss", "advantage_and_loss"):
            found[j] -= beta * slope
        elif placement == "loss_reweighted":
            found[j] -= beta * rho[j] * slope
        elif placement == "loss_corrected":
            found[j] -= beta * rho[j] * slope
            for i in range(length):
                found[i] -= beta * rho[j] * VALUE[estimator](kappa[j]) * shares[j][i]
    return found


def expected_update(
    current: Policy, behaviour: Policy, reference: Policy, reward: Callable[[tuple[int, ...]], float], *,
    end: int | None = None, **cell: object,
) -> list[list[float]]:  # fmt: skip
    """E_behaviour of the per-trajectory ascent direction (advantage `raw`, tokens summed)."""
    total: Gradient = defaultdict(float)
    for sequence in sequences(current, end):
        share = probability(behaviour, sequence)
        parts = coefficients(sequence, current, behaviour, reference, reward(sequence), 0.0, **cell)  # type: ignore[arg-type]
        add_scores(total, current, sequence, [share * c for c in parts])
    return as_rows(total, current)


def expected_group_update(
    current: Policy, behaviour: Policy, reward: Callable[[tuple[int, ...]], float], size: int,
    baselined: Callable[[list[float], int], float],
) -> list[list[float]]:  # fmt: skip
    """E over ordered groups of the mean over the group of baselined(rewards, i) * grad log pi(trajectory i)."""
    total: Gradient = defaultdict(float)
    for group in itertools.product(sequences(current), repeat=size):
        share = math.prod(probability(behaviour, sequence) for sequence in group)
        rewards = [reward(sequence) for sequence in group]
        for i, sequence in enumerate(group):
            add_scores(total, current, sequence, [share * baselined(rewards, i) / size] * len(sequence))
    return as_rows(total, current)


def true_gradient(
    current: Policy, reference: Policy, value: Callable[[Policy, tuple[int, ...]], float], *, end: int | None = None,
    h: float = 1e-6,
) -> list[list[float]]:  # fmt: skip
    """Central differences of sum over sequences of value(policy, sequence), logit by logit."""
    rows = []
    for prefix in sorted(current, key=lambda prefix: (len(prefix), prefix)):
        row = []
        for v in range(len(current[()])):
            sides = []
            for sign in (1.0, -1.0):
                odds = [p * math.exp(sign * h * (u == v)) for u, p in enumerate(current[prefix])]
                moved = {**current, prefix: [x / sum(odds) for x in odds]}
                sides.append(math.fsum(value(moved, sequence) for sequence in sequences(moved, end)))
            row.append((sides[0] - sides[1]) / (2 * h))
        rows.append(row)
    return rows
