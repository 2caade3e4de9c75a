"""Tensors that say they are on an emulated device, with their numbers in the CPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.support.emulated_device.memory import Allocation

NAME = "emulated"
"""What PyTorch calls the emulated devices: `emulated:0`, `emulated:1`, ..."""

DISPATCH: list[Any] = []
"""The emulated devices in use, innermost last: who computes what is asked of a tensor of theirs."""


class DeviceTensor(torch.Tensor):
    """A tensor of an emulated device.

    Attributes:
        values: its numbers, a tensor of the CPU; views share memory as their values do.
        allocation: the memory it stands in.
    """

    values: torch.Tensor
    allocation: Allocation

    @staticmethod
    def __new__(cls, values: torch.Tensor, allocation: Allocation, index: int) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, index),
            requires_grad=False,
        )
        made.values, made.allocation = values, allocation
        return made

    def __init__(self, *given: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not DISPATCH:
            raise RuntimeError(f"{func} on a tensor of an emulated device that is no longer in use")
        return DISPATCH[-1].compute(func, args, kwargs or {})


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, in lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def mapped(value: Any, change: Any) -> Any:
    """Arguments or results of an operation with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(each, change) for each in value])
    return value
