"""How fast this core multiplies matrices and reads memory, and how much of either an update takes at least."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.setting import GROUP_SIZE, HIDDEN, INTERMEDIATE, LAYERS, UPDATES_PER_ROLLOUT, VOCABULARY

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


def stream_gigabytes(rounds: int = 7) -> float:
    """The best rate at which one thread reads memory that no cache holds, in 10⁹ bytes per second of processor time."""
    torch.set_num_threads(1)
    numbers = torch.ones(2**26)
    times = []
    for _ in range(rounds):
        began = time.process_time()
        numbers.sum()
        times.append(time.process_time() - began)
    return 4 * len(numbers) / min(times) / 1e9


def weight_bytes(passes: float, packed: int) -> dict[str, float]:
    """Bytes of weights, gradients and moments that one update of a cell moves between memory and core, if caches keep
    nothing from one pass to the next, as in a pack whose cells have more of them than the caches hold.

    Every pass of a rollout reads all weights once; the reference's are shared by the pack. The backward pass reads
    weights and writes gradients (what is written is read first); the norm reads gradients; Adam reads gradients,
    weights and two moments and writes three of them.

    Args:
        passes: of the policy for one rollout: the prompts' and one per further token.
    """
    weights = 4 * (LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) + VOCABULARY * HIDDEN)
    times = {
        "rollout": passes / UPDATES_PER_ROLLOUT,
        "reference": 1 / UPDATES_PER_ROLLOUT / packed,
        "forward": 1.0,
        "backward": 3.0,
        "step": 8.0,
    }
    return {phase: count * weights for phase, count in times.items()}


@dataclass(frozen=True)
class Sizes:
    """What the products of a decoder depend on; `narrow` is the width of keys, and of values."""

    layers: int
    hidden: int
    narrow: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        """From a configuration of transformers, as a dictionary."""
        hidden = config["hidden_size"]
        narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
        return cls(config["num_hidden_layers"], hidden, narrow, config["intermediate_size"], config["vocab_size"])


TINY = Sizes(LAYERS, HIDDEN, HIDDEN, INTERMEDIATE, VOCABULARY)


def plain_flops(
    prompts: int, prompt_tokens: int, completion_tokens: float, sizes: Sizes = TINY, group_size: int = GROUP_SIZE
) -> dict[str, float]:
    """FLOPs of one update by phase when every trajectory is computed by itself, prompt and completion in full.

    A token's products cost 2 FLOP per weight, and 4·hidden per key it attends to; backward costs twice forward.
    Sampling with a cache and the reference's pass go through all tokens once per rollout, which serves several updates.
    Nothing is counted twice: the sampler's own log-probabilities are the behaviour policy's.
    """
    wide, narrow = sizes.hidden, sizes.narrow
    weights = sizes.layers * (2 * wide * wide + 2 * wide * narrow + 3 * wide * sizes.intermediate)
    length = prompt_tokens + completion_tokens
    attention = sizes.layers * 4 * wide * length * length / 2
    head = 2 * wide * sizes.vocabulary * completion_tokens
    passed = prompts * group_size * (2 * weights * length + attention + head)
    return {
        "rollout": passed / UPDATES_PER_ROLLOUT,
        "reference": passed / UPDATES_PER_ROLLOUT,
        "forward": passed,
        "backward": 2 * passed,
    }
