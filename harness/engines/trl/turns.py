"""Tasks whose environment answers: TRL generates the policy's turns, the task's `respond` the others.

TRL calls this as its rollout function. It is told which tokens are the policy's (`env_mask`); klab's budget of new
tokens is that of all turns of a trajectory together.
"""

from __future__ import annotations

from typing import Any

from klab.harness.engines.trl.rollout_trainer import TEXT, TRUNCATED
from klab.harness.engines.trl.trainer import KlabTrainer
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder
from klab.harness.training.data.generate import environment_of


def complete_turns(prompts: list[str], trainer: KlabTrainer) -> dict[str, Any]:
    """One trajectory per prompt, in whole: the policy's turns and the environment's answers.

    Processes whose trajectories have ended generate on beside the others, for sharded weights are only there while all
    go through the model together.
    """
    member = trainer.member
    ids = [trainer.prompt_ids(prompt) for prompt in prompts]
    environment = environment_of([member], [trainer.answered], 1, [0])
    builder = TrajectoryBuilder(trainer.sampling_view(), 0, ids, SamplingOptions(1, member.max_new_tokens), environment)
    while any(trainer.group.all_gather_object("a turn", lambda: not builder.finished)):
        going = [i for i, unfinished in enumerate(builder.unfinished) if unfinished]
        asked = [ids[i] + builder.tokens[i] for i in going] or [ids[0]]
        turns, sampled = trainer._generate_single_turn(asked, None, {}, 1)
        for place, i in enumerate(going):
            room = member.max_new_tokens - builder.num_generated[i]
            tokens = turns[place][:room]
            logp = [0.0] * len(tokens) if sampled is None else sampled[place][:room]
            builder.add_turn(i, tokens, logp)
    rollout = builder.build()
    return {
        "prompt_ids": ids,
        "completion_ids": builder.tokens,
        "logprobs": builder.logp if trainer.use_vllm else None,
        "env_mask": [[int(own) for own in row] for row in builder.generated],
        TEXT: rollout.texts,
        TRUNCATED: builder.truncated,
    }
