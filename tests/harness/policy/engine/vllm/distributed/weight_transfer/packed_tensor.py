"""vllm/distributed/weight_transfer/packed_tensor.py:146 of 0.31.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Named = tuple[str, torch.Tensor]


def packed_nccl_broadcast_producer(
    iterator: Iterator[Named], group: Any, src: int, post_iter_func: Callable[[Named], torch.Tensor]
) -> None:
    assert src == 0
    sent = [post_iter_func(item).clone() for item in iterator]
    group.server.sent += sent
