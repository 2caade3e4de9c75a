"""Activations, logits and caches as counted on real passes of small models, and of real vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.grid.schema.sections import load_section
from klab.harness.policy.footprint import MAX_LOGITS, Footprint, Workload
from klab.harness.policy.load import load_policy
from klab.harness.policy.pretrained import read_config
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import token_scores
from tests.support.peak_memory import PeakMemory
from tests.support.random_checkpoints import checkpoint

WIDTHS: dict[str, Any] = {
    **{"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"intermediate_size": 256, "max_position_embeddings": 1024},
}
PROMPT, NEW, ROWS, GROUP = 57, 200, 8, 4


def rollout(new: int) -> Rollout:
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, new, dtype=torch.bool)
    return Rollout(
        prompts=[[3] * PROMPT for _ in range(ROWS // GROUP)],
        group_size=GROUP,
        tokens=torch.randint(3, 10, (ROWS, new), generator=draw),
        mask=mask,
        present=mask,
        logp=torch.zeros(ROWS, new),
        truncated=torch.zeros(ROWS, dtype=torch.bool),
        texts=[""] * ROWS,
    )


def counted(
    folder: Path, section: Any, layers: int, vocabulary: int = 16, new: int = NEW
) -> tuple[int, int, int, Footprint]:
    """Bytes that live after the forward pass, at the peak of forward and backward, and of the gradients."""
    start = checkpoint(
        folder / str(layers), "Llama", "0123456789", num_hidden_layers=layers, vocab_size=vocabulary, **WIDTHS
    )
    policy = load_policy(section(start), start, 1, "cpu")
    for name, value in policy.parameters.items():
        if name.endswith(".B") or "lora_B" in name:
            value.data.normal_()
    with PeakMemory() as memory:
        (scores,) = token_scores(policy, [rollout(new)], entropy=True)
        held = memory.now
        scores.logp.sum().backward()
    gradients = sum(value.numel() * value.itemsize for value in policy.parameters.values())
    sizes = Footprint.of(section(start), read_config(start), section(start).engine)
    assert sizes is not None
    return held, memory.peak, gradients, sizes


@pytest.mark.parametrize("engine", ["stacked", "transformers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapters"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_activations_per_layer(
    tmp_path: Path, engine: str, dtype: str, lora: dict[str, Any] | None, recomputes: bool
) -> None:
    def section(start: Path) -> Any:
        settings = {"dtype": dtype, "lora": lora, "gradient_checkpointing": recomputes, "engine": engine}
        return load_section("policy", {"name": "hf", "model": str(start), **settings})

    one, two = (counted(tmp_path, section, layers) for layers in (1, 3))
    tokens, _ = Workload(PROMPT, NEW, ROWS, GROUP, ROWS).micro_batch(engine)
    added = (two[3].activations(tokens) - one[3].activations(tokens)) / 2
    measured = (two[0] - one[0]) / 2
    if engine == "transformers":
        assert measured == pytest.approx(added, rel=0.02)
    else:  # trajectories lie in rows of slots, some of which are padding
        assert 0.7 * measured < added < 1.35 * measured


@pytest.mark.parametrize("engine", ["stacked", "transformers"])
def test_the_peak_of_an_update_of_real_vocabulary(tmp_path: Path, engine: str) -> None:
    """One layer, the 151,936 tokens of Qwen2.5: gradients, activations and a chunk of logits."""

    def section(start: Path) -> Any:
        return load_section("policy", {"name": "hf", "model": str(start), "engine": engine})

    _, peak, gradients, sizes = counted(tmp_path, section, 1, 151_936, 40)
    tokens, rows = Workload(PROMPT, 40, ROWS, GROUP, ROWS).micro_batch(engine)
    expected = gradients + sizes.activations(tokens) + sizes.logits(rows, "cpu")
    assert rows * sizes.vocabulary > 2 * MAX_LOGITS["cpu"]
    assert 0.6 * peak < expected < 1.3 * peak


def test_tokens_of_a_micro_batch() -> None:
    work = Workload(prompt=100, new=300, rows=32, group=8, sampled=64)
    assert work.micro_batch("stacked") == (4 * 100 + 32 * 300, 32 * 300)
    assert work.micro_batch("transformers") == (32 * 400, 32 * 300)
    assert work.micro_batch("stacked", single=True) == (400, 300)
    assert work.drawn() == 64 * 400
    tight = replace(work, token_budget=5000)  # two groups of 2,500 tokens
    assert tight.micro_batch("stacked") == (2 * 100 + 16 * 300, 16 * 300)
    assert replace(work, token_budget=1).micro_batch("stacked") == (400, 300)
    assert replace(work, token_budget=1000).drawn() == 40 * 400


def test_sizes_come_from_any_configuration(tmp_path: Path) -> None:
    section = load_section("policy", {"name": "hf", "model": "m", "dtype": "float32"})
    gpt2 = Footprint.of(section, read_config(checkpoint(tmp_path / "GPT2", "GPT2", "0123")), "transformers")
    assert gpt2 is not None
    assert (gpt2.hidden, gpt2.keys, gpt2.intermediate, gpt2.layers) == (32, 32, 128, 2)
    assert gpt2.cache(10) == 10 * 2 * 2 * 32 * 4
    assert Footprint.of(section, read_config(checkpoint(tmp_path / "Mamba", "Mamba", "0123")), "transformers") is None
