"""AdamW on slices against torch's, and a slice's independence of its mates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klab.grid.schema.sections import TrainingSection
from klab.harness.training.optim.optimizer import StackedAdamW, norm

SHAPES = {"matrix": (5, 3), "norm": (7,), "other": (3, 11)}


def stack(cells: int) -> dict[str, torch.Tensor]:
    drawn = {name: torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    return {name: value[:cells].clone().requires_grad_() for name, value in drawn.items()}


def gradient(cell: int, step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 * cell + step)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def run(optimizer: StackedAdamW, cells: list[int], steps: int, lr: float = 0.01) -> None:
    for step in range(steps):
        given = [gradient(cell, step) for cell in cells]
        for name, parameter in optimizer.parameters.items():
            parameter.grad = torch.stack([each[name] for each in given]).to(parameter.dtype)
        for c, slices in enumerate(optimizer.gradients()):
            optimizer.apply_step(optimizer.prepare_step(c, slices, lr, float(norm(slices))))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_it_is_torchs_adamw_with_gradient_clipping(clip: float | None) -> None:
    settings = TrainingSection(clip_norm=clip, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6)
    ours = stack(1)
    run(StackedAdamW(ours, [settings]), [0], steps=5)
    theirs = {name: value[0].detach().clone().requires_grad_() for name, value in stack(1).items()}
    adam = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for step in range(5):
        for name, value in gradient(0, step).items():
            theirs[name].grad = value
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adam.step()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name][0], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-7), (torch.float64, 1e-14)])
def test_clipping_is_as_exact_as_the_weights(dtype: torch.dtype, error: float) -> None:
    weights = {name: value.detach().to(dtype).requires_grad_() for name, value in stack(1).items()}
    optimizer = StackedAdamW(weights, [TrainingSection(clip_norm=0.3)])
    run(optimizer, [0], steps=1)
    given = {name: value.double() for name, value in gradient(0, 0).items()}
    scale = 0.3 / float(norm(list(given.values())))
    for name, value in given.items():
        expected = 0.1 * scale * value  # Adam's first moment after one step, 1 − β₁ = 0.1
        torch.testing.assert_close(optimizer.first[name][0].double(), expected, rtol=error, atol=0)


def test_weight_decay_shrinks_matrices_only() -> None:
    decayed, plain = stack(1), stack(1)
    run(StackedAdamW(decayed, [TrainingSection(weight_decay=0.5)]), [0], steps=1, lr=0.1)
    run(StackedAdamW(plain, [TrainingSection()]), [0], steps=1, lr=0.1)
    assert torch.equal(decayed["norm"], plain["norm"])
    torch.testing.assert_close(decayed["matrix"], plain["matrix"] - 0.05 * stack(1)["matrix"])


def test_a_cells_bits_do_not_depend_on_its_mates() -> None:
    together, settings = stack(3), [TrainingSection(clip_norm=clip) for clip in (None, 0.1, 2.0)]
    run(StackedAdamW(together, settings), [0, 1, 2], steps=4)
    for c in range(3):
        alone = {name: value[c : c + 1].detach().clone().requires_grad_() for name, value in stack(3).items()}
        run(StackedAdamW(alone, [settings[c]]), [c], steps=4)
        for name, value in alone.items():
            assert torch.equal(together[name][c], value[0])


def test_a_restored_state_goes_on_with_the_same_bits() -> None:
    through, half, resumed = stack(2), stack(2), stack(2)
    settings = [TrainingSection(), TrainingSection(clip_norm=0.2)]
    run(StackedAdamW(through, settings), [0, 1], steps=3)
    first = StackedAdamW(half, settings)
    run(first, [0, 1], steps=3)
    second = StackedAdamW(resumed, settings)
    for c in range(2):
        second.restore(c, first.state(c))
    for optimizer in (first, second):
        run(optimizer, [0, 1], steps=2)
    for name in SHAPES:
        assert torch.equal(half[name], resumed[name])
        assert not torch.equal(half[name], through[name])


def test_a_state_of_another_architecture_is_refused() -> None:
    optimizer = StackedAdamW(stack(1), [TrainingSection()])
    state = optimizer.state(0)
    state["weight/matrix"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="matrix has shape"):
        optimizer.restore(0, state)


def test_only_the_cell_with_an_infinite_weight_is_not_finite() -> None:
    weights = stack(3)
    with torch.no_grad():
        weights["other"][1, 0, 0] = float("inf")
    assert StackedAdamW(weights, [TrainingSection()] * 3).finite() == [True, False, True]


def step_evenly(optimizer: StackedAdamW, gradient: float, lr: float) -> None:
    """A step of the only cell along a gradient of equal numbers."""
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, gradient)
    (slices,) = optimizer.gradients()
    optimizer.apply_step(optimizer.prepare_step(0, slices, lr, float(norm(slices))))


@given(
    st.lists(st.tuples(st.floats(-30, 36), st.floats(-20, 37)), min_size=1, max_size=6),
    st.sampled_from([None, 1.0, 1e20]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 5),
)
def test_no_weight_becomes_infinite_unseen(
    steps: list[tuple[float, float]], clip_norm: float | None, decay: float, resumed_after: int
) -> None:
    """Whatever the learning rates and gradients, also when the cell is resumed in between."""
    settings = [TrainingSection(clip_norm=clip_norm, weight_decay=decay)]
    optimizer = StackedAdamW(stack(1), settings)
    for number, (rate, scale) in enumerate(steps):
        step_evenly(optimizer, 10**scale, 10**rate)
        if number == resumed_after:
            state, optimizer = optimizer.state(0), StackedAdamW(stack(1), settings)
            optimizer.restore(0, state)
        sound = all(bool(value.isfinite().all()) for value in optimizer.parameters.values())
        assert sound or optimizer.finite() == [False]


def test_weights_that_cannot_be_infinite_are_not_looked_at() -> None:
    optimizer = StackedAdamW(stack(1), [TrainingSection()])
    assert optimizer.finite() == [True]
    step_evenly(optimizer, 1.0, 1e-3)
    with torch.no_grad():
        optimizer.parameters["other"][0, 0, 0] = float("inf")  # which no step can do
    assert optimizer.finite() == [True]
    step_evenly(optimizer, 1.0, 1e23)
    assert optimizer.finite() == [False]


def narrow(cells: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in stack(cells).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tiny_steps_of_16_bit_weights_add_up(dtype: torch.dtype) -> None:
    """A thousand steps of 1e-6 move every weight by a thousandth (to float32's rounding); one alone moves none."""
    weights = narrow(1, dtype)
    before = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = StackedAdamW(weights, [TrainingSection(clip_norm=None)])
    for step in range(1000):
        for parameter in weights.values():
            parameter.grad = torch.full_like(parameter, 0.5)
        (slices,) = optimizer.gradients()
        assert {value.dtype for value in slices} == {dtype}
        optimizer.apply_step(optimizer.prepare_step(0, slices, 1e-6, float(norm(slices))))
        if step == 0:
            assert all(torch.equal(value, before[name]) for name, value in weights.items())
    for name, value in weights.items():
        torch.testing.assert_close(optimizer.masters[name], before[name].float() - 1e-3, rtol=0, atol=6e-5)
        assert torch.equal(value, optimizer.masters[name].to(dtype))
        assert not torch.equal(value, before[name])


def test_16_bit_weights_follow_float32_ones_given_the_same_gradients() -> None:
    settings = [TrainingSection(clip_norm=0.1, weight_decay=0.1)] * 2
    few, many = narrow(2, torch.bfloat16), {n: v.detach().float() for n, v in narrow(2, torch.bfloat16).items()}
    small, large = StackedAdamW(few, settings), StackedAdamW(many, settings)
    for step in range(5):
        for c in range(2):
            given = {name: value.to(torch.bfloat16) for name, value in gradient(c, step).items()}
            slices = [given[name] for name in small._order]
            wide = [value.float() for value in slices]
            assert float(norm(slices)) == pytest.approx(float(norm(wide)), rel=1e-6)
            small.apply_step(small.prepare_step(c, slices, 0.01, float(norm(wide))))
            large.apply_step(large.prepare_step(c, wide, 0.01, float(norm(wide))))
    for name, value in many.items():
        assert torch.equal(small.masters[name], value)
        assert torch.equal(few[name], value.to(torch.bfloat16))


def test_a_restored_state_of_16_bit_weights_goes_on_with_the_same_bits() -> None:
    settings = [TrainingSection()]
    through, resumed = narrow(1, torch.bfloat16), narrow(1, torch.bfloat16)
    first, second = StackedAdamW(through, settings), StackedAdamW(resumed, settings)
    run(first, [0], steps=3, lr=1e-4)
    state = first.state(0)
    assert {value.dtype for value in state.values()} == {torch.float32}
    second.restore(0, state)
    assert all(torch.equal(resumed[name], through[name]) for name in SHAPES)
    for optimizer in (first, second):
        run(optimizer, [0], steps=30, lr=1e-4)
    for name in SHAPES:
        assert torch.equal(resumed[name], through[name])
        assert torch.equal(first.masters[name], second.masters[name])


def test_16_bit_gradients_become_wide_within_one_buffer_of_the_largest() -> None:
    """Whatever fits together; the bits are those of wide gradients, and the next cell uses the same memory."""
    weights = {
        name: torch.full((2, *shape), 0.5, dtype=torch.bfloat16).requires_grad_()
        for name, shape in {"a": (4, 4), "b": (3, 3), "c": (2, 2), "d": (5,), "e": (7,), "f": (16,)}.items()
    }
    optimizer = StackedAdamW(weights, [TrainingSection(weight_decay=0.1)] * 2)
    draw = torch.Generator().manual_seed(3)
    for parameter in weights.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(torch.bfloat16)
    slices = optimizer.gradients()
    steps = [optimizer.prepare_step(c, slices[c], 0.01, 1.0) for c in range(2)]
    assert steps[0].buffer is steps[1].buffer
    assert steps[0].buffer is not None
    assert steps[0].buffer.numel() == 16
    wide = {name: value.detach().float().requires_grad_() for name, value in weights.items()}
    plain = StackedAdamW(wide, optimizer.settings)
    for c, step in enumerate(steps):
        optimizer.apply_step(step)
        plain.apply_step(plain.prepare_step(c, [value.float() for value in slices[c]], 0.01, 1.0))
    assert all(torch.equal(optimizer.masters[name], value) for name, value in wide.items())
    optimizer.clear()
    assert optimizer._buffer is None
