"""An update happens once or not at all: allocations that fail, one after the other, and what the pack is then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.harness.training.runtime.oom import is_out_of_memory
from klab.harness.training.runtime.timer import PhaseTimer
from tests.support.training_records import MakeRun

ADAPTERS = {"lora": {"rank": 2}}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "16-bit": {"policy": {"dtype": "bfloat16"}},
    "64-bit, clipped": {"policy": {"dtype": "float64"}, "training": {"clip_norm": 1e-3}},
    "adapters": {"policy": ADAPTERS},
    "16-bit adapters": {"policy": {**ADAPTERS, "dtype": "bfloat16"}},
    "critic": {"objective": {"advantage": "gae"}, "training": {"critic": {"kind": "model"}}},
    "shared critic": {"objective": {"advantage": "gae"}, "training": {"critic": {"kind": "head"}}},
    "micro-batches": {"training": {"micro_batch": 4}},
}


class FailingAllocator(TorchDispatchMode):
    """Counts the operations that return new storage, and lets number `fails` (from 0) run out of memory."""

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.count, self.fails = 0, fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(each.alias_info is None for each in func._schema.returns):
            self.count += 1
            if self.count - 1 == self.fails:
                raise torch.OutOfMemoryError("out of memory, as the test wants it")
        return func(*args, **(kwargs or {}))


class StepTimer(PhaseTimer):
    """Notes how many allocations there were before the phase `step`."""

    def __init__(self, allocator: FailingAllocator) -> None:
        super().__init__()
        self.allocator, self.before_step = allocator, 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == "step":
            self.before_step = self.allocator.count
        with super().__call__(phase):
            yield


def pack_of_two(make_run: MakeRun, policy: Any = None, training: Any = None, objective: Any = None) -> Pack:
    run = make_run(
        training={"updates_per_rollout": 8, "prompts": 2, "updates": 8, **(training or {})},
        policy=policy or {},
        objectives=[objective or {}],
        seeds=2,
    )
    pack = Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])
    pack.advance()  # draws the rollout that all further updates use
    return pack


def everything(pack: Pack) -> dict[str, Any]:
    """All that an update may change, bit by bit."""
    found: dict[str, Any] = {"done": pack.done, "streaks": list(pack.streaks), "coefficients": list(pack.coefficients)}
    optimizers = [pack.optimizer] if pack.critics is None else [pack.optimizer, pack.critics.optimizer]
    for number, optimizer in enumerate(optimizers):
        for cell in range(len(pack.members)):
            found |= {f"{number}/{cell}/{name}": value.clone() for name, value in optimizer.state(cell).items()}
        found |= {f"{number}/{name}": value.detach().clone() for name, value in optimizer.parameters.items()}
    return found


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_runs_out_of_memory_anywhere_can_be_made_again(make_run: MakeRun, case: str) -> None:
    """Every allocation of the step, and a tenth of those of the forward and backward passes."""
    pack = pack_of_two(make_run, **CASES[case])
    states = [copy.deepcopy(pack.state(c)) for c in range(2)]
    before = everything(pack)
    with FailingAllocator() as counting:
        timer = pack._timer = StepTimer(counting)
        pack.advance()
    after = everything(pack)
    assert any(not torch.equal(after[n], v) for n, v in before.items() if isinstance(v, torch.Tensor))
    assert 0 < timer.before_step < counting.count
    tried = [*range(0, timer.before_step, 10), *range(timer.before_step, counting.count)]
    for fails in tried:  # of a pack each: one that has made an update has memory that it need not allocate again
        again = Pack.resumed(pack.members, states)
        with FailingAllocator(fails), pytest.raises(Exception) as caught:  # noqa: PT011 (of many types; see below)
            again.advance()
        assert is_out_of_memory(caught.value)
        assert_equal(everything(again), before)
        again.advance()
        assert_equal(everything(again), after)
