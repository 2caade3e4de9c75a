"""Emulated devices as a backend of PyTorch: `torch.device("emulated", 0)` and what `torch.get_device_module` gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.support.emulated_device import streams
from tests.support.emulated_device.device import EmulatedDevices
from tests.support.emulated_device.graphs import Graph
from tests.support.emulated_device.memory import Pool
from tests.support.emulated_device.tensor import DISPATCH, NAME, DeviceTensor


def devices() -> EmulatedDevices:
    """Those in use."""
    found: EmulatedDevices = DISPATCH[-1]
    return found


class CUDAGraph(Graph):
    """What `torch.cuda.CUDAGraph` is on a CUDA device."""

    def replay(self) -> None:
        devices().replay(self)


class DeviceModule:
    """What `torch.cuda` is for a CUDA device, as far as it is used."""

    Stream = streams.Stream
    Event = streams.Event
    CUDAGraph = CUDAGraph

    def is_available(self) -> bool:
        return bool(DISPATCH)

    def is_initialized(self) -> bool:
        return bool(DISPATCH)

    def device_count(self) -> int:
        return len(devices().memories) if DISPATCH else 0

    def current_device(self) -> int:
        return devices().current if DISPATCH else 0

    def set_device(self, device: Any) -> None:
        devices().current = device if isinstance(device, int) else torch.device(device).index or 0

    def get_device_name(self, device: Any = None) -> str:
        return "emulated device"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing draws from a generator of the device."""

    def current_stream(self, device: Any = None) -> streams.Stream:
        return devices().stream

    def default_stream(self, device: Any = None) -> streams.Stream:
        return streams.DEFAULT

    @contextmanager
    def stream(self, stream: streams.Stream) -> Iterator[None]:
        used = devices()
        before, used.stream, used.several_streams = used.stream, stream, True
        try:
            yield
        finally:
            used.stream = before

    def synchronize(self, device: Any = None) -> None:
        devices().wait("synchronize")

    def graph_pool_handle(self) -> Pool:
        return Pool(devices().memories[devices().current])

    @contextmanager
    def graph(self, graph: CUDAGraph, pool: Pool | None = None, **settings: Any) -> Iterator[None]:
        used = devices()
        used.wait("beginning of a capture")
        used.begin_capture(graph, pool)
        try:
            yield
        finally:
            used.end_capture()

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def memory_allocated(self, device: Any = None) -> int:
        return devices().memories[_index(device)].allocated

    def memory_reserved(self, device: Any = None) -> int:
        return devices().memories[_index(device)].reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        return devices().memories[_index(device)].peak

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = devices().memories[_index(device)]
        memory.peak = memory.reserved

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = devices().memories[_index(device)]
        total = memory.capacity or 2**40
        return total - memory.reserved, total


def _index(device: Any) -> int:
    if device is None or isinstance(device, int):
        return devices().current if device is None else device
    found = torch.device(device).index
    return devices().current if found is None else found


class _Functions(TorchFunctionMode):
    """Functions that make tensors of Python numbers, and back, without an operation that could be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == NAME:
                rest = {name: value for name, value in kwargs.items() if name != "device"}
                return func(*args, **rest).to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], DeviceTensor):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


@cache
def register() -> DeviceModule:
    """Tell PyTorch of the backend, once per process and before its first backward pass, which counts the devices."""
    module = DeviceModule()

    class Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[name-defined,misc]
        def is_available(self) -> bool:
            return module.is_available()

        def has_primary_context(self, index: int) -> bool:
            return module.is_available()

        def is_built(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(NAME, module, Hook())
    return module


@contextmanager
def use_emulated_devices(count: int = 1, capacity: int | None = None) -> Iterator[EmulatedDevices]:
    """A context in which devices `emulated:0`, ... exist; tensors of theirs are of no use after it.

    Args:
        count: number of devices.
        capacity: bytes of memory of each; None: any number.
    """
    register()
    used = EmulatedDevices(count, capacity)
    before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    DISPATCH.append(used)
    try:
        with used, _Functions():
            yield used
    finally:
        DISPATCH.pop()
        torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]
