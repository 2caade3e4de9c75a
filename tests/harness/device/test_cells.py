"""Every kind of cell trains on the emulated device, and its numbers are the CPU's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.harness.policy.stacked.block_decoding import VARIABLE
from klab.harness.store import Run
from klab.harness.training import run_cells
from tests.support.emulated_device.device import EmulatedDevices
from tests.support.training_records import MakeRun, StopAfter, finished, numbers, weights

TRAINING = {
    "updates": 2,
    "prompts": 2,
    "group_size": 3,
    "evaluate_every": 2,
    "evaluation_prompts": 2,
    "evaluation_samples": 1,
    "final_evaluation_samples": 1,
}
KL = {"estimator": "k3", "placement": "loss"}
CLIP = {**KL, "weight": "ppo_clip"}
LORA = {"lora": {"rank": 2}}

KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "adapters": {"policy": LORA},
    "a pack": {"seeds": 2, "objectives": [KL, {"estimator": "k1", "placement": "reward"}]},
    "a pack of adapters": {"seeds": 2, "policy": LORA},
    "checkpointing": {"policy": {"gradient_checkpointing": True}},
    "micro-batches": {"training": {"micro_batch": 2, "updates_per_rollout": 2}, "objectives": [CLIP]},
    "token budget": {"training": {"token_budget": 12}},
    "refill": {"training": {"equal_groups": "refill"}},
    "critic": {"training": {"critic": {"kind": "head"}}, "objectives": [{"advantage": "gae"}]},
    "critic of its own": {"training": {"critic": {"kind": "model"}}, "objectives": [{"advantage": "gae"}]},
    "greedy baseline": {"objectives": [{"advantage": "greedy_baseline"}]},
    "whole distributions": {"objectives": [{"estimator": "full", "placement": "loss"}]},
    "another precision samples": {
        "training": {"sampler": {"dtype": "float32", "correction": "tis"}},
        "tolerance": 1e-4,
    },
    "tempered nucleus": {"training": {"temperature": 0.7, "top_p": 0.8}},
    "lag and minibatches": {"training": {"lag": 1, "minibatches": 2, "updates_per_rollout": 2}, "objectives": [CLIP]},
    "environment": {"task": {"name": "letters_task:Echo"}},
    "transformers": {"policy": {"engine": "transformers"}},
    "transformers, adapters": {"policy": {"engine": "transformers", **LORA}},
    "transformers, checkpointing": {"policy": {"engine": "transformers", "gradient_checkpointing": True}},
}


def run(make_run: MakeRun, name: str, model: Path, kind: dict[str, Any], **policy: Any) -> Run:
    settings = {"model": str(model), "dtype": "float64", **kind.get("policy", {}), **policy}
    return make_run(
        name,
        training={**TRAINING, **kind.get("training", {})},
        objectives=kind.get("objectives", [KL]),
        seeds=kind.get("seeds", 1),
        task=kind.get("task"),
        policy=settings,
    )


def assert_close(mine: Any, theirs: Any, tolerance: float, where: str = "") -> None:
    """Equal text and counts, numbers within a relative and absolute tolerance."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_close(value, theirs[key], tolerance, f"{where}.{key}")
    elif isinstance(mine, list):
        assert len(mine) == len(theirs)
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_close(*pair, tolerance, f"{where}[{index}]")
    elif isinstance(mine, float):
        assert math.isclose(mine, theirs, rel_tol=tolerance, abs_tol=tolerance), where
    else:
        assert mine == theirs, where


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_numbers_are_those_of_the_cpu(
    make_run: MakeRun, qwen: Path, device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    there = finished(run(make_run, "device", qwen, kind))
    assert device.launches > 1000
    assert not device.unordered
    monkeypatch.undo()
    here = finished(run(make_run, "cpu", qwen, kind))
    for mine, theirs in zip(there.cells, here.cells, strict=True):
        assert_close(numbers(there, mine), numbers(here, theirs), kind.get("tolerance", 1e-6))
        expected = weights(here, theirs)
        for name, value in weights(there, mine).items() if "tolerance" not in kind else ():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("policy", [{}, LORA, {"engine": "transformers"}], ids=["whole", "adapters", "transformers"])
def test_in_16_bits_they_are_close(
    make_run: MakeRun, qwen: Path, device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch, policy: dict[str, Any]
) -> None:
    """With the same way of decoding on the CPU; beside it, products of 16 bits are rounded as they come."""
    narrow = {"dtype": "bfloat16", **policy}
    there = finished(run(make_run, "device", qwen, {}, **narrow))
    assert device.launches > 1000
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, "static")
    here = finished(run(make_run, "cpu", qwen, {}, **narrow))
    mine, theirs = (numbers(each, each.cells[0])["metrics"][0] for each in (there, here))
    assert (mine["reward_mean"], mine["tokens"]) == (theirs["reward_mean"], theirs["tokens"])
    assert_close(mine["entropy"], theirs["entropy"], 0.02)
    assert_close(mine["gradient_norm"], theirs["gradient_norm"], 0.05)


@pytest.mark.parametrize("policy", [{}, LORA], ids=["whole", "adapters"])
def test_a_cell_goes_on_from_its_checkpoint(
    make_run: MakeRun, qwen: Path, device: EmulatedDevices, policy: dict[str, Any]
) -> None:
    kind = {"training": {"updates": 3, "updates_per_rollout": 2}, "policy": policy}
    through, broken = finished(run(make_run, "through", qwen, kind)), run(make_run, "broken", qwen, kind)
    assert set(run_cells(broken.path, broken.cells, stop=StopAfter(1)).values()) == {"interrupted"}
    finished(broken)
    assert numbers(through, through.cells[0]) == numbers(broken, broken.cells[0])
    expected = weights(through, through.cells[0])
    for name, value in weights(broken, broken.cells[0]).items():
        assert torch.equal(value, expected[name])
