"""Policies that the compiled layers compute, and what they compute in a process of its own: `python -m
tests.support.native_policy FILE`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.native.library import build, library
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store.kernels import ATEN
from tests.support.tiny_policy import decoder, generators, written

ROOT = Path(__file__).parents[2]
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
CHECKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "default branch": {"head_dim": 80, "num_key_value_heads": 2, "hidden_size": 48, **BIASES},
    "blocks": {"hidden_size": 272, "intermediate_size": 304},
}
"""What the process computes."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {**BIASES, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "one layer": ("qwen2", {"num_hidden_layers": 1}),
    "narrowest": ("llama", {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, **BIASES}),
    "half a tile": ("llama", {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 3}),
    "beyond a block": ("qwen2", {"hidden_size": 272, "intermediate_size": 304, "head_dim": 32}),
    "heads of 64": ("llama", {"hidden_size": 64, "head_dim": 64, "num_key_value_heads": 2}),
    "heads of 80": ("qwen2", {"hidden_size": 48, "head_dim": 80, "num_key_value_heads": 1}),
    "heads of 256": ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, **BIASES}),
}
for _, sizes in SHAPES.values():
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])


def tame_policy(cells: int = 1, family: str = "llama", **changes: Any) -> StackedPolicy:
    """Random cells, biases and norms too; multiples of 1/1000, the same with all kernels of torch. Heads of 16."""
    policy = decoder(cells, family, **{"head_dim": 16, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in policy.parameters.items():
            drawn = torch.randint(-1000, 1001, value.shape, generator=generator) / 1000
            fan_in = value.shape[1] if value.dim() == 3 and name != "embedding" else 16
            value.copy_(1 + drawn / 2 if name.endswith("norm") else drawn / round(fan_in**0.5))
    return policy


def ragged_rollout(
    seed: int,
    prompts: int = 3,
    group_size: int = 4,
    prompt: tuple[int, int] = (1, 7),
    completion: tuple[int, int] = (1, 9),
    letters: int = 3,
) -> Rollout:
    """Prompts and completions of between so many tokens; the fewer letters, the more completions are alike."""
    draw = random.Random(seed)
    starts = [[draw.randint(2, 14) for _ in range(draw.randint(*prompt))] for _ in range(prompts)]
    rows = [
        [draw.randint(2, 1 + letters) for _ in range(draw.randint(*completion))]
        for _ in range(len(starts) * group_size)
    ]
    return written(starts, rows)


CELLS: dict[str, list[Rollout]] = {
    "unequal cells": [ragged_rollout(0, prompts=1), ragged_rollout(1, prompts=5, group_size=2), ragged_rollout(2)],
    "one token": [ragged_rollout(3, 1, 1, (1, 1), (1, 1)), ragged_rollout(4, 1, 3, (1, 1), (2, 5))],
    "all equal": [ragged_rollout(5, 2, 6, completion=(7, 7), letters=1)],
    "all different": [ragged_rollout(6, 3, 6, completion=(6, 12), letters=13)],
    "long": [ragged_rollout(7, 2, 3, (90, 130), (1, 60)), ragged_rollout(8, 1, 2)],
    "many tokens": [ragged_rollout(9, 4, 12, (1, 30), (1, 30), letters=13)],
}


def with_parameters(policy: StackedPolicy, parameters: dict[str, Tensor]) -> StackedPolicy:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    return StackedPolicy(policy.config, policy.tokenizer, leaves)


def alone(policy: StackedPolicy, cell: int) -> StackedPolicy:
    return with_parameters(policy, {name: value[cell : cell + 1] for name, value in policy.parameters.items()})


def numbers(policy: StackedPolicy, rollouts: list[Rollout], plain: bool = False) -> dict[str, Tensor]:
    """Scores, one after the other, and the gradients of a loss that all of them enter; in float64."""
    scores = token_scores(policy, rollouts, entropy=True, entropy_gradient=True, states=True, plain=plain)
    found, terms = {}, []
    for name in ("logp", "entropy", "states"):
        value = torch.cat([getattr(score, name).flatten() for score in scores])
        terms.append((value * torch.linspace(-1, 2, len(value), dtype=value.dtype)).sum())
        found[name] = value.detach().double()
    slopes = torch.autograd.grad(torch.stack(terms).sum(), list(policy.parameters.values()))
    return found | {name: slope.double() for name, slope in zip(policy.parameters, slopes, strict=True)}


def states_and_gradients(policy: StackedPolicy, rollouts: list[Rollout]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the layers alone compute: final states by cell, and the gradients of a function of these."""
    states = [score.states for score in token_scores(policy, rollouts, states=True) if score.states is not None]
    weights = [torch.arange(each.numel()).remainder(13).sub(6).view(each.shape) / 8 for each in states]
    loss = [(weight * each).sum() for weight, each in zip(weights, states, strict=True)]
    names = [name for name in policy.parameters if name != "head"]
    found = torch.autograd.grad(loss, [policy.parameters[name] for name in names])
    return [each.detach() for each in states], dict(zip(names, found, strict=True))


def computed(folder: Path, **environment: str) -> dict[str, Any]:
    """What a process of its own computes, with klab's cache in a folder."""
    given = {name: value for name, value in os.environ.items() if name != ATEN}
    command = [sys.executable, "-m", "tests.support.native_policy", str(folder / "found")]
    subprocess.run(command, check=True, cwd=ROOT, env=given | {"KLAB_CACHE": str(folder)} | environment)
    found: dict[str, Any] = torch.load(folder / "found")
    return found


def main() -> None:
    torch.set_num_threads(1)
    policy = tame_policy(2)
    drawn = sample(
        policy, [[[3, 4], [5]], [[6, 7, 8]]], generators([0, 1]), SamplingOptions(group_size=4, max_new_tokens=12)
    )
    by_name = {}
    for name, changes in CHECKED.items():
        rollouts = [ragged_rollout(seed, completion=(1, 40)) for seed in range(2)]
        by_name[name] = states_and_gradients(tame_policy(2, **changes), rollouts)
    found = {
        "built": str(build()),
        "library": library() is not None,
        "native": policy.native is not None,
        "decoder": type(policy.decoder([[[3]]] * 2, 1)).__name__,
        "tokens": [each.tokens for each in drawn],
        "computed": by_name,
    }
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
