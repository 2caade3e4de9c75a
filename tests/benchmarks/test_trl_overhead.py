"""The benchmark of klab's objective on TRL runs, and counts updates of both sides."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import trl_overhead


@pytest.mark.parity
def test_both_sides_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = trl_overhead.main(["--rounds", "1", "--updates", "8", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["pairs"] == 2
    assert found["overhead"] == pytest.approx(found["klab"] / found["trl"] - 1)
