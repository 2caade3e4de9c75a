"""Cells without a token budget get one on GPUs, and on CPUs none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klab.grid.schema.sections import Sampler, TinyPolicy
from klab.harness.policy.footprint import Footprint
from klab.harness.policy.stacked.recorded_steps import KEPT_SHARE
from klab.harness.training.distributed.process_group import SINGLE_PROCESS
from klab.harness.training.microbatch import UNLIMITED, MemoryBudget
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.harness.training.runtime.automatic_budget import USABLE, automatic_budget, tokens_that_fit
from tests.support.training_records import MakeRun

HALF_BILLION = Footprint("stacked", 24, 896, 896, 128, 4864, 14, 151_936, 2)
GB = 10**9


def test_on_a_card_of_80_gb() -> None:
    """Qwen2.5-0.5B in bfloat16 keeps 1.57 MB per token; its weights, moments and gradients take 10 GB."""
    assert HALF_BILLION.per_token == 24 * 2 * (14 * 896 + 4 * 128 + 4 * 4864 + 4 * 14)
    assert tokens_that_fit(HALF_BILLION, 70 * GB, 1, 80 * GB) == pytest.approx(28_600, rel=0.01)
    assert tokens_that_fit(replace(HALF_BILLION, recomputes=True), 70 * GB, 1, 80 * GB) > 400_000
    assert tokens_that_fit(HALF_BILLION, 1 * GB, 1, 80 * GB) == 1


@given(st.integers(1, 10**11), st.integers(1, 16))
def test_what_fits_leaves_room(free: int, cells: int) -> None:
    memory = 10**11
    tokens = tokens_that_fit(HALF_BILLION, free, cells, memory)
    used = cells * HALF_BILLION.activations(tokens) + HALF_BILLION.logits(tokens, "cuda")
    assert tokens == 1 or used <= free - (1 - USABLE + KEPT_SHARE) * memory


def test_it_is_asked_for_where_the_device_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GB)
    section: Any = TinyPolicy()
    config = SimpleNamespace(
        **{"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 16},
        intermediate_size=192,
    )
    config.get_text_config = lambda: config
    parameters = {"all": torch.empty(10, device="meta")}
    policy: Any = SimpleNamespace(device=torch.device("cuda"), config=config, parameters=parameters)
    monkeypatch.setattr("klab.harness.training.runtime.automatic_budget.engine_for", lambda *_: "stacked")
    found = automatic_budget(UNLIMITED, policy, section, None, 4, SINGLE_PROCESS)
    assert found.tokens is not None
    assert found.tokens > 900_000
    for chosen in (MemoryBudget(tokens=7), MemoryBudget(rows=2)):
        assert automatic_budget(chosen, policy, section, None, 4, SINGLE_PROCESS) is chosen
    awake, asleep = (Sampler(engine="vllm", gpu_memory=0.5, sleep=sleep) for sleep in (False, True))
    beside = [automatic_budget(UNLIMITED, policy, section, each, 4, SINGLE_PROCESS).tokens for each in (awake, asleep)]
    assert beside[1] == found.tokens
    taken = 2.0 + 3.2 + 80 * KEPT_SHARE  # GB: what is held, a chunk of logits, what decoding keeps
    assert beside[0] == pytest.approx(found.tokens * (0.35 * 80 - taken) / (0.85 * 80 - taken), rel=0.01)
    policy.device = torch.device("cpu")
    assert automatic_budget(UNLIMITED, policy, section, None, 4, SINGLE_PROCESS) is UNLIMITED


def test_cells_on_a_cpu_have_the_budget_that_they_set(make_run: MakeRun) -> None:
    for number, training in enumerate(({}, {"token_budget": 50})):
        run = make_run(f"run{number}", training=training)
        pack = Pack([prepare_cell(run, run.cell(run.cells[0]))[0]])
        assert pack.budget == pack.settings.budget == MemoryBudget(tokens=training.get("token_budget"))
