"""Cells of one shape, stacked on a leading axis and trained together, update by update.

A pack is state in memory; files, clocks and signals belong to `runner.py`. No number of a cell depends on the cells
beside it: random draws and prompts are functions of its own seed, losses and steps use its own slice. So a pack can
lose a member after any update, or be split into packs of one, without changing a bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch

from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.policy.load import load_policy
from klab.harness.policy.policy import Policy
from klab.harness.training.checkpoint import CellState
from klab.harness.training.data import group_filtering
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.minibatch import minibatch_groups, select_groups
from klab.harness.training.data.rollouts import collect_rollouts
from klab.harness.training.distributed import sharded_checkpoint
from klab.harness.training.distributed.commands import CommandChannel
from klab.harness.training.distributed.gathering import gathered
from klab.harness.training.distributed.process_group import checksum
from klab.harness.training.evaluation import EvalSet, evaluate, prepare_eval_sets
from klab.harness.training.forward import Models
from klab.harness.training.metrics import Row
from klab.harness.training.optim import kl_controller
from klab.harness.training.optim.critic import Critics
from klab.harness.training.optim.moving_reference import MovingReference
from klab.harness.training.optim.optimizer import StackedAdamW
from klab.harness.training.optim.sharded_optimizer import ShardedAdamW
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.automatic_budget import automatic_budget
from klab.harness.training.runtime.timer import PhaseTimer, shares
from klab.harness.training.summary import DIVERGED_AFTER
from klab.harness.training.update import update

CHECK_UPDATES = 8
"""Updates between two comparisons of the weights of processes that train a pack together."""


class Pack:
    """Members of one shape at the same update.

    Attributes:
        members: the cells.
        settings: what they have in common.
        policy: their stacked policies, in training.
        start: their starting policies, frozen: what evaluations compare with.
        moving: references that move; None where the starting policies are the references, or π_old is.
        critics: what they learn beside it; None where no member asks for one.
        coefficients: of the next update, per member.
        done: updates made.
        pending: rollouts sampled and not used up; one entry per rollout, each with one experience per member.
        streaks: non-finite updates in a row, per member.
        evaluated: updates made at the last evaluation, -1 before the first.
        budget: what may go through the policies at once.
        channel: sends what this pack does to the other processes of the job.
    """

    def __init__(self, members: Sequence[PackedCell], channel: CommandChannel | None = None) -> None:
        self.members = list(members)
        self.channel = channel or CommandChannel()
        self.settings = PackSettings.of(self.members)
        self.policy: Policy = self._stack()
        self.start: Policy = self.policy.frozen_copy()
        trainings = [member.cell.training for member in self.members]
        self.optimizer = self._new_optimizer()
        self.moving = MovingReference.of(self.settings, self.members, self.policy, self.optimizer)
        self.critics = Critics.of(self.settings.critic, trainings, self.policy, self._stack)
        self.coefficients = [kl_controller.initial_coefficients(member.cell) for member in self.members]
        self.done = 0
        self.evaluated = -1
        self.pending: list[list[Experience]] = []
        self.streaks = [0] * len(self.members)
        self.budget = automatic_budget(
            self.settings.budget,
            self.policy,
            self.settings.policy,
            self.settings.sampler,
            len(self.members),
            self.channel.process_group,
        )
        self._halved = False
        self._schedule = self.settings.schedule
        self._timer = PhaseTimer(self.policy.device)
        self._eval_sets: list[EvalSet] = []

    def _stack(self) -> Policy:
        """The members' starting policies."""
        members, settings = self.members, self.settings
        seeds = [member.cell.seed for member in members]
        group = self.channel.process_group.device_group
        policy = load_policy(settings.policy, members[0].start, len(members), device(), seeds, group)
        for position, member in enumerate(members):
            if member.start != members[0].start:
                policy.load(member.start, position)
        return policy

    def _new_optimizer(self) -> StackedAdamW:
        trainings = [member.cell.training for member in self.members]
        if isinstance(self.policy, ShardedPolicy):
            return ShardedAdamW(self.policy, trainings[0], self.channel.process_group)
        return StackedAdamW(self.policy.parameters, trainings)

    @property
    def reference(self) -> Policy:
        """The reference policies as they are now."""
        return self.start if self.moving is None else self.moving.policy

    @property
    def finished(self) -> bool:
        """Whether all planned updates have been made."""
        return self.done >= self._schedule.updates

    @property
    def evaluation_due(self) -> bool:
        """Before the first update, every `evaluate_every` updates, and after the last."""
        every = self.settings.evaluate_every
        return self.evaluated < self.done and (self.finished or self.done % every == 0)

    def advance(self) -> list[Row]:
        """Make one update of every member; one row of metrics each.

        Raises:
            CellFailure: where one member's reward or objective raises. The pack is then as it was before the call.
        """
        return self.channel.execute(self, "advance", {}, self._advance, self._numbers)

    def _advance(self) -> list[Row]:
        number, epoch, part = self._schedule.position(self.done)
        self.collect_due_rollouts()
        minibatches = [
            select_groups(
                experience,
                minibatch_groups(
                    self.settings.prompts, self.settings.minibatches, part, member.cell.seed, number, epoch
                ),
            )
            for member, experience in zip(self.members, self.pending[0], strict=True)
        ]
        used = [group_filtering.drop_zero_variance(*pair) for pair in zip(self.members, minibatches, strict=True)]
        filtered = [
            group_filtering.filtering_metrics(*each) for each in zip(self.members, minibatches, used, strict=True)
        ]
        rows = update(
            Models(self.policy, self.reference, self.critics),
            self.optimizer,
            self.settings,
            self.members,
            used,
            self.coefficients,
            self.done + 1,
            self._timer,
            self.budget,
            process_group=self.channel.process_group,
        )
        # from here on the update has been made: nothing below may fail
        self.done += 1
        for experience in self.pending[0]:
            experience.rollout.known_states = None
        if self.moving is not None:
            self.moving.follow(self.done)
        if self.done % self._schedule.updates_per_rollout == 0:
            self.pending.pop(0)
        drawn = [
            float(of_cell.get("sampled_tokens", row["tokens"]) or 0)
            for row, of_cell in zip(rows, filtered, strict=True)
        ]
        seconds = self._timer.take(drawn)
        for c, row in enumerate(rows):
            self.streaks[c] = self.streaks[c] + 1 if row["nonfinite"] else 0
            row.update(filtered[c])
            self.coefficients[c] = kl_controller.next_coefficients(self.members[c].cell, self.coefficients[c], row)
            row.update(seconds[c])
        return rows

    def halve_budget(self) -> bool:
        """Halve the memory budget, which changes no gradient; False if it was halved before or is at its least."""
        return self.channel.execute(self, "halve_budget", {}, self._halve_budget)

    def _halve_budget(self) -> bool:
        rows = -(-self.settings.minibatch_rows // self.channel.process_group.size)
        if self._halved or min(rows, self.budget.rows or rows) == 1:
            return False
        self.budget, self._halved = self.budget.halved(rows), True
        return True

    def collect_due_rollouts(self) -> None:
        """Sample the rollouts that are due from the policy as it is now."""
        behaviour = self.policy
        if self.settings.samples_reference:
            behaviour = self.reference
        first = self.done // self._schedule.updates_per_rollout
        for number in range(first + len(self.pending), self._schedule.rollouts_needed(self.done)):
            if self.moving is not None:
                self.moving.follow_rollout()
            with torch.no_grad():
                drawn = collect_rollouts(
                    self.settings,
                    self.members,
                    behaviour,
                    self.reference,
                    number,
                    self._timer,
                    self.budget,
                    self.channel.process_group,
                )
            if self.critics is not None:
                with self._timer("forward"):
                    self.critics.compute_values(drawn, self.policy, self.budget, self.channel.process_group)
            self.pending.append(drawn)

    def evaluate(self) -> list[Row]:
        """Evaluate every member; one row each. Training is not affected."""
        return self.channel.execute(self, "evaluate", {}, self._evaluate, lambda: self.done)

    def _evaluate(self) -> list[Row]:
        started = time.perf_counter()
        with torch.no_grad():
            if not self._eval_sets:
                self._eval_sets = prepare_eval_sets(
                    self.settings, self.members, self.start, self.budget, self.channel.process_group
                )
                if not (self.settings.samples_reference and self.moving is None):
                    self.start.release_memory()  # it draws no more
            rows = evaluate(
                self.policy,
                self.start,
                self.settings,
                self.members,
                self._eval_sets,
                self.done,
                self.budget,
                self.channel.process_group,
                moving=None if self.moving is None else self.moving.policy,
            )
        self.evaluated = self.done
        seconds, parts = time.perf_counter() - started, shares([row["length"] for row in rows])
        return [{**row, "seconds": seconds * part} for row, part in zip(rows, parts, strict=True)]

    def diverged(self) -> list[int]:
        """Positions of the members that diverged: too many non-finite updates in a row, or non-finite weights."""
        sound = self.optimizer.finite()
        if self.critics is not None:
            sound = [all(pair) for pair in zip(sound, self.critics.optimizer.finite(), strict=True)]
        return [c for c in range(len(self.members)) if self.streaks[c] >= DIVERGED_AFTER or not sound[c]]

    def save_policy(self, path: str | Path, position: int) -> None:
        """Write one member's policy as a folder that transformers or PEFT loads."""
        if not isinstance(self.policy, ShardedPolicy):
            self.policy.save(path, position)
            return
        arguments = {"path": str(path), "position": position}
        self.channel.execute(self, "save_policy", arguments, lambda: self._save_gathered(path, position))

    def _save_gathered(self, path: str | Path, position: int) -> None:
        process_group = self.channel.process_group
        with gathered(process_group, self.policy):
            process_group.all_gather_object(
                "a policy", lambda: self.policy.save(path, position) if process_group.is_main else None
            )

    def write_shards(self, folder: str | Path) -> None:
        """Write all processes' shares of what `state` leaves out; nothing where this process has it all."""
        if isinstance(self.optimizer, ShardedAdamW):
            self.channel.execute(self, "write_shards", {"folder": str(folder)}, lambda: self._write_shards(folder))

    def _write_shards(self, folder: str | Path) -> None:
        assert isinstance(self.optimizer, ShardedAdamW)
        shares = self.optimizer.state_shares()
        sharded_checkpoint.write(Path(folder), self.done, shares, self.channel.process_group)

    def state(self, position: int) -> CellState:
        """Checkpoint of one member; `Pack.resumed` is the inverse."""
        return CellState(
            self.members[position].id,
            self.done,
            self.streaks[position],
            self.optimizer.state(position),
            [experiences[position] for experiences in self.pending],
            {} if self.critics is None else self.critics.optimizer.state(position),
            self.coefficients[position],
            reference={} if self.moving is None else self.moving.state(position),
        )

    @classmethod
    def resumed(
        cls, members: Sequence[PackedCell], states: Sequence[CellState], channel: CommandChannel | None = None
    ) -> Pack:
        """A pack that continues from checkpoints, all of the same update."""
        pack = cls(members, channel)
        pack.done = pack.evaluated = states[0].update
        for position, state in enumerate(states):
            if isinstance(pack.optimizer, ShardedAdamW) and state.shards is not None:
                sharded_checkpoint.read(state.shards, pack.optimizer.state_shares(), pack.channel.process_group)
            pack.optimizer.restore(position, state.optimizer)
            if pack.critics is not None:
                pack.critics.optimizer.restore(position, state.critic)
            if pack.moving is not None:
                pack.moving.restore(position, state.reference)
        pack.streaks = [state.streak for state in states]
        pack.coefficients = [state.coefficients for state in states]
        pack.pending = [list(each) for each in zip(*(state.pending for state in states), strict=True)]
        return pack

    def select(self, positions: Sequence[int]) -> Pack:
        """A new pack of some of the members, which continues where they are; an empty one for no positions."""
        if not positions:
            empty = copy(self)
            empty.members = []
            return empty
        rest = self.channel.execute(self, "select", {"positions": list(positions)}, lambda: self._select(positions))
        return self.channel.register(rest)

    def _select(self, positions: Sequence[int]) -> Pack:
        chosen = [self.members[c] for c in positions]
        pack = Pack.resumed(chosen, [self.state(c) for c in positions], self.channel)
        pack.evaluated = self.evaluated
        pack.budget, pack._halved = self.budget, self._halved
        return pack

    def _numbers(self) -> tuple[int, ...]:
        """What all processes must agree on: the update count, and every `CHECK_UPDATES` a checksum of the weights."""
        if self.done % CHECK_UPDATES and not self.finished:
            return (self.done,)
        if isinstance(self.policy, ShardedPolicy):  # each process has numbers of its own
            return (self.done,)
        taught = {} if self.critics is None else self.critics.optimizer.parameters
        followed = {} if self.moving is None else self.moving.weights
        return (self.done, *checksum([*self.policy.parameters.values(), *taught.values(), *followed.values()]))


def device() -> torch.device:
    """The device to train on: the first visible GPU (CUDA_VISIBLE_DEVICES), else the CPU.

    Apple's GPUs are not used: sampling needs double precision.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
