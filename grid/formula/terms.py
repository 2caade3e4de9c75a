"""What `entropy_bonus`, `entropy_share` and the penalties of weights add to a printed formula."""

from __future__ import annotations

PENALTIES = {
    "kl_cov": r"\theta \operatorname{sign}(\lambda_{j}) \mathbf{1}[\operatorname{rank}(g_{j}) \le \max(1, q "
    r"\sum_{n=1}^{N} H_{n})] \nabla \ell_{j}",
    "tv_band": r"2 \tau \lambda_{j} \nabla \ell_{j}",
}
"""The gradient of Q, the penalty of a weight, whose own equation is beside the weight's."""

HIGH_ENTROPY = r"\mathbf{1}[S_{j} \ge \operatorname{quantile}_{B, i}(S_{i}, 1 - q_{\mathrm{H}})]"
"""The factor of a token's surrogate with `entropy_share`."""

BONUS = (
    r" + c_{\mathrm{H}} S_{j}",
    r" - c_{\mathrm{H}} \sum_{v} \pi_{j}(v) \log \pi_{j}(v) \nabla \log \pi_{j}(v)",
)
"""What an `entropy_bonus` adds to the surrogate of a token, and its gradient."""

ENTROPY = ("S_{j}", r"-\sum_{v} \pi_{j}(v) \log \pi_{j}(v)")
"""The equation of the entropy."""
