"""Which cells klab's plugin trains on verl, and verl's settings for them."""

from __future__ import annotations

from typing import Any

from klab.grid import Objective, UserError
from klab.grid.catalogue import value_of
from klab.grid.user_code import names_user_code
from klab.harness.export.family import Condition
from klab.harness.export.setting import Export, Setting, require_own_fresh_rollouts
from klab.harness.export.verl import ACTOR, AGGREGATIONS, ESTIMATORS, training_overrides

NAME = "klab"
"""What the plugin's advantage estimator and policy loss are called."""

CELL = "KLAB_CELL"
"""Environment variable that names the cell: a named algorithm, or a cell's folder in a run."""

CHARGED = ("reward", "reward_to_go", "reward_and_loss")
"""Placements whose KL verl subtracts from the rewards."""


def acting_placement(objective: Objective) -> str:
    """The placement of the KL, `none` where it has no effect."""
    return str(objective.canonical().get("placement", "none"))


def _is_charged(objective: Objective) -> bool:
    return acting_placement(objective) in CHARGED


def _is_custom(*axes: str) -> Any:
    return lambda objective: any(names_user_code(getattr(objective, axis)) for axis in axes)


KNOWN = frozenset(("logp", "logp_behaviour", "logp_reference", "log_ratio", "lengths", "mask", "advantage"))
"""What the loss of one of verl's micro-batches can give to an axis function beside its positional arguments."""


def _asks_for_more(axis: str) -> Any:
    return lambda objective: not KNOWN.issuperset(value_of(axis, getattr(objective, axis)).needs)


CONDITIONS = (
    Condition("estimator", lambda o: not _asks_for_more("estimator")(o), "verl gives its losses no logits"),
    Condition("ratio", lambda o: not _asks_for_more("ratio")(o), "verl does not give its losses what it asks for"),
    Condition("weight", lambda o: not _asks_for_more("weight")(o), "verl does not give its losses what it asks for"),
    Condition(
        "weight",
        lambda o: value_of("weight", o.weight).statistics != "update",
        "what it depends on is found for a whole update at once",
    ),
    Condition(
        "advantage",
        lambda o: o.advantage != "gae" and not value_of("advantage", o.advantage).needs,
        "verl gives values and greedy rewards to estimators of its own only, and no parts of rewards",
    ),
    Condition("entropy_share", lambda o: o.entropy_share == 1.0, "its quantile is found for a whole update at once"),
    Condition("aggregation", lambda o: o.aggregation in AGGREGATIONS, "its denominators are those of a whole update"),
    Condition("kl_scale", lambda o: not _is_charged(o) or o.kl_scale == "sum", "verl sums a KL in the reward"),
    Condition(
        "kl_at",
        lambda o: not _is_charged(o) or o.kl_at == "rollout",
        "verl takes a KL in the reward at the rollout",
    ),
    Condition(
        "estimator",
        lambda o: not _is_charged(o) or o.estimator in ESTIMATORS,
        "verl has no such KL in the reward",
    ),
    Condition(
        "divergence",
        lambda o: not _is_charged(o) or o.divergence == "reverse",
        "a divergence in the reward is subtracted by verl, which has reverse KL there",
    ),
    Condition(
        "advantage",
        lambda o: not _is_charged(o) or not _is_custom("advantage", "placement")(o),
        "verl gives rewards from which the KL was subtracted, not the task's",
    ),
)
"""What must hold of an objective; everything else is computed by klab's own functions."""


def require_expressible(objective: Objective, on_policy: bool = False) -> None:
    """Raises UserError, naming the axis or parameter, where verl does not give the plugin what the objective needs."""
    idle = objective.canonical_form(on_policy).idle
    for condition in CONDITIONS:
        if condition.key not in idle and not condition.holds(objective):
            raise UserError(
                f"verl with klab's plugin cannot express this cell: {condition.reason}",
                key=condition.key,
                value=getattr(objective, condition.key),
            )


def plugin_overrides(setting: Setting) -> Export:
    """Overrides of verl's `ppo_trainer` configuration with which klab's plugin trains a cell.

    Raises:
        UserError: naming the axis or setting that does not map.
    """
    objective, training = setting.objective, setting.training
    require_expressible(objective, setting.on_policy)
    charged = _is_charged(objective)
    found: dict[str, Any] = {
        f"+ray_kwargs.ray_init.runtime_env.env_vars.{CELL}": setting.name,
        "algorithm.adv_estimator": NAME,
        f"{ACTOR}.policy_loss.loss_mode": NAME,
        f"{ACTOR}.loss_agg_mode": AGGREGATIONS[objective.aggregation],
        "algorithm.use_kl_in_reward": charged,
        # makes verl compute the reference policy's log-probabilities; klab's loss has the term itself
        f"{ACTOR}.use_kl_loss": needs_reference(objective),
        f"{ACTOR}.kl_loss_coef": 0.0,
    }
    if objective.entropy_bonus:
        found[f"{ACTOR}.entropy_coeff"] = objective.entropy_bonus  # verl's own term, beside klab's loss
    if charged:
        found |= {"algorithm.kl_penalty": ESTIMATORS[objective.estimator], "algorithm.kl_ctrl.kl_coef": objective.beta}
    differences = [f"needs klab in verl's environment, and {CELL} in that of its workers"]
    if training is not None:
        require_own_fresh_rollouts(training, "verl with klab's plugin")
        if training.critic is not None:
            raise UserError("verl with klab's plugin has no critic", key="training.critic")
        chosen, more = training_overrides(training, objective)
        found |= chosen
        differences += more
        if training.minibatches > 1 and objective.advantage in ("group_center_batch_norm", "batch_norm"):
            differences.append("statistics of the advantage are over the rollout, not over each minibatch")
    if objective.aggregation == "constant":
        if setting.max_new_tokens:
            found[f"{ACTOR}.loss_scale_factor"] = setting.max_new_tokens
        else:
            differences.append(f"set {ACTOR}.loss_scale_factor to max_response_length")
    if setting.max_new_tokens:
        found["data.max_response_length"] = setting.max_new_tokens
    return Export(found, tuple(differences), "overrides of verl.trainer.main_ppo, with klab's plugin", objective)


def needs_reference(objective: Objective) -> bool:
    """Whether klab's loss reads the reference policy's log-probabilities."""
    return acting_placement(objective) not in ("none", "reward", "reward_to_go", "log_ratio")
