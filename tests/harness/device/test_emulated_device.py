"""The emulated device behaves like a CUDA device where klab depends on it."""

from __future__ import annotations

import pytest
import torch

from tests.support.emulated_device.backend import use_emulated_devices
from tests.support.emulated_device.device import EmulatedDevices

HERE = torch.device("emulated", 0)


def module() -> torch.cuda:  # type: ignore[valid-type]
    return torch.get_device_module(HERE)


def test_views_share_memory_and_gradients_flow(device: EmulatedDevices) -> None:
    weight = torch.arange(6.0, device="cpu").view(2, 3).to(HERE).requires_grad_()
    assert weight.device == HERE
    (weight[1] * weight[1]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 0, 0], [6, 8, 10]]
    row = weight.detach()[0]
    row.add_(1)
    assert weight.tolist() == [[1, 2, 3], [3, 4, 5]]
    row.unsqueeze_(0)
    assert row.shape == (1, 3)


@pytest.mark.parametrize("other", ["cpu", "emulated:1"])
def test_tensors_of_two_devices_have_no_product(other: str) -> None:
    with use_emulated_devices(count=2):
        here, there = torch.ones(2, 2, device=HERE), torch.ones(2, 2, device=other)
        for product in (lambda: here @ there, lambda: there + here, lambda: torch.cat((here, there))):
            with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
                product()
        assert (here + there.to(HERE)).tolist() == [[2, 2], [2, 2]]
        assert (here * torch.tensor(3.0)).tolist() == [[3, 3], [3, 3]]  # a number of the CPU goes with the kernel
        with pytest.raises(RuntimeError, match="no device emulated:2"):
            torch.ones(2, device="emulated:2")


def test_what_waits_for_the_device_is_counted(device: EmulatedDevices) -> None:
    values = torch.ones(4, device=HERE)
    numbers, chosen = torch.arange(4.0), torch.tensor([True, False, True, False])
    assert device.num_waits == 0
    for waits in (
        lambda: values.sum().item(),
        lambda: values.cpu(),
        lambda: values.tolist(),
        lambda: values.copy_(numbers),
        lambda: numbers.to(HERE),
        lambda: torch.tensor([1, 2], device=HERE),
        lambda: values[numbers.to(HERE, non_blocking=True) > 1],
        lambda: values[torch.tensor([1, 2])],
        lambda: bool(values.any()),
        lambda: module().synchronize(),
    ):
        device.reset_counts()
        waits()
        assert device.num_waits == 1
    device.reset_counts()
    values.copy_(numbers, non_blocking=True)
    moved = chosen.to(HERE, non_blocking=True)
    values.masked_fill_(moved, 7.0).mul_(2).fill_(1)
    assert device.num_waits == 0
    assert device.launches == 5


def test_a_graph_computes_with_what_stands_in_its_memory_at_replay(device: EmulatedDevices) -> None:
    given, total = torch.zeros(3, device=HERE), torch.zeros(3, device=HERE)
    graph = module().CUDAGraph()
    with module().graph(graph):
        total.add_(given * 2)
    assert total.tolist() == [0, 0, 0]  # nothing is computed while recording
    device.reset_counts()
    for step in range(3):
        given.fill_(step)
        graph.replay()
    assert (device.launches, device.replays, device.num_waits) == (6, 3, 0)
    assert total.tolist() == [6, 6, 6]
    assert graph.kept_bytes == 0


def test_what_no_graph_can_hold_is_an_error(device: EmulatedDevices) -> None:
    values, host = torch.ones(3, device=HERE), torch.ones(3)
    for forbidden in (
        lambda: values.sum().item(),
        lambda: values.cpu(),
        lambda: values.copy_(host),
        lambda: values.copy_(host, non_blocking=True),
        lambda: values[values > 0],
        lambda: module().synchronize(),
        lambda: torch.tensor([1.0], device=HERE),
    ):
        with (
            pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
            module().graph(module().CUDAGraph()),
        ):
            forbidden()
    with pytest.raises(RuntimeError, match="draws from the generator of the device"):
        torch.rand(3, device=HERE)
    assert (values + 1).tolist() == [2, 2, 2]


def test_memory_that_a_graph_uses_has_to_stay(device: EmulatedDevices) -> None:
    values, kept = torch.ones(3, device=HERE), []
    graph = module().CUDAGraph()
    with module().graph(graph):
        kept.append(values * 2)
    assert graph.kept_bytes == 512
    kept.clear()
    assert graph.kept_bytes == 0
    graph.replay()
    del values
    with pytest.raises(RuntimeError, match="memory has been freed"):
        graph.replay()


def test_a_stream_must_wait_for_what_it_reads(device: EmulatedDevices) -> None:
    values, aside = torch.ones(3, device=HERE), module().Stream()
    with module().stream(aside):
        written = torch.zeros(3, device=HERE)
    with pytest.raises(RuntimeError, match="reads what another stream writes"):
        written + values
    module().current_stream().wait_stream(aside)
    assert (written + values).tolist() == [1, 1, 1]
    with module().stream(aside), pytest.raises(RuntimeError, match="overwrites what another stream reads"):
        written.add_(1)
    aside.wait_event(module().current_stream().record_event())
    with module().stream(aside):
        written.add_(1)


def test_memory_is_counted_and_limited() -> None:
    with use_emulated_devices(capacity=2**20):
        held = torch.zeros(2**16, device=HERE)  # 256 KiB
        view = held[5:]
        del held
        assert module().memory_allocated() == 2**18
        (view * 2).sum()
        assert module().max_memory_allocated() == 2**19 + 512
        module().reset_peak_memory_stats()
        with pytest.raises(torch.OutOfMemoryError, match="emulated device out of memory"):
            torch.zeros(2**18, device=HERE)
        graph = module().CUDAGraph()
        with module().graph(graph):
            for _ in range(3):
                view.mul_(view + 1)
        assert (module().memory_allocated(), module().memory_reserved()) == (2**18, 2**19)
        again, pool = module().CUDAGraph(), graph.pool
        with module().graph(again, pool=pool):
            view.mul_(view + 1)
        assert module().memory_reserved() == 2**19
        del view, graph, again, pool
        assert module().memory_reserved() == 0


def test_uninitialised_memory_shows(device: EmulatedDevices) -> None:
    assert torch.empty(2, device=HERE).isnan().all()
    assert torch.empty_like(torch.ones(2, device=HERE)).isnan().all()
    with pytest.raises(IndexError):
        torch.ones(2, device=HERE)[torch.empty(1, dtype=torch.long, device=HERE)]


def test_sums_in_any_order_are_named(device: EmulatedDevices) -> None:
    table = torch.ones(3, 2, device=HERE).requires_grad_()
    rows = torch.tensor([0, 0, 2], device=HERE)
    table.index_select(0, rows).sum().backward()
    assert [name for name, _ in device.unordered] == ["index_add"]
    device.reset_counts()
    table.gather(0, rows.view(-1, 1)).sum().backward()
    assert [name for name, _ in device.unordered] == ["scatter_add"]
    device.reset_counts()
    table[rows].sum().backward()
    assert not device.unordered  # sorted by index, then summed
