"""Claims that only training can decide, and what would decide them."""

from __future__ import annotations

import math

from klab.harness.claims.claim import Evidence, claim


@claim(
    "C21",
    "E",
    "Shah et al. 2025",
    "Training stability: k1-reward stable and best > k3-loss > k1-loss unstable > k3-reward collapses.",
)
def comedy_training(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical. What would decide it: a small language model, on-policy RLOO, four placements x beta "
        "{.05,.1,.3,1} x >= 5 seeds, with collapse as an outcome; the expected gradients (C21b, C13, C16) "
        "already predict which ones cannot regularise."
    )


@claim(
    "C22",
    "E",
    "Liu et al. 2025a",
    "GRPO, beta .5, mathematics: k2-loss regularises most, k3-loss less, k1-loss not at all and drifts late.",
)
def liu_training(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical. What would decide it: the three losses on one task at equal beta, off-policy minibatches, >= 5 "
        "seeds, reverse KL measured one way for all. C12, C13 and C23 decide the expected gradients and fixed "
        "points behind it."
    )


@claim(
    "C37",
    "E",
    "Xiong et al. 2025, figure 2 (RAFT++)",
    "q = 1 without clipping trains worse than q = 0, which trains worse than clipping.",
)
def raft_ordering(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical (one run, positive-only data). What would decide it: `positive` advantages x weights one, ratio, "
        "power, ppo_clip on one task with several updates per rollout and >= 5 seeds. 'Neither extreme of rho^q "
        "is optimal' (Bai & Zhang) extrapolates: q in (0,1) was never run."
    )


@claim(
    "C3E",
    "E",
    "Zheng et al. 2025a (GSPO)",
    "GSPO clips two orders of magnitude more tokens than GRPO and is still more efficient.",
)
def gspo_efficiency(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical. What would decide it: sequence_mean with 3e-4/4e-4 against token with .2/.27 on one task, 4 "
        "minibatches, >= 5 seeds. C3Eb has the clipping."
    )


@claim(
    "C3F",
    "E",
    "Zheng et al. 2025b (MiniRL)",
    "On-policy, token-weighted REINFORCE is best; off-policy with 2-8 updates, no clipping collapses.",
)
def minirl(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical. What would decide it: weights ratio and ppo_clip x updates_per_rollout {1,2,4,8} x >= 5 "
        "seeds, collapse as the outcome."
    )


@claim(
    "C3G",
    "E",
    "Zhao et al. 2025 (GMPO)",
    "The geometric mean of clipped token ratios gains 1-4 points over GRPO and does not collapse on Countdown.",
)
def gmpo(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical (greedy single evaluation, no seeds). What would decide it: the two on Countdown, >= 5 seeds, "
        "with held-out sampling error."
    )


@claim(
    "C3H",
    "E",
    "MiniMax 2025 (CISPO); Khatri et al. 2025 (ScaleRL)",
    "CISPO needs half of DAPO's steps and has a higher asymptote.",
)
def cispo(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical (run-to-run spread of the asymptote .015: differences below .02 are noise). What would decide it: "
        "weights truncate and ppo_clip with clip-higher, 16 minibatches, >= 5 seeds, compared at equal tokens."
    )


@claim(
    "C47",
    "E",
    "Xiong et al. 2025, figure 4 (RAFT++); Liu et al. 2025c (Lite-PPO)",
    "Removing all-wrong groups helps most, the std little; Lite-PPO: group mean with batch std is best.",
)
def ablation_of_normalisation(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical, and the two conflict. What would decide it: advantages group_norm, group_center, "
        "group_center_batch_norm, positive on tasks of two difficulties, >= 5 seeds. C44 and C45 give the "
        "expected scales."
    )


@claim(
    "C4A",
    "E",
    "Yu et al. 2025 (DAPO)",
    "GRPO 30 -> overlong filter 36 -> clip-higher 38 -> soft overlong 41 -> token loss 42 -> dynamic "
    "sampling 50 (AIME24).",
)
def dapo_ladder(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical (one run per rung). What would decide it: the rungs as cells on one task at equal tokens, "
        ">= 5 seeds."
    )


@claim("C63", "E", "Hochlehnert et al. 2025", "Seed and decoding noise on AIME dominates most reported gains.")
def decoding_noise(evidence: Evidence) -> None:
    evidence.remark(
        "Empirical. What would decide it here: the spread over seeds of every cell's final accuracy beside the "
        "differences between cells; the report prints both. The binomial part alone, 30 problems at p = .5: "
        f"standard error {100 * math.sqrt(0.25 / 30):.1f} points."
    )


@claim("C64", "E", "this book", "Almost none of the papers cited here report several training seeds.")
def seeds_in_papers(evidence: Evidence) -> None:
    evidence.remark("A survey, not an experiment.")
