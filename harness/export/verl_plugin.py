"""A cell on verl 0.9: klab's advantages and loss, registered with verl by the entry point `verl.plugins`.

verl imports this module with itself, in its driver and in every Ray worker. Where the environment variable
`KLAB_CELL` names a cell it registers the advantage estimator and the policy loss `klab`, and puts a loss of klab's in
the place of verl's `ppo_loss`, which is used where `loss_mode` is `klab`: verl's own gives a policy loss neither the
reference policy nor a say in the KL term. A KL in the reward is subtracted by verl before the estimator sees it.

Everything is computed by the functions that train klab's own cells; the denominators are those of verl's mini-batch.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.grid import Objective, UserError, user_code
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.harness.export.verl_cells import CELL, KNOWN, NAME, acting_placement, needs_reference, require_expressible
from klab.harness.objective import LossCoefficients, TokenBatch, UpdateContext, objective_loss
from klab.harness.objective.advantage import Returns
from klab.harness.objective.aggregate import Totals
from klab.harness.objective.functions import axis_functions
from klab.harness.objective.groups import Groups
from klab.harness.objective.loss import detached_kl
from klab.harness.objective.masking import last_token_mask, masked, suffix_sum


@lru_cache(maxsize=1)
def cell_objective() -> Objective:
    """The objective of the cell that the environment names.

    Raises:
        UserError: there is no such cell, or verl does not give the plugin what it needs.
    """
    name = os.environ[CELL]
    if name in algorithm_names():
        objective = Objective(**load_algorithm(name).objective)
    else:
        from klab.harness.store import Run

        folder = Path(name)
        if folder.parent.name != "cells":
            raise UserError("no named algorithm, and no folder RUN/cells/ID", key=CELL, value=name)
        run = Run.open(folder.parents[1])
        objective = run.cell(folder.name).cell().objective
        with user_code.searching(known=run.user_code(folder.name)):
            asks = axis_functions(objective).asks  # imports the user's own values, from the run's copy of their code
        for axis, names in asks.items():
            if not names <= (frozenset() if axis == "advantage" else KNOWN):
                raise UserError(f"verl does not give it {', '.join(sorted(names - KNOWN) or names)}", key=axis)
    require_expressible(objective)
    return objective


def advantages(objective: Objective, token_rewards: Tensor, mask: Tensor, labels: Any) -> Tensor:
    """A of a whole rollout `[N, T]`, 0 off the own tokens.

    Args:
        token_rewards: verl's, `[N, T]`: the task's reward on the last token, less the KL of each token.
        mask: the policy's own tokens, bool `[N, T]`.
        labels: which prompt each trajectory answers, `[N]`.
    """
    rewards = masked(token_rewards, mask)
    if acting_placement(objective) not in (
        "reward_to_go",
        "reward_and_loss",
    ):  # charged or not, all of it counts for each token
        rewards = torch.where(last_token_mask(mask), rewards.sum(1, keepdim=True), 0.0)
    numbers: dict[Any, int] = {}
    index = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], device=mask.device)
    returns = Returns(
        returns=suffix_sum(rewards),
        token_rewards=rewards,
        rewards=rewards.sum(1),
        mask=mask,
        groups=Groups.from_labels(index),
    )
    return masked(axis_functions(objective).advantage(returns), mask)


def estimate_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """verl's advantage estimator `klab`: advantages and returns, which are the same without a critic."""
    with torch.no_grad():
        found = advantages(cell_objective(), token_level_rewards, response_mask.bool(), index)
    return found, found


def micro_batch_loss(
    objective: Objective,
    *,
    log_prob: Tensor,
    old_log_prob: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    information: dict[str, Any],
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The policy's part of the loss and the KL term, with gradient, of a micro-batch of verl's.

    Args:
        information: verl's `global_batch_info`: tokens and trajectories of the mini-batch over all ranks, ranks, and
            the completion budget. Sums of ranks are multiplied by their number, since FSDP averages gradients.
        correction: verl's weights of the rollout correction.
    """
    ranks = information.get("dp_size") or 1
    tokens = information.get("batch_num_tokens")
    totals = Totals(
        trajectories=information.get("global_batch_size") or len(mask),
        tokens=mask.sum() if tokens is None else torch.as_tensor(tokens, device=mask.device),
        max_new_tokens=information.get("loss_scale_factor") or mask.shape[1],
        prompts=torch.ones((), dtype=torch.long),  # no aggregation that maps reads these two
        prompt_tokens=torch.ones(len(mask), 1, dtype=torch.long),
    )
    batch = TokenBatch(
        logp=log_prob,
        logp_behaviour=old_log_prob,
        logp_reference=old_log_prob if reference is None else reference,
        mask=mask,
        rewards=log_prob.new_zeros(len(mask)),
        groups=torch.zeros(len(mask), dtype=torch.long, device=mask.device),
        max_new_tokens=totals.max_new_tokens,
        correction=correction,
    )
    penalty, phi = axis_functions(objective).placement.advantage, detached_kl(objective, batch)
    if penalty is not None and phi is not None:
        advantages = masked(advantages - penalty(phi, mask), mask)
    context = UpdateContext(advantages, totals, coefficients=LossCoefficients(entropy=0.0))  # verl adds the bonus
    out = objective_loss(objective, batch, context)
    return out.policy_loss * ranks, out.kl_loss * ranks


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's policy loss `klab`, of objectives whose loss has no KL term.

    Raises:
        RuntimeError: the objective's loss reads the reference policy, which verl gives to `ppo_loss` only.
    """
    objective = cell_objective()
    if needs_reference(objective):
        raise RuntimeError("klab's loss must stand in the place of verl's ppo_loss: this cell's has a KL term")
    loss, _ = micro_batch_loss(
        objective,
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        reference=None,
        advantages=advantages,
        mask=response_mask.bool(),
        information=config.global_batch_info,
        correction=rollout_is_weights,
    )
    return loss, {}


def register() -> None:
    """Register klab's advantage estimator and policy loss with verl, and put its loss in the place of verl's."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
    from verl.workers.utils import losses

    register_adv_est(NAME)(estimate_advantages)
    register_policy_loss(NAME)(policy_loss)
    if not hasattr(losses.ppo_loss, "verls"):
        losses.ppo_loss = _in_place_of(losses.ppo_loss)


def _in_place_of(verls: Any) -> Any:
    """A loss that is verl's own unless `loss_mode` is `klab`."""

    def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        if config.policy_loss.get("loss_mode", "vanilla") != NAME:
            result: tuple[Tensor, dict[str, Any]] = verls(config, model_output, data, dp_group)
            return result
        from verl.trainer.ppo.core_algos import agg_loss
        from verl.utils.metric import AggregationType, Metric
        from verl.workers.utils.padding import no_padding_2_padding

        information = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
        information["loss_scale_factor"] = config.loss_scale_factor
        config.global_batch_info.update(information)
        entropy = model_output.get("entropy", None)
        if entropy is not None:
            entropy = no_padding_2_padding(entropy, data)
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        optional = [name for name in ("rollout_is_weights", "ref_log_prob") if name in data]
        padded = data.select("response_mask", "old_log_probs", "advantages", *optional).to_padded_tensor()
        mask = padded["response_mask"].to(bool)
        policy, kl = micro_batch_loss(
            cell_objective(),
            log_prob=log_prob,
            old_log_prob=padded["old_log_probs"],
            reference=_reference(cell_objective(), padded),
            advantages=padded["advantages"],
            mask=mask,
            information=information,
            correction=padded.get("rollout_is_weights", None),
        )
        metrics = {
            "actor/pg_loss": Metric(value=policy, aggregation=AggregationType.SUM),
            "kl_loss": Metric(value=kl, aggregation=AggregationType.SUM),
        }
        loss = policy + kl
        if entropy is not None and config.entropy_coeff:
            bonus = agg_loss(entropy, mask, config.loss_agg_mode, **information)
            loss = loss - config.entropy_coeff * bonus
            metrics["actor/entropy_loss"] = Metric(value=bonus, aggregation=AggregationType.SUM)
        return loss, metrics

    ppo_loss.verls = verls  # type: ignore[attr-defined]
    return ppo_loss


def _reference(objective: Objective, padded: Any) -> Tensor | None:
    """log π_ref `[N, T]`.

    Raises:
        RuntimeError: the objective reads it, and verl has not computed it.
    """
    found: Tensor | None = padded.get("ref_log_prob", None)
    if found is None and needs_reference(objective):
        raise RuntimeError("set actor_rollout_ref.actor.use_kl_loss: without it verl loads no reference policy")
    return found


if os.environ.get(CELL):
    register()
