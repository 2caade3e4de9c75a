"""vLLM played by klab's own decoder (`tests/harness/policy/engine/vllm`), for the time of a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from klab.harness.policy.sampling.vllm import close_engine

ENGINE = Path(__file__).parents[1] / "harness" / "policy" / "engine"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `vllm`; afterwards it is not installed again."""
    monkeypatch.syspath_prepend(ENGINE)
    forget()
    yield import_module("vllm")
    close_engine()
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
