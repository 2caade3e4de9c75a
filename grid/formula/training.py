"""What training settings add to a printed formula: the trust region, the sampler's corrections, the length penalty."""

from __future__ import annotations

from collections.abc import Iterator

from klab.grid.schema.kl_term import BetaControl, ReferencePolicy
from klab.grid.schema.sampler import Rejection, Sampler
from klab.grid.schema.training import TrainingSection

TRUST_REGION = (
    r"\beta_{\mathrm{tr}} (e^{\lambda_{j}} - 1 - \lambda_{j})",
    r"\beta_{\mathrm{tr}} (e^{\lambda_{j}} - 1) \nabla \ell_{j}",
)
"""What the trust region adds to the loss of a token, and its gradient."""

LENGTH_PENALTY = (
    r"R^{\mathrm{task}} - p_{\mathrm{len}} "
    r"\operatorname{clip}(\frac{H - (T_{\max} - T_{\mathrm{buf}})}{T_{\mathrm{buf}}}, 0, 1)"
)
"""The reward with `training.overlong_buffer`."""

CORRECTIONS = {
    "none": "",
    "ratio": "",
    "tis": r"\operatorname{clip}(z_{j}, z_{\mathrm{low}}, z_{\mathrm{high}})",
    "icepop": r"z_{j} \mathbf{1}[z_{\mathrm{low}} \le z_{j} \le z_{\mathrm{high}}]",
}
"""The factor of a token's surrogate by `training.sampler.correction`, in terms of z."""

LEVELS = {"token": r"e^{\lambda_{j}^{\mathrm{s}}}", "sequence": r"\exp(\sum_{i=1}^{H} \lambda_{i}^{\mathrm{s}})"}
"""z by `training.sampler.level`."""

DIVERGENCES = {
    "k1": r"\lambda_{i}^{\mathrm{s}}",
    "k2": r"\frac{1}{2} (\lambda_{i}^{\mathrm{s}})^{2}",
    "k3": r"(e^{\lambda_{i}^{\mathrm{s}}} - 1 - \lambda_{i}^{\mathrm{s}})",
}
"""What is compared by `training.sampler.reject.divergence`."""

REACHES = {
    "token": "{}",
    "sum": r"\sum_{{i=1}}^{{H}} {}",
    "mean": r"\frac{{1}}{{H}} \sum_{{i=1}}^{{H}} {}",
    "max": r"\max_{{i}}({})",
}
"""Over what, by `training.sampler.reject.over`."""


def surrogate_factor(training: TrainingSection | None) -> str:
    """The symbol that multiplies the surrogate of a token; empty where there is none."""
    return r"\zeta_{j}" if training is not None and training.sampler is not None and training.sampler.multiplies else ""


def follows_entropy(training: TrainingSection | None) -> bool:
    """Whether the coefficient of an entropy bonus follows a target."""
    return training is not None and training.entropy_control is not None


def loss_terms(training: TrainingSection | None) -> list[tuple[str, str]]:
    """What is added to the loss of each own token, and its gradient."""
    return [TRUST_REGION] if training is not None and training.trust_region is not None else []


def outer_equations(training: TrainingSection | None) -> list[tuple[str, str]]:
    """The equations of the symbols of this module, and of R where the reward is not the task's alone."""
    found: list[tuple[str, str]] = []
    if training is None:
        return found
    if training.sampler is not None and training.sampler.multiplies:
        found += _correction(training.sampler)
    if training.reference is not None and training.reference.follows == "rollout":
        found.append((r"\ell_{j}^{\mathrm{ref}}", r"\ell_{j}^{\mathrm{old}}"))
    if training.overlong_buffer is not None:
        found.append(("R", LENGTH_PENALTY))
    return found


def numbers(training: TrainingSection | None) -> dict[str, tuple[float, str]]:
    """The numbers of this module by their symbols: value and meaning."""
    found: dict[str, tuple[float, str]] = {}
    if training is None:
        return found
    if training.entropy_control is not None:
        found[r"c_{\mathrm{H}}"] = (0.0, "coefficient of the entropy bonus in the first update")
    if training.trust_region is not None:
        found[r"\beta_{\mathrm{tr}}"] = (training.trust_region.coefficient, "coefficient of the trust region")
    if training.overlong_buffer is not None:
        found[r"p_{\mathrm{len}}"] = (training.overlong_penalty, "reward that a completion of the full budget loses")
        found[r"T_{\mathrm{buf}}"] = (training.overlong_buffer, "last tokens of the budget that cost reward")
    if (sampler := training.sampler) is not None:
        low, high = (sampler.floor, sampler.cap) if sampler.correction == "tis" else (sampler.low, sampler.high)
        found[r"z_{\mathrm{low}}"] = (low, "smallest ratio to the sampler")
        found[r"z_{\mathrm{high}}"] = (high, "largest ratio to the sampler")
        if sampler.reject is not None:
            found[r"d_{\mathrm{low}}"] = (sampler.reject.lower_bound, "smallest ratio to the sampler that is kept")
            found[r"d_{\mathrm{high}}"] = (sampler.reject.high, "largest disagreement with the sampler that is kept")
    return found


def remarks(training: TrainingSection | None) -> Iterator[str]:
    """What training settings change of the formula without being seen in it."""
    if training is None:
        return
    if training.beta_control is not None:
        yield _coefficient(training.beta_control)
    if (control := training.entropy_control) is not None:
        yield (
            f"c_H rises by {control.step:g} after every update whose entropy was at or below {control.target:g} nats "
            f"and falls by it otherwise, within {control.low:g} and {control.high:g}; it acts after the former only"
        )
    if training.reference is not None:
        yield _reference(training.reference)
    if training.trust_region is not None and training.trust_region.target is not None:
        yield f"β_tr follows a KL target of {training.trust_region.target:g} nats per token; it starts as given"
    if training.sampler is not None and training.sampler.correction == "ratio":
        yield "π_old is the sampler (training.sampler.correction: ratio)"
    if training.behaviour == "reference":
        yield "π_old is the reference policy (training.behaviour: reference)"
    if training.truncated == "mask":
        yield "sums of the loss leave out truncated trajectories, which still count in N and in the advantage"
    if training.equal_groups != "keep":
        yield f"groups of equal rewards are left out (training.equal_groups: {training.equal_groups})"


def _coefficient(control: BetaControl) -> str:
    """How β changes."""
    if control.target is not None:
        return f"β follows a KL target of {control.target:g} nats per token; it starts as given"
    until = "the last update" if control.updates is None else f"update {control.updates}"
    return f"β goes from the given to {control.end:g} by {until} ({control.schedule})"


def _reference(reference: ReferencePolicy) -> str:
    """How π_ref moves."""
    if reference.follows == "rollout":
        return "π_ref is the policy that drew the rollout (training.reference: rollout)"
    how = "after every update" if reference.update_every == 1 else f"after every {reference.update_every} updates"
    if reference.ema == 0.0:
        return f"π_ref is set to π {how}"
    return f"each weight of π_ref becomes {reference.ema:g} of itself and {1 - reference.ema:g} of π's {how}"


def _correction(sampler: Sampler) -> list[tuple[str, str]]:
    factors = [CORRECTIONS[sampler.correction]]
    if sampler.reject is not None:
        factors.append(_kept(sampler.reject))
    found = [(r"\zeta_{j}", " ".join(filter(None, factors)))]
    found.append(("z_{j}", LEVELS[sampler.level]))
    return [*found, (r"\lambda_{j}^{\mathrm{s}}", r"\ell_{j}^{\mathrm{old}} - \log \mu_{j}")]


def _kept(reject: Rejection) -> str:
    """1 where sampler and trainer agree, else 0."""
    each = DIVERGENCES[reject.divergence]
    if reject.over == "token":
        each = each.replace("_{i}", "_{j}")
    compared = REACHES[reject.over].format(each)
    if reject.divergence == "k1":
        return rf"\mathbf{{1}}[d_{{\mathrm{{low}}}} \le \exp({compared}) \le d_{{\mathrm{{high}}}}]"
    return rf"\mathbf{{1}}[{compared} \le d_{{\mathrm{{high}}}}]"
