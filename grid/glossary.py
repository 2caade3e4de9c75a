"""Every symbol of the objective, once: its name in the code, its shape and its meaning.

`klab axes --symbols` prints it, and `klab formula` explains with it what it prints. N is the number of trajectories of
an update, T the padded number of positions, V the size of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol of the formulas.

    Attributes:
        symbol: as formulas write it.
        code: its name in `klab.harness.objective`; empty where the code has no name for it.
        shape: of its tensor; empty for a number or an operation.
        meaning: what it is.
        latex: as printed formulas write it, in the notation of `klab.grid.formula`, without indices of tokens and
            trajectories; empty where they do not.
    """

    symbol: str
    code: str
    shape: str
    meaning: str
    latex: tuple[str, ...] = ()


GLOSSARY = (
    Symbol("N, T, V", "", "", "trajectories of the update, padded positions, vocabulary size", ("N",)),
    Symbol("T_max", "max_new_tokens", "", "the completion budget", (r"T_{\max}",)),
    Symbol("P", "totals.prompts", "", "number of prompts of the update", ("P",)),
    Symbol("n", "", "", "a trajectory of the update; formulas of one token leave out their own trajectory's", ("n",)),
    Symbol("j, i", "", "", "own-token positions of a trajectory; i ≥ j are j and the own tokens after it", ("j", "i")),
    Symbol(
        "own token",
        "mask",
        "bool [N, T]",
        "a token that the policy itself produced; padding and environment tokens (tool output) are not",
    ),
    Symbol("v", "", "", "a token of the vocabulary", ("v",)),
    Symbol("H", "lengths(mask)", "int [N, 1]", "number of a trajectory's own tokens", ("H",)),
    Symbol("group, G", "groups", "int [N]", "the trajectories of one prompt; G is their number", ("G",)),
    Symbol("G_j", "", "", "the trajectories of the group that have a j-th own token", ("G_{j}",)),
    Symbol("B", "", "", "all trajectories of the update", ("B",)),
    Symbol("π", "", "", "current policy; π_j of the sampled token, π_j(v) of any", (r"\pi",)),
    Symbol("π_old", "", "", "behaviour policy, which drew the rollout", (r"\pi^{\mathrm{old}}",)),
    Symbol("π_ref", "", "", "reference policy", (r"\pi^{\mathrm{ref}}",)),
    Symbol("ℓ", "logp", "float [N, T]", "log π of the sampled token; carries the gradient", (r"\ell",)),
    Symbol("ℓ_old", "logp_behaviour", "float [N, T]", "log π_old of the sampled token", (r"\ell^{\mathrm{old}}",)),
    Symbol("ℓ_ref", "logp_reference", "float [N, T]", "log π_ref of the sampled token", (r"\ell^{\mathrm{ref}}",)),
    Symbol(
        "κ",
        "log_ratio (of an estimator)",
        "float [N, T]",
        "ℓ − ℓ_ref, log-ratio to the reference policy; κ_old is ℓ_old − ℓ_ref",
        (r"\kappa", r"\kappa^{\mathrm{old}}"),
    ),
    Symbol("δ", "", "float [N, T]", "e^{−κ} = π_ref/π of the sampled token"),
    Symbol(
        "f",
        "divergence",
        "",
        "generator of the divergence, f(1) = 0 and f″(1) = 1: at a state it is Σ_v π(v)·f(δ_v)",
    ),
    Symbol(
        "λ", "log_ratio (of a ratio)", "float [N, T]", "ℓ − ℓ_old, log-ratio to the behaviour policy", (r"\lambda",)
    ),
    Symbol(
        "φ",
        "phi",
        "float [N, T]",
        "the KL estimator's value at each own token; φ_old that of the behaviour policy",
        (r"\varphi", r"\varphi^{\mathrm{old}}"),
    ),
    Symbol("β", "beta", "", "coefficient of the KL term", (r"\beta",)),
    Symbol("c", "kl_scale", "", "factor of a KL inside the returns: 1/H (mean) or 1 (sum)", ("c",)),
    Symbol("R", "rewards", "float [N]", "the task's reward of a trajectory", ("R",)),
    Symbol(
        "R_k, ω_k",
        "reward_terms, term_weights",
        "float [N, K], [K]",
        "the terms of the reward, and their weights",
        ("k", "R_{k}", r"\omega_{k}"),
    ),
    Symbol(
        "R_greedy",
        "greedy_rewards",
        "float [N]",
        "reward of the greedy completion of the same prompt",
        (r"R^{\mathrm{greedy}}",),
    ),
    Symbol(
        "r, r_j", "returns", "float [N, T]", "return at own token j: R, less KL penalties placed in the reward", ("r",)
    ),
    Symbol("r_1", "trajectory_returns", "float [N, 1]", "a trajectory's return: r at its first own token", ("r_{1}",)),
    Symbol(
        "u_j",
        "token_rewards",
        "float [N, T]",
        "reward of own token j: R at the last one, less the token's KL penalty; r_j is the sum from j on",
        ("u",),
    ),
    Symbol(
        "mean_G, std_G",
        "",
        "",
        "mean and standard deviation over the trajectories of a set, or over own tokens where a token's index stands "
        "beside it; what is divided by a standard deviation of 0 is 0",
        ("mean", "std"),
    ),
    Symbol("μ_j, σ_j", "", "", "mean and standard deviation, over the group, of r_j at own position j"),
    Symbol("second", "", "", "the second largest", ("second",)),
    Symbol(
        "white(·)", "whitened", "", "less the mean, over √(variance + 1e-8), over the update's own tokens", ("white",)
    ),
    Symbol(
        "V",
        "values",
        "float [N, T]",
        "a critic's value before each token; 0 without a critic and after the last",
        ("V",),
    ),
    Symbol("R̂", "value_targets", "float [N, T]", "target of the critic: A + V"),
    Symbol("A", "advantages", "float [N, T]", "advantage; without gradient", ("A",)),
    Symbol("a", "", "float [N, T]", "advantage before a KL term is subtracted from it", ("a",)),
    Symbol("ρ", "rho, ratio", "float [N, T]", "importance ratio", (r"\rho",)),
    Symbol("w", "weight", "float [N, T]", "weight on the score, w(ρ, A); without gradient", ("w",)),
    Symbol("Q", "PENALTIES", "float [N, T]", "what a weight adds to the loss at each own token, beside w·A·s", ("Q",)),
    Symbol("S", "entropy", "float [N, T]", "entropy of π at each own token, in nats", ("S",)),
    Symbol(
        "rank, draw",
        "largest_tokens, drawn_tokens",
        "int [N, T]",
        "the place of a token among the update's own tokens, the largest value first; and in a random order of those "
        "that meet a condition, infinite for the others",
        ("rank", "draw"),
    ),
    Symbol(
        "quantile",
        "masked_quantile",
        "",
        "the quantile, linear between two values, over a trajectory's own tokens or the update's",
        ("quantile",),
    ),
    Symbol("ε_low, ε_high", "eps_low, eps_high", "", "clipping widths"),
    Symbol("agg", "aggregation", "", "from per-token terms x_j [N, T] to one number", ("x",)),
    Symbol("s", "", "float [N, T]", "what w·A multiplies in the loss: ℓ, κ or log ρ", ("s",)),
    Symbol("K", "", "float [N, T]", "what each own token adds to the loss as its KL term", ("K",)),
    Symbol(
        "μ", "", "", "the sampler that drew the tokens, where it is not π_old as the trainer computes it", (r"\mu",)
    ),
    Symbol("λ_s", "", "float [N, T]", "ℓ_old − log μ, log-ratio of π_old to the sampler", (r"\lambda^{\mathrm{s}}",)),
    Symbol("z", "", "float [N, T]", "ratio of π_old to the sampler, of a token or of its trajectory", ("z",)),
    Symbol("ζ", "correction", "float [N, T]", "the sampler's correction, a constant factor of a token", (r"\zeta",)),
    Symbol("R_task", "", "float [N]", "the task's reward, before the penalty of its length", (r"R^{\mathrm{task}}",)),
    Symbol(
        "L",
        "loss",
        "scalar",
        "the loss: −agg(w·A·ℓ) or −agg(w·A·log ρ), and the KL term of the loss placements",
        ("L",),
    ),
    Symbol("E", "", "", "expectation over updates whose trajectories are drawn from π_old", ("E",)),
    Symbol("sg(·)", "detach", "", "stop-gradient", ("sg",)),
    Symbol("∇", "", "", "gradient with respect to the policy's weights; ∇ℓ is the score", (r"\nabla",)),
    Symbol("1[·]", "", "", "1 where the condition holds, else 0", ("1[]",)),
    Symbol("clip(x, a, b)", "clamp", "", "min(max(x, a), b)", ("clip",)),
    Symbol("sign(·)", "", "", "−1, 0 or 1", ("sign",)),
    Symbol("argmin", "", "", "the index of the smallest", ("argmin",)),
    Symbol("σ(·)", "sigmoid", "", "logistic function", (r"\sigma",)),
)
"""The symbols in the order in which the objective is composed."""
