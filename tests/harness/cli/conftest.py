"""Commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from klab.harness.cli.main import main


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`ask(words…, code=0)` runs a command and gives what it printed; with `--json`, the value."""

    def run(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(words) == code
        out, err = capsys.readouterr()
        if code == 2:
            assert "Traceback" not in err
            return err
        return json.loads(out) if "--json" in words else out

    return run
