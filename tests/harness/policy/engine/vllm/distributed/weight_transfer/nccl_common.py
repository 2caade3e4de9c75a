"""vllm/distributed/weight_transfer/nccl_common.py of 0.31.0: the group is a list that the server reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

servers: list[Any] = []
"""The servers of this process; the last one is in the group."""


def trainer_init(init_info: dict[str, Any]) -> Any:
    assert init_info["packed"] is True
    return SimpleNamespace(server=servers[-1], group=SimpleNamespace(store=object(), socket=object()))
