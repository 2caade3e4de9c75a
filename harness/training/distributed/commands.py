"""Orders: what rank 0 does with a pack, the other processes of its process_group do at the same time.

Rank 0 leads its life as ever. Each step of a pack (begin, an update, an evaluation, smaller micro-batches, the pack
without some members) is announced as an command, and every process carries it out on its own copy: its share of the
prompts and of the pieces of an update (`process_group.py`), and everything else in full.
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
"""Orders that are no methods of a pack: begin one, forget them all, and do nothing more."""


@message_type
@dataclass(frozen=True, slots=True)
class Command:
    """The next step: a method of pack number `pack`, or another word. `released`: packs that rank 0 has let go."""

    step: str
    pack: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    released: tuple[int, ...] = ()


class CommandChannel:
    """One process's end of the line. In a process_group of one nothing is announced.

    Attributes:
        packs: by number, what the processes have copies of; rank 0 keeps its own as long as it needs them.
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
        """Give a pack that all processes have made just now its number."""
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
        """What rank 0 announces."""
        channel: list[Command | None] = self.process_group.all_gather_object("command", lambda: None)
        command = channel[0]
        assert command is not None
        for number in command.released:
            self.packs.pop(number, None)
        return command

    def shutdown(self, word: str = FORGET_PACKS) -> None:
        """Rank 0 has nothing more to do with its packs, or (`EXIT`) at all."""
        if self.process_group.size > 1 and not self.process_group.broken:
            self.process_group.all_gather_object("command", lambda: Command(word))
