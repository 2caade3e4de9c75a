"""The manifest keeps every version of the stated analysis, and every number of seeds that was looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from klab.grid import UserError
from klab.harness.store import Run, files
from klab.harness.store.looks import looks
from klab.harness.store.stated_analysis import versions

MakeRun = Callable[..., Run]
STATED = ("seeds: 2", "seeds: 2\nanalysis: {delta: 0.02, contrasts: [{estimator: k1}]}")


def _finish(run: Run, count: int = 1) -> None:
    for identity in run.cells[:count]:
        run.cell(identity).write_result({"state": "finished", "updates": 8})


def test_the_first_launch_records_what_is_stated(make_run: MakeRun) -> None:
    run = Run.open(make_run(STATED).path)
    (version,) = versions(run.manifest, run.path)
    assert version.plan is not None
    assert (version.plan.delta, version.results, version.beforehand) == (0.02, 0, True)
    assert [run.resolved(identity)["objective"]["estimator"] for identity in run.cells[2:]] == ["k1", "k1"]
    assert version.cells == (run.resolved(run.cells[2])["group"],)
    before = (run.path / "manifest.json").read_bytes()
    make_run(STATED)
    assert (run.path / "manifest.json").read_bytes() == before


def test_a_changed_analysis_is_added_with_the_number_of_results_that_were_there(make_run: MakeRun) -> None:
    run = make_run(STATED)
    _finish(run, 3)
    changed = make_run((STATED[0], STATED[1].replace("0.02", "0.2")))
    first, second = versions(changed.manifest, run.path)
    assert first.plan is not None
    assert second.plan is not None
    assert (first.plan.delta, second.plan.delta) == (0.02, 0.2)
    assert (second.results, second.beforehand) == (3, False)
    assert first.digest != second.digest
    assert [each.digest for each in versions(make_run(STATED).manifest, run.path)][-1] == first.digest
    assert len(versions(Run.open(run.path).manifest, run.path)) == 3


def test_an_analysis_that_is_stated_after_the_launch_stands_after_the_empty_one(make_run: MakeRun) -> None:
    _finish(make_run())
    run = make_run(STATED)
    assert [(each.plan is None, each.results) for each in versions(run.manifest, run.path)] == [(True, 0), (False, 1)]


def test_a_run_that_is_older_than_the_record_stated_nothing_before(make_run: MakeRun) -> None:
    run = make_run()
    manifest = files.read_record(run.path / "manifest.json")
    assert manifest is not None
    old = {key: value for key, value in manifest.items() if key not in ("analysis", "looks", "schema", "checksum")}
    files.replace(run.path / "manifest.json", files.encode_record(old))
    assert (versions(Run.open(run.path).manifest, run.path)[0].at, looks(Run.open(run.path).manifest)) == (None, (2,))
    before = (run.path / "manifest.json").read_bytes()
    make_run()
    assert (run.path / "manifest.json").read_bytes() == before
    _finish(run)
    grown = make_run((STATED[0], STATED[1].replace("seeds: 2", "seeds: 4")))
    assert [each.beforehand for each in versions(grown.manifest, run.path)] == [False, False]
    assert looks(grown.manifest) == (2, 4)


def test_seeds_that_are_added_to_results_are_another_look(make_run: MakeRun) -> None:
    run = make_run()
    assert looks(run.manifest) == (2,)
    assert looks(make_run(("seeds: 2", "seeds: 3")).manifest) == (3,)  # nobody can have looked yet
    _finish(run)
    assert looks(make_run(("seeds: 2", "seeds: 6")).manifest) == (3, 6)
    assert looks(make_run(("seeds: 2", "seeds: 1")).manifest) == (3, 6)
    assert looks(make_run(("seeds: 2", "seeds: 6"), ("[k1, k3]", "[k1, k2, k3]")).manifest) == (3, 6)


def test_a_damaged_record_is_said_to_be_damaged(make_run: MakeRun) -> None:
    run = make_run(STATED)
    for broken in ([{"plan": None}], [{**run.manifest["analysis"][0], "plan": {"delta": "much"}}]):
        with pytest.raises(UserError, match="does not say which analysis was stated"):
            versions({**run.manifest, "analysis": broken}, run.path / "manifest.json")
