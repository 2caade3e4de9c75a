"""Torn and corrupted files of every kind: a repair or a clear mistake, never a wrong number, never a traceback."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import UserError
from klab.harness.dispatch.status import statuses
from klab.harness.store import Run
from tests.faults.conftest import MakeRun
from tests.support.forked_runs import live, wait
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.faults
SETTINGS: dict[str, Any] = {"seeds": 2, "training": {"updates": 6, "checkpoint_updates": 2, "evaluate_every": 3}}
Damage = Callable[[bytes, random.Random], bytes]


def torn(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))] if data else data


def flipped(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return b"\x00"
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def garbage(data: bytes, dice: random.Random) -> bytes:
    return dice.randbytes(dice.randrange(1, 200))


def valid_json(data: bytes, dice: random.Random) -> bytes:
    return dice.choice([b"{}\n", b"[]\n", b"null\n", b'{"schema":1}\n', b'{"schema":2}\n', b"1e999\n", b'"x"\n'])


def nested(data: bytes, dice: random.Random) -> bytes:
    return b"[" * 200_000


def nothing(data: bytes, dice: random.Random) -> bytes:
    return b""


DAMAGES: tuple[Damage, ...] = (torn, torn, flipped, flipped, garbage, valid_json, nested, nothing)


def files_of(run: Run) -> list[Path]:
    """Every file of the run folder, of one cell only."""
    other = run.cell(run.cells[1]).path
    return sorted(
        path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file() and other not in path.parents
    )


def test_damaged_files_of_an_interrupted_run(make_run: MakeRun, finished: MakeRun) -> None:
    """Stopped in the middle; then one file at a time is damaged in several ways; then the cells run on."""
    quiet, dice = finished("damage", **SETTINGS), random.Random(7)
    middle = make_run("damage", **SETTINGS)
    assert wait(live(middle, lambda: stop_after(4))) == 2
    tried, repaired, refused = 0, 0, 0
    wrong: list[tuple[Path, str]] = []
    for name in files_of(middle):
        for damage in DAMAGES:
            tried += 1
            copy = copied(middle)
            (copy / name).write_bytes(damage((middle.path / name).read_bytes(), dice))
            said = complaint(copy)
            if said is None and wait(live(Run.open(copy))) == 0:
                wrong += [] if same_bits(quiet, Run.open(copy)) else [(name, damage.__name__)]
                repaired += 1
                continue
            refused += 1
            said = said or complaint(copy)
            assert said is not None, (name, damage.__name__)
            assert name.name in said, (name, damage.__name__, said)
    assert wrong == []
    print(f"{tried} damaged files: {repaired} repaired to the same bits, {refused} refused with their name")


def complaint(path: Path) -> str | None:
    """What klab says about a run folder with which something is wrong, None when it finds nothing."""
    try:
        run = Run.open(path)
        details = [row.detail for row in statuses(run) if row.state == "failed"]
        return details[0] + str([run.cell(cell).error() for cell in run.cells]) if details else None
    except UserError as error:
        return str(error)


def test_damaged_files_of_a_finished_run_never_give_a_wrong_number(finished: MakeRun) -> None:
    from klab.reports import load_run

    dice = random.Random(11)
    run = finished("damage", **SETTINGS)
    before = load_run(run.path).summary()
    tried, same, refused = 0, 0, 0
    wrong: list[tuple[Path, str, str]] = []
    for name in files_of(run):
        for damage in DAMAGES:
            tried += 1
            copy = copied(run)
            (copy / name).write_bytes(damage((run.path / name).read_bytes(), dice))
            try:
                study = load_run(copy)
                after, said = study.summary(), "".join(study.cells["error"].dropna())
            except UserError as error:
                after, said = None, str(error)
            complaint(copy)
            if name.name not in said and (after is None or not before.equals(after)):
                wrong.append((name, damage.__name__, said))
            same, refused = same + (not said), refused + bool(said)
    assert wrong == []
    print(f"{tried} damaged files of a finished run: {same} without effect, {refused} refused with their name")


def same_bits(left: Run, right: Run) -> bool:
    try:
        assert_same(left, right)
    except AssertionError:
        return False
    return True


def copied(run: Run) -> Path:
    """A fresh copy of the run folder."""
    copy = run.path.parent.parent / "copy" / run.path.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run.path, copy)
    return copy


def stop_after(updates: int) -> None:
    """Interrupt this process's training at that update's boundary."""
    import klab.harness.training

    whole, left = klab.harness.training.run_cells, [updates]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    def limited(path: Any, cells: Any, **keywords: Any) -> Any:
        return whole(path, cells, **{**keywords, "stop": stop})

    klab.harness.training.run_cells = limited  # type: ignore[assignment]
