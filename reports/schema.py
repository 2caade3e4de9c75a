"""The documented columns of the tidy frames."""

from __future__ import annotations

from klab.grid.score import RESULTS

CELLS = {
    "run": "name of the run",
    "cell": "id of the cell",
    "group": "id without the seed: one configuration",
    "label": "short name of the configuration: how it differs from the baseline",
    "task": "task with its parameters",
    "algorithm": "named algorithm it came from, if any",
    "seed": "training seed",
    "state": "finished, diverged, stopped (by training.stop), failed (raised an error), damaged (a file of it is), "
    "running, interrupted (unfinished), missing",
    "updates_planned": "optimizer updates asked for",
    "updates": "optimizer updates done",
    **{name: kind.meaning for name, kind in RESULTS.items() if name != "updates"},
    "error": "why it failed",
}

METRICS = {
    "update": "optimizer update, from 1",
    "rollout": "number of the rollout it used",
    "reward_mean": "mean task reward of the rollout",
    "reward_std": "standard deviation of the task reward",
    "correct": "share of correct completions",
    "k1": "mean of log pi - log pi_ref over tokens that the behaviour policy drew: KL(pi || pi_ref) per token only "
    "where the policy is still that one; evaluations have the KL of the policy itself",
    "k2": "mean of the squared log-ratio / 2 over the same tokens",
    "k3": "mean of pi_ref / pi - 1 + log pi - log pi_ref over the same tokens",
    "kl_behaviour": "KL(behaviour || policy), k3 on the sampled tokens, mean per token: how far a trust region reached",
    "entropy": "mean entropy per token in nats",
    "gradient_norm": "norm of the gradient before clipping",
    "ratio_mean": "mean importance ratio",
    "ratio_max": "largest importance ratio",
    "ess": "effective sample size of the weights, as a share",
    "weight_mean": "mean weight",
    "clip_fraction": "share of tokens with weight 0",
    "informative_groups": "share of groups whose advantages are not all 0",
    "length_mean": "mean number of own tokens",
    "truncated": "share of completions cut by the budget",
    "loss": "value of the loss",
    "tokens": "own tokens of the update",
    "lr": "learning rate",
    "seconds_rollout": "seconds sampling",
    "seconds_reward": "seconds scoring",
    "seconds_reference": "seconds in the reference policy",
    "seconds_forward": "seconds in the forward pass",
    "seconds_backward": "seconds in the backward pass",
    "seconds_step": "seconds in the optimizer",
    "nonfinite": "1 if the loss or the gradient was not finite",
}

METRICS_OF_SOME = {
    "beta": "coefficient of the KL term in this update (training.beta_control)",
    "trust_coefficient": "coefficient of the trust region in this update (training.trust_region)",
    "entropy_coefficient": "coefficient of the entropy bonus in this update (training.entropy_control)",
    "value_loss": "loss of the critic (training.critic)",
    "explained_variance": "share of the variance of its targets that the critic explains",
    "value_clip_fraction": "share of tokens whose value is clipped",
    "critic_gradient_norm": "norm of the critic's gradient before clipping",
    "sampled_groups": "groups drawn for the rollout, used or not (training.equal_groups: refill)",
    "sampled_tokens": "own tokens drawn for the rollout, used or not",
    "unused_tokens": "own tokens drawn for the rollout that no update uses",
    "kept_groups": "groups left in the update (training.equal_groups: drop)",
    "loss_tokens": "own tokens in the loss (training.equal_groups: drop, training.truncated: mask)",
    "reward_timeouts": "rewards of the update that a time limit decided (reward math)",
    "overlong": "mean charge for length (training.overlong_buffer)",
    "sampler_kl": "KL(sampler || trainer's behaviour policy), k3 on the sampled tokens (training.sampler)",
    "sampler_ess": "effective sample size of the trainer's probabilities over the sampler's, as a share",
    "correction_mean": "mean factor of the surrogate that corrects for the sampler",
    "sampler_rejected": "share of own tokens that training.sampler.reject leaves out",
}
"""Columns that are there only where some cell has the setting behind them."""

EVALUATIONS = {
    "update": "after this many updates",
    "accuracy": "greedy accuracy on held-out prompts",
    "reward": "mean reward of completions sampled at temperature 1 on held-out prompts",
    "pass_at_k": "share of held-out prompts solved by one of k samples",
    "k": "samples per prompt",
    "reverse_kl": "KL(policy || the policy that the cell started from) per trajectory in nats on fresh samples",
    "completions": "completions sampled",
    "reward_se": "standard error of the reward from sampling completions, prompts held fixed",
    "forward_kl": "KL(the policy that the cell started from || policy) per trajectory in nats on samples of the former",
    "entropy": "mean entropy per token in nats",
    "length": "mean number of own tokens",
}

EVALUATIONS_OF_SOME = {
    "moving_kl": "KL(policy || its moving reference) per trajectory in nats on fresh samples (training.reference)",
    "reward_timeouts": "rewards of the evaluation that a time limit decided (reward math)",
}
"""Columns that are there only where some cell has the setting behind them, beside `parts.NAME` of a reward's parts."""

SUMMARY = {
    "task": CELLS["task"],
    "score": "what cells are compared by",
    "label": CELLS["label"],
    "n": "seeds that count: finished ones, stopped ones with their last evaluation, and diverged ones at the worst of "
    "these scores of the task",
    "mean": "mean score over these seeds",
    "low": "lower end of its interval, simultaneous over all cells (95%)",
    "high": "upper end",
    "seeds": "seeds planned",
    "finished": "seeds that finished",
    "diverged": "seeds that diverged",
    "stopped": "seeds that training.stop ended: their score is censored",
    "failed": "seeds that failed with an error or a damaged file",
    "unfinished": "seeds that are running, interrupted or missing",
    "accuracy_final": "mean greedy held-out accuracy at the last evaluation, of the seeds that have one",
    "reward_final": "mean training reward of the last tenth of the updates, of the seeds that have one",
    "reverse_kl_final": "mean final KL to the reference of the seeds that have one",
    "difference": "mean difference to the baseline, seed by seed",
    "difference_low": "lower end of its interval, simultaneous over all cells",
    "difference_high": "upper end",
    "pairs": "seeds in the difference",
    "p": "p of the difference, adjusted for all cells; below 0.05 exactly where the interval excludes 0",
    "verdict": "differs; equivalent: the interval lies within the margin; undecided",
    "bound_low": "difference to the baseline if stopped seeds had ended as badly for it as any run of the task",
    "bound_high": "the same, as well for it as any",
    "depends": "whether its verdict is another one at an end of these bounds: it depends on what stopped seeds would "
    "have reached",
    "stated": "whether its comparison with the baseline was stated before there were results",
    "more_seeds": "further seeds per cell that would decide an undecided one at the present estimates",
    "rank": "1 is the best mean",
    "better": "whether it differs from the baseline for the better",
    "stable": "whether no seed diverged, failed or was stopped",
}
