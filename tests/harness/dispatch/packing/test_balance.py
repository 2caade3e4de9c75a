"""Pack sizes follow measured step times, keep the workers busy to the end, and change nobody's bits."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.grid import Grid
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.local.pool import Pool
from klab.harness.dispatch.packing.balance import (
    START_SECONDS,
    even_sizes,
    exploratory_size,
    makespan,
    pack_seconds,
    pack_sizes,
    without_noise,
)
from klab.harness.dispatch.packing.packs import PACK_SIZE, cost_key, make_packs
from klab.harness.dispatch.packing.step_times import (
    FILE,
    HardwareKey,
    append_measurement,
    have_changed,
    read_step_times,
    record_job,
)
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run
from tests.support.run_processes import wait_for

MakeGrid = Callable[..., Grid]

PLACE = HardwareKey("a processor, 2 cores", 1)


def partitions(number: int, most: int) -> Iterator[list[int]]:
    """All ways to write `number` as a sum of numbers up to `most`."""
    if not number:
        yield []
    for first in range(min(number, most), 0, -1):
        for rest in partitions(number - first, first):
            yield [first, *rest]


def least_makespan(number: int, workers: int, seconds: Sequence[float]) -> float:
    """Over all packs, and all ways to give them to workers."""
    least = float("inf")
    for sizes in partitions(number, len(seconds)):
        for owners in itertools.product(range(workers), repeat=len(sizes)):
            ends = [0.0] * workers
            for size, owner in zip(sizes, owners, strict=True):
                ends[owner] += seconds[size - 1]
            least = min(least, max(ends))
    return least


def cells(number: int, prompts: int = 4, updates: int = 100) -> dict[str, dict[str, Any]]:
    training = {"prompts": prompts, "updates": updates}
    return {
        f"cell{prompts}-{index}": {"task": {"name": "addition"}, "policy": {}, "training": {**training, "lr": index}}
        for index in range(number)
    }


def sizes(number: int, times: dict[int, float], workers: int, **options: Any) -> list[int]:
    alike = cells(number)
    planned = make_packs(alike, None, workers, {cost_key(alike["cell4-0"]): times}, **options)
    assert planned.sizes_from == "measured"
    assert sorted(cell for pack in planned.packs for cell in pack.cells) == sorted(alike)
    return [len(pack.cells) for pack in planned.packs]


@given(
    st.dictionaries(st.integers(1, 6), st.floats(0.001, 0.5), min_size=1),
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_no_packs_let_the_workers_end_sooner(
    times: dict[int, float], updates: int, most: int, number: int, workers: int
) -> None:
    """By trying all, for any measured times."""
    seconds = pack_seconds(times, updates, most)
    order = pack_sizes(number, workers, seconds)
    assert sum(order) == number
    found = makespan([seconds[size - 1] for size in order], workers)
    assert found == pytest.approx(least_makespan(number, workers, seconds), rel=1e-8)


def test_pack_seconds_between_and_beyond_what_was_measured() -> None:
    """By hand: packs of 2 take 2 × 0.3 s an update, packs of 4 take 4 × 0.2 s."""
    steps = [(seconds - START_SECONDS) / 10 for seconds in pack_seconds({2: 0.3, 4: 0.2}, 10, 6)]
    assert steps == pytest.approx([0.3, 0.6, 0.7, 0.8, 1.0, 1.2])
    dips = pack_seconds({1: 1.0, 3: 0.1}, 10, 3)
    assert dips == pytest.approx([11.0, 11.0, 11.0])  # more cells never take less time


def test_the_fastest_size_is_chosen_and_workers_get_equal_shares() -> None:
    slow_beyond_four = {1: 0.5, 2: 0.3, 4: 0.2, 8: 0.4, 16: 0.4}
    assert sizes(32, slow_beyond_four, 2) == [4] * 8
    assert sizes(30, slow_beyond_four, 2) == [4, 4, 4, 4, 4, 4, 3, 3]
    faster_together = {8: 0.4, 16: 0.2, 32: 0.3, 4: 0.5}
    assert sizes(64, faster_together, 2) == [16] * 4
    assert sizes(30, faster_together, 2) == [15, 15]
    assert sizes(3, faster_together, 2) == [2, 1]


@given(st.integers(1, 60), st.integers(1, 6), st.floats(0.01, 1.0), st.floats(0.001, 1.0))
def test_sizes_differ_by_one_at_most_where_each_cell_adds_the_same(
    number: int, workers: int, fixed: float, each: float
) -> None:
    times = {size: each + fixed / size for size in (1, 2, 4, 8, 16, 32)}
    seconds = pack_seconds(times, 10, 32)
    for share in even_sizes(number, min(workers, number)):
        packs = pack_sizes(share, 1, seconds)
        assert max(packs) - min(packs) <= 1
        assert len(packs) == -(-share // 32)


def test_what_was_asked_for_wins_and_nothing_measured_means_the_default() -> None:
    alike = cells(30)
    times = {cost_key(alike["cell4-0"]): {2: 0.1, 8: 0.9}}
    asked = make_packs(alike, 7, 2, times)
    assert ([len(pack.cells) for pack in asked.packs], asked.sizes_from) == ([7, 7, 7, 7, 2], "cells_per_job")
    for nothing in (None, {}, {"another kind": {2: 0.1}}):
        planned = make_packs(alike, None, 2, nothing)
        assert ([len(pack.cells) for pack in planned.packs], planned.sizes_from) == ([15, 15], "default")
        assert max(len(pack.cells) for pack in make_packs(cells(96), None, 1, nothing).packs) == PACK_SIZE


def test_shapes_share_the_workers_by_their_time_and_the_longest_packs_come_first() -> None:
    short, long = cells(8, prompts=4), cells(8, prompts=64)
    times = {cost_key(short["cell4-0"]): {4: 0.01, 8: 0.01}, cost_key(long["cell64-0"]): {4: 0.2, 8: 0.2}}
    planned = make_packs({**short, **long}, None, 4, times)
    assert [(pack.cells[0].split("-")[0], len(pack.cells)) for pack in planned.packs] == [
        *[("cell64", 2)] * 4,
        ("cell4", 8),
    ]
    partly = make_packs({**short, **long}, None, 4, {cost_key(short["cell4-0"]): {8: 0.01}})
    assert partly.sizes_from == "partly measured"


def test_one_pack_of_an_unknown_size_where_there_is_room_for_it() -> None:
    assert exploratory_size({8: 0.1}, 24) == 16
    assert exploratory_size({8: 0.1}, 23) is None
    assert exploratory_size({8: 0.1, 16: 0.2}, 32) == exploratory_size({8: 0.1}, 32, running=[16]) == 4
    assert exploratory_size({8: 0.1, 16: 0.2}, 31) is exploratory_size({8: 0.1}, 31, running=[16]) is None
    assert exploratory_size({8: 0.1, 15: 0.2, 5: 0.2}, 100) is None
    assert exploratory_size({32: 0.1, 16: 0.2}, 1000) is None
    assert sizes(96, {16: 0.1}, 2) == [32, 16, 16, 16, 16]
    assert sizes(96, {16: 0.1}, 2, running=[32, 8]) == [16] * 6


def test_sizes_are_not_chosen_for_what_may_be_noise() -> None:
    assert without_noise({4: 0.95, 8: 1.0, 16: 1.09, 32: 1.11, 2: 0.9}, 8) == {
        4: 1.0,
        8: 1.0,
        16: 1.0,
        32: 1.11,
        2: 0.9,
    }
    assert without_noise({4: 0.95, 16: 1.0}, 8) == {4: 0.95, 16: 1.0}
    assert sizes(64, {8: 1.0, 4: 0.92, 16: 0.98}, 2) == [16] * 4
    assert sizes(64, {8: 1.0, 4: 0.8, 16: 0.98}, 2, running=[2]) == [4] * 16


def test_measurements_are_kept_by_place_and_survive_damage(tmp_path: Path) -> None:
    assert read_step_times(tmp_path, PLACE) == {}
    for seconds in (9.0, 9.0, 9.0, 0.1, 0.3, 0.2, 0.2, 5.0):
        append_measurement(tmp_path, PLACE, "kind", 8, seconds)
    append_measurement(tmp_path, HardwareKey("a processor, 2 cores", 2), "kind", 8, 7.0)
    with (tmp_path / FILE).open("a") as file:
        file.write("no record\n" + json.dumps({"schema": 1, "size": 3}) + "\n")
    append_measurement(tmp_path, PLACE, "kind", 1, 0.5)
    assert read_step_times(tmp_path, PLACE) == {"kind": {8: 0.1, 1: 0.5}}  # the least of the five newest
    assert read_step_times(tmp_path, None) == {}


def test_the_file_stays_small(tmp_path: Path) -> None:
    append_measurement(tmp_path, PLACE, "kind", 8, 1.0)
    line = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(line * (2 * 2**20 // len(line) + 1))
    append_measurement(tmp_path, PLACE, "kind", 4, 0.5)
    assert (tmp_path / FILE).stat().st_size <= 2**20
    assert read_step_times(tmp_path, PLACE) == {"kind": {8: 1.0, 4: 0.5}}


def test_news_are_new_sizes_and_times_that_changed() -> None:
    assert not have_changed({}, {})
    assert have_changed({"a": {8: 1.0}}, {})
    assert have_changed({"a": {8: 1.0, 4: 1.0}}, {"a": {8: 1.0}})
    assert not have_changed({"a": {8: 1.09}}, {"a": {8: 1.0}})
    assert have_changed({"a": {8: 1.2}}, {"a": {8: 1.0}})
    assert have_changed({"a": {8: 1.0}}, {"a": {8: 1.2}})


def test_only_jobs_of_one_process_on_this_machine_are_measured() -> None:
    assert HardwareKey.for_launch("local", Resources()) == HardwareKey.for_launch("here", Resources())
    assert HardwareKey.for_launch("slurm", Resources()) is None
    assert HardwareKey.for_launch("local", Resources(processes=2)) is None


def test_a_run_measures_and_the_next_plan_uses_it(make_grid: MakeGrid, place: Path) -> None:
    first = Run.create(place / "runs/first", make_grid("first", seeds=2, updates=6))
    launch(first, InlineExecutor(), workers=1)
    known = read_step_times(place / "runs", HardwareKey.for_launch("local", Resources()))
    word = cost_key(first.resolved(first.cells[0]))
    assert list(known) == [word]
    assert list(known[word]) == [2]
    both = [first.cell(identity).metrics()[1:] for identity in first.cells]
    spent = [[sum(value for key, value in row.items() if key.startswith("seconds")) for row in rows] for rows in both]
    middle = sorted((one + other) / 2 for one, other in zip(*spent, strict=True))[2]
    assert 0 < known[word][2] <= middle
    record_job(first, first.cells, PLACE, busy=0.5)
    assert read_step_times(place / "runs", PLACE) == {word: {2: pytest.approx(0.5 * middle)}}

    second = make_grid("second", seeds=9, updates=9)
    resolved = {cell.id: cell.resolved() for cell in second.cells}
    planned = make_packs(resolved, None, 1, known)
    assert planned.sizes_from == "measured"
    assert [len(pack.cells) for pack in planned.packs] == [4, 5]  # twice the measured size, to know it, and the rest


def test_what_waits_is_packed_anew_when_step_times_are_known(make_grid: MakeGrid, place: Path) -> None:
    """Packs of one cell, one after the other; when the first is measured others go together, with the same bits."""
    grid = make_grid(seeds=4, updates=6)
    alone, together = Run.create(place / "alone/little", grid), Run.create(place / "runs/little", grid)
    launch(alone, InlineExecutor(), workers=1, cells_per_job=1)
    pool, where = Pool(together), HardwareKey.for_launch("local", Resources())
    pool.replace_queue([Pack((each,)) for each in together.cells], slots=1, threads=1, gpus=[], hardware=where)
    wait_for(lambda: pool.step() and not pool.running and not pool.waiting)
    assert count(statuses(together)) == {"finished": 4}
    processes = Counter(together.cell(each).attempts()[0]["pid"] for each in together.cells)
    assert sorted(processes.values()) == [1, 1, 2]  # two cells at once were worth trying
    for identity in grid.cells:
        bare = [
            [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]
            for rows in (alone.cell(identity.id).metrics(), together.cell(identity.id).metrics())
        ]
        assert bare[0] == bare[1]
        assert len(bare[0]) == 6
