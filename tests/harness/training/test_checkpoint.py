"""A cell's state comes back from its file exactly, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from klab.harness.training import checkpoint
from klab.harness.training.checkpoint import CellState, UnusableCheckpoint
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
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
        patch.setattr(checkpoint, "SCHEMA", 1)
        checkpoint.write(tmp_path / "c", state)
    with pytest.raises(UnusableCheckpoint, match="schema 1, not 2"):
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
