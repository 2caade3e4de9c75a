"""Who draws a cell's completions: klab's own sampler, or vLLM beside the trainer or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from klab.grid.schema.sampler import Sampler, check_processes
from klab.harness.policy.policy import Policy
from klab.harness.policy.sampling.engine import EngineSettings
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SampleFunction
from klab.harness.policy.sampling.vllm import require_vllm, vllm_sampler
from klab.harness.training.distributed.process_group import ProcessGroup
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget
from klab.harness.training.packed_cell import PackedCell
from klab.tasks.task import lists_prompts

_copies: WeakKeyDictionary[Policy, Policy] = WeakKeyDictionary()
"""The copy of each policy that its sampler drew from last, on GPUs: recorded decoding steps belong to it."""


def sample_function(
    sampler: Sampler | None, policy: Policy, members: Sequence[PackedCell], process_group: ProcessGroup
) -> SampleFunction:
    """Who draws rollouts, evaluations and greedy baselines of some cells from a policy.

    Raises:
        UserError: vllm is not installed, there is no GPU for it, or its server does not answer; or several processes
            would send their weights to one server.
    """
    if sampler is None or sampler.engine == "klab":
        return sample
    check_processes(sampler, process_group.size)
    lora = members[0].cell.policy.lora
    return vllm_sampler(
        EngineSettings(
            sampler=sampler,
            model=policy.origin,
            revision=policy.revision,
            dtype=sampler.dtype or str(policy.dtype).removeprefix("torch."),
            context=longest_sequence(policy, members),
            logprobs_mode="raw_logprobs" if members[0].cell.training.top_p < 1.0 else "processed_logprobs",
            lora_rank=0 if lora is None else lora.rank,
        )
    )


def longest_sequence(policy: Policy, members: Sequence[PackedCell]) -> int:
    """The longest prompt of some cells with their budget, in tokens; the context where a length cannot be known: the
    task answers within an episode, or makes prompts without end."""
    if any(getattr(each.task, "interactive", True) or not lists_prompts(each.task) for each in members):
        return policy.context_length
    longest = max(each.longest_prompt + each.max_new_tokens for each in members)
    return min(policy.context_length, longest)


def sampling_budget(sampler: Sampler | None, budget: MemoryBudget) -> MemoryBudget:
    """What may be drawn at once: vLLM looks after its own memory."""
    return UNLIMITED if sampler is not None and sampler.engine == "vllm" else budget


def check_sampler(member: PackedCell) -> None:
    """Raises UserError where the cell's sampler is not installed, or this process sees no GPU for it."""
    sampler = member.cell.training.sampler
    if sampler is not None and sampler.engine == "vllm":
        require_vllm()


def sampling_policy(behaviour: Policy, sampler: Sampler | None) -> Policy:
    """The policy that the sampler draws from: the behaviour policy itself, or a copy of it in another precision."""
    if sampler is None or sampler.engine != "klab" or sampler.dtype is None:
        return behaviour
    dtype: torch.dtype = getattr(torch, sampler.dtype)
    if dtype == behaviour.dtype:
        return behaviour
    if behaviour.device.type == "cpu":
        return behaviour.frozen_copy(dtype)
    earlier = _copies.get(behaviour)
    _copies[behaviour] = behaviour.sampling_copy(dtype, earlier if earlier and earlier.dtype == dtype else None)
    return _copies[behaviour]
