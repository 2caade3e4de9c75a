"""The server answers about runs, says when nothing changed, lets nobody in who should not be, and writes nothing."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from klab.grid import UserError
from klab.harness.dispatch.status import count, statuses
from klab.harness.serve.runs_folder import RunsFolder
from klab.harness.serve.server import LiveServer
from klab.harness.store import Run
from klab.reports import render
from tests.harness.serve.conftest import STUDY, Client
from tests.reports.synthetic import write_run
from tests.support import tuned_run

Serve = Callable[..., Client]
PATHS = (
    "runs",
    "runs/little",
    "runs/little/cells",
    "runs/little/configurations",
    "runs/little/curves",
    "runs/little/curves?by=cell",
    "runs/little/completions",
)


def listed(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")]}


def mixed(folder: Path) -> Run:
    """Finished, diverged, failed, running, waiting cells."""
    ends = {"k1": "finished", "k2": "diverged", "k3": "failed"}
    return write_run(
        folder,
        STUDY,
        outcome=lambda cell: "missing" if cell.training.lr == 0.2 else ends[cell.objective.estimator],
    )


def test_the_head_of_a_run_is_what_status_says(tmp_path: Path, serve: Serve) -> None:
    run = mixed(tmp_path / "runs" / "little")
    running = run.cell(run.cells[2])
    running.claim()
    running.write_heartbeat({"update": 4, "updates": 6, "reward": 0.5})
    try:
        found = serve(run.path.parent).get("runs/little")
        assert (
            found["states"]
            == count(statuses(run))
            == {"finished": 2, "diverged": 2, "running": 1, "waiting": 5, "failed": 2}
        )
    finally:
        running.release_claim()
    assert (found["cells"], found["configurations"], found["updates"]) == (12, 6, 72)
    assert found["description"] == "Which estimator?"
    assert found["axes"] == [
        {"key": "estimator", "values": ["k1", "k2", "k3"]},
        {"key": "training.lr", "values": ["0.1", "0.2"]},
    ]


def test_states_follow_the_run(run: Run, client: Client) -> None:
    assert client.get("runs/little")["states"] == {"finished": 12}
    cell = run.cell(run.cells[0])
    (cell.path / "result.json").unlink()
    cell.claim()
    cell.write_heartbeat({"update": 2, "updates": 6, "reward": 0.25})
    try:
        assert client.get("runs/little")["states"] == {"finished": 11, "running": 1}
        row = client.get("runs/little/cells?state=running")["rows"][0]
        assert (row["id"], row["update"], row["reward"]) == (cell.id, 2, 0.25)
    finally:
        cell.release_claim()
    cell.record_failure("Traceback\nValueError: too bad")
    row = client.get("runs/little/cells?state=failed")["rows"][0]
    assert (row["id"], row["detail"]) == (cell.id, "ValueError: too bad")
    detail = client.get(f"runs/little/cells/{cell.id}")
    assert "ValueError: too bad" in detail["error"]


def test_a_run_that_appears_or_grows_is_seen(run: Run, client: Client) -> None:
    assert [each["name"] for each in client.get("runs")["runs"]] == ["little"]
    write_run(run.path.parent / "second", STUDY.replace("little", "second"))
    assert {each["name"] for each in client.get("runs")["runs"]} == {"little", "second"}
    write_run(run.path, STUDY.replace("seeds: 2", "seeds: 3"), only=lambda cell: cell.seed == 2)
    assert client.get("runs/little")["states"] == {"finished": 18}


def test_cells_that_wait_for_their_settings_stand_at_the_end_until_they_have_them(tmp_path: Path, serve: Serve) -> None:
    run = tuned_run.create(tmp_path / "runs" / "tuned")
    client = serve(run.path.parent)

    def rows() -> list[Any]:
        return list(client.get("runs/tuned/cells?size=100")["rows"])

    before = rows()
    assert [row["id"] for row in before] == [row.id for row in statuses(run)]
    assert len(before) == len(run.cells) + 6
    assert [row["detail"] for row in before[-6:]] == ["waits for tuning"] * 6
    name = before[-1]["id"]
    assert client.get(f"runs/tuned/cells/{quote(name, safe='')}")["state"] == "waiting"
    assert client.get("runs/tuned/configurations")["total"] > 0
    tuned_run.fill(
        run, lambda cell: ("finished", 0.5 if cell.training.lr == 1e-3 else 0.25) if cell.seed > 100 else None
    )
    fresh = tuned_run.settled(run)
    after = rows()
    assert [row["id"] for row in after] == Run.open(run.path).cells
    assert [row["state"] for row in after if row["id"] in fresh] == ["waiting"] * 6


def test_held_and_stopped_cells_are_shown_as_such(run: Run, client: Client) -> None:
    held, stopped = run.cell(run.cells[0]), run.cell(run.cells[1])
    (held.path / "result.json").unlink()
    held.append_attempt({"event": "held", "at": time.time(), "queue": "local"})
    (stopped.path / "result.json").unlink()
    stopped.write_result({"state": "stopped", "updates": 3, "reward_final": 0.1, "reason": "reward below 0.2"})
    assert client.get("runs/little")["states"] == {"finished": 10, "stopped": 1, "held": 1}
    assert client.get("runs/little/cells?state=stopped")["rows"][0]["detail"] == "reward below 0.2"


def test_curves_grow_and_completions_come(tmp_path: Path, serve: Serve) -> None:
    run = write_run(tmp_path / "runs" / "little", STUDY, outcome=lambda cell: "missing")
    client = serve(run.path.parent)
    assert client.get("runs/little/curves") == {"panels": [], "curves": [], "behind": False}
    assert client.get("runs/little/completions") == {"completions": []}
    cell = run.cell(run.cells[0])
    cell.claim()
    try:
        for update in (1, 2, 3):
            cell.append_metrics([{"update": update, "reward_mean": update / 10, "k3": float("nan"), "entropy": 1.0}])
            cell.write_heartbeat({"update": update, "updates": 6, "reward": update / 10})
            curve = client.get(f"runs/little/curves?by=cell&id={cell.id}")["curves"][0]
            assert curve["lines"]["reward_mean"] == {
                "x": list(range(1, update + 1)),
                "y": [each / 10 for each in range(1, update + 1)],
            }
            assert set(curve["lines"]) == {"reward_mean", "entropy"}
            assert len(client.get("runs/little/cells")["rows"][0]["spark"]) == update
        sample = {"prompt": "1+1=", "completion": "2 <b>", "reward": 1.0}
        cell.append_evaluations([{"update": 3, "reward": 0.5, "reverse_kl": 0.1, "samples": [sample]}])
        cell.write_heartbeat({"update": 3, "updates": 6, "reward": 0.3})
        found = client.get("runs/little/completions")["completions"]
        assert [(each["cell"], each["update"], each["completion"]) for each in found] == [(cell.id, 3, "2 <b>")]
        detail = client.get(f"runs/little/cells/{cell.id}")
        assert detail["completions"] == [{"update": 3, "samples": [sample]}]
        assert detail["values"]["reward"] == 0.5
        cell.truncate_metrics(1)  # as a cell does that resumes from a checkpoint
        curve = client.get(f"runs/little/curves?by=cell&id={cell.id}")["curves"][0]
        assert curve["lines"]["reward_mean"] == {"x": [1.0], "y": [0.1]}
    finally:
        cell.release_claim()


def test_the_mean_of_a_configuration_is_that_of_its_seeds(run: Run, client: Client) -> None:
    found = client.get("runs/little/curves")["curves"]
    assert [curve["cells"] for curve in found] == [2] * 6
    for curve in found:
        cells = [cell for cell in run.cells if run.resolved(cell)["group"] == curve["id"]]
        rewards = [[row["reward"] for row in run.cell(cell).evaluations()] for cell in cells]
        assert curve["lines"]["reward"]["y"] == pytest.approx(
            [sum(each) / 2 for each in zip(*rewards, strict=True)], rel=1e-4
        )
        assert curve["lines"]["reward"]["low"] == pytest.approx(
            [min(each) for each in zip(*rewards, strict=True)], rel=1e-4
        )


def test_the_table_is_filtered_sorted_and_cut_on_the_server(run: Run, client: Client) -> None:
    def ids(query: str) -> list[str]:
        return [row["id"] for row in client.get(f"runs/little/cells?{query}")["rows"]]

    rewards = {cell: run.cell(cell).result()["reward_final"] for cell in run.cells}  # type: ignore[index]
    assert ids("") == run.cells
    assert ids("sort=reward&order=down") == sorted(run.cells, key=lambda cell: -rewards[cell])
    first, second = ids("size=5&sort=reward"), ids("size=5&sort=reward&page=1")
    assert first + second == sorted(run.cells, key=lambda cell: rewards[cell])[:10]
    assert ids("q=estimator+k1") == [cell for cell in run.cells if cell.startswith("k1-")]
    assert ids("axis=estimator%3Dk1&axis=training.lr%3D0.2") == [
        cell for cell in run.cells if cell.startswith("k1-") and run.resolved(cell)["training"]["lr"] == 0.2
    ]
    assert ids("state=failed") == []
    assert client.get("runs/little/cells?page=99&size=5")["page"] == 2
    assert len(client.get("runs/little/cells?size=100000&page=-1&sort=nothing")["rows"]) == 12
    lines = client.get("runs/little/configurations?sort=reward&order=down")
    assert lines["total"] == 6
    assert [line["reward"] for line in lines["rows"]] == sorted(
        (line["reward"] for line in lines["rows"]), reverse=True
    )
    assert lines["rows"][0]["states"] == {"finished": 2}


def test_what_did_not_change_is_not_sent_again(run: Run, client: Client) -> None:
    for path in (*PATHS, f"runs/little/cells/{run.cells[0]}"):
        first = client.ask(f"/api/{path}")
        again = client.ask(f"/api/{path}", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status, again.body) == (304, b""), path
    tag = client.ask("/api/runs/little").headers["etag"]
    run.cell(run.cells[0]).append_attempt({"event": "cancelled", "at": time.time()})
    (run.cell(run.cells[0]).path / "result.json").unlink()
    assert client.ask("/api/runs/little", headers={"If-None-Match": tag}).status == 200


def test_nothing_is_written(tmp_path: Path, serve: Serve) -> None:
    run = mixed(tmp_path / "runs" / "little")
    before = listed(tmp_path)
    client = serve(tmp_path / "runs")
    for path in (*PATHS, *(f"runs/little/cells/{cell}" for cell in run.cells)):
        client.get(path)
        client.get(path)
    assert listed(tmp_path) == before


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_reading_is_possible(run: Run, client: Client, method: str) -> None:
    for path in ("/", "/api/runs", "/runs/little/report/index.html"):
        reply = client.ask(path, method)
        assert reply.status == 405
        assert reply.headers["allow"] == "GET, HEAD"
    assert client.ask("/api/runs", "HEAD").body == b""


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:PORT",
        "localhost.evil.example",
        "127.0.0.1.evil.example:PORT",
        "10.0.0.1:PORT",
        "localhost:PORT/x",
        "a@localhost:PORT",
        "[::1",
        "127.0.0.1:port",
    ],
)
def test_another_name_for_this_server_is_refused(run: Run, client: Client, host: str | None) -> None:
    sent = host.replace("PORT", str(client.port)) if host is not None else None
    for path in ("/", "/api/runs", "/static/live.js"):
        reply = client.ask(path, headers={"Host": sent})
        assert reply.status in (400, 421)
        assert b"little" not in reply.body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9999", "127.0.0.1:1", "[::1]:8765"])
def test_names_of_a_tunnel_are_known(client: Client, host: str) -> None:
    assert client.ask("/api/runs", headers={"Host": host}).status == 200


def test_pages_of_other_sites_may_not_ask(client: Client) -> None:
    for site in ("cross-site", "same-site"):
        asked = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
        assert client.ask("/api/runs", headers=asked).status == 403
        followed = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert client.ask("/", headers=followed).status == 200
        assert client.ask("/", headers={**followed, "Sec-Fetch-Dest": "iframe"}).status == 403
    assert client.ask("/api/runs", headers={"Sec-Fetch-Site": "same-origin"}).status == 200


def test_every_reply_forbids_scripts_and_frames_of_others(client: Client) -> None:
    for path in ("/", "/static/live.js", "/api/runs", "/api/runs/nothing", "/nothing", "/runs/little/report/"):
        reply = client.ask(path)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in reply.headers
        assert "server" not in reply.headers
    page = client.ask("/").headers["content-security-policy"]
    assert "unsafe" not in page
    assert "script-src 'self'" in page


def test_the_page_needs_nothing_but_this_server(client: Client) -> None:
    page = client.ask("/").body.decode()
    assert not re.search(r"(src|href)=[\"'](https?:)?//", page)
    for path in re.findall(r'(?:src|href)="(static/[^"]+)"', page):
        assert client.ask(f"/{path}").status == 200
    for module in re.findall(r'from "\./([a-z]+\.js)"', client.ask("/static/live.js").body.decode()):
        text = client.ask(f"/static/{module}").body.decode()
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in text


def test_the_report_is_there_when_it_is_written(run: Run, client: Client) -> None:
    assert client.get("runs/little")["report"] is None
    assert client.ask("/runs/little/report/").status == 404
    render(run.path, figures=False)
    assert client.get("runs/little")["report"] == pytest.approx(time.time(), abs=600)
    page = client.ask("/runs/little/report/")
    assert page.body == (run.path / "report" / "index.html").read_bytes()
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in policy
    assert "connect-src" not in policy
    table = next((run.path / "report" / "tables").glob("*.csv"))
    assert client.ask(f"/runs/little/report/tables/{table.name}").body == table.read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "../grid.yaml",
        "..%2fgrid.yaml",
        "%2e%2e/grid.yaml",
        "..%2f..%2f..%2foutside.html",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "linked.html",
        "folder/outside.html",
        "tables/../../manifest.json",
        "index.html%00.html",
        "cache/cells.parquet",
        ".hidden",
        "tables",
        "fifo.html",
    ],
)
def test_nothing_outside_of_the_report_is_given_out(run: Run, client: Client, tmp_path: Path, path: str) -> None:
    (tmp_path / "outside.html").write_text("secret")
    report = run.path / "report"
    (report / "tables").mkdir(parents=True)
    (report / "cache").mkdir()
    (report / "cache" / "cells.parquet").write_text("secret")
    (report / ".hidden").write_text("secret")
    (report / "index.html").write_text("page")
    (report / "linked.html").symlink_to(tmp_path / "outside.html")
    (report / "folder").symlink_to(tmp_path)
    os.mkfifo(report / "fifo.html")
    reply = client.ask(f"/runs/little/report/{path}")
    assert reply.status in (403, 404)
    assert b"secret" not in reply.body
    assert b"schema" not in reply.body


def test_a_report_folder_that_is_a_link_is_refused(run: Run, client: Client, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "index.html").write_text("secret")
    (run.path / "report").symlink_to(outside)
    assert client.get("runs/little")["report"] is None
    assert client.ask("/runs/little/report/").status == 403


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2flittle", ".", "nothing", "%00", "x" * 5000, "little%0a"])
def test_what_is_no_run_of_the_folder_is_not_found(client: Client, name: str) -> None:
    assert client.ask(f"/api/runs/{name}").status in (307, 404)
    assert client.ask(f"/api/runs/{name}/cells/x").status in (307, 404)
    assert client.ask("/api/runs/little/cells/nothing").status == 404


def test_a_secret_keeps_other_users_of_the_machine_out(run: Run, serve: Serve) -> None:
    client = serve(run.path.parent, private=True)
    secret = client.server.address.secret
    assert len(secret) >= 20
    assert client.server.address.url.endswith(f"/{secret}/")
    for path in ("/", "/api/runs", "/static/live.js", f"/{secret[:-1]}/api/runs", f"/{secret}x/api/runs", f"/{secret}"):
        assert client.ask(path).status == 404
    assert client.ask(f"/{secret}/api/runs").data["total"] == 1
    assert b"static/live.js" in client.ask(f"/{secret}/").body
    assert client.ask(f"/{secret}/static/live.js").status == 200


def test_addresses_say_how_to_come_from_elsewhere(run: Run) -> None:
    server = LiveServer(RunsFolder(run.path.parent))
    port = server.address.port
    assert port > 0
    assert server.address.url == f"http://127.0.0.1:{port}/"
    assert re.fullmatch(rf"ssh -N -L {port}:127\.0\.0\.1:{port} \S+", server.address.tunnel)
    with pytest.raises(UserError, match="cannot listen"):
        LiveServer(RunsFolder(run.path.parent), port=port)
    with pytest.raises(UserError, match="cannot listen"):
        LiveServer(RunsFolder(run.path.parent), host="no.such.host.invalid")
    server.stop()
    server.run()


def test_a_single_run_is_shown_by_itself(run: Run, serve: Serve) -> None:
    found = serve(run.path).get("runs")
    assert (found["single"], [each["name"] for each in found["runs"]]) == ("little", ["little"])


def test_an_overview_has_pages_and_finds_names(tmp_path: Path, serve: Serve) -> None:
    names = [f"study-{number:02d}" for number in range(23)]
    for number, name in enumerate(names):
        run = write_run(tmp_path / name, STUDY.replace("little", name), outcome=lambda cell: "missing")
        os.utime(run.path / "manifest.json", (1e9 + number, 1e9 + number))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("")
    client = serve(tmp_path)

    def shown(query: str) -> list[Any]:
        return [each["name"] for each in client.get(f"runs?{query}")["runs"]]

    assert shown("") + shown("page=1") == names[::-1]
    assert shown("q=study+1") == [name for name in names[::-1] if "1" in name]
    assert shown("q=nothing") == []


def test_what_could_not_be_told_is_told_when_the_damage_is_mended(run: Run, client: Client) -> None:
    client.get("runs/little")
    cell = run.cell(run.cells[0])
    (cell.path / "result.json").unlink()
    cell.record_failure("ValueError: no")
    record = run.jobs / "slurm" / "001" / "submission.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert "submission.json" in client.ask("/api/runs/little").data["problem"]
    record.unlink()
    assert client.get("runs/little")["states"] == {"finished": 11, "failed": 1}
