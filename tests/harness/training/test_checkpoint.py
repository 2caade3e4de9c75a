"""A cell's state comes back from its file exactly, or not at all."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from klab.harness.training import checkpoint
from klab.harness.training.checkpoint import CellState, UnusableCheckpoint
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.harness.training.runtime.checkpoint_clock import CheckpointClock
from tests.support.training_records import MakeRun

CPU = torch.device("cpu")


def states(make_run: MakeRun) -> list[CellState]:
    run = make_run(training={"lag": 2}, objectives=[{"advantage": "greedy_baseline"}], seeds=2)
    pack = Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])
    pack.advance()
    pack.streaks[1] = 4
    return [pack.state(0), pack.state(1)]


def test_everything_comes_back(make_run: MakeRun, tmp_path: Path) -> None:
    for state in states(make_run):
        checkpoint.write(tmp_path / state.cell, state)
        found = checkpoint.read(tmp_path / state.cell / checkpoint.FILE, state.cell, CPU)
        assert (found.cell, found.update, found.streak) == (state.cell, state.update, state.streak)
        assert found.optimizer.keys() == state.optimizer.keys()
        assert all(torch.equal(value, found.optimizer[name]) for name, value in state.optimizer.items())
        assert len(found.pending) == len(state.pending) == 2
        for mine, theirs in zip(state.pending, found.pending, strict=True):
            assert (mine.number, mine.rollout.texts) == (theirs.number, theirs.rollout.texts)
            assert mine.rollout.prompts == theirs.rollout.prompts
            for field in dataclasses.fields(mine.rollout):
                value = getattr(mine.rollout, field.name)
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, getattr(theirs.rollout, field.name)), field.name
            for name in ("rewards", "correct", "reference_logprobs", "greedy_rewards"):
                assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_a_second_write_replaces_the_first(make_run: MakeRun, tmp_path: Path) -> None:
    state = states(make_run)[0]
    checkpoint.write(tmp_path / "c", state)
    checkpoint.write(tmp_path / "c", dataclasses.replace(state, update=9))
    assert checkpoint.read(tmp_path / "c" / checkpoint.FILE, state.cell, CPU).update == 9
    assert [file.name for file in (tmp_path / "c").iterdir()] == [checkpoint.FILE]


def test_another_schema_is_not_read(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = states(make_run)[0]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", 2)
        checkpoint.write(tmp_path / "c", state)
    with pytest.raises(UnusableCheckpoint, match="schema 2, not 3"):
        checkpoint.read(tmp_path / "c" / checkpoint.FILE, state.cell, CPU)


@pytest.mark.parametrize("place", [9, 200, 3000, -1])
def test_a_flipped_bit_anywhere_is_noticed(make_run: MakeRun, tmp_path: Path, place: int) -> None:
    state = states(make_run)[0]
    checkpoint.write(tmp_path / "c", state)
    file = tmp_path / "c" / checkpoint.FILE
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    with pytest.raises(UnusableCheckpoint):
        checkpoint.read(file, state.cell, CPU)


SHAPES = st.lists(st.integers(0, 3), max_size=3)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=4), st.tuples(SHAPES, st.sampled_from([*checkpoint._TYPE_NAMES])), max_size=5
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(TENSORS, st.integers(1, 40))
def test_the_file_is_what_the_library_would_write_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: dict[str, tuple[list[int], torch.dtype]], piece: int
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    draw = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randint(0, 2, shape, generator=draw).to(dtype).mT.mT.transpose(0, -1)
        if len(shape) > 1
        else torch.randint(0, 2, shape, generator=draw).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    checkpoint.write(tmp_path, CellState("a cell", 3, 0, drawn))
    found = load_file(tmp_path / checkpoint.FILE)
    assert found.keys() == {f"optimizer/{name}" for name in drawn}
    for name, value in drawn.items():
        assert torch.equal(found[f"optimizer/{name}"], value)
        assert found[f"optimizer/{name}"].dtype == value.dtype
    assert checkpoint.read(tmp_path / checkpoint.FILE, "a cell", CPU).optimizer.keys() == drawn.keys()
    save_file({name: value.contiguous() for name, value in found.items()}, tmp_path / "theirs")
    mine, theirs = ((tmp_path / name).read_bytes() for name in (checkpoint.FILE, "theirs"))
    assert sorted(mine[8 + int.from_bytes(mine[:8], "little") :]) == sorted(
        theirs[8 + int.from_bytes(theirs[:8], "little") :]
    )


PEAK = """
import resource, sys
from pathlib import Path
import torch
from klab.harness.training import checkpoint
tensors = {str(i): torch.ones(2**22) for i in range(8)}  # 16 MiB each
checkpoint.write(Path(sys.argv[1]), checkpoint.CellState("warm", 1, 0, {"0": torch.ones(1)}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.write(Path(sys.argv[1]), checkpoint.CellState("a cell", 1, 0, tensors))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**14)
"""


def test_writing_takes_less_memory_than_the_largest_tensor(tmp_path: Path) -> None:
    """128 MiB of tensors, by the peak of a process's resident memory; all at once would be 8 or 16 largest tensors."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "c")], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2
    assert (tmp_path / "c" / checkpoint.FILE).stat().st_size > 2**27


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=50)
@given(st.integers(1, 100), st.integers(1, 1000), st.integers(1, 50))
def test_checkpoints_by_the_clock_take_a_tenth_of_the_time(every: int, saves: int, update: int) -> None:
    """A save that takes longer than the interval does not repeat after every update."""
    clock = Clock()
    timer = CheckpointClock(every, clock)
    spent = since = 0
    for _ in range(200):
        assert timer.due == (since >= max(every, 9 * saves if spent else 0))
        if timer.due:
            with timer.saving():
                clock.now += saves
            spent, since = spent + saves, 0
        clock.now += update
        since += update
    assert spent <= 0.1 * (clock.now - 100.0) + saves


def test_checkpoints_are_synced_every_few_seconds() -> None:
    clock = Clock()
    timer, durable = CheckpointClock(1.0, clock), []
    for seconds in (1.0, 3.0, 1.0, 1.0, 5.0):
        clock.now += seconds
        with timer.saving() as synced:
            durable.append(synced)
    assert durable == [False, False, True, False, True]
