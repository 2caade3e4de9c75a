"""A pack: cells of one shape stacked on a leading axis, advancing together, update by update.

Everything lives in memory here; files, clocks and signals are `life.py`'s. No number of a cell depends on its
mates: random draws and prompts are functions of its own seed, losses and steps run on its own slice. So a pack may
lose a member at any update, or be taken apart into packs of one, and nobody's bits change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy

import torch

from klab.harness.policy.load import load_policy
from klab.harness.policy.policy import Policy
from klab.harness.training.checkpoint import State
from klab.harness.training.data import group_filtering as selection
from klab.harness.training.data.minibatch import minibatch, select
from klab.harness.training.data.rollouts import Experience, collect
from klab.harness.training.distributed.commands import Orders
from klab.harness.training.distributed.process_group import checksum
from klab.harness.training.evaluation import Examination, evaluate, prepare
from klab.harness.training.forward import Models
from klab.harness.training.metrics import Row
from klab.harness.training.microbatch import Limit
from klab.harness.training.optim import kl_controller as controls
from klab.harness.training.optim.critic import Critics
from klab.harness.training.optim.optimizer import StackedAdamW
from klab.harness.training.packed_cell import Member
from klab.harness.training.runtime.timer import Stopwatch
from klab.harness.training.summary import DIVERGED_AFTER
from klab.harness.training.update import update

CHECK_UPDATES = 8
"""How often processes that train a pack together compare their weights."""


class Pack:
    """Members of one shape at the same update.

    Attributes:
        members: the cells.
        policy: their stacked policies, in training.
        reference: their starting policies, frozen.
        critics: what they learn beside it; None where no member asks for one.
        coefficients: of the next update, per member.
        done: updates made.
        pending: rollouts drawn and not used up; one entry per rollout, each with one experience per member.
        streaks: non-finite updates in a row, per member.
        evaluated: updates made at the last evaluation, -1 before the first.
        limit: what may go through the policies at once.
        orders: how the processes of a job keep step; what several of them do is done by all.
    """

    def __init__(self, members: Sequence[Member], orders: Orders | None = None) -> None:
        self.members = list(members)
        self.orders = orders or Orders()
        self.policy: Policy = _stack(self.members)
        self.reference: Policy = self.policy.frozen_copy()
        self.optimizer = StackedAdamW(self.policy.parameters, [member.cell.training for member in self.members])
        self.critics = Critics.of(self.members, self.policy, lambda: _stack(self.members))
        self.coefficients = [controls.first(member.cell) for member in self.members]
        self.done = 0
        self.evaluated = -1
        self.pending: list[list[Experience]] = []
        self.streaks = [0] * len(self.members)
        self.limit = Limit.of(self.members[0].cell.training)
        self._halved = False
        self._timetable = self.members[0].timetable
        self._watch = Stopwatch()
        self._examinations: list[Examination] = []

    @property
    def over(self) -> bool:
        """Whether all planned updates have been made."""
        return self.done >= self._timetable.updates

    @property
    def evaluation_due(self) -> bool:
        """Before the first update, every `evaluate_every` updates, and after the last."""
        every = self.members[0].cell.training.evaluate_every
        return self.evaluated < self.done and (self.over or self.done % every == 0)

    def advance(self) -> list[Row]:
        """One update of every member; one row of metrics each.

        Raises:
            CellFailure: where one member's reward or objective raises. The pack is then as it was before the call.
        """
        return self.orders.carry_out(self, "advance", {}, self._advance, self._numbers)

    def _advance(self) -> list[Row]:
        number, epoch, part = self._timetable.place(self.done)
        self.draw()
        current = self.pending[0]
        training = self.members[0].cell.training
        chosen = [
            select(
                experience,
                minibatch(training.prompts, training.minibatches, part, member.cell.seed, number, epoch),
            )
            for member, experience in zip(self.members, current, strict=True)
        ]
        used = [selection.remaining(*pair) for pair in zip(self.members, chosen, strict=True)]
        rows = update(
            Models(self.policy, self.reference, self.critics),
            self.optimizer,
            self.members,
            used,
            self.coefficients,
            self.done + 1,
            self._watch,
            self.limit,
            world=self.orders.world,
        )
        self.done += 1
        if self.done % self._timetable.span == 0:
            self.pending.pop(0)
        seconds = self._watch.take(len(self.members))
        for c, row in enumerate(rows):
            self.streaks[c] = self.streaks[c] + 1 if row["nonfinite"] else 0
            row.update(selection.figures(self.members[c], chosen[c], used[c]))
            if row.get("loss_tokens") != 0:
                self.coefficients[c] = controls.adapted(self.members[c].cell, self.coefficients[c], row)
            row.update(seconds)
        return rows

    def halve(self) -> bool:
        """Halve what goes through the policies at once, which changes no gradient; False when that was done before or
        cannot be."""
        return self.orders.carry_out(self, "halve", {}, self._halve)

    def _halve(self) -> bool:
        training = self.members[0].cell.training
        rows = training.prompts * training.group_size // training.minibatches
        rows = -(-rows // self.orders.world.size)
        if self._halved or min(rows, self.limit.rows or rows) == 1:
            return False
        self.limit, self._halved = self.limit.halved(rows), True
        return True

    def draw(self) -> None:
        """Draw the rollouts that are to come from the policy as it is now."""
        behaviour = self.policy
        if self.members[0].cell.training.behaviour == "reference":
            behaviour = self.reference
        first = self.done // self._timetable.span
        for number in range(first + len(self.pending), self._timetable.drawn(self.done)):
            with torch.no_grad():
                drawn = collect(
                    self.members, behaviour, self.reference, number, self._watch, self.limit, self.orders.world
                )
            if self.critics is not None:
                with self._watch("forward"):
                    self.critics.appraise(drawn, self.policy, self.limit, self.orders.world)
            self.pending.append(drawn)

    def evaluate(self) -> list[Row]:
        """One row of evaluations per member, of the policies as they are. Training does not notice."""
        return self.orders.carry_out(self, "evaluate", {}, self._evaluate, lambda: self.done)

    def _evaluate(self) -> list[Row]:
        started = time.perf_counter()
        with torch.no_grad():
            if not self._examinations:
                self._examinations = prepare(self.members, self.reference, self.limit, self.orders.world)
            rows = evaluate(
                self.policy,
                self.reference,
                self.members,
                self._examinations,
                self.done,
                self.limit,
                self.orders.world,
            )
        self.evaluated = self.done
        seconds = (time.perf_counter() - started) / len(self.members)
        return [{**row, "seconds": seconds} for row in rows]

    def diverged(self) -> list[int]:
        """Positions of the members that cannot go on: too many non-finite updates in a row, or non-finite weights."""
        sound = self.optimizer.finite()
        if self.critics is not None:
            sound = [all(pair) for pair in zip(sound, self.critics.optimizer.finite(), strict=True)]
        return [c for c in range(len(self.members)) if self.streaks[c] >= DIVERGED_AFTER or not sound[c]]

    def state(self, position: int) -> State:
        """One member between two updates; `Pack.resumed` is the inverse."""
        return State(
            self.members[position].id,
            self.done,
            self.streaks[position],
            self.optimizer.state(position),
            [experiences[position] for experiences in self.pending],
            {} if self.critics is None else self.critics.optimizer.state(position),
            self.coefficients[position],
        )

    @classmethod
    def resumed(cls, members: Sequence[Member], states: Sequence[State], orders: Orders | None = None) -> Pack:
        """The members as their states left them. All states must be of the same update."""
        pack = cls(members, orders)
        pack.done = pack.evaluated = states[0].update
        for position, state in enumerate(states):
            pack.optimizer.restore(position, state.optimizer)
            if pack.critics is not None:
                pack.critics.optimizer.restore(position, state.critic)
        pack.streaks = [state.streak for state in states]
        pack.coefficients = [state.coefficients for state in states]
        pack.pending = [list(each) for each in zip(*(state.pending for state in states), strict=True)]
        return pack

    def only(self, positions: Sequence[int]) -> Pack:
        """A new pack of some of the members, where they are; without any it is the empty pack."""
        if not positions:
            empty = copy(self)
            empty.members = []
            return empty
        rest = self.orders.carry_out(self, "only", {"positions": list(positions)}, lambda: self._only(positions))
        return self.orders.count(rest)

    def _only(self, positions: Sequence[int]) -> Pack:
        chosen = [self.members[c] for c in positions]
        pack = Pack.resumed(chosen, [self.state(c) for c in positions], self.orders)
        pack.evaluated = self.evaluated
        pack.limit, pack._halved = self.limit, self._halved
        return pack

    def _numbers(self) -> tuple[int, ...]:
        """What processes that train this pack together must agree on; the weights now and then."""
        if self.done % CHECK_UPDATES and not self.over:
            return (self.done,)
        taught = {} if self.critics is None else self.critics.optimizer.parameters
        return (self.done, *checksum([*self.policy.parameters.values(), *taught.values()]))


def device() -> torch.device:
    """Where cells train: the first GPU that this process may see (CUDA_VISIBLE_DEVICES), else the processor.

    Apple's GPUs are left alone: sampling needs double precision.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _stack(members: Sequence[Member]) -> Policy:
    seeds = [member.cell.seed for member in members]
    policy = load_policy(members[0].cell.policy, members[0].start, len(members), device(), seeds)
    for position, member in enumerate(members):
        if member.start != members[0].start:
            policy.load(member.start, position)
    return policy
