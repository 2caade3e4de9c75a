"""Commands: rank 0 broadcasts each step of a pack, and every process executes it on its own copy.

Rank 0 runs the same loop as a single process. Each step of a pack (start, update, evaluation, smaller micro-batches,
selection of members) is sent as a command. A process works on its part of the prompts and micro-batches
(`process_group.py`) and does everything else in full.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from klab.harness.training.distributed.messages import message_type
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup

if TYPE_CHECKING:
    from klab.harness.training.pack import Pack

T = TypeVar("T")

START_PACK, FORGET_PACKS, EXIT = "begin", "end", "leave"
"""Commands that are not methods of a pack: start one, forget all, end the worker."""


@message_type
@dataclass(frozen=True, slots=True)
class Command:
    """The next step: a method of pack number `pack`, or another word. `released`: packs that rank 0 has let go."""

    step: str
    pack: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    released: tuple[int, ...] = ()


class CommandChannel:
    """One process's end of the command channel. A single process sends nothing.

    Attributes:
        packs: copies of rank 0's packs by number, in the other processes.
    """

    def __init__(self, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.process_group = process_group
        self.packs: dict[int, Pack] = {}
        self._numbers: weakref.WeakKeyDictionary[Pack, int] = weakref.WeakKeyDictionary()
        self._released: list[int] = []
        self._last = 0

    def execute(
        self,
        pack: Pack | None,
        step: str,
        arguments: dict[str, Any],
        work: Callable[[], T],
        state: Callable[[], object] = lambda: None,
    ) -> T:
        """Run `work`, this process's part of a step that rank 0 announces first.

        Raises: as `ProcessGroup.run_collectively`.
        """
        if self.process_group.size == 1:
            return work()
        if self.process_group.is_main:
            number = 0 if pack is None else self._numbers[pack]
            command = Command(step, number, arguments, tuple(self._released))
            self._released.clear()
            self.process_group.all_gather_object("command", lambda: command)
        return self.process_group.run_collectively(work, state)

    def register(self, pack: Pack) -> Pack:
        """Number a pack that all processes have just made."""
        if self.process_group.size == 1:
            return pack
        self._last += 1
        if self.process_group.is_main:
            self._numbers[pack] = self._last
            weakref.finalize(pack, self._released.append, self._last)
        else:
            self.packs[self._last] = pack
        return pack

    def receive(self) -> Command:
        """Wait for the next command of rank 0."""
        channel: list[Command | None] = self.process_group.all_gather_object("command", lambda: None)
        command = channel[0]
        assert command is not None
        for number in command.released:
            self.packs.pop(number, None)
        return command

    def shutdown(self, word: str = FORGET_PACKS) -> None:
        """Let the other processes forget all packs, or, with `EXIT`, end."""
        if self.process_group.size > 1 and not self.process_group.broken:
            self.process_group.all_gather_object("command", lambda: Command(word))
