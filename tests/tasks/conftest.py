"""Datasets are cached in a folder of the test's own, and no test needs a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def write_rows(tmp_path: Path, offline: None) -> Callable[..., str]:
    """Writes rows to a JSONL file and returns its path."""

    def write(name: str, *rows: Mapping[str, Any]) -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write
