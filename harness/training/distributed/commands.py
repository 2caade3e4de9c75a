"""Orders: what rank 0 does with a pack, the other processes of its world do at the same time.

Rank 0 leads its life as ever. Each step of a pack (begin, an update, an evaluation, smaller micro-batches, the pack
without some members) is announced as an order, and every process carries it out on its own copy: its share of the
prompts and of the pieces of an update (`world.py`), and everything else in full.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from klab.harness.training.distributed.process_group import ALONE, World

if TYPE_CHECKING:
    from klab.harness.training.pack import Pack

T = TypeVar("T")

BEGIN, END, LEAVE = "begin", "end", "leave"
"""Orders that are no methods of a pack: begin one, forget them all, and do nothing more."""


@dataclass(frozen=True, slots=True)
class Order:
    """The next step: a method of pack number `pack`, or another word. `forgotten`: packs that rank 0 has let go."""

    step: str
    pack: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    forgotten: tuple[int, ...] = ()


class Orders:
    """One process's end of the line. In a world of one nothing is announced.

    Attributes:
        packs: by number, what the processes have copies of; rank 0 keeps its own as long as it needs them.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.packs: dict[int, Pack] = {}
        self._numbers: weakref.WeakKeyDictionary[Pack, int] = weakref.WeakKeyDictionary()
        self._let_go: list[int] = []
        self._last = 0

    def carry_out(
        self,
        pack: Pack | None,
        step: str,
        arguments: dict[str, Any],
        work: Callable[[], T],
        state: Callable[[], object] = lambda: None,
    ) -> T:
        """`work`, this process's part of a step; rank 0 announces it first. See `World.together` for what is raised."""
        if self.world.size == 1:
            return work()
        if self.world.leads:
            number = 0 if pack is None else self._numbers[pack]
            order = Order(step, number, arguments, tuple(self._let_go))
            self._let_go.clear()
            self.world.exchange("order", lambda: order)
        return self.world.together(work, state)

    def count(self, pack: Pack) -> Pack:
        """Give a pack that all processes have made just now its number."""
        if self.world.size == 1:
            return pack
        self._last += 1
        if self.world.leads:
            self._numbers[pack] = self._last
            weakref.finalize(pack, self._let_go.append, self._last)
        else:
            self.packs[self._last] = pack
        return pack

    def next(self) -> Order:
        """What rank 0 announces."""
        orders: list[Order | None] = self.world.exchange("order", lambda: None)
        order = orders[0]
        assert order is not None
        for number in order.forgotten:
            self.packs.pop(number, None)
        return order

    def dismiss(self, word: str = END) -> None:
        """Rank 0 has nothing more to do with its packs, or (`LEAVE`) at all."""
        if self.world.size > 1 and not self.world.broken:
            self.world.exchange("order", lambda: Order(word))
