"""The collector of cycles rests while cells are read, and works again afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from klab.harness.cli.collector import uncollected, uncollected_unless


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


def test_a_command_runs_without_it_unless_it_is_given_the_option() -> None:
    seen = []

    @uncollected_unless("measure")
    def command(grid: str, measure: bool = False) -> None:
        seen.append((grid, gc.isenabled()))

    command("a.yaml")
    command("b.yaml", measure=True)
    command(grid="c.yaml", measure=False)
    assert seen == [("a.yaml", False), ("b.yaml", True), ("c.yaml", False)]
    assert gc.isenabled()
