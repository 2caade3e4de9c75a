"""What a reader of a cell's numbers should know beforehand; `klab plan` and the job's output say it."""

from __future__ import annotations

from collections.abc import Iterator

from klab.grid import Objective
from klab.grid.schema.sections import PolicySection, TrainingSection
from klab.grid.user_code import names_user_code


def small_set_notes(training: TrainingSection, train: int, held_out: int) -> Iterator[str]:
    """One line for each set with fewer prompts than asked for: allowed, but not what was written.

    Args:
        train, held_out: prompts in each split.
    """
    if training.evaluation_prompts > held_out:
        yield (
            f"training.evaluation_prompts: {training.evaluation_prompts}, but {held_out} prompts are held out: "
            "evaluations use these"
        )
    if training.prompts > train:
        yield f"training.prompts: {training.prompts}, but there are {train} to train on: each rollout repeats some"


def sampling_notes(training: TrainingSection) -> Iterator[str]:
    """One line where tokens are drawn from another distribution than the one that log-probabilities are of.

    Log-probabilities, ratios and KL are of the softmax of logits/temperature over the whole vocabulary. With `top_p`
    tokens come from a truncated, renormalised one: expectations are over that, and a ratio of whole softmaxes is not
    the importance ratio between the truncated distributions.
    """
    if training.top_p < 1.0:
        yield (
            f"training.top_p: {training.top_p:g}: tokens are drawn from the most likely ones, while log-probabilities, "
            "ratios and KL are of the softmax over the whole vocabulary; gradients are biased by the difference"
        )
    sampler = training.sampler
    if sampler is not None and sampler.correction == "none" and sampler.temperature not in (None, training.temperature):
        yield (
            f"training.sampler.temperature: {sampler.temperature:g}: tokens are drawn at this temperature, while "
            f"log-probabilities, ratios and KL are at training.temperature: {training.temperature:g}; nothing corrects "
            "the difference"
        )
    if sampler is not None and sampler.url is not None:
        yield "training.sampler.url: the server draws with generators of its own: the cell's numbers are not repeatable"


def divergence_notes(objective: Objective) -> Iterator[str]:
    """One line where a divergence other than reverse KL enters in a way that does not lower it.

    Inside returns and advantages f(δ) lacks the gradient of f itself, which only for κ has the expectation 0;
    `reinforce` has both, and is no estimate of the divergence whose gradient a loss could follow.
    """
    form = objective.canonical()
    divergence, estimator, placement = (form.get(axis) for axis in ("divergence", "estimator", "placement"))
    if divergence is None or names_user_code(placement):
        return
    detached = placement in ("reward", "reward_to_go", "advantage", "advantage_to_go")
    if detached and estimator != "reinforce":
        yield (
            f"placement: {placement} with divergence: {divergence}: a {estimator} that is not differentiated lacks a "
            "part of the divergence's gradient and may push away from the reference; estimator: reinforce has it"
        )
    elif not detached and estimator == "reinforce":
        yield (
            f"placement: {placement} with divergence: {divergence}: reinforce is what returns and advantages are "
            "charged with; differentiated it follows another gradient than the divergence's, whose estimators are k1, "
            "k3 and full"
        )


def precision_notes(policy: PolicySection, on_gpu: bool) -> Iterator[str]:
    """One line where a pretrained model's precision is not the one that its device is fast in."""
    if policy.name == "hf" and on_gpu and policy.dtype == "float32":
        yield (
            "policy.dtype: float32 on a GPU: products do without TF32 and take several times as long as with bfloat16, "
            "which is the default where the grid file asks for GPUs (resources.gpus: 1)"
        )
    if not on_gpu and policy.dtype == "bfloat16":
        yield "policy.dtype: bfloat16 without a GPU: most processors are faster with float32"
