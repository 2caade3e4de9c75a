"""How fast this core multiplies matrices, and how many multiplications an update takes by the plain formula."""

from __future__ import annotations

import statistics
import time

import torch

from tests.benchmarks.setting import (
    GROUP_SIZE,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    UPDATES_PER_ROLLOUT,
    VOCABULARY,
)

SIZES = (512, 1024)


def peak_gflops(rounds: int = 7) -> float:
    """The best median rate of float32 products of square matrices on one thread, in 10⁹ FLOP/s of processor time."""
    torch.set_num_threads(1)
    rates = []
    for size in SIZES:
        left, right = torch.randn(size, size), torch.randn(size, size)
        repeats = max(1, 2**31 // (2 * size**3))
        torch.mm(left, right)
        found = []
        for _ in range(rounds):
            began = time.process_time()
            for _ in range(repeats):
                torch.mm(left, right)
            found.append(2 * size**3 * repeats / (time.process_time() - began) / 1e9)
        rates.append(statistics.median(found))
    return max(rates)


def plain_flops(prompts: int, prompt_tokens: int, completion_tokens: float) -> dict[str, float]:
    """FLOPs of one update by phase when every trajectory is computed by itself, prompt and completion in full.

    A token's products cost 2 FLOP per weight, and 4·hidden per key it attends to; backward costs twice forward.
    Sampling with a cache and the reference's pass go through all tokens once per rollout, which serves several updates.
    Nothing is counted twice: the sampler's own log-probabilities are the behaviour policy's.
    """
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    length = prompt_tokens + completion_tokens
    attention = LAYERS * 4 * HIDDEN * length * length / 2
    head = 2 * HIDDEN * VOCABULARY * completion_tokens
    passed = prompts * GROUP_SIZE * (2 * weights * length + attention + head)
    return {
        "rollout": passed / UPDATES_PER_ROLLOUT,
        "reference": passed / UPDATES_PER_ROLLOUT,
        "forward": passed,
        "backward": 2 * passed,
    }
