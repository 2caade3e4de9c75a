"""What training costs a device beside its arithmetic: recordings, waits of the host, launches one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked import batched_layers, recorded_steps
from klab.harness.policy.stacked.block_decoding import StaticBlockDecoder
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.policy.stacked.recorded_steps import RecordedSteps
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.harness.training.runtime.timer import PhaseTimer
from tests.support.emulated_device.device import EmulatedDevices
from tests.support.tiny_policy import ALPHABET, configuration, generators
from tests.support.training_records import MakeRun
from tests.support.transformers_tokenizer import character_tokenizer

HERE = torch.device("emulated", 0)
LORA = {"lora": {"rank": 2}}


def long_policy() -> StackedPolicy:
    """A model of one layer whose completions are as long as one likes; see `end_with`."""
    config = configuration(num_hidden_layers=1, max_position_embeddings=2048)
    policy = StackedPolicy.random(config, character_tokenizer(ALPHABET), [0], device=HERE)
    with torch.no_grad():
        policy.parameters["embedding"][:, :, 0] = 3.0
    return policy


@torch.no_grad()
def end_with(policy: StackedPolicy, preference: float) -> None:
    """Make the end of a completion more or less likely, in place as training does."""
    (end,) = policy.eos_token_ids
    policy.parameters["head"][:, :, end] = 0.0
    policy.parameters["head"][:, 0, end] = preference


def draw(policy: StackedPolicy, seed: int, **options: Any) -> Rollout:
    prompts = [[3, 4, 5, 6], [7, 8]]
    return sample(policy, [prompts], generators([seed]), SamplingOptions(8, **{"max_new_tokens": 1024, **options}))[0]


def assert_within_budget(device: EmulatedDevices, steps: int, prefill: int) -> None:
    """Of a rollout: nothing is recorded, 1/16 waits and 2 launches outside of the graphs per step.

    Args:
        prefill: launches before the first step.
    """
    assert device.recorded == 0
    assert device.num_waits <= steps / 16, device.waits
    assert device.launches - device.replays - prefill <= 2 * steps, device.kernels


def assert_graphs_keep_nothing(policy: StackedPolicy) -> None:
    assert policy.steps.recorded
    for graph in policy.steps.recorded.values():
        assert graph.kept_bytes == 0


def test_rollouts_of_any_length_after_the_first_stay_within_the_budget(device: EmulatedDevices) -> None:
    policy = long_policy()
    end_with(policy, 2.0)
    assert draw(policy, 0).tokens.shape[1] < 32
    assert device.recorded == 2 * 4 + 2  # 16 and 8 rows of 1,536, 768, 384 and 192 slots; drawing for each
    assert_graphs_keep_nothing(policy)
    device.reset_counts()
    assert draw(policy, 0, max_new_tokens=1).tokens.shape[1] == 1
    prefill = device.launches - device.replays
    seen = []
    for seed, preference in enumerate((-20.0, 0.0, 1.0)):
        end_with(policy, preference)
        device.reset_counts()
        device.recorded = 0
        seen.append(draw(policy, seed).tokens.shape[1])
        assert_within_budget(device, seen[-1], prefill)
        assert seen[-1] >= 16
    assert seen[0] == 1024
    assert 32 < seen[1] < 1024
    device.reset_counts()
    draw(policy, 7, max_new_tokens=300, temperature=0.9)
    assert device.recorded == 2  # another way of drawing; the layers are the same


def test_memory_of_decoding_is_one_buffer_and_is_released_where_it_is_large(device: EmulatedDevices) -> None:
    policy, backend = long_policy(), torch.get_device_module(HERE)
    before = backend.memory_reserved()
    draw(policy, 0)
    memory = policy.steps.memory
    assert memory is not None
    assert memory.size >= 16 * 1536 * 2 * 32 * 4
    held = backend.memory_reserved() - before
    assert memory.size < held < 2.5 * memory.size
    device.memories[0].capacity = 7 * memory.size
    draw(policy, 1)
    assert policy.steps.memory is None
    del memory
    assert backend.memory_reserved() - before < 0.05 * held
    end_with(policy, 2.0)
    assert draw(policy, 2).tokens.shape[1] < 32


KINDS: dict[str, dict[str, Any]] = {
    "micro-batches": {"training": {"micro_batch": 3}, "policy": LORA},
    "a pack of adapters": {"seeds": 3, "policy": LORA},
    "token budget, several updates": {"training": {"token_budget": 30, "updates_per_rollout": 2, "minibatches": 2}},
    "critic": {"training": {"critic": {"kind": "head"}}, "objectives": [{"advantage": "gae"}]},
    "16 bits": {"policy": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    "another precision samples": {"training": {"sampler": {"dtype": "bfloat16", "correction": "tis"}}},
    "transformers": {
        "training": {"micro_batch": 3, "updates_per_rollout": 3},
        "policy": {"engine": "transformers", "gradient_checkpointing": True},
    },
    "refill": {"training": {"equal_groups": "refill"}},
}


def make_pack(make_run: MakeRun, model: Path, kind: dict[str, Any]) -> Pack:
    made = make_run(
        training={"prompts": 2, "group_size": 4, "max_new_tokens": 12, "updates": 9, **kind.get("training", {})},
        objectives=kind.get("objectives", [{"estimator": "k3", "placement": "loss"}]),
        seeds=kind.get("seeds", 1),
        policy={"model": str(model), **kind.get("policy", {})},
    )
    return Pack([prepare_cell(made, made.cell(identity))[0] for identity in made.cells])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_updates_stay_within_the_budget(
    make_run: MakeRun, qwen: Path, device: EmulatedDevices, kind: dict[str, Any]
) -> None:
    pack = make_pack(make_run, qwen, kind)
    pack.advance()
    for _ in range(2):
        device.reset_counts()
        device.recorded = 0
        rows = pack.advance()
        assert device.num_waits <= 20, device.waits
        assert device.recorded == 0
        assert not device.unordered
        assert all(row["gradient_norm"] > 0 for row in rows)


def test_phases_last_until_the_device_is_done_with_them(device: EmulatedDevices) -> None:
    timer, values = PhaseTimer(HERE), torch.ones(3, device=HERE)
    device.reset_counts()
    device.kernel_seconds = 100.0
    with timer("forward"):
        values + 1
        values + 2
    with timer("backward"):
        values + 3
    assert device.num_waits == 0
    taken = timer.take([1, 1])[0]
    assert device.num_waits == 1
    assert taken["seconds_forward"] == pytest.approx(100, abs=50)
    assert taken["seconds_backward"] == pytest.approx(50, abs=1e-9)
    assert taken["seconds_step"] == 0
    assert set(timer.take([1, 1])[0].values()) == {0.0}


def test_a_tensor_made_on_the_cpu_is_caught(
    make_run: MakeRun, qwen: Path, device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_layers, "swiglu", lambda x: x[..., : x.shape[-1] // 2] * torch.ones(x.shape[-1] // 2))
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        make_pack(make_run, qwen, {}).advance()


def test_a_wait_in_every_step_is_caught(device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, layers, drawing = long_policy(), RecordedSteps.layers, RecordedSteps._draw
    end_with(policy, -20.0)

    def looked_at(self: RecordedSteps, *given: Any) -> None:
        layers(self, *given)
        assert self.memory is not None
        self.memory.step.item()

    monkeypatch.setattr(RecordedSteps, "layers", looked_at)
    draw(policy, 0, max_new_tokens=40)
    device.reset_counts()
    device.recorded = 0
    draw(policy, 1, max_new_tokens=40)
    with pytest.raises(AssertionError):
        assert_within_budget(device, 40, 100)
    monkeypatch.setattr(RecordedSteps, "layers", layers)

    def inside(self: RecordedSteps, *given: Any) -> None:
        drawing(self, *given)
        assert self.memory is not None
        self.memory.step.item()

    monkeypatch.setattr(RecordedSteps, "_draw", inside)
    policy.release_memory()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing: item"):
        draw(policy, 0, max_new_tokens=40)


def test_memory_allocated_in_a_capture_and_kept_is_caught(
    device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, forward, kept = long_policy(), recorded_steps.batched_forward, []

    def keeping(*given: Any) -> torch.Tensor:
        kept.append(forward(*given))
        return kept[-1]

    monkeypatch.setattr(recorded_steps, "batched_forward", keeping)
    draw(policy, 0, max_new_tokens=2)
    with pytest.raises(AssertionError):
        assert_graphs_keep_nothing(policy)


def test_memory_that_graphs_read_and_nobody_keeps_is_caught(
    device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = long_policy()
    draw(policy, 0, max_new_tokens=2)
    policy.rotary.tables.clear()  # replaced by longer ones
    draw(policy, 1, max_new_tokens=2)
    policy.rotary.tables.clear()
    policy.steps._rotary_tables.clear()
    with pytest.raises(RuntimeError, match="memory has been freed"):
        draw(policy, 2, max_new_tokens=2)


def test_sums_in_any_order_are_caught(
    make_run: MakeRun, qwen: Path, device: EmulatedDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_layers, "take_rows", lambda values, index: values.index_select(0, index))
    make_pack(make_run, qwen, {}).advance()
    assert {name for name, _ in device.unordered} == {"index_add"}


def test_the_block_is_what_the_waits_are_counted_by() -> None:
    assert StaticBlockDecoder.max_steps >= 16
