"""What processes that train together send one another: plain values and tensors as JSON and safetensors, no pickles.

Decoding runs no code but the constructors of the dataclasses registered here, so that a forged message is data. Each
message carries a keyed hash over its sender, its number and its contents; who does not know the job's secret can
neither forge nor replay one.

    header   8 bytes, the length of the JSON text
    JSON     the value, tensors by number
    tensors  safetensors
    hash     32 bytes, BLAKE2b with the job's secret as key
"""

from __future__ import annotations

import hashlib
import hmac
import json
import numbers
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

T = TypeVar("T")

_HEADER, _HASH = 8, 32

_types: dict[str, type] = {}


class ForgedMessage(Exception):
    """The message is not one of this job's, or not the one whose turn it is."""


def message_type(cls: type[T]) -> type[T]:
    """Let instances of a dataclass be sent; use as a decorator or call it with a class of another room."""
    _types[cls.__name__] = cls
    return cls


def encode(value: Any, secret: bytes, sender: int, number: int) -> bytes:
    """A message that `decode` turns back into `value`; tensors travel detached.

    Args:
        value: None, numbers, text, tensors and registered dataclasses, in any nesting of lists, tuples and dicts.
        sender: rank of this process.
        number: of its messages, counted from 0.

    Raises:
        TypeError: where the value holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(value, tensors)).encode()
    contents = len(text).to_bytes(_HEADER, "big") + text + save(tensors)
    return contents + _hash(contents, secret, sender, number)


def decode(message: bytes, secret: bytes, sender: int, number: int, device: torch.device | str = "cpu") -> Any:
    """The value of a message, tensors on `device`.

    Raises:
        ForgedMessage: where it was not made by `encode` with the same secret, sender and number.
    """
    contents, found = message[:-_HASH], message[-_HASH:]
    if not hmac.compare_digest(found, _hash(contents, secret, sender, number)):
        raise ForgedMessage(f"message {number} of process {sender} does not carry the secret of this job")
    start = _HEADER + int.from_bytes(contents[:_HEADER], "big")
    tensors = {name: value.to(device) for name, value in load(contents[start:]).items()}
    return _from_json(json.loads(contents[_HEADER:start]), tensors)


def _hash(contents: bytes, secret: bytes, sender: int, number: int) -> bytes:
    digest = hashlib.blake2b(f"{sender} {number} ".encode(), key=secret, digest_size=_HASH)
    digest.update(contents)
    return digest.digest()


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain values stand for themselves; all others are a list [kind, contents]."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # a copy of its own: safetensors stores no tensors that share memory
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", name]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_to_json(part, tensors) for part in value]]
    if isinstance(value, dict):
        return ["dict", [[_to_json(name, tensors), _to_json(part, tensors)] for name, part in value.items()]]
    for cls in type(value).__mro__:
        if is_dataclass(cls) and _types.get(cls.__name__) is cls:
            parts = {each.name: _to_json(getattr(value, each.name), tensors) for each in fields(cls) if each.init}
            return [cls.__name__, parts]
    raise TypeError(f"values of type {type(value).__name__} cannot be sent to other processes")


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, contents = value
    match kind:
        case "tensor":
            return tensors[contents]
        case "list":
            return [_from_json(part, tensors) for part in contents]
        case "tuple":
            return tuple(_from_json(part, tensors) for part in contents)
        case "dict":
            return {_from_json(name, tensors): _from_json(part, tensors) for name, part in contents}
    return _types[kind](**{name: _from_json(part, tensors) for name, part in contents.items()})
