"""Frames: what the folder holds is what the frame says, read once, and again only where it changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from klab.harness.store import CellFolder, Run
from klab.reports.frame import read_frames
from klab.reports.schema import EVALUATIONS, METRICS

Small = Callable[..., Run]


def _same(a: pd.DataFrame, b: pd.DataFrame, keys: list[str]) -> None:
    left, right = (frame.astype({"cell": "str"}).sort_values(keys, ignore_index=True) for frame in (a, b))
    pd.testing.assert_frame_equal(left, right, check_dtype=False)


def test_every_stored_number_is_in_its_frame(small: Small) -> None:
    run = small()
    frames = read_frames(run, cache=False)
    for identity in run.cells:
        rows = run.cell(identity).metrics()
        part = frames.metrics[frames.metrics["cell"] == identity]
        assert part["reward_mean"].tolist() == [row["reward_mean"] for row in rows]
        assert part["update"].tolist() == [row["update"] for row in rows]
        result = run.cell(identity).result()
        assert result is not None
        assert frames.cells.set_index("cell").loc[identity, "reward_final"] == result["reward_final"]
    assert set(METRICS) <= set(frames.metrics)
    assert set(EVALUATIONS) <= set(frames.evaluations)


def test_the_cache_gives_the_same_frames(small: Small) -> None:
    run = small(outcome=lambda cell: "interrupted" if cell.seed == 2 else "finished")
    fresh = read_frames(run, cache=False)
    read_frames(run)
    cached = read_frames(run)
    _same(fresh.cells, cached.cells, ["cell"])
    _same(fresh.metrics, cached.metrics, ["cell", "update"])
    _same(fresh.evaluations, cached.evaluations, ["cell", "update"])
    _same(fresh.samples, cached.samples, ["cell", "update", "prompt"])


def test_only_cells_that_changed_are_read_again(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(outcome=lambda cell: "interrupted" if cell.seed == 2 else "finished")
    before = read_frames(run)
    changed = next(identity for identity in run.cells if "-s2-" in identity)
    last = run.cell(changed).metrics()[-1]
    run.cell(changed).append_metrics([{**last, "update": last["update"] + 1, "reward_mean": 0.123, "new_column": 7.0}])
    read: list[str] = []
    original = CellFolder.read_measurements
    monkeypatch.setattr(
        CellFolder, "read_measurements", lambda folder, *rest: read.append(folder.id) or original(folder, *rest)
    )
    after = read_frames(run)
    assert read == [changed]
    assert len(after.metrics) == len(before.metrics) + 1
    newest = after.metrics[after.metrics["cell"] == changed].sort_values("update").iloc[-1]
    assert newest["reward_mean"] == 0.123
    assert list(after.cells["cell"]) == run.cells


def test_a_damaged_cache_is_only_a_slower_start(small: Small) -> None:
    run = small()
    fresh = read_frames(run)
    for path in (run.report / "cache").glob("*.parquet"):
        path.write_bytes(b"not parquet")
    _same(fresh.metrics, read_frames(run).metrics, ["cell", "update"])


def test_a_run_folder_that_cannot_be_written_is_read_without_cache(small: Small) -> None:
    run = small()
    run.report.mkdir(exist_ok=True)
    (run.report / "cache").write_text("a file where the folder should be")
    assert len(read_frames(run).cells) == len(run.cells)


def test_a_damaged_cell_is_listed_as_such_and_hides_no_other(small: Small) -> None:
    run = small()
    path = run.cell(run.cells[0]).path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"reward_mean":0.', b'"reward_mean":1.', 1))
    cells = read_frames(run).cells.set_index("cell")
    assert cells.loc[run.cells[0], "state"] == "damaged"
    assert "checksum" in cells.loc[run.cells[0], "error"]
    assert (cells["state"] == "finished").sum() == len(run.cells) - 1


def test_a_torn_last_line_is_dropped(small: Small) -> None:
    run = small(outcome=lambda cell: "interrupted")
    path = run.cell(run.cells[0]).path / "metrics.jsonl"
    whole = len(run.cell(run.cells[0]).metrics())
    with path.open("ab") as file:
        file.write(b'{"schema":1,"update":99,"reward_me')
    frames = read_frames(run)
    assert (frames.metrics["cell"] == run.cells[0]).sum() == whole


def test_states_of_cells(small: Small) -> None:
    states = iter(["finished", "diverged", "failed", "interrupted", "missing", "interrupted"])
    run = small(outcome=lambda cell: next(states))
    held = run.cell(run.cells[5])
    held.claim()
    try:
        found = read_frames(run).cells
        assert found["state"].tolist() == ["finished", "diverged", "failed", "interrupted", "missing", "running"]
        assert np.isnan(found["reward_final"]).tolist() == [False, False, True, True, True, True]
    finally:
        held.release_claim()


def test_reading_many_cells_at_once_changes_nothing(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside cells with a column of their own, a damaged one, one with words among its numbers, and unfinished ones;
    in a block that has to grow.
    """
    states = iter(["finished", "diverged", "interrupted", "finished", "missing", "interrupted"])
    run = small(outcome=lambda cell: next(states))
    path = run.cell(run.cells[3]).path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"reward_mean":0.', b'"reward_mean":1.', 1))
    for identity, more in ((run.cells[2], {"new": 2.5}), (run.cells[5], {"new": 1.5, "loss": None, "word": "x"})):
        last = run.cell(identity).metrics()[-1]
        run.cell(identity).append_metrics([{**last, "update": last["update"] + 1, **more}])
    monkeypatch.setattr("klab.reports.numeric_frame._ROWS", 2)
    together = read_frames(run, cache=False)
    monkeypatch.setattr("klab.reports.frame.read_metric_columns", lambda paths: {})
    plain = read_frames(run, cache=False)
    for name in ("cells", "metrics", "evaluations", "samples"):
        pd.testing.assert_frame_equal(getattr(together, name), getattr(plain, name), check_exact=True)
    assert together.metrics["new"].dropna().tolist() == [2.5, 1.5]
    for identity in (run.cells[0], run.cells[1], run.cells[5]):
        part = plain.metrics[plain.metrics["cell"] == identity]
        rows = run.cell(identity).metrics()
        for column in ("loss", "reward_mean", "nonfinite", "update"):
            np.testing.assert_array_equal(
                part[column], [np.nan if row[column] is None else row[column] for row in rows]
            )
