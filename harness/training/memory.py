"""Running out of memory: how to tell, and how to let go of what can be let go of."""

from __future__ import annotations

import gc

import torch

from harness.policy import static_decoding

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or the one it came from, says that memory did not suffice."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__
    return False


def release() -> None:
    """Give back what nothing refers to any more, and what can be made again."""
    static_decoding.forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
