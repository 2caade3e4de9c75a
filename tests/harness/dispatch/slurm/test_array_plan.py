"""Arrays of a launch: every task once, no array too large, the cap kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from klab.harness.dispatch.slurm.array_plan import Chunk, split_into_arrays


@given(st.integers(0, 400), st.integers(1, 60), st.none() | st.integers(1, 80))
def test_every_task_is_in_one_array_and_the_cap_is_shared(tasks: int, largest: int, cap: int | None) -> None:
    chunks = split_into_arrays(tasks, largest, cap)
    assert [n for chunk in chunks for n in range(chunk.first, chunk.first + chunk.count)] == list(range(tasks))
    assert all(1 <= chunk.count <= largest and 1 <= chunk.parallel <= chunk.count for chunk in chunks)
    chains: list[list[Chunk]] = []
    place: dict[int, list[Chunk]] = {}
    for number, chunk in enumerate(chunks):
        if chunk.after is None:
            chains.append([])
        place[number] = chains[-1] if chunk.after is None else place[chunk.after]
        place[number].append(chunk)
    if cap is not None:
        assert sum(max(chunk.parallel for chunk in chain) for chain in chains) <= cap
        assert len(chunks) <= cap or len(chains) == cap


def test_two_arrays_share_a_cap_of_five() -> None:
    assert split_into_arrays(12, 10, 5) == [Chunk(0, 6, 3), Chunk(6, 6, 2)]


def test_more_arrays_than_the_cap_form_chains() -> None:
    assert [chunk.after for chunk in split_into_arrays(9, 2, 2)] == [None, None, 0, 1, 2]


def test_without_a_cap_nothing_waits() -> None:
    assert split_into_arrays(4, 3) == [Chunk(0, 2, 2), Chunk(2, 2, 2)]
