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
    terms: list[float] = field(default_factory=list)
    term_weights: list[float] = field(default_factory=list)
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
    ratios = [_log_rho(o, t, row) for t, row in zip(trajectories, advantages, strict=True)]
    log_rho, slopes = zip(*ratios, strict=True)
    rho = [[math.exp(x) for x in row] for row in log_rho]
    weights = _weights(o, trajectories, rho, log_rho, advantages)
    share = _shares(o.aggregation, trajectories, max_new_tokens)
    uncertain, penalised = _high_entropy(o, trajectories), _largest_covariances(o, trajectories, advantages)
    answer = Answer(0.0, advantages=advantages, weights=weights)

    def add(n: int, j: int, amount: float) -> None:
        key = (n, trajectories[n].columns[j])
        answer.logp[key] = answer.logp.get(key, 0.0) + amount

    for n, t in enumerate(trajectories):
        for j in range(t.length):
            counted = share[n] * ((n, j) in uncertain) * (1.0 if t.correction is None else t.correction[j])
            strength = counted * weights[n][j] * advantages[n][j]
            lam = t.now[j] - t.old[j]
            if (n, j) in penalised and abs(lam) > 1e-5:
                answer.loss += counted * o.cov_penalty * abs(lam)
                add(n, j, counted * o.cov_penalty * ((lam > 0) - (lam < 0)))
            if o.weight == "tv_band":
                answer.loss += counted * o.band_penalty * lam * lam
                add(n, j, counted * o.band_penalty * 2 * lam)
            if o.entropy_bonus:
                assert t.logits is not None
                p = _softmax(t.logits[j])
                entropy = -sum(x * math.log(x) for x in p)
                answer.loss -= share[n] * o.entropy_bonus * entropy
                for v, x in enumerate(p):
                    slope = share[n] * o.entropy_bonus * x * (math.log(x) + entropy)
                    answer.logits[n, t.columns[j], v] = answer.logits.get((n, t.columns[j], v), 0.0) + slope
            if o.path == "ratio" and o.ratio != "none":
                answer.loss -= strength * log_rho[n][j]
                for i, slope in enumerate(slopes[n][j]):
                    add(n, i, -strength * slope)
            else:
                answer.loss -= strength * (t.now[j] - (t.ref[j] if o.placement == "log_ratio" else 0.0))
                add(n, j, -strength)
            if o.placement not in (
                "loss",
                "loss_reweighted",
                "loss_corrected",
                "reward_and_loss",
                "advantage_and_loss",
            ):
                continue
            factor = rho[n][j] if o.placement in ("loss_reweighted", "loss_corrected") else 1.0
            phi, slope_logp, slope_logits = _phi(o, t, j, t.now)
            answer.loss += share[n] * o.beta * factor * phi
            add(n, j, share[n] * o.beta * factor * slope_logp)
            for v, slope in enumerate(slope_logits):
                key = (n, t.columns[j], v)
                answer.logits[key] = answer.logits.get(key, 0.0) + share[n] * o.beta * factor * slope
            if o.placement == "loss_corrected":
                for i, slope in enumerate(slopes[n][j]):
                    add(n, i, share[n] * o.beta * factor * phi * slope)
    return answer


def _places(ts: list[Trajectory]) -> list[tuple[int, int]]:
    return [(n, j) for n, t in enumerate(ts) for j in range(t.length)]


def _high_entropy(o: Any, ts: list[Trajectory]) -> set[tuple[int, int]]:
    """The tokens that keep their surrogate: those whose entropy reaches the quantile, linear between two."""
    places = _places(ts)
    if o.entropy_share >= 1 or not places:
        return set(places)
    found = {(n, j): -sum(x * math.log(x) for x in _softmax(ts[n].logits[j])) for n, j in places}  # type: ignore[index]
    bound = _quantile(list(found.values()), 1 - o.entropy_share)
    return {place for place, entropy in found.items() if entropy >= bound * (1 - 1e-6)}


def _quantile(values: list[float], share: float) -> float:
    ordered, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(values) - 1)] - ordered[below])


def _covariances(ts: list[Trajectory], advantages: list[list[float]]) -> dict[tuple[int, int], float]:
    """(A − Ā)·(ℓ − ℓ̄) of every own token."""
    places = _places(ts)
    mean_a = math.fsum(advantages[n][j] for n, j in places) / max(1, len(places))
    mean_l = math.fsum(ts[n].now[j] for n, j in places) / max(1, len(places))
    return {(n, j): (advantages[n][j] - mean_a) * (ts[n].now[j] - mean_l) for n, j in places}


def _largest_covariances(o: Any, ts: list[Trajectory], advantages: list[list[float]]) -> set[tuple[int, int]]:
    if o.weight != "kl_cov":
        return set()
    parts = _covariances(ts, advantages)
    ordered = sorted(parts, key=lambda place: (-round(parts[place], 13), place))
    return set(ordered[: max(1, math.floor(o.cov_share * len(parts)))])


def hashed(number: int) -> int:
    """The random number of an own token in the first update."""
    mixed = (number * 0x9E3779B1 + 0x85EBCA6B) % 2**32
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        mixed = (mixed ^ mixed >> shift) * factor % 2**32
    return mixed ^ mixed >> 15


def _drawn(o: Any, ts: list[Trajectory], rho: list[list[float]], advantages: list[list[float]]) -> set[tuple[int, int]]:
    """The tokens that Clip-Cov drops in the first update."""
    parts, numbers = _covariances(ts, advantages), {}
    for number, (n, j) in enumerate(_places(ts), start=1):
        r, a = rho[n][j], advantages[n][j]
        free = not (a > 0 and r > 1 + o.eps_high) and not (a < 0 and r < 1 - o.eps_low)
        if free and o.cov_low < parts[n, j] < o.cov_high:
            numbers[n, j] = hashed(number)
    count = max(1, math.floor(o.cov_share * len(parts)))
    return set(sorted(numbers, key=numbers.__getitem__)[:count])


def _phi(o: Any, t: Trajectory, j: int, policy: list[float]) -> tuple[float, float, list[float]]:
    """φ at token j, its derivative to ℓ_j, and its derivatives to the logits."""
    name, kappa = o.estimator, policy[j] - t.ref[j]
    delta = math.exp(-kappa)
    if name == "k2":
        return kappa * kappa / 2, kappa, []
    if name == "abs":
        return abs(kappa), (kappa > 0) - (kappa < 0), []
    f, first, second = _generator(o, delta)
    if name == "k1":
        return f, -delta * first, []
    at_one = _generator(o, 1.0)[1]
    if name == "k3":
        return f - at_one * (delta - 1), -delta * (first - at_one), []
    if name == "k3_plus":
        return f - at_one * (delta - 1), kappa, []
    if name == "reinforce":
        return f - delta * first + at_one, delta * delta * second, []
    assert name == "full"
    assert t.logits is not None
    assert t.logits_ref is not None
    p, q = _softmax(t.logits[j]), _softmax(t.logits_ref[j])
    found = [_generator(o, b / a) for a, b in zip(p, q, strict=True)]
    total = sum(a * f for a, (f, _, _) in zip(p, found, strict=True))
    slopes = [f - b / a * first for a, b, (f, first, _) in zip(p, q, found, strict=True)]  # of Σ π f(π_ref/π) to π(v)
    mean = sum(a * slope for a, slope in zip(p, slopes, strict=True))
    return total, 0.0, [a * (slope - mean) for a, slope in zip(p, slopes, strict=True)]


def _generator(o: Any, delta: float) -> tuple[float, float, float]:
    """f, f′ and f″ of the divergence at δ."""
    log = math.log(delta)
    forward = (delta * log, log + 1, 1 / delta)
    reverse = (-log, -1 / delta, 1 / delta**2)
    match o.divergence:
        case "reverse":
            return reverse
        case "forward":
            return forward
        case "jeffreys":
            f, first, second = ((a + b) / 2 for a, b in zip(forward, reverse, strict=True))
            return f, first, second
        case "alpha":
            a = o.alpha
            if a == 1:
                return reverse
            return (delta ** (1 - a) - 1) / (a * (a - 1)), -(delta**-a) / a, delta ** (-a - 1)
    raise AssertionError(o.divergence)


def _softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def _charges(o: Any, t: Trajectory) -> list[float]:
    """φ of the detached placements: at the behaviour policy or the current one."""
    policy = t.old if o.kl_at == "rollout" else t.now
    return [_phi(o, t, j, policy)[0] for j in range(t.length)]


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
    if o.advantage == "term_norm":
        estimated = _term_norm(o, ts)
    if o.advantage == "gae" and o.whiten == "batch":
        estimated = _whitened(estimated)
    result = []
    for n, t in enumerate(ts):
        mates = [m for m, other in enumerate(ts) if other.group == t.group and other.length]
        row = [_advantage(o, ts, returns, mates, n, j) for j in range(t.length)]
        if o.advantage in ("gae", "term_norm"):
            row = estimated[n]
        if o.placement == "advantage":
            row = [a - o.beta * phi for a, phi in zip(row, _charges(o, t), strict=True)]
        if o.placement in ("advantage_to_go", "advantage_and_loss"):
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
            if max(firsts) == min(firsts):
                return r - firsts[0]
            return r - sum(ts[m].length * returns[m][0] for m in mates) / sum(ts[m].length for m in mates)
        case "leave_one_out_norm":
            others, std = [returns[m][0] for m in mates if m != n], _deviation(firsts, o.std)
            return (r - _mean(others)) / (std + o.eps) if std and others else 0.0
        case "group_success":
            return (r - _mean(firsts)) / _mean(firsts) if _mean(firsts) > 0 else 0.0
        case "group_center_rescaled":
            return (r - _mean(firsts)) * len(ts) / max(1, sum(row[0] != 0 for row in returns if row))
        case "best_of_group":
            best, *rest = sorted(firsts, reverse=True)
            std = _deviation(firsts, o.std)
            return (best - rest[0]) / (std + o.eps) if rest and std and returns[n][0] == best else 0.0
        case "optimal_token_baseline":
            alive = [m for m in mates if ts[m].length > j]
            energies = [_energy(ts[m], j) for m in alive]
            weighed = sum(w * returns[m][j] for w, m in zip(energies, alive, strict=True)) / (sum(energies) + 1e-8)
            return r - weighed if len(alive) > 1 else r
        case "gae" | "term_norm":
            return 0.0
    raise AssertionError(o.advantage)


def _energy(t: Trajectory, j: int) -> float:
    """Σ_{i≤j} (1 − 2π_i + Σ_v π_i(v)²)."""
    assert t.logits is not None
    return sum(
        1 - 2 * math.exp(ell) + sum(p * p for p in _softmax(row))
        for ell, row in zip(t.now[: j + 1], t.logits[: j + 1], strict=True)
    )


def _term_norm(o: Any, ts: list[Trajectory]) -> list[list[float]]:
    """Each term normalised in its group, weighed, summed, and whitened over all tokens."""
    rows = []
    for t in ts:
        total = 0.0
        for k, own in enumerate(t.terms):
            known = [m.terms[k] for m in ts if m.group == t.group and m.length and not math.isnan(m.terms[k])]
            std = _deviation(known, o.std) if known else 0.0
            if t.length and std and not math.isnan(own):
                total += t.term_weights[k] * (own - _mean(known)) / (std + o.eps)
        rows.append([total] * t.length)
    return _whitened(rows)


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


def _log_rho(o: Any, t: Trajectory, advantages: list[float]) -> tuple[list[float], list[list[float]]]:
    """log ρ_j, and its derivative to every own ℓ_i."""
    name, lam = o.ratio, [a - b for a, b in zip(t.now, t.old, strict=True)]
    h = t.length
    values, slopes = [], []
    if name == "prefix_minimum":
        for j in range(h):
            least = [i for i in range(j) if lam[i] == min(lam[:j])][-1:]
            values.append(lam[j] + sum(lam[i] for i in least))
            slopes.append([float(i == j) + float(i in least) for i in range(h)])
        return values, slopes
    if name == "clipped_mean":
        clipped, free = [], []
        for x, a in zip(lam, advantages, strict=True):
            clipped.append(min(x, o.clip_high) if a > 0 else max(x, -o.clip_low) if a < 0 else 0.0)
            free.append(1 / h if (a > 0 and x <= o.clip_high) or (a < 0 and x >= -o.clip_low) else 0.0)
        return [sum(clipped) / max(h, 1)] * h, [free] * h
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
    o: Any,
    ts: list[Trajectory],
    rho: list[list[float]],
    log_rho: tuple[list[float], ...],
    advantages: list[list[float]],
) -> list[list[float]]:
    if o.weight == "adaptive":
        q = largest_exponent([x for row in log_rho for x in row], o.ess)
        return [[math.exp(q * x) for x in row] for row in log_rho]
    if o.weight == "clip_cov":
        dropped = _drawn(o, ts, rho, advantages)
        low, high = 1 - o.eps_low, 1 + o.eps_high
        return [
            [
                0.0 if (n, j) in dropped or (a > 0 and r > high) or (a < 0 and r < low) else r
                for j, (r, a) in enumerate(zip(row, signs, strict=True))
            ]
            for n, (row, signs) in enumerate(zip(rho, advantages, strict=True))
        ]
    if o.weight == "second_moment_mask":
        dropped = _second_moment_dropped(log_rho, advantages, o.moment)
        return [[0.0 if (n, j) in dropped else r for j, r in enumerate(row)] for n, row in enumerate(rho)]
    return [
        [weight(o, t, j, r, a) for j, (r, a) in enumerate(zip(*rows, strict=True))]
        for t, *rows in zip(ts, rho, advantages, strict=True)
    ]


def _second_moment_dropped(
    log_rho: tuple[list[float], ...], advantages: list[list[float]], limit: float
) -> set[tuple[int, int]]:
    """One token after the other, the largest square first, while the mean of the rest is above the limit."""
    left = {
        (n, j): x * x
        for n, (row, signs) in enumerate(zip(log_rho, advantages, strict=True))
        for j, (x, a) in enumerate(zip(row, signs, strict=True))
        if x * a > 0
    }
    dropped = set()
    while left and math.fsum(left.values()) / len(left) > limit:
        largest = max(left, key=lambda place: (left[place], place))
        dropped.add(largest)
        del left[largest]
    return dropped


def weight(o: Any, t: Trajectory, j: int, rho: float, a: float) -> float:
    def clip(x: float) -> float:
        return min(max(x, 1 - o.eps_low), 1 + o.eps_high)

    lam = [x - y for x, y in zip(t.now, t.old, strict=True)]
    kept = o.weight in _UNCLIPPED or (rho - clip(rho)) * a <= 0
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
        case "two_sided_clip":
            return _two_sided(rho, a, o)
        case "dppo_tv":
            moved = math.exp(t.now[j]) - math.exp(t.old[j])
            return min(rho, o.truncation) if (moved <= o.tv_high if a > 0 else moved >= -o.tv_low) else 0.0
        case "dppo_kl":
            p, old = math.exp(t.now[j]), math.exp(t.old[j])
            other, other_old = max(0.0, 1 - p), max(0.0, 1 - old)
            apart = old * math.log(old / p) + other_old * math.log((other_old + 1e-8) / (other + 1e-8))
            away = t.now[j] > t.old[j] and apart > o.kl_high if a > 0 else p < old and apart > o.kl_low
            return 0.0 if away else min(rho, o.truncation)
        case "sequence_kl_mask":
            return 0.0 if not kept or (a < 0 and -sum(lam) / t.length > o.drift) else rho
        case "sequence_max_mask":
            return rho if all(math.exp(x) - 1 - x <= o.worst for x in lam) else 0.0
        case "gamma_kernel":
            k, rate = (o.k_pos, o.rate_pos) if a >= 0 else (o.k_neg, o.rate_neg)
            return rho**k * math.exp(rate - rate * rho)
        case "tapered":
            return 1.0 if a > 0 else min(rho, 1.0)
        case "future_kl":
            ahead = sum(2 ** (-(i - j) / o.half_life) * lam[i] for i in range(j, t.length))
            factor = min(max(math.exp(ahead), 1.0), 1.0 + o.influence)
            if a < 0 and rho > o.safety:
                factor = min(max(factor, 0.8), 1.0)
            return factor * rho if kept else 0.0
        case "kl_cov":
            return rho
        case "log_clip":
            scale, log_rho = (j + 1) ** o.growth, math.log(rho)
            if a > 0:
                return 0.0 if log_rho > o.log_high * scale else rho
            outside = log_rho < -o.log_low * scale or log_rho > o.log_ceiling * scale
            return 0.0 if a < 0 and outside else rho
        case "cppo_tv":
            return _within_budget(o, t, j, rho, a)
        case "drpo_tv":
            sign = (a > 0) - (a < 0)
            return rho * (1 - sign * (min(1.0, math.exp(t.now[j])) - min(1.0, math.exp(t.old[j]))) / o.tv_scale)
        case "tv_band":
            return rho if abs(math.exp(t.now[j]) - math.exp(t.old[j])) <= o.band else 0.0
    raise AssertionError(o.weight)


def _within_budget(o: Any, t: Trajectory, j: int, rho: float, a: float) -> float:
    """CPPO's mask, token by token."""
    moved = [abs(math.exp(x) - math.exp(y)) for x, y in zip(t.now, t.old, strict=True)]
    shares = [1 - (1 - o.least_weight) * i / max(1, t.length - 1) for i in range(t.length)]
    mean = min(max(_quantile(moved, 0.9), o.budget), 2 * o.budget)
    spent = sum(v * d for v, d in zip(shares[:j], moved[:j], strict=True))
    limit = min(o.tv_limit, o.tv_limit + mean * sum(shares[:j]) - spent)
    return rho if a * (rho - 1) <= 0 or shares[j] * moved[j] <= limit + 1e-15 else 0.0


_UNCLIPPED = {
    "one", "ratio", "truncate", "power", "mask", "sigmoid", "dppo_tv", "dppo_kl", "sequence_max_mask", "gamma_kernel",
    "tapered", "kl_cov", "log_clip", "cppo_tv", "drpo_tv", "tv_band",
}  # fmt: skip


def _two_sided(rho: float, a: float, o: Any) -> float:
    """The derivative of min(min(ρ, δ)·A, clip(ρ)·A) to ρ, times ρ."""
    if a == 0:
        return rho
    inner = (min(rho, o.ceiling) * a, rho if rho <= o.ceiling else 0.0)
    low, high = 1 - o.eps_low, 1 + o.eps_high
    outer = (min(max(rho, low), high) * a, rho if low <= rho <= high else 0.0)
    return min(inner, outer, key=lambda term: term[0])[1]


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
    by_prompt: dict[int, int] = {}
    for t in ts:
        by_prompt[t.group] = by_prompt.get(t.group, 0) + t.length
    prompts = max(1, sum(count > 0 for count in by_prompt.values()))
    return [
        {
            "sequence_mean": 1 / (len(ts) * max(t.length, 1)),
            "token_mean": 1 / max(tokens, 1),
            "constant": 1 / (len(ts) * max_new_tokens),
            "sequence_sum": 1 / len(ts),
            "prompt_mean": 1 / (prompts * max(by_prompt[t.group], 1)),
        }[name]
        for t in ts
    ]
