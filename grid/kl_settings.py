"""Training settings of the KL term, a moving β and a moving reference: where they do nothing, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

from klab.grid.catalogue import AXES, value_of
from klab.grid.errors import UserError
from klab.grid.objective import Objective
from klab.grid.schema.policy import PolicySection
from klab.grid.schema.training import TrainingSection
from klab.grid.user_code import names_user_code

_NO_KL = ("none", "log_ratio")
"""Placements whose gradient has no KL term."""


def idle_kl_settings(training: TrainingSection, objective: Objective) -> dict[str, str]:
    """`beta_control` and `reference` where they have no effect with this objective, and why."""
    idle = {}
    if training.beta_control is not None and (reason := _idle_beta(training, objective)):
        idle["beta_control"] = reason
    if training.reference is not None and (reason := _idle_reference(training, objective)):
        idle["reference"] = reason
    return idle


def _idle_beta(training: TrainingSection, objective: Objective) -> str | None:
    control = training.beta_control
    canonical = objective.canonical_form(training.on_policy).canonical
    if "placement.beta" not in canonical and not names_user_code(objective.placement):
        return "no KL term has a coefficient"
    assert control is not None
    first = first_beta(objective)
    if first == 0.0:
        return "β is 0, and changes by factors"
    if control.schedule == "adaptive":
        return None
    if training.updates == 1:
        return "the only update has the objective's β"
    return "β begins with its last value" if first == control.end else None


def first_beta(objective: Objective) -> float:
    """β of the first update: the objective's; 1, the factor of a placement of the user's own that has none."""
    return float(objective.arguments("placement").get("beta", 1.0))


def _idle_reference(training: TrainingSection, objective: Objective) -> str | None:
    reference = training.reference
    assert reference is not None
    if training.behaviour != "reference" and not reads_reference(objective, training.on_policy):
        return "nothing is compared with the reference: there is no KL term"
    if reference.follows == "policy" and reference.update_every > training.last_draw:
        return (
            f"the last rollout is drawn after {training.last_draw} updates, before the reference moves for the first "
            f"time, after {reference.update_every}"
        )
    return None


def reads_reference(objective: Objective, on_policy: bool) -> bool:
    """Whether the gradient depends on the reference policy, as far as names tell: the user's own values may."""
    if objective.is_custom:
        return True
    return objective.canonical_form(on_policy).canonical["placement"] not in _NO_KL


def compares_distributions(objective: Objective, on_policy: bool) -> bool:
    """Whether an objective of built-in values reads the reference's logits of the whole vocabulary."""
    canonical = objective.canonical_form(on_policy).canonical
    if canonical["placement"] in _NO_KL:
        return False
    names = {axis: getattr(objective, axis) for axis in AXES}
    return any(
        "logits_reference" in value_of(axis, name).needs for axis, name in names.items() if not names_user_code(name)
    )


def refuse_kl_settings(training: TrainingSection, policy: PolicySection, objective: Objective) -> None:
    """Check that the cell's reference can move as it is asked to.

    Raises:
        UserError: naming what it cannot move beside.
    """
    reference = training.reference
    if reference is None:
        return
    if reference.follows == "rollout" and training.behaviour == "reference":
        raise UserError(
            "each is said to be the other: the reference the policy that draws the rollouts, which is the reference",
            key="training.reference.follows",
            value="rollout",
            hint="Leave training.behaviour: reference out, or let the reference follow the policy.",
        )
    if reference.ema and policy.lora is not None:
        raise UserError(
            "adapters are products of two factors, and the mean of the factors is not the mean of the weights",
            key="training.reference.ema",
            value=reference.ema,
            hint="Reset the reference ({update_every: 100}), or train whole weights (policy.lora: null).",
        )
    whole = compares_distributions(objective, training.on_policy)
    if whole:
        refuse_late_logits(training, f"the estimator {objective.estimator!r}")
    if getattr(policy, "sharding", "none") != "none" and (reference.follows == "policy" or keeps_copy(training, whole)):
        raise UserError(
            "the reference of a model whose weights are shared out among processes stays where it is",
            key="training.reference",
            value=reference.follows,
            hint="Leave policy.sharding out, or the reference fixed; reference: rollout needs no second model.",
        )


def refuse_late_logits(training: TrainingSection, asks: str) -> None:
    """Check that the reference beside which a rollout was drawn is still there in the rollout's last update.

    Its log-probabilities of the drawn tokens are kept with the rollout; those of the whole vocabulary would not fit.

    Args:
        asks: what reads them.

    Raises:
        UserError: the reference may move in between.
    """
    reference, steps = training.reference, training.optimizer_steps_per_rollout
    if reference is None or training.draws_from_reference:
        return
    if training.lag and training.behaviour != "reference":
        raise UserError(
            f"{asks} compares whole distributions with the reference that a rollout was drawn beside, which has moved "
            "when a lagged rollout is used",
            key="training.lag",
            value=training.lag,
            hint="Choose k1, k2 or k3, lag: 0, or a fixed reference.",
        )
    if reference.follows == "policy" and reference.update_every % steps:
        raise UserError(
            f"{asks} compares whole distributions with the reference that a rollout was drawn beside, which must not "
            f"move within the {steps} updates of a rollout",
            key="training.reference.update_every",
            value=reference.update_every,
            hint=f"Choose a multiple of {steps}; or k1, k2 or k3.",
        )


def keeps_copy(training: TrainingSection, whole_distributions: bool) -> bool:
    """Whether the cell needs a second model for its moving reference, beside the policy and what it started from.

    Args:
        whole_distributions: see `compares_distributions`.
    """
    reference = training.reference
    if reference is None:
        return False
    return reference.follows == "policy" or (whole_distributions and not training.on_policy)


def reference_notes(training: TrainingSection) -> Iterator[str]:
    """One line where the KL term does nothing because the policy is compared with itself."""
    if training.draws_from_reference:
        yield (
            "training.reference: with one update per rollout the policy is compared with itself: the KL and its "
            "gradient are 0, at least on average; set training.updates_per_rollout to 2 or more, a longer "
            "update_every, or placement: none"
        )
