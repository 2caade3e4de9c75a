"""Data parallelism: starting packs in several processes, and the loop of ranks above 0.

The number of processes is not part of a cell's identity: sampled tokens are the same, and all numbers up to the
rounding of sums. The same number of processes gives the same bits, also after interruptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from klab.harness.policy.preferences import attach_reward_model
from klab.harness.store import Run
from klab.harness.training import checkpoint
from klab.harness.training.checkpoint import CellState
from klab.harness.training.data.prompts import PromptLengths
from klab.harness.training.distributed.commands import EXIT, FORGET_PACKS, START_PACK, CommandChannel
from klab.harness.training.distributed.process_group import ProcessGroup, PropagatedError
from klab.harness.training.pack import Pack, device
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.torch_settings import configure_torch
from klab.tasks import load_task


def start_pack(channel: CommandChannel, members: Sequence[PackedCell], states: Sequence[CellState]) -> Pack:
    """Start a pack in all processes, resumed from the members' states if there are any."""

    def made() -> Pack:
        return Pack.resumed(members, states, channel) if states else Pack(members, channel)

    listed = [(member.id, str(member.start)) for member in members]
    arguments = {"members": listed, "update": states[0].update if states else None}
    return channel.register(channel.execute(None, START_PACK, arguments, made))


def release_workers(process_group: ProcessGroup) -> None:
    """End the loops of the other processes."""
    CommandChannel(process_group).shutdown(EXIT)


def run_worker(run_path: str | Path, process_group: ProcessGroup, threads: int = 1) -> None:
    """Execute rank 0's commands until it sends `EXIT`. Rank 0 decides what is done about failures.

    Raises:
        ProcessGroupLost: when a process is gone or out of step.
    """
    with configure_torch(threads):
        _run(Run.open(Path(run_path)), process_group)


def _run(run: Run, process_group: ProcessGroup) -> None:
    channel = CommandChannel(process_group)
    while True:
        try:
            command = channel.receive()
            if command.step == EXIT:
                return
            if command.step == FORGET_PACKS:
                channel = CommandChannel(process_group)
            elif command.step == START_PACK:
                _start_copy(channel, run, **command.arguments)
            else:
                getattr(channel.packs[command.pack], command.step)(**command.arguments)
        except PropagatedError:
            continue


def _start_copy(channel: CommandChannel, run: Run, members: Sequence[tuple[str, str]], update: int | None) -> None:
    """Make this process's copy of a pack that rank 0 starts, from the same files."""

    def made() -> Pack:
        built, lengths = [], PromptLengths()
        for identity, start in members:
            cell = run.cell(identity).cell()
            task = load_task(cell.task)
            attach_reward_model(task, cell.task, cell.policy, start, cell.seed, run.policies)
            built.append(PackedCell(cell, task, Path(start), run.created, lengths))
        if update is None:
            return Pack(built, channel)
        states = [checkpoint.read(run.cell(m.id).checkpoint / checkpoint.FILE, m.id, device()) for m in built]
        if any(state.update != update for state in states):
            found = ", ".join(f"{state.cell} at {state.update}" for state in states)
            raise RuntimeError(f"the checkpoints are not those of update {update}: {found}")
        return Pack.resumed(built, states, channel)

    channel.register(channel.execute(None, START_PACK, {}, made))
