"""Real run folders with made-up numbers: written through the store, so that they stay true to it.

The score of a cell is known in advance: `true_score` plus a shift per seed and a little noise, so that tests can
    compute what a report must say by other means. Used by the tests of reports, of the browser page, and by the
    benchmarks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from klab.grid import Cell, parse_grid
from klab.harness.store import Run

QUICKSTART = """
name: quickstart
description: Which KL estimator, where, and with which weight?
task: {name: addition, digits: 2}
policy: {name: tiny}
training: {updates: 60, prompts: 16, group_size: 8, updates_per_rollout: 2, lr: 3.0e-4}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k2, k3]
  placement: [none, reward, loss]
  weight: [ppo_clip, {name: power, q: 0.5}, truncate]
  training.lr: [1.0e-4, 3.0e-4]
seeds: 5
"""

EFFECTS: dict[tuple[str, str], float] = {
    ("estimator", "k1"): -0.10,
    ("estimator", "k2"): 0.02,
    ("placement", "none"): 0.06,
    ("placement", "reward"): 0.015,
    ("weight", "power"): 0.03,
    ("weight", "truncate"): -0.03,
    ("lr", "0.0001"): -0.22,
}
"""What a value adds to the final reward of the baseline."""

BASE = 0.70
Outcome = Callable[[Cell], str]


def true_score(cell: Cell, effects: Mapping[tuple[str, str], float] = EFFECTS) -> float:
    """The final reward that a cell has but for its seed and noise."""
    form = cell.objective.canonical(cell.training.on_policy)
    settings = {**form, "lr": f"{cell.training.lr:g}"}
    return BASE + sum(effect for (axis, value), effect in effects.items() if settings.get(axis) == value)


def write_run(
    path: Path,
    text: str = QUICKSTART,
    *,
    outcome: Outcome = lambda cell: "finished",
    effects: Mapping[tuple[str, str], float] = EFFECTS,
    noise: float = 0.015,
    constant: bool = False,
    samples: int = 2,
    completion: Callable[[Cell], str] = lambda cell: "0142",
    only: Callable[[Cell], bool] = lambda cell: True,
) -> Run:
    """Creates the run of a grid text in `path` and fills its cells.

    Args:
        outcome: finished, diverged, stopped, failed, interrupted or missing, by cell.
        constant: every reward is 0.5, in every cell.
        completion: text of the sampled completions, by cell.
        only: which cells to write to; others are left as they are.
    """
    grid = parse_grid(text, path / "grid.yaml")
    run = Run.create(path, grid)
    for cell in grid.cells:
        if only(cell):
            _fill(run, cell, outcome(cell), true_score(cell, effects), noise, constant, samples, completion(cell))
    return run


def _fill(
    run: Run, cell: Cell, outcome: str, score: float, noise: float, constant: bool, samples: int, text: str
) -> None:
    if outcome == "missing":
        return
    generator = np.random.default_rng(int(hashlib.sha256(cell.id.encode()).hexdigest()[:12], 16))
    folder = run.cell(cell.id)
    updates = cell.training.updates
    lasts = {"diverged": 0.6, "failed": 0.3, "interrupted": 0.5, "stopped": 0.5}.get(outcome, 1.0)
    done = max(int(updates * lasts), 1)
    shift = np.random.default_rng(cell.seed).normal() * 0.02
    time = np.arange(1, done + 1) / updates
    target = score + shift + generator.normal() * noise
    reward = 0.35 + (target - 0.35) * (1 - np.exp(-time * 5)) / (1 - np.exp(-5)) + generator.normal(size=done) * 0.02
    weak_kl = 0.6 if cell.objective.placement in ("none", "log_ratio") else 0.25
    kl = weak_kl * (1 + shift) * time**0.8 * (1 + 0.05 * generator.normal(size=done)).clip(0.1)
    if outcome == "diverged":
        reward[-max(done // 4, 1) :] = 0.02
        kl *= 8
    if constant:
        reward[:] = 0.5
    reward = reward.clip(0.0, 1.0)
    rows = [
        _metrics(cell, update, float(reward[update - 1]), float(kl[update - 1]), generator)
        for update in range(1, done + 1)
    ]
    points = sorted({0, *range(0, done + 1, cell.training.evaluate_every), done})
    evaluations = [_evaluation(update, reward, kl, samples, text) for update in points]
    folder.append_metrics(rows)
    folder.append_evaluations(evaluations)
    if outcome == "failed":
        folder.record_failure('Traceback (most recent call last):\n  ...\nRuntimeError: <out of memory> & "quotes"\n')
    elif outcome in ("finished", "diverged", "stopped"):
        folder.write_result(_result(outcome, rows, evaluations, done, updates, generator))


def _metrics(cell: Cell, update: int, reward: float, kl: float, generator: np.random.Generator) -> dict[str, Any]:
    wide = cell.objective.weight in ("power", "truncate", "ratio")
    jitter = generator.random(6).round(5).tolist()
    return {
        "update": update,
        "rollout": (update - 1) // cell.training.optimizer_steps_per_rollout,
        "reward_mean": reward,
        "reward_std": 0.5 * (1 - reward),
        "correct": reward,
        "k1": kl / 6,
        "k2": kl / 7,
        "k3": kl / 6.5,
        "kl_behaviour": 0.002 * jitter[0],
        "entropy": max(1.2 - kl + 0.05 * jitter[1], 0.02),
        "gradient_norm": 0.4 + 0.3 * jitter[2],
        "ratio_mean": 1.0,
        "ratio_max": 1.5 + jitter[3],
        "ess": 0.97 - 0.1 * jitter[4] * (2 if wide else 1),
        "weight_mean": 1.0,
        "clip_fraction": 0.0 if wide else 0.03 * jitter[5],
        "informative_groups": 0.9 - 0.4 * reward,
        "length_mean": 4.2,
        "truncated": 0.01,
        "loss": -0.01,
        "tokens": 540,
        "lr": cell.training.lr,
        "seconds_rollout": 0.03,
        "seconds_reward": 0.001,
        "seconds_reference": 0.005,
        "seconds_forward": 0.01,
        "seconds_backward": 0.02,
        "seconds_step": 0.002,
        "nonfinite": False,
        **({} if cell.training.beta_control is None else {"beta": cell.objective.beta * 1.02**update}),
    }


def _evaluation(update: int, reward: Any, kl: Any, samples: int, text: str) -> dict[str, Any]:
    at = min(max(update, 1), len(reward)) - 1
    value = float(reward[at]) if update else 0.35
    return {
        "update": update,
        "accuracy": min(value + 0.05, 1.0),
        "reward": value,
        "pass_at_k": min(value + 0.15, 1.0),
        "k": 4,
        "reverse_kl": float(kl[at]) if update else 0.0,
        "forward_kl": float(kl[at]) * 1.1 if update else 0.0,
        "entropy": 1.0,
        "length": 4.2,
        "samples": [{"prompt": f"{17 + i}+25=", "completion": text, "reward": float(i % 2)} for i in range(samples)],
    }


def _result(
    outcome: str, rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], done: int, updates: int, generator: Any
) -> dict[str, Any]:
    rewards = [row["reward_mean"] for row in rows]
    final = float(np.mean(rewards[-max(done // 10, 1) :]))
    collapsed = outcome == "diverged"
    return {
        "state": outcome,
        "updates": done,
        "reward_final": final,
        "reward_best": max(rewards),
        "gap": max(rewards) - final,
        "accuracy_final": evaluations[-1]["accuracy"],
        "accuracy_best": max(row["accuracy"] for row in evaluations),
        "reverse_kl_final": evaluations[-1]["reverse_kl"],
        "reverse_kl_max": max(row["reverse_kl"] for row in evaluations),
        "collapsed": collapsed,
        "collapse_update": int(done * 0.75) if collapsed else None,
        "nonfinite_updates": 3 if collapsed else 0,
        "gradient_spikes": int(generator.integers(0, 3)) + 6 * collapsed,
        "ess_min": min(row["ess"] for row in rows),
        "seconds": 0.08 * done,
        "tokens": 540 * done,
        "parts": {},
        "versions": {"torch": "2.13.0"},
        "hardware": {"processor": "synthetic"},
    }


def large_grid(cells: int, seeds: int, updates: int) -> str:
    """A product of axes with about `cells` configurations, for benchmarks."""
    rates = max(cells // 125, 1)
    learning_rates = [round(1e-4 * 1.02**i, 9) for i in range(rates)]
    return f"""
name: large
task: {{name: addition, digits: 2}}
training: {{updates: {updates}, updates_per_rollout: 2, evaluate_every: {max(updates // 10, 1)}}}
objective: {{algorithm: grpo, beta: 0.05}}
axes:
  estimator: [k1, k2, k3, abs, full]
  placement: [loss, reward, reward_to_go, advantage, loss_corrected]
  weight: [ppo_clip, ratio, truncate, power, mask]
  training.lr: {learning_rates}
seeds: {seeds}
"""


def write_large_run(path: Path, cells: int, seeds: int, updates: int = 100) -> Run:
    """A run of about `cells` configurations; without waiting for the disk, which would take longer than what is
    measured.
    """
    from unittest.mock import patch

    with patch("os.fsync", lambda descriptor: None):
        return write_run(path, large_grid(cells, seeds, updates), outcome=_sometimes_lost, noise=0.03)


def _sometimes_lost(cell: Cell) -> str:
    roll = int(hashlib.sha256(cell.id.encode()).hexdigest()[:4], 16) % 200
    return "diverged" if roll < 3 else "failed" if roll < 4 else "finished"
