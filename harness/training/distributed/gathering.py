"""Weights that the processes of a job share out, gathered in each of them for as long as they sample or score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.policy.policy import Policy
from klab.harness.training.distributed.process_group import ProcessGroup


@contextmanager
def gathered(process_group: ProcessGroup, *policies: Policy) -> Iterator[None]:
    """A block in which every process can use these policies by itself. All processes enter it together; policies whose
    weights are not shared out are left alone.

    Raises:
        ProcessGroupLost: where gathering fails in one process: the others wait inside it.
    """
    sharded = [policy for policy in policies if isinstance(policy, ShardedPolicy)]
    entered: list[ShardedPolicy] = []
    try:
        for policy in sharded:
            with process_group.lockstep():
                policy.gather()
            entered.append(policy)
        yield
    finally:
        for policy in entered:
            policy.release()
