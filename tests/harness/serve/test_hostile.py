"""A stranger's run is data: whatever its files hold, the server answers in bounded size, and other runs are shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.harness.store import Run, files
from tests.harness.serve.conftest import Client

SCRIPT = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
MEGABYTE = 2**20


def every_path(run: Run) -> list[str]:
    views = ("", "/cells?size=100", "/configurations?size=100", "/curves", "/curves?by=cell", "/completions")
    return [
        "runs",
        *(f"runs/{run.path.name}{view}" for view in views),
        *(f"runs/{run.path.name}/cells/{cell}" for cell in run.cells[:3]),
    ]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def outside(path: Path) -> None:
    secret = path.parents[4] / "secret"
    secret.write_bytes(
        files.encode_record({"update": 1, "reward_mean": 0.123456, "event": "secret", "at": 1.0}) + b"\n"
    )
    path.symlink_to(secret)


def folder(path: Path) -> None:
    path.mkdir()


def zeros(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


def torn(path: Path) -> None:
    path.write_bytes(b'{"schema":1,"update":1,"reward_mean":0.5,"samples":[{"prompt":"a')


def deep(path: Path) -> None:
    path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4000)


@pytest.mark.parametrize("make", [fifo, loop, outside, folder, zeros, torn, deep, binary])
def test_files_of_any_kind_are_survived(run: Run, client: Client, make: Callable[[Path], None]) -> None:
    names = ("metrics.jsonl", "evaluations.jsonl", "attempts.jsonl", "heartbeat", "claim", "result.json", "error.txt")
    for identity in run.cells[:2]:
        for name in names:
            path = run.cell(identity).path / name
            path.unlink(missing_ok=True)
            make(path)
    (run.path / "report").mkdir()
    for path in (run.path / "index.json", run.path / "report" / "index.html"):
        make(path)
    for _ in range(2):
        for path in every_path(run):
            reply = client.ask(f"/api/{path}")
            assert reply.status == 200, (path, reply.body[:500])
            assert len(reply.body) < MEGABYTE
            assert b"0.123456" not in reply.body
    assert client.get("runs/little")["states"]["finished"] == 10
    assert client.get(f"runs/little/cells/{run.cells[0]}")["state"] == "failed"


def test_values_of_any_kind_are_survived(run: Run, client: Client) -> None:
    """Checksums only tell damage: a stranger writes them as well."""
    strange = [None, True, "x" * 5000, [1, [2]], {"a": {"b": SCRIPT}}, -1, 10**300, float("nan"), float("-inf"), SCRIPT]
    cells = [run.cell(identity).path for identity in run.cells]
    for cell, value in zip(cells, strange, strict=False):
        rows = [{"update": 1, "reward_mean": value, "samples": value, "reward": value}]
        rows += [{"update": 2, "samples": [value, {"prompt": value, "completion": value, "reward": value}]}]
        rows += [{"update": value}, {"reward_mean": value}]
        data = b"".join(files.encode_record(row) + b"\n" for row in rows)
        (cell / "metrics.jsonl").write_bytes(data)
        (cell / "evaluations.jsonl").write_bytes(data)
        event = {"event": str(value), "at": 1.0, "details": value, "log": value, "host": value}
        (cell / "attempts.jsonl").write_bytes(files.encode_record(event) + b"\n")
        (cell / "heartbeat").write_bytes(files.encode_record({"update": value, "reward": value, "at": value}))
        (cell / "claim").write_bytes(
            files.encode_record({"pid": value, "host": value, "machine": value, "start": value})
        )
        result = {
            "state": "finished",
            "updates": value,
            "reward_final": value,
            "reason": value,
            "reverse_kl_final": value,
        }
        if value is not None:
            (cell / "result.json").write_bytes(files.encode_record(result))
        else:
            (cell / "result.json").unlink()
    for path in (*every_path(run), *(f"runs/little/cells/{cell}" for cell in run.cells)):
        for sort in ("reward", "kl", "at", "done", "state", "label", "seed"):
            reply = client.ask(f"/api/{path}{'&' if '?' in path else '?'}sort={sort}")
            assert reply.status == 200, (path, reply.body[:500])
            assert len(reply.body) < MEGABYTE
            json.loads(reply.body, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(
    "fields",
    [
        {"description": SCRIPT * 1000},
        {"axes": {"estimator": None, SCRIPT: [SCRIPT]}},
        {"created": float("nan")},
        {"created": 1e300},
        {"baseline": SCRIPT},
        {"tuning": {"arms": 5}},
        {"resources": {"gpus": SCRIPT}},
        {"name": "../../x"},
        {"cells": {"../../etc": {}}},
        {"cells": {"a": 5, "b": {"group": SCRIPT, "seed": 0}}},
        {
            "cells": {
                f"c{i}": {"group": "g", "seed": i, "spellings": [SCRIPT] * 1000, "training": []} for i in range(200)
            }
        },
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_manifest_of_any_kind_is_survived(run: Run, client: Client, fields: dict[str, object]) -> None:
    shutil.copytree(run.path, run.path.parent / "sound")
    path = run.path / "manifest.json"
    manifest = files.read_record(path)
    assert manifest is not None
    files.replace(path, files.encode_record(manifest | fields))
    for each in every_path(run):
        reply = client.ask(f"/api/{each}")
        assert reply.status in (200, 404, 422, 500), (each, reply.body[:500])
        assert len(reply.body) < MEGABYTE
        assert reply.status == 200 or reply.data["problem"]
        json.loads(reply.body, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    heads = {each["name"]: each for each in client.get("runs")["runs"]}
    assert heads["sound"]["states"] == {"finished": 12}


def test_queues_of_any_kind_are_survived(run: Run, client: Client) -> None:
    (run.cell(run.cells[0]).path / "result.json").unlink()
    run.jobs.mkdir()
    (run.jobs / "slurm" / "001").mkdir(parents=True)
    for name in ("local-request.json", "local-state.json", "controller", "slurm/001/submission.json"):
        for value in ({"packs": 5, "flying": [5], "waiting": [[5]], "ticket": SCRIPT}, {"cells": SCRIPT, "name": 5}):
            (run.jobs / name).write_bytes(files.encode_record(value))
            for path in every_path(run):
                reply = client.ask(f"/api/{path}")
                assert reply.status in (200, 422, 500)
                assert len(reply.body) < MEGABYTE


def test_links_out_of_the_run_show_nothing(run: Run, client: Client, tmp_path: Path) -> None:
    """Whole folders and logs: what lies elsewhere is not this run's, however well-formed it is."""
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    cell = run.cell(run.cells[0])
    shutil.rmtree(cell.path)
    cell.path.symlink_to(other / "cells" / cell.id)
    found = client.get(f"runs/little/cells/{cell.id}")
    assert (found["state"], found["completions"], found["curves"][0]["lines"]) == ("failed", [], {})
    assert "link" in found["detail"]
    (tmp_path / "secret.err").write_text("secret")
    (run.path / "jobs").mkdir()
    (run.path / "jobs" / "linked.err").symlink_to(tmp_path / "secret.err")
    reader = run.cell(run.cells[1])
    for log in ("jobs/linked.err", "../../secret.err", str(tmp_path / "secret.err"), "jobs/../../../secret.err"):
        reader.append_attempt({"event": "started", "at": 1.0, "log": log})
        assert client.get(f"runs/little/cells/{reader.id}")["output"] == []
    (run.path / "jobs" / "real.err").write_text("mine")
    reader.append_attempt({"event": "started", "at": 1.0, "log": "jobs/real.err"})
    assert client.get(f"runs/little/cells/{reader.id}")["output"] == [{"file": "jobs/real.err", "text": "mine"}]
    shutil.move(run.path / "cells", tmp_path / "cells")
    (run.path / "cells").symlink_to(tmp_path / "cells")
    assert "link" in client.ask("/api/runs/little").data["problem"]


def test_texts_without_end_are_cut(run: Run, client: Client) -> None:
    cell = run.cell(run.cells[0])
    long = SCRIPT * 3000
    samples = [{"prompt": long, "completion": long, "reward": 1.0}] * 100
    for update in range(100, 103):
        cell.append_evaluations([{"update": update, "reward": 0.5, "samples": samples[:1]}])
    cell.append_evaluations([{"update": 200, "reward": 0.5, "samples": [{"prompt": "", "completion": "x"}] * 5000}])
    (cell.path / "result.json").unlink()
    cell.record_failure(long)
    for path in every_path(run):
        assert len(client.ask(f"/api/{path}").body) < MEGABYTE
    found = client.get(f"runs/little/cells/{cell.id}")
    assert "more letters" in found["completions"][1]["samples"][0]["completion"]
    assert len(found["completions"][0]["samples"]) == 8
