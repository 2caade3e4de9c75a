"""Data parallelism: packs that several processes train together, and the life of those that do not lead.

How many processes train a cell is no part of what it is: the sampled tokens are the same, and all numbers but for the
rounding of sums. The same number of processes gives the same bits, whatever happens to them in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from klab.harness.store import Run
from klab.harness.training import checkpoint
from klab.harness.training.checkpoint import State
from klab.harness.training.distributed.commands import BEGIN, END, LEAVE, Orders
from klab.harness.training.distributed.process_group import SharedFailure, World
from klab.harness.training.pack import Pack, device
from klab.harness.training.packed_cell import Member
from klab.harness.training.runtime.torch_settings import settled
from klab.tasks import load_task


def begin(orders: Orders, members: Sequence[Member], states: Sequence[State]) -> Pack:
    """A pack of these members in all processes, as their states left them; at their beginning without states."""

    def made() -> Pack:
        return Pack.resumed(members, states, orders) if states else Pack(members, orders)

    listed = [(member.id, str(member.start)) for member in members]
    arguments = {"members": listed, "update": states[0].update if states else None}
    return orders.count(orders.carry_out(None, BEGIN, arguments, made))


def finish(world: World) -> None:
    """Let the other processes go; each leaves the world then."""
    Orders(world).dismiss(LEAVE)


def follow(run_path: str | Path, world: World, threads: int = 1) -> None:
    """Do what rank 0 does until it has nothing more to do. What fails is rank 0's to decide about.

    Raises:
        WorldLost: when a process is gone or out of step.
    """
    with settled(threads):
        _follow(Run.open(Path(run_path)), world)


def _follow(run: Run, world: World) -> None:
    orders = Orders(world)
    while True:
        try:
            order = orders.next()
            if order.step == LEAVE:
                return
            if order.step == END:
                orders = Orders(world)
            elif order.step == BEGIN:
                _copy(orders, run, **order.arguments)
            else:
                getattr(orders.packs[order.pack], order.step)(**order.arguments)
        except SharedFailure:
            continue


def _copy(orders: Orders, run: Run, members: Sequence[tuple[str, str]], update: int | None) -> None:
    """This process's copy of the pack that rank 0 begins, from the same files."""

    def made() -> Pack:
        built = []
        for identity, start in members:
            cell = run.cell(identity).cell()
            built.append(Member(cell, load_task(cell.task), Path(start)))
        if update is None:
            return Pack(built, orders)
        states = [checkpoint.read(run.cell(m.id).checkpoint / checkpoint.FILE, m.id, device()) for m in built]
        if any(state.update != update for state in states):
            found = ", ".join(f"{state.cell} at {state.update}" for state in states)
            raise RuntimeError(f"the checkpoints are not those of update {update}: {found}")
        return Pack.resumed(built, states, orders)

    orders.count(orders.carry_out(None, BEGIN, {}, made))
