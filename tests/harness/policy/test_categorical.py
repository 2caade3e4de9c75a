"""Both ways of drawing tokens, that of CPUs and that of devices, draw the same ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from klab.harness.policy.categorical import (
    UniformSlice,
    UniformTable,
    invert,
    invert_by_chunks,
    nucleus,
    nucleus_by_bisection,
    uniform_numbers,
)


def distributions(seed: int, rows: int, vocabulary: int, dtype: torch.dtype, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * sharpness
    logits[:, ::7] = -torch.inf
    return logits.to(dtype).softmax(-1)


@pytest.mark.parametrize("vocabulary", [3, 127, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_hold_the_same_tokens(vocabulary: int, dtype: torch.dtype) -> None:
    probs = distributions(1, 4000, vocabulary, dtype)
    uniforms = torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(invert_by_chunks(probs, uniforms), invert(probs.double(), uniforms))


def test_no_random_number_draws_an_impossible_token() -> None:
    probs = torch.tensor([[0.0, 0.3, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    below_one = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    for number in (torch.tensor(0.0, dtype=torch.float64), below_one):
        tokens = invert_by_chunks(probs, number.expand(3, 1))
        assert (probs.gather(1, tokens) > 0).all()
    wide = distributions(3, 2000, 700, torch.float32)
    assert (wide.gather(1, invert_by_chunks(wide, below_one.expand(2000, 1))) > 0).all()


def test_nan_draws_some_token() -> None:
    assert invert_by_chunks(torch.full((2, 300), torch.nan), torch.full((2, 1), 0.5).double()).tolist() == [[0], [0]]
    nucleus_by_bisection(torch.full((2, 300), torch.nan), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999999])
def test_the_nucleus_needs_no_sort(dtype: torch.dtype, top_p: float) -> None:
    for sharpness in (0.0, 0.5, 8.0):  # 0: all equally likely
        probs = distributions(4, 50, 301, dtype, sharpness)
        assert torch.equal(nucleus_by_bisection(probs, top_p) > 0, nucleus(probs.double(), top_p) > 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any), st.floats(0.01, 0.99))
def test_of_equally_likely_tokens_the_first_are_in_the_nucleus(weights: list[int], top_p: float) -> None:
    probs = torch.tensor([weights], dtype=torch.float64) / sum(weights)
    kept = nucleus_by_bisection(probs, top_p)[0]
    total, expected = 0.0, set()
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if total >= top_p - 1e-12:
            break
        if weights[index]:
            expected.add(index)
        total += float(probs[0, index])
    assert set(kept.nonzero().view(-1).tolist()) == expected


def test_a_table_has_the_numbers_that_are_drawn_step_by_step() -> None:
    cpu = torch.device("cpu")

    def source() -> UniformSlice:
        return UniformSlice(torch.Generator().manual_seed(5), first=2, total=40)

    one = source()
    steps = torch.cat([uniform_numbers(one, 20, cpu).view(1, -1) for _ in range(12)])
    table = UniformTable(source(), 20)
    firsts = [index % 5 for index in range(20)]
    found = torch.from_numpy(table.numbers(firsts, 3))
    for trajectory, first in enumerate(firsts):
        assert torch.equal(found[:, trajectory], steps[first : first + 3, trajectory])
    assert torch.equal(torch.from_numpy(table.numbers([8] * 20, 4)), steps[8:12])
