"""An archive says what the run says: the same report to the last digit, the same figures, and one message where it was
damaged or comes from somebody who means harm."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from klab.grid import Cell, UserError
from klab.harness.store import Run, files
from klab.harness.store.archive import MANIFEST, Archive
from klab.harness.store.column_table import encoded
from klab.harness.store.usage import span, used
from klab.reports import load_run, render
from klab.reports.across import across_all
from klab.reports.archive import KEPT_METRICS, write_archive
from klab.reports.claim_tables import claim_records
from klab.reports.claims import judged
from klab.reports.comparison import compare_all
from klab.reports.config_detail import _QUANTITIES as PANELS
from klab.reports.figures import draw
from klab.reports.figures.curves import QUANTITIES
from klab.reports.gradients import load_gradients
from klab.reports.study import Study, load_runs
from klab.reports.tables import to_json
from klab.reports.tuned import tuned_parts, tuning_table
from tests.reports.synthetic import QUICKSTART, write_run
from tests.support.published_studies import claimed
from tests.support.tuned_run import create, fill, settled

Small = Callable[..., Run]


def _archive(run: Run, folder: Path) -> Archive:
    write_archive(run, folder)
    return Archive.open(folder)


def _report(study: Study) -> str:
    return to_json(compare_all(study), across_all(study), claim_records(judged(study)))


@pytest.fixture(scope="module")
def archive(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return _archive(run, tmp_path_factory.mktemp("archives") / "quickstart")


@pytest.fixture(scope="module")
def archived(archive: Archive) -> Study:
    return load_run(archive.path)


def test_the_report_of_an_archive_is_that_of_its_run(study: Study, archived: Study) -> None:
    assert _report(archived) == _report(study)
    pd.testing.assert_frame_equal(archived.cells, study.cells)
    pd.testing.assert_frame_equal(archived.evaluations, study.evaluations)


def test_scores_of_other_names_are_the_same_too(study: Study, archived: Study) -> None:
    for score in ("reward_at_kl(0.2)", "objective", "training_reward", "collapse_update"):
        pd.testing.assert_frame_equal(archived.summary(score), study.summary(score))


def _drawn(axes: Any) -> list[np.ndarray[Any, Any]]:
    """The data of everything that a panel draws."""
    shapes = [path.vertices for each in axes.collections for path in each.get_paths()]
    arrays = [
        np.ma.filled(np.ma.asarray(each.get_array()), np.nan)
        for each in axes.collections
        if each.get_array() is not None
    ]
    offsets = [np.ma.filled(each.get_offsets(), np.nan) for each in axes.collections]
    return [*(line.get_xydata() for line in axes.lines), *shapes, *arrays, *offsets]


def _compare_figures(here: Study, there: Study, units: list[str]) -> None:
    """To single precision where metrics of updates are drawn, to the last bit elsewhere."""
    compared = 0
    for mine, theirs in zip(compare_all(here), compare_all(there), strict=True):
        for one, other in zip(draw(here, mine, None, units), draw(there, theirs, None, units), strict=True):
            assert (one.name, one.title, one.caption) == (other.name, other.title, other.caption)
            single = one.name.startswith(("curves", "stability"))
            for left, right in zip(one.figure.axes, other.figure.axes, strict=True):
                assert [text.get_text() for text in left.texts] == [text.get_text() for text in right.texts]
                for a, b in zip(_drawn(left), _drawn(right), strict=True):
                    np.testing.assert_allclose(b, a, rtol=2e-6 if single else 0, atol=2e-7 if single else 0)
                    compared += a.size
    assert compared > 500


def test_figures_have_the_same_data(study: Study, archived: Study) -> None:
    _compare_figures(study, archived, ["updates"])


def test_curves_over_tokens_and_samples_have_the_same_data(small: Small, tmp_path: Path) -> None:
    run = small()
    archive = _archive(run, tmp_path / "archive")
    _compare_figures(load_run(run.path), load_run(archive.path), ["tokens", "samples"])


def test_an_archive_keeps_every_column_that_is_drawn() -> None:
    drawn = {each.column for each in QUANTITIES if each.frame == "metrics"} | {
        column for frame, column, _ in PANELS if frame == "metrics"
    }
    assert drawn <= set(KEPT_METRICS)


def test_metrics_are_those_of_the_run_in_single_precision(study: Study, archived: Study) -> None:
    assert sorted(archived.metrics) == sorted(study.metrics)
    assert archived.metrics["tokens"].tolist() == study.metrics["tokens"].tolist()
    kept = study.metrics["entropy"].to_numpy()
    assert archived.metrics["entropy"].to_numpy().tolist() == kept.astype(np.float32).astype(np.float64).tolist()
    assert archived.metrics["loss"].isna().all()


def test_pages_have_the_same_tables_and_say_what_is_missing(small: Small, tmp_path: Path) -> None:
    run = small()
    archive = _archive(run, tmp_path / "archive")
    pages = [render(each.path, tmp_path / name, figures=False) for each, name in ((run, "run"), (archive, "archive"))]
    tables = [sorted((page.parent / "tables").iterdir()) for page in pages]
    assert [file.name for file in tables[0]] == [file.name for file in tables[1]]
    for one, other in zip(*tables, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    text = pages[1].read_text()
    assert "is read from an archive" in text
    assert "stored completions out" in text
    assert "is read from an archive" not in pages[0].read_text()


@pytest.mark.parametrize("outcome", ["missing", "interrupted", "failed", "stopped", "diverged"])
def test_every_way_to_end_survives(small: Small, tmp_path: Path, outcome: str) -> None:
    run = small(outcome=lambda cell: outcome if cell.seed == 1 else "finished")
    archive = _archive(run, tmp_path / "archive")
    one, other = load_run(run.path), load_run(archive.path)
    assert _report(one) == _report(other)
    pd.testing.assert_frame_equal(other.cells, one.cells)


def test_a_damaged_cell_stays_damaged(small: Small, tmp_path: Path) -> None:
    run = small()
    broken = run.cell(run.cells[0])
    (broken.path / "metrics.jsonl").write_text("{broken}\n")
    one, other = load_run(run.path), load_run(_archive(run, tmp_path / "archive").path)
    assert one.cells["state"].tolist().count("damaged") == 1
    assert _report(one) == _report(other)


def test_a_run_without_any_result_can_be_archived(small: Small, tmp_path: Path) -> None:
    run = small(only=lambda cell: False)
    archive = _archive(run, tmp_path / "archive")
    assert load_run(archive.path).cells["state"].unique().tolist() == ["missing"]
    assert archive.span is None


def test_claims_and_their_verdicts_survive(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    studies = [load_run(path) for path in (run.path, _archive(run, tmp_path / "archive").path)]
    assert len(judged(studies[0])) == 2
    assert _report(studies[0]) == _report(studies[1])


def test_runs_and_archives_are_reported_together(small: Small, tmp_path: Path) -> None:
    one, other = small("one"), small("other", digits=3)
    archive = _archive(other, tmp_path / "archive")
    both = [load_runs([one.path, each]) for each in (other.path, archive.path)]
    assert _report(both[0]) == _report(both[1])


def test_what_was_tuned_survives(tmp_path: Path) -> None:
    def reward(cell: Cell) -> tuple[str, float]:
        noise = np.random.default_rng([cell.seed, int(cell.training.lr * 1e6)]).normal() * 0.004
        return "finished", 0.8 - 0.1 * abs(np.log10(cell.training.lr / 3e-4)) + noise

    run = create(tmp_path / "run")
    fill(run, reward)
    settled(run)
    fill(run, reward)
    studies = [load_run(path) for path in (run.path, _archive(run, tmp_path / "archive").path)]
    parts = [tuning_table(tuned_parts(study, compare_all(study))) for study in studies]
    assert len(parts[0]) > 0
    pd.testing.assert_frame_equal(*parts)
    assert _report(studies[0]) == _report(studies[1])


def test_gradients_and_costs_survive(small: Small, tmp_path: Path) -> None:
    run = small()
    cell = run.cell(run.cells[0])
    cell.append_attempt({"event": "started", "at": 100.0, "pid": 1, "host": "here", "threads": 2})
    cell.append_attempt({"event": "ended", "at": 3700.0})
    rows = [
        {
            "group": load_run(run.path).cells["group"].iloc[0],
            "drift": "none",
            "bias": 1 / 3,
            "cosine": None,
            "variance": 2,
        }
    ]
    files.replace(run.output_folder("report") / "gradients.json", files.encode_record({"rows": rows}))
    archive = _archive(run, tmp_path / "archive")
    frames = [load_gradients(load_run(each.path)) for each in (run, archive)]
    assert frames[0] is not None
    assert frames[1] is not None
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert archive.usage == used(run)
    assert archive.usage.cpu_hours == 2.0
    assert archive.span == span(run) == (100.0, 3700.0)


def test_the_same_results_give_the_same_bytes_and_a_report_in_the_archive_stays(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    before = {file.name: file.read_bytes() for file in _archive(run, folder).path.iterdir()}
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("a page")
    write_archive(run, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert (folder / "report" / "index.html").read_text() == "a page"
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive"]


def test_nothing_but_an_archive_is_replaced(run: Run, archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no archive"):
        write_archive(run, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is an archive already"):
        write_archive(archive, tmp_path / "other")


def test_a_run_of_a_hundred_updates_takes_less_than_four_kilobytes(tmp_path: Path) -> None:
    """So that a study of 400 runs stays below a megabyte and a half."""
    text = QUICKSTART.replace("updates: 60", "updates: 100").replace("seeds: 5", "seeds: 6")
    run = write_run(tmp_path / "run", text, samples=1)
    archive = _archive(run, tmp_path / "archive")
    assert sum(file.stat().st_size for file in archive.path.iterdir()) < len(run.cells) * 1_500_000 / 400


def test_an_archive_is_no_run_folder_to_other_commands(archive: Archive) -> None:
    with pytest.raises(UserError, match="It is an archive of results"):
        Run.open(archive.path)


# -- a stranger's archive ---------------------------------------------------------------------------------------------


def _resealed(folder: Path, name: str, data: bytes) -> None:
    """Put other contents into an archive, with the checksums that fit."""
    (folder / name).write_bytes(data)
    record = files.read_record(folder / "archive.json") or {}
    record["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / "archive.json").write_bytes(files.encode_record(record))


def _bomb(folder: Path) -> None:
    _resealed(folder, MANIFEST, gzip.compress(b"{" + bytes(files.TABLE_BYTES + 2**20), 1))


def _extension(folder: Path) -> None:
    table = pa.table({"cell": pa.array(["a"]), "update": pa.array([[1]])})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    _resealed(folder, "metrics.parquet", sink.getvalue().to_pybytes())


def _long(folder: Path) -> None:
    rows = 2**24 + 1
    table = {"cell": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), ["a"]), "update": np.zeros(rows, np.int8)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink, store_schema=False)
    _resealed(folder, "metrics.parquet", sink.getvalue().to_pybytes())


def _stranger(folder: Path) -> None:
    _resealed(folder, "metrics.parquet", encoded({"cell": ["../../etc"], "update": np.array([1])}))


def _disorder(folder: Path) -> None:
    cell = Archive.open(folder).cells[0]
    _resealed(folder, "metrics.parquet", encoded({"cell": [cell, cell], "update": np.array([2, 1])}))


def _lost(folder: Path) -> None:
    columns = Archive.open(folder).table("cells")
    _resealed(folder, "cells.parquet", encoded({name: column[1:] for name, column in columns.items()}))


def _state(folder: Path) -> None:
    columns = Archive.open(folder).table("cells")
    columns["state"] = ["splendid"] * len(columns["cell"])
    _resealed(folder, "cells.parquet", encoded(columns))


def _link(folder: Path) -> None:
    (folder / "cells.parquet").unlink()
    (folder / "cells.parquet").symlink_to("/etc/hostname")


def _pipe(folder: Path) -> None:
    (folder / "evaluations.parquet").unlink()
    os.mkfifo(folder / "evaluations.parquet")


def _bits(folder: Path) -> None:
    data = bytearray((folder / "evaluations.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "evaluations.parquet").write_bytes(bytes(data))


def _noise(folder: Path) -> None:
    _resealed(folder, "evaluations.parquet", b"PAR1" + bytes(range(256)) + b"PAR1")


def _gone(folder: Path) -> None:
    (folder / "metrics.parquet").unlink()


def _large(folder: Path) -> None:
    os.truncate(folder / "metrics.parquet", 2**30)


def _names(folder: Path) -> None:
    record = files.read_record(folder / "archive.json") or {}
    record["files"]["../passwd"] = "0"
    (folder / "archive.json").write_bytes(files.encode_record(record))


def _hours(folder: Path) -> None:
    record = files.read_record(folder / "archive.json") or {}
    record["usage"]["hours"] = "many"
    (folder / "archive.json").write_bytes(files.encode_record(record))


def _newer(folder: Path) -> None:
    record = files.read_record(folder / "archive.json") or {}
    text = json.dumps({**record, "schema": 2})
    (folder / "archive.json").write_text(text)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (_bomb, "manifest.json.gz.*unpacks to more than 128 MiB"),
        (_extension, "metrics.parquet.*other columns than numbers and texts"),
        (_long, "metrics.parquet.*rows, of 16777216 at most"),
        (_stranger, "metrics.parquet.*cells that the run does not have"),
        (_disorder, "metrics.parquet.*out of order"),
        (_lost, "cells.parquet.*how every cell ended"),
        (_state, "cells.parquet.*how every cell ended"),
        (_link, "cells.parquet.*is a link"),
        (_pipe, "evaluations.parquet.*not an ordinary file"),
        (_bits, "evaluations.parquet.*checksum"),
        (_noise, "evaluations.parquet.*not a sound Parquet file"),
        (_gone, "metrics.parquet.*is missing"),
        (_large, "metrics.parquet.*has 1,024 MiB"),
        (_names, "archive.json.*not the record of an archive"),
        (_hours, "archive.json.*not the record of an archive"),
        (_newer, "archive.json.*a newer klab"),
    ],
)
def test_a_harmful_archive_ends_in_one_message(
    small: Small, tmp_path: Path, harm: Callable[[Path], None], expected: str
) -> None:
    folder = tmp_path / "archive"
    write_archive(small(), folder)
    harm(folder)
    with pytest.raises(UserError, match=expected):
        load_run(folder)
