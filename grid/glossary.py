"""Every symbol of the objective, once: its name in the code, its shape and its meaning.

`klab axes --symbols` prints it. N is the number of trajectories of an update, T the padded number of positions, V the
size of the vocabulary.
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
    """

    symbol: str
    code: str
    shape: str
    meaning: str


GLOSSARY = (
    Symbol("N, T, V", "", "", "trajectories of the update, padded positions, vocabulary size"),
    Symbol("j, i", "", "", "own-token positions of a trajectory; i ≥ j are j and the own tokens after it"),
    Symbol(
        "own token",
        "mask",
        "bool [N, T]",
        "a token that the policy itself produced; padding and environment tokens (tool output) are not",
    ),
    Symbol("H", "lengths(mask)", "int [N, 1]", "number of a trajectory's own tokens"),
    Symbol("group, G", "groups", "int [N]", "the trajectories of one prompt; G is their number"),
    Symbol("π, π_old, π_ref", "", "", "current policy, behaviour policy (which drew the rollout), reference policy"),
    Symbol("ℓ", "logp", "float [N, T]", "log π of the sampled token; carries the gradient"),
    Symbol("ℓ_old", "logp_behaviour", "float [N, T]", "log π_old of the sampled token"),
    Symbol("ℓ_ref", "logp_reference", "float [N, T]", "log π_ref of the sampled token"),
    Symbol("κ", "log_ratio (of an estimator)", "float [N, T]", "ℓ − ℓ_ref, log-ratio to the reference policy"),
    Symbol("δ", "", "float [N, T]", "e^{−κ} = π_ref/π of the sampled token"),
    Symbol("λ", "log_ratio (of a ratio)", "float [N, T]", "ℓ − ℓ_old, log-ratio to the behaviour policy"),
    Symbol("φ", "phi", "float [N, T]", "the KL estimator's value at each own token"),
    Symbol("β", "beta", "", "coefficient of the KL term"),
    Symbol("c", "kl_scale", "", "factor of a KL inside the returns: 1/H (mean) or 1 (sum)"),
    Symbol("R", "rewards", "float [N]", "the task's reward of a trajectory"),
    Symbol("r, r_j", "returns", "float [N, T]", "return at own token j: R, less KL penalties placed in the reward"),
    Symbol("mean_G, std_G", "", "", "mean and standard deviation of the returns of a group"),
    Symbol("μ_j, σ_j", "", "", "mean and standard deviation, over the group, of r_j at own position j"),
    Symbol("V", "values", "float [N, T]", "a critic's value before each token; 0 without a critic"),
    Symbol("R̂", "value_targets", "float [N, T]", "target of the critic: A + V"),
    Symbol("A", "advantages", "float [N, T]", "advantage; without gradient"),
    Symbol("ρ", "rho, ratio", "float [N, T]", "importance ratio"),
    Symbol("w", "weight", "float [N, T]", "weight on the score, w(ρ, A); without gradient"),
    Symbol("ε_low, ε_high", "eps_low, eps_high", "", "clipping widths"),
    Symbol("agg", "aggregation", "", "from per-token terms [N, T] to one number"),
    Symbol("L", "loss", "scalar", "the loss: −agg(w·A·ℓ) or −agg(w·A·log ρ), and the KL term of the loss placements"),
    Symbol("sg(·)", "detach", "", "stop-gradient"),
    Symbol("∇", "", "", "gradient with respect to the policy's weights; ∇ℓ is the score"),
    Symbol("1[·]", "", "", "1 where the condition holds, else 0"),
    Symbol("clip(x, a, b)", "clamp", "", "min(max(x, a), b)"),
    Symbol("σ(·)", "sigmoid", "", "logistic function"),
)
"""The symbols in the order in which the objective is composed."""
