"""Emulated devices: every operation on their tensors is checked, counted, recorded where asked, and computed.

What is an error on a CUDA device is one here: products of tensors on different devices, and in a capture whatever the
graphs cannot hold. What costs time there is counted here: kernels launched one by one, and waits of the host for the
device. Copies to the device wait for it too, unless they are `non_blocking`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.emulated_device.graphs import Capture, Graph
from tests.support.emulated_device.memory import Allocation, Memory, Pool
from tests.support.emulated_device.operations import (
    COPYING,
    EMPTY,
    INDEXING,
    WAITING,
    aten,
    computed,
    is_random,
    is_view,
    unordered_sum,
    written_arguments,
)
from tests.support.emulated_device.streams import DEFAULT
from tests.support.emulated_device.tensor import NAME, DeviceTensor, mapped, tensors

_ROOT = Path(__file__).parents[3]


class EmulatedDevices(TorchDispatchMode):
    """Some devices, used while this mode is entered (`backend.use_emulated_devices`).

    Attributes:
        memories: of each device.
        current: index of the device that `emulated` without a number means.
        launches: kernels and graphs launched by the host.
        replays: of graphs, each of them one launch.
        waits: how often the host waited for the device: (why, where) -> times.
        unordered: operations with other last digits each time: (which, where) -> times.
        kernels: names of kernels launched by the host -> times.
        recorded: how many graphs have been recorded.
        kernel_seconds: how long the device says that a kernel takes; the host does not wait for that.
        busy_until: when the device will have done its work, by the host's clock.
    """

    def __init__(self, count: int = 1, capacity: int | None = None) -> None:
        super().__init__()
        self.memories = [Memory(index, capacity) for index in range(count)]
        self.current = 0
        self.stream = DEFAULT
        self.several_streams = False
        self.capture: Capture | None = None
        self.recorded = 0
        self.kernel_seconds = 0.0
        self.busy_until = 0.0
        self.reset_counts()

    def reset_counts(self) -> None:
        """Count from zero: launches, replays, waits, unordered sums, kernels."""
        self.launches = self.replays = 0
        self.waits: Counter[tuple[str, str]] = Counter()
        self.unordered: Counter[tuple[str, str]] = Counter()
        self.kernels: Counter[str] = Counter()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def wait(self, reason: str) -> None:
        """The host waits for the device.

        Raises:
            RuntimeError: in a capture.
        """
        if self.capture is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
        self.waits[(reason, _caller())] += 1

    def begin_capture(self, graph: Graph, pool: Pool | None) -> None:
        self.recorded += 1
        self.capture = Capture(graph, pool, self.memories[self.current])

    def end_capture(self) -> None:
        assert self.capture is not None
        self.capture.end()
        self.capture = None

    def replay(self, graph: Graph) -> None:
        used = graph.outside()
        if self.several_streams:
            self.stream.check(used, used)
        self.launches += 1
        self.replays += 1
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            graph.run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Check, count and compute one operation."""
        inputs = list(tensors((args, kwargs)))
        ours = [each for each in inputs if isinstance(each, DeviceTensor)]
        index = self._target(func, kwargs, ours)
        if index is None and not ours:
            return func(*args, **kwargs)
        self._check(func, args, kwargs, inputs, ours, index)
        changes = {name: torch.device("cpu") for name in ("device",) if kwargs.get(name) is not None}
        changes |= {name: False for name in ("pin_memory", "non_blocking") if kwargs.get(name)}
        raw_args = mapped(args, _values)
        raw_kwargs = {name: mapped(value, _values) for name, value in kwargs.items()} | changes
        if torch.Tag.inplace_view in func.tags:  # the tensor itself gets another shape
            with no_dispatch():
                func(*args, **kwargs)
        written = [args[i] if i < len(args) else kwargs.get(name) for i, name in written_arguments(func)]
        written = list(tensors(written))
        launched = not is_view(func) and func is not aten._local_scalar_dense.default
        if launched:
            self._launch(func, ours, [each for each in written if isinstance(each, DeviceTensor)])
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            result = computed(func, raw_args, raw_kwargs)
        if self.capture is not None and launched:
            self.capture.add((func, raw_args, raw_kwargs, result))
        return self._wrapped(func, result, inputs, index)

    def _target(self, func: Any, kwargs: Any, ours: list[DeviceTensor]) -> int | None:
        """Index of the device that the result stands on; None: the CPU."""
        device = kwargs.get("device")
        if device is not None:
            device = torch.device(device)
            if device.type != NAME:
                return None
            index = self.current if device.index is None else device.index
            if index >= len(self.memories):
                raise RuntimeError(f"no device {device}: there are {len(self.memories)}")
            return index
        if func is aten.copy_.default:
            ours = ours if not ours or isinstance(ours[0], DeviceTensor) else []
        return ours[0].device.index if ours else None

    def _check(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[torch.Tensor],
        ours: list[DeviceTensor],
        index: int | None,
    ) -> None:
        """Raise where CUDA would, and count the waits."""
        if is_random(func) and kwargs.get("generator") is None:
            raise RuntimeError(f"{func} draws from the generator of the device, which depends on what ran before")
        if func in COPYING:
            source = args[1] if func is aten.copy_.default else args[0]
            to_host = isinstance(source, DeviceTensor) and (index is None or not _on_device(func, args, index))
            if to_host:
                self.wait("copy to the host")
            elif not isinstance(source, DeviceTensor) and not _is_async(func, args, kwargs):
                if func is not aten.copy_.default or source.dim() > 0:
                    self.wait("copy from the host")
            elif self.capture is not None and not isinstance(source, DeviceTensor) and source.dim() > 0:
                self.wait("copy from memory of the host that is not pinned")
            return
        if func in WAITING:
            self.wait(WAITING[func])
        allowed: list[torch.Tensor] = []
        if func in INDEXING:
            allowed = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in allowed):
                self.wait("index of booleans")
            elif any(not isinstance(each, DeviceTensor) for each in allowed):
                self.wait("index on the host")
        devices = {each.device for each in ours}
        strangers = [
            each
            for each in inputs
            if not isinstance(each, DeviceTensor) and each.dim() > 0 and not any(each is a for a in allowed)
        ]
        if len(devices) > 1 or strangers:
            found = sorted({str(each.device) for each in [*ours, *strangers]})
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {func}")
        name = unordered_sum(func)
        if name is not None:
            self.unordered[(name, _caller())] += 1

    def _launch(self, func: Any, ours: list[DeviceTensor], written: list[DeviceTensor]) -> None:
        if self.capture is not None:
            self.capture.before([each.allocation for each in ours], [each.values for each in written])
        else:
            self.launches += 1
            self.busy_until = max(time.perf_counter(), self.busy_until) + self.kernel_seconds
            self.kernels[func._schema.name.split("::")[1]] += 1
        if self.several_streams:
            self.stream.check([each.allocation for each in ours], [each.allocation for each in written])

    def _wrapped(self, func: Any, result: Any, inputs: list[torch.Tensor], index: int | None) -> Any:
        """The result as tensors of the device: the arguments themselves, views of them, or new ones."""
        known = {id(_values(each)): each for each in inputs}
        memories = {each.values.untyped_storage().data_ptr(): each.allocation for each in inputs if _ours(each)}

        def wrap(value: torch.Tensor) -> torch.Tensor:
            if id(value) in known:
                return known[id(value)]
            if index is None:
                return value
            storage = value.untyped_storage()
            allocation = memories.get(storage.data_ptr()) if storage.nbytes() else None
            if allocation is None:
                allocation = self._allocate(storage.nbytes(), index)
                if func in EMPTY:
                    _poison(value)
            return DeviceTensor(value, allocation, index)

        return mapped(result, wrap)

    def _allocate(self, size: int, index: int) -> Allocation:
        made = Allocation(self.memories[index], size) if self.capture is None else self.capture.allocate(size)
        if self.several_streams:
            made.written = (self.stream, self.stream.time)
        return made


def _ours(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DeviceTensor)


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.values if isinstance(tensor, DeviceTensor) else tensor


def _on_device(func: Any, args: Any, index: int) -> bool:
    """Whether a copy goes to a device."""
    return func is not aten.copy_.default or isinstance(args[0], DeviceTensor)


def _is_async(func: Any, args: Any, kwargs: Any) -> bool:
    if func is aten.copy_.default:
        return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    return bool(kwargs.get("non_blocking"))


def _poison(values: torch.Tensor) -> None:
    """Numbers that show wherever uninitialised memory is read."""
    if values.is_floating_point():
        values.fill_(torch.nan)
    elif values.dtype == torch.long:
        values.fill_(-(2**40))


def _caller() -> str:
    """The innermost lines of klab that led here."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 2:
        place = _place(frame.f_code.co_filename)
        if place:
            found.append(f"{place}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


@cache
def _place(file: str) -> str:
    """The path of a file of klab in the repository; "" for others."""
    path = Path(file)
    if not path.is_relative_to(_ROOT):
        return ""
    inside = path.relative_to(_ROOT)
    return "" if inside.parts[0] == ".venv" or "support" in inside.parts else str(inside)
