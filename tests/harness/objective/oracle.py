"""The objective again, as loops over trajectories and tokens with Python floats and gradients by hand.

Written from the mathematics alone; it shares no code with the package. A trajectory is the list of its own tokens;
everything else of the batch is never looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class Trajectory:
    """Own tokens only: current, behaviour and reference log-probabilities, logits, and where they stood in the
    batch."""

    group: int
    reward: float
    columns: list[int]
    now: list[float]
    old: list[float]
    ref: list[float]
    greedy: float = 0.0
    values: list[float] | None = None
    logits: list[list[float]] | None = None
    logits_ref: list[list[float]] | None = None
    correction: list[float] | None = None
    excluded_from_loss: bool = False

    @property
    def length(self) -> int:
        return len(self.now)


@dataclass
class Answer:
    """Loss, its gradient per (trajectory, column), and per (trajectory, column, symbol) for logits."""

    loss: float
    logp: dict[tuple[int, int], float] = field(default_factory=dict)
    logits: dict[tuple[int, int, int], float] = field(default_factory=dict)
    advantages: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)


def solve(objective: Any, trajectories: list[Trajectory], max_new_tokens: int) -> Answer:
    o = objective
    advantages = _advantages(o, trajectories)
    trajectories = [replace(t, columns=[], now=[], old=[], ref=[]) if t.excluded_from_loss else t for t in trajectories]
    advantages = [[] if t.excluded_from_loss else row for t, row in zip(trajectories, advantages, strict=True)]
    log_rho, slopes = zip(*[_log_rho(o.ratio, t) for t in trajectories], strict=True)
    rho = [[math.exp(x) for x in row] for row in log_rho]
    weights = _weights(o, rho, log_rho, advantages)
    share = _shares(o.aggregation, trajectories, max_new_tokens)
    answer = Answer(0.0, advantages=advantages, weights=weights)

    def add(n: int, j: int, amount: float) -> None:
        key = (n, trajectories[n].columns[j])
        answer.logp[key] = answer.logp.get(key, 0.0) + amount

    for n, t in enumerate(trajectories):
        for j in range(t.length):
            strength = share[n] * weights[n][j] * advantages[n][j]
            if t.correction is not None:
                strength *= t.correction[j]
            if o.path == "ratio" and o.ratio != "none":
                answer.loss -= strength * log_rho[n][j]
                for i, slope in enumerate(slopes[n][j]):
                    add(n, i, -strength * slope)
            else:
                answer.loss -= strength * (t.now[j] - (t.ref[j] if o.placement == "log_ratio" else 0.0))
                add(n, j, -strength)
            if o.placement not in ("loss", "loss_reweighted", "loss_corrected", "reward_and_loss"):
                continue
            factor = rho[n][j] if o.placement in ("loss_reweighted", "loss_corrected") else 1.0
            phi, slope_logp, slope_logits = _phi(o.estimator, t, j, t.now)
            answer.loss += share[n] * o.beta * factor * phi
            add(n, j, share[n] * o.beta * factor * slope_logp)
            for v, slope in enumerate(slope_logits):
                answer.logits[n, t.columns[j], v] = share[n] * o.beta * factor * slope
            if o.placement == "loss_corrected":
                for i, slope in enumerate(slopes[n][j]):
                    add(n, i, share[n] * o.beta * factor * phi * slope)
    return answer


def _phi(name: str, t: Trajectory, j: int, policy: list[float]) -> tuple[float, float, list[float]]:
    """φ at token j, its derivative to ℓ_j, and its derivatives to the logits."""
    kappa = policy[j] - t.ref[j]
    if name == "k1":
        return kappa, 1.0, []
    if name == "k2":
        return kappa * kappa / 2, kappa, []
    if name == "k3":
        return math.exp(-kappa) - 1 + kappa, 1 - math.exp(-kappa), []
    if name == "k3_plus":
        return math.exp(-kappa) - 1 + kappa, kappa, []
    if name == "abs":
        return abs(kappa), (kappa > 0) - (kappa < 0), []
    assert name == "full"
    assert t.logits is not None
    assert t.logits_ref is not None
    p, q = _softmax(t.logits[j]), _softmax(t.logits_ref[j])
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return divergence, 0.0, [a * (math.log(a / b) - divergence) for a, b in zip(p, q, strict=True)]


def _softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def _charges(o: Any, t: Trajectory) -> list[float]:
    """φ of the detached placements: at the behaviour policy or the current one."""
    policy = t.old if o.kl_at == "rollout" else t.now
    return [_phi(o.estimator, t, j, policy)[0] for j in range(t.length)]


def _returns(o: Any, t: Trajectory) -> list[float]:
    if o.placement not in ("reward", "reward_to_go", "reward_and_loss") or not t.length:
        return [t.reward] * t.length
    phi, c = _charges(o, t), 1 / t.length if o.kl_scale == "mean" else 1.0
    start = [0] * t.length if o.placement == "reward" else range(t.length)
    return [t.reward - o.beta * c * sum(phi[i:]) for i in start]


def _deviation(values: list[float], kind: str) -> float:
    if max(values) == min(values):
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - (kind == "sample")))


def _mean(values: list[float]) -> float:
    return values[0] if max(values) == min(values) else math.fsum(values) / len(values)


def _advantages(o: Any, ts: list[Trajectory]) -> list[list[float]]:
    returns = [_returns(o, t) for t in ts]
    estimated = [_gae(o, t) for t in ts] if o.advantage == "gae" else []
    if o.advantage == "gae" and o.whiten == "batch":
        estimated = _whitened(estimated)
    result = []
    for n, t in enumerate(ts):
        mates = [m for m, other in enumerate(ts) if other.group == t.group and other.length]
        row = [_advantage(o, ts, returns, mates, n, j) for j in range(t.length)]
        if o.advantage == "gae":
            row = estimated[n]
        if o.placement == "advantage":
            row = [a - o.beta * phi for a, phi in zip(row, _charges(o, t), strict=True)]
        if o.placement == "advantage_to_go":
            phi = _charges(o, t)
            row = [a - o.beta * sum(phi[j:]) for j, a in enumerate(row)]
        result.append(row)
    return result


def _advantage(o: Any, ts: list[Trajectory], returns: list[list[float]], mates: list[int], n: int, j: int) -> float:
    r, t = returns[n][j], ts[n]
    firsts = [returns[m][0] for m in mates]
    match o.advantage:
        case "raw":
            return r
        case "group_norm":
            std = _deviation(firsts, o.std)
            return (r - _mean(firsts)) / (std + o.eps) if std else 0.0
        case "group_center":
            return r - _mean(firsts)
        case "leave_one_out":
            others = [returns[m][0] for m in mates if m != n]
            return r - _mean(others) if others else 0.0
        case "group_center_batch_norm":
            std = _deviation([row[0] for row in returns if row], o.std)
            return (r - _mean(firsts)) / (std + o.eps) if std else 0.0
        case "batch_norm":
            tokens = [x for row in returns for x in row]
            std = _deviation(tokens, o.std)
            return (r - _mean(tokens)) / (std + o.eps) if std else 0.0
        case "position_norm":
            here = [returns[m][j] for m in mates if ts[m].length > j]
            std = _deviation(here, o.std)
            return (r - _mean(here)) / (std + o.eps) if std else 0.0
        case "position_center":
            return r - _mean([returns[m][j] for m in mates if ts[m].length > j])
        case "positive":
            return 1.0 if t.reward > 0 else float(o.rejected)
        case "greedy_baseline":
            return r - t.greedy
        case "length_baseline":
            return r - sum(ts[m].length * returns[m][0] for m in mates) / sum(ts[m].length for m in mates)
        case "gae":
            return 0.0
    raise AssertionError(o.advantage)


def _gae(o: Any, t: Trajectory) -> list[float]:
    """Backwards recursion A_j = δ_j + γλ·A_{j+1}."""
    rewards = [0.0] * t.length
    if t.length:
        rewards[-1] = t.reward
    if o.placement in ("reward", "reward_to_go", "reward_and_loss"):
        phi = _charges(o, t)
        for j in range(t.length):
            c = 1 / t.length if o.kl_scale == "mean" else 1.0
            if o.placement == "reward":
                rewards[-1] -= o.beta * c * phi[j]
            else:
                rewards[j] -= o.beta * c * phi[j]
    values = (t.values or [0.0] * t.length) + [0.0]
    row, ahead = [0.0] * t.length, 0.0
    for j in reversed(range(t.length)):
        ahead = rewards[j] + o.gamma * values[j + 1] - values[j] + o.gamma * o.lam * ahead
        row[j] = ahead
    return row


def _whitened(rows: list[list[float]]) -> list[list[float]]:
    tokens = [x for row in rows for x in row]
    if len(tokens) < 2:
        return [[0.0 for _ in row] for row in rows]
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def _log_rho(name: str, t: Trajectory) -> tuple[list[float], list[list[float]]]:
    """log ρ_j, and its derivative to every own ℓ_i."""
    lam = [a - b for a, b in zip(t.now, t.old, strict=True)]
    h = t.length
    values, slopes = [], []
    for j in range(h):
        members = {
            "none": range(0),
            "token": range(j, j + 1),
            "sequence_mean": range(h),
            "sequence_product": range(h),
            "future_mean": range(j, h),
            "future_product": range(j, h),
            "prefix_product": range(j + 1),
        }[name]
        scale = 1 / len(members) if name.endswith("_mean") else 1.0
        values.append(scale * sum(lam[i] for i in members))
        slopes.append([scale if i in members else 0.0 for i in range(h)])
    return values, slopes


def _weights(
    o: Any, rho: list[list[float]], log_rho: tuple[list[float], ...], advantages: list[list[float]]
) -> list[list[float]]:
    if o.weight == "adaptive":
        q = largest_exponent([x for row in log_rho for x in row], o.ess)
        return [[math.exp(q * x) for x in row] for row in log_rho]
    return [[weight(o, r, a) for r, a in zip(*rows, strict=True)] for rows in zip(rho, advantages, strict=True)]


def weight(o: Any, rho: float, a: float) -> float:
    def clip(x: float) -> float:
        return min(max(x, 1 - o.eps_low), 1 + o.eps_high)

    kept = (rho - clip(rho)) * a <= 0
    match o.weight:
        case "one":
            return 1.0
        case "ratio":
            return rho
        case "ppo_clip":
            return rho if kept else 0.0
        case "dual_clip":
            return 0.0 if not kept or (a < 0 and rho > o.c) else rho
        case "truncate":
            return min(rho, o.cap)
        case "clamp":
            return clip(rho)
        case "truncate_clip":
            return min(rho, 1 + o.eps_high) if kept else 0.0
        case "power":
            return rho**o.q
        case "mask":
            return rho if o.low <= rho <= o.high else 0.0
        case "sigmoid":
            p = 1 / (1 + math.exp(-(o.tau_pos if a > 0 else o.tau_neg) * (rho - 1)))
            return 4 * rho * p * (1 - p)
    raise AssertionError(o.weight)


def largest_exponent(log_rho: list[float], target: float) -> float:
    """The largest q in [0, 1] whose effective sample size share reaches the target, by halving 50 times."""

    def share(q: float) -> float:
        w = [math.exp(q * (x - max(log_rho))) for x in log_rho]
        return sum(w) ** 2 / (len(w) * sum(x * x for x in w))

    if not log_rho or share(1.0) >= target:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= target else (low, middle)
    return low


def _shares(name: str, ts: list[Trajectory], max_new_tokens: int) -> list[float]:
    """What one own token of each trajectory counts for."""
    tokens = sum(t.length for t in ts)
    return [
        {
            "sequence_mean": 1 / (len(ts) * max(t.length, 1)),
            "token_mean": 1 / max(tokens, 1),
            "constant": 1 / (len(ts) * max_new_tokens),
            "sequence_sum": 1 / len(ts),
        }[name]
        for t in ts
    ]
