"""The collector of cycles rests while cells are read, and works again afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from klab.harness.cli.collector import uncollected


def test_the_collector_works_again_after_an_error() -> None:
    seen = []

    def fail() -> None:
        with uncollected():
            seen.append(gc.isenabled())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False]
    assert gc.isenabled()


def test_a_collector_that_rests_already_stays_so() -> None:
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
