"""What klab and TRL are both told in the comparison; nothing but numbers, so that either environment can read it."""

from __future__ import annotations

from pathlib import Path

DIGITS, VOCABULARY, CONTEXT = 3, 32, 256
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 128, 4, 4, 384
GROUP_SIZE, UPDATES_PER_ROLLOUT = 8, 2
BETA, EPSILON, LEARNING_RATE = 0.04, 0.2, 1e-4


def grid_text(start: Path, prompts: int, budget: int, updates: int, cells: int, name: str = "bench") -> str:
    """klab's grid: cells that differ in their seed alone. Evaluated as seldom and as little as klab can."""
    return f"""
name: {name}
task: {{name: addition, digits: {DIGITS}}}
policy: {{name: hf, model: {start}}}
training:
  updates: {updates}
  prompts: {prompts}
  group_size: {GROUP_SIZE}
  updates_per_rollout: {UPDATES_PER_ROLLOUT}
  max_new_tokens: {budget}
  lr: {LEARNING_RATE}
  clip_norm: 1.0
  evaluate_every: {updates}
  evaluation_prompts: 1
  evaluation_samples: 1
objective: {{algorithm: grpo, beta: {BETA}, eps_low: {EPSILON}, eps_high: {EPSILON}}}
seeds: {cells}
"""
