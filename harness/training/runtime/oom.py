"""Out of memory: recognise it, explain it, and free what can be freed."""

from __future__ import annotations

import gc

import torch

from klab.grid.cell import Cell

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or the one it came from, says that memory did not suffice."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__
    return False


class OutOfMemory(Exception):
    """A cell alone ran out of memory with the smallest micro-batch tried; the message says which settings to change."""

    def __init__(self, cell: Cell, rows: int | None) -> None:
        training, policy = cell.training, cell.policy
        tried = training.micro_batch if rows is None else rows
        ways = [f"lower training.micro_batch ({tried or 'all trajectories of an update'} at a time)"]
        ways.append(f"lower training.token_budget ({training.token_budget or 'none'})")
        if not policy.gradient_checkpointing:
            ways.append("set policy.gradient_checkpointing: true")
        if policy.lora is None:
            ways.append("train adapters with policy.lora: {rank: 16}")
        super().__init__(f"memory does not suffice for {cell.id} alone; {', or '.join(ways)}")


def explain_oom(error: Exception, cell: Cell, rows: int | None = None) -> Exception:
    """The error itself, or, for out of memory, one whose message says which settings need less memory."""
    if not is_out_of_memory(error):
        return error
    explained = OutOfMemory(cell, rows)
    explained.__cause__ = error
    return explained


def free_memory() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
