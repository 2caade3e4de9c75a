"""The table of models of Qwen2.5's sizes in harness/README.md is what `klab plan` computes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from klab.grid import parse_grid
from klab.harness.cli.memory import JobMemory, MemoryNeed
from klab.harness.policy.footprint import Footprint, Workload
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.preflight.memory import MemoryEstimate, estimate_memory, stacked_sizes

README = Path(__file__).parents[3] / "harness" / "README.md"
WORK = Workload(prompt=180, new=1000, rows=16, group=8, sampled=64)
"""Two groups of 8 completions of 1,000 tokens: 16,360 tokens in a micro-batch."""

MODELS = {
    "0.5B": (896, 24, 14, 2, 64, 4864, True),
    "1.5B": (1536, 28, 12, 2, 128, 8960, True),
    "3B": (2048, 36, 16, 2, 128, 11008, True),
    "7B": (3584, 28, 28, 4, 128, 18944, False),
}
"""hidden, layers, heads, key and value heads, their width, feed-forward, whether input and output share a matrix."""

CARD = JobMemory(on_gpu=True, limit_gb=80 * 10**9 / 2**30, processes=1, cells_per_job=1)


def need(model: str, **policy: Any) -> MemoryNeed:
    hidden, layers, heads, kv_heads, width, inner, tied = MODELS[model]
    vocabulary = 151_936 if tied else 152_064
    architecture = Architecture(
        **{"family": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "num_layers": layers},
        **{"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width, "intermediate_size": inner},
        **{"norm_eps": 1e-6, "initializer_range": 0.02, "qkv_bias": True, "out_bias": False, "mlp_bias": False},
        **{"qk_norm": False, "tied": tied, "context_length": 32768},
    )  # type: ignore[arg-type]
    section = {"name": "hf", "model": f"Qwen2.5-{model}", "dtype": "bfloat16", **policy}
    (cell,) = parse_grid(json.dumps({"name": "n", "task": "addition", "policy": section}), "n.yaml").cells
    lora: Any = cell.policy.lora
    footprint = Footprint(
        *("stacked", layers, hidden, heads * width, kv_heads * width, inner, heads, vocabulary, 2),
        rank=0 if lora is None else lora.rank,
        recomputes=cell.policy.gradient_checkpointing,
    )
    return MemoryNeed(cell, estimate_memory(cell, stacked_sizes(cell.policy, architecture), footprint, WORK), 1, CARD)


def row(name: str) -> list[str]:
    """A row of the README's table."""
    model, kind = name.split()
    policy: dict[str, Any] = {} if kind == "whole" else {"lora": {"rank": 16}}
    plain, recomputing = need(model, **policy), need(model, **policy, gradient_checkpointing=True)
    on_top = [each.estimate.passes("cuda") for each in (plain, recomputing)]
    figures = [plain.bytes, *(each["activations"] for each in on_top), on_top[0]["logits"]]
    fits = [each.expected() <= 80 * 10**9 for each in (plain, recomputing)]
    verdict = "yes" if fits[0] else "with checkpointing" if fits[1] else "no"
    return [name, *(f"{value / 1e9:.3g}" for value in figures), verdict]


ROWS = ("0.5B whole", "1.5B whole", "3B whole", "7B whole", "7B adapters")


def test_the_readme_has_the_table() -> None:
    written = [[word.strip() for word in line.strip("|").split("|")] for line in README.read_text().splitlines()]
    for name in ROWS:
        assert row(name) in written, row(name)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    refusal = str(need("7B").refusal("n.yaml"))
    assert "n.yaml: policy: training needs at least 1" in refusal
    assert "the largest GPU here has 74.5 GB" in refusal
    assert "policy.lora" in refusal
    assert "policy.sharding: full with several resources.gpus" in refusal
    assert need("0.5B").refusal("n.yaml") is None
    assert "token_budget" not in str(need("0.5B").passes_line())
    assert need("7B", lora={}, gradient_checkpointing=True).refusal("n.yaml") is None


def test_a_micro_batch_that_is_too_large_has_a_token_budget_that_is_not() -> None:
    large = need("7B", lora={})
    assert large.refusal("n.yaml") is None
    line = str(large.passes_line())
    assert "keys and values 4.03 GB" in line
    assert line.endswith("and is about the default")
    budget = int(line.split("training.token_budget: ")[1].split()[0])
    estimate = large.estimate
    assert estimate.footprint is not None
    room = CARD.limit_gb * 2**30 - estimate.total() - estimate.footprint.logits(16_000, "cuda")  # type: ignore[operator]
    assert estimate.footprint.activations(budget) <= room < estimate.footprint.activations(budget + 1)


def test_a_single_trajectory_that_does_not_fit_is_refused() -> None:
    crowded = need("7B", lora={})
    little = JobMemory(True, crowded.bytes / 2**30 + 1, 1, 1)
    refusal = str(MemoryNeed(crowded.cell, crowded.estimate, 1, little).refusal("n.yaml"))
    assert "GB with a single trajectory (activations" in refusal
    assert "policy.gradient_checkpointing: true" in refusal


def test_estimates_survive_their_way_between_processes() -> None:
    from dataclasses import asdict

    estimate = need("0.5B").estimate
    assert MemoryEstimate.from_record(json.loads(json.dumps(asdict(estimate)))) == estimate


@pytest.mark.parametrize("sampled", [8, 100_000])
def test_sampling_counts_where_it_takes_more_than_an_update(sampled: int) -> None:
    from dataclasses import replace

    estimate = replace(need("0.5B", gradient_checkpointing=True).estimate, work=replace(WORK, sampled=sampled))
    on_top = estimate.passes("cuda")
    assert ("keys and values in excess of an update's" in on_top) == (sampled > 8)
