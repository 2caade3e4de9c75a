"""Packs hold every cell once, only cells of one shape, and keep the workers busy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from klab.harness.dispatch.packing.packs import PACK_SIZE, STACKED_BYTES, make_packs, stacking_key


def cells(shapes: list[int]) -> dict[str, dict[str, Any]]:
    """Cells of which equal numbers have equal shapes."""
    return {
        f"cell{number}": {"task": {"name": "addition"}, "policy": {}, "training": {"prompts": prompts, "lr": number}}
        for number, prompts in enumerate(shapes)
    }


@given(st.lists(st.integers(1, 3), max_size=60), st.none() | st.integers(1, 20), st.integers(1, 9))
def test_every_cell_once_and_shapes_apart(shapes: list[int], size: int | None, workers: int) -> None:
    given_cells = cells(shapes)
    packs = make_packs(given_cells, size, workers).packs
    assert sorted(cell for pack in packs for cell in pack.cells) == sorted(given_cells)
    for pack in packs:
        assert 1 <= len(pack.cells) <= (size or PACK_SIZE)
        assert len({stacking_key(given_cells[cell]) for cell in pack.cells}) == 1


@given(st.integers(1, 200), st.integers(1, 9))
def test_alike_cells_are_shared_evenly(number: int, workers: int) -> None:
    sizes = [len(pack.cells) for pack in make_packs(cells([1] * number), None, workers).packs]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) % workers == 0 or len(sizes) == number


def test_sixty_cells_on_two_workers_are_four_packs() -> None:
    assert [len(pack.cells) for pack in make_packs(cells([1] * 60), None, 2).packs] == [15] * 4


def test_cells_of_a_large_model_get_a_job_each_unless_asked_otherwise(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"

    def sizes(model: str, size: int | None = None) -> list[int]:
        alike = {
            identity: {**cell, "policy": {"name": "hf", "model": model}} for identity, cell in cells([1] * 6).items()
        }
        return [len(pack.cells) for pack in make_packs(alike, size).packs]

    for length, expected in ((STACKED_BYTES, [6]), (STACKED_BYTES + 1, [1] * 6)):
        with weights.open("wb") as file:
            file.truncate(length)
        assert sizes(str(tmp_path)) == expected
    assert sizes(str(tmp_path), 3) == [3, 3]
    assert sizes("someone/some-model") == [1] * 6
