"""The example in the documentation of `loss` runs as printed."""

from __future__ import annotations

import doctest

from klab.harness.objective import loss


def test_the_documented_example() -> None:
    found = doctest.testmod(loss)
    assert found.attempted > 0
    assert found.failed == 0
