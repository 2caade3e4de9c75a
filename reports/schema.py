"""The documented columns of the tidy frames."""

from __future__ import annotations

CELLS = {
    "run": "name of the run",
    "cell": "id of the cell",
    "group": "id without the seed: one configuration",
    "label": "short name of the configuration: how it differs from the baseline",
    "task": "task with its parameters",
    "algorithm": "named algorithm it came from, if any",
    "seed": "training seed",
    "state": "finished, diverged, failed (raised an error), damaged (a file of it is), running, stopped "
    "(unfinished), missing",
    "updates_planned": "optimizer updates asked for",
    "updates": "optimizer updates done",
    "reward_final": "mean training reward of the last 10% of the updates",
    "reward_best": "highest training reward of any update",
    "gap": "reward_best - reward_final",
    "accuracy_final": "held-out greedy accuracy at the last evaluation",
    "accuracy_best": "highest held-out greedy accuracy",
    "reverse_kl_final": "KL(policy || reference) per trajectory in nats, exact per token, at the last evaluation",
    "reverse_kl_max": "largest reverse KL at any evaluation",
    "collapsed": "1 if the reward fell far below its best and stayed there",
    "collapse_update": "update at which it collapsed",
    "nonfinite_updates": "updates with a non-finite loss or gradient",
    "gradient_spikes": "updates whose gradient norm stood far above its recent median",
    "ess_min": "smallest effective sample size of any update, as a share",
    "seconds": "wall-clock seconds of training on one worker",
    "tokens": "own tokens sampled",
    "reward_timeouts": "uses of rewards that a time limit decided, in updates and evaluations",
    "zero_gradient": "1 if the policy gradient was 0 in every update: it learnt nothing from its rewards",
    "error": "why it failed",
}

METRICS = {
    "update": "optimizer update, from 1",
    "rollout": "number of the rollout it used",
    "reward_mean": "mean task reward of the rollout",
    "reward_std": "standard deviation of the task reward",
    "correct": "share of correct completions",
    "k1": "mean per token of log pi - log pi_ref",
    "k2": "mean per token of k1 squared / 2",
    "k3": "mean per token of exp(-k1) - 1 + k1",
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
    "reward": "mean sampled reward on held-out prompts",
    "pass_at_k": "share of held-out prompts solved by one of k samples",
    "k": "samples per prompt",
    "reverse_kl": "KL(policy || reference) per trajectory in nats on fresh samples",
    "forward_kl": "KL(reference || policy) per trajectory in nats on samples of the reference",
    "entropy": "mean entropy per token in nats",
    "length": "mean number of own tokens",
}

RESULTS = tuple(name for name in list(CELLS)[list(CELLS).index("updates") : list(CELLS).index("error")])
"""Numbers of result.json."""

TITLES = {name: name.replace("_", " ") for name in RESULTS} | {
    "reward_final": "final reward",
    "reward_best": "best reward",
    "gap": "gap from best to final reward",
    "accuracy_final": "held-out accuracy",
    "accuracy_best": "best held-out accuracy",
    "reverse_kl_final": "KL to the reference",
    "reverse_kl_max": "largest KL to the reference",
    "ess_min": "smallest effective sample size",
}
"""What a result is called in figures and sentences."""

LOWER_IS_BETTER = (
    "gap",
    "reverse_kl_final",
    "reverse_kl_max",
    "collapsed",
    "nonfinite_updates",
    "gradient_spikes",
    "seconds",
    "tokens",
    "reward_timeouts",
    "zero_gradient",
)

SUMMARY = {
    "task": CELLS["task"],
    "label": CELLS["label"],
    "n": "seeds with a score (diverged and failed ones count, at the worst score of the task)",
    "mean": "mean score over these seeds",
    "low": "lower end of the 95% t-interval over seeds",
    "high": "upper end",
    "mean_finished": "mean over finished seeds only",
    "seeds": "seeds planned",
    "finished": "seeds that finished",
    "diverged": "seeds that diverged",
    "failed": "seeds that failed with an error or a damaged file",
    "unfinished": "seeds that are running, stopped or missing",
    "accuracy_final": "mean held-out accuracy of the seeds that have one",
    "reverse_kl_final": "mean final KL to the reference of the seeds that have one",
    "difference": "mean paired difference to the baseline, same seeds",
    "difference_low": "lower end of its 95% t-interval",
    "difference_high": "upper end",
    "pairs": "seeds in the paired difference",
    "p": "p of the exact sign-flip test of the paired differences",
    "p_holm": "the same, adjusted by Holm over all cells of the task",
    "improvement": "probability that a random seed of it beats a random seed of the baseline",
    "rank": "1 is best",
    "stable": "whether no seed diverged or failed",
    "best_group": "whether Tukey's test, over stable cells, cannot tell it from the best of them",
}
