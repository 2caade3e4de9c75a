"""Commands that read many cells, without the collector of cycles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, which would look at ten thousand cells again and again while they are read."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def uncollected_unless(option: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that runs without the collector from end to end, unless it is given this option.

    One that only reads and shows makes hardly any cycles; the first look of the collector at all of its cells, which
    comes as soon as it works again, takes longer than anything else that it does with them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(*values: Any, **options: Any) -> None:
            with nullcontext() if options.get(option) else uncollected():
                command(*values, **options)

        return called

    return decorate
