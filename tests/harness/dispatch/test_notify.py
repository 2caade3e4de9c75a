"""Whom a study tells: a real server and a real command get every event once, whatever goes wrong harms nothing."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid, UserError, load_grid, parse_grid
from klab.harness.cli.main import main
from klab.harness.dispatch.cancel import cancel
from klab.harness.dispatch.job import run_job
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.notify import markers, tell_of_cells, tell_of_end
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run, files
from tests.support.run_processes import wait_for

MakeGrid = Callable[..., Grid]
SECRET = "a-very-secret-token"


class Server:
    """A web server on this machine that keeps what it is sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answers: list[int] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code = server.answers.pop(0) if server.answers else 200
                if code == 200:
                    server.bodies.append(json.loads(body))
                self.send_response(code)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hooks/{SECRET}"

    def events(self) -> list[tuple[str, str]]:
        return [(body["event"], body.get("cell", "")) for body in self.bodies]


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("KLAB_TEST_HOOK", server.address)
    yield server
    server.server.shutdown()
    server.server.server_close()


def telling(grid: Grid, **notify: Any) -> Grid:
    text = {**json.loads(grid.text), "notify": {"webhook": "${KLAB_TEST_HOOK}", **notify}}
    Path(grid.file).write_text(json.dumps(text))
    return load_grid(grid.file)


def test_end_failure_and_divergence_are_told_once(make_grid: MakeGrid, place: Path, web: Server) -> None:
    cells: list[dict[str, Any]] = [{}, {"training.lr": 1e38, "training.clip_norm": None}]
    grid = make_grid(cells=cells, updates=30)
    run = Run.create(place / "runs/little", telling(grid))
    launch(run, InlineExecutor(), workers=1)
    good, bad = run.cells
    assert count(statuses(run)) == {"finished": 1, "diverged": 1}
    assert sorted(web.events()) == [("divergence", bad), ("end", "")]
    told = {body["event"]: body for body in web.bodies}
    assert told["end"]["states"] == {"finished": 1, "diverged": 1}
    assert told["end"]["text"] == "little has ended: 1 diverged, 1 finished"
    assert "not finite" in told["divergence"]["reason"]
    launch(run, InlineExecutor(), workers=1)  # nothing is left to run, and nothing is told again
    tell_of_cells(run, run.cells)
    tell_of_end(run)
    assert len(web.bodies) == 2
    assert good not in [cell for _, cell in web.events()]


def test_a_failure_is_told_every_time_that_it_happens(make_grid: MakeGrid, place: Path, web: Server) -> None:
    task = {"name": "slow_tasks:Chore", "fail_unless": str(place / "there")}
    run = Run.create(place / "runs/little", telling(make_grid(seeds=2, task=task), on=["failure"]))
    for number in (1, 2):
        launch(run, InlineExecutor(), workers=1, retry_failed=True)
        assert sorted(web.events()) == sorted([("failure", cell) for cell in run.cells] * number)
    assert all(body["state"] == "failed" and body["reason"] in body["text"] for body in web.bodies)
    assert all(body["reason"] for body in web.bodies)


def test_every_cell_where_that_is_asked_for_and_no_end_before_the_last(
    make_grid: MakeGrid, place: Path, web: Server
) -> None:
    run = Run.create(place / "runs/little", telling(make_grid(seeds=3), on=["cell", "end"]))
    first, second, third = run.cells
    run_job(run.path, (first,), executor="local")
    run_job(run.path, (second,), executor="local")
    assert web.events() == [("cell", first), ("cell", second)]
    cancel(run, [third], executors=())
    tell_of_end(run)
    assert web.events()[2:] == [("end", "")]
    launch(run, InlineExecutor(), workers=1)
    assert web.events()[3:] == [("cell", third), ("end", "")]
    assert web.bodies[-1]["states"] == {"finished": 3}


def test_many_processes_tell_of_one_end_once(make_grid: MakeGrid, place: Path, web: Server) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    launch(run, InlineExecutor(), workers=1)
    run = Run.create(run.path, telling(load_grid("little.yaml")))
    workers = [threading.Thread(target=tell_of_end, args=(Run.open(run.path),)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert web.events() == [("end", "")]


def test_a_marker_that_a_dead_process_never_wrote_lets_another_one_tell(
    make_grid: MakeGrid, place: Path, web: Server
) -> None:
    run = Run.create(place / "runs/little", telling(make_grid()))
    web.answers += [500] * 3  # the web is away: said, marked, and not tried for ever
    launch(run, InlineExecutor(), workers=1)
    assert web.bodies == []
    (marker,) = markers(run)
    assert files.read_record(marker) == {
        **(files.read_record(marker) or {}),
        "event": "end",
        "problems": ["notify.webhook: ${KLAB_TEST_HOOK} answered 500"],
    }
    marker.unlink()
    tell_of_end(run)
    assert web.events() == [("end", "")]


def test_the_web_may_be_away_for_a_moment(make_grid: MakeGrid, place: Path, web: Server) -> None:
    web.answers += [503]
    run = Run.create(place / "runs/little", telling(make_grid()))
    launch(run, InlineExecutor(), workers=1)
    assert web.events() == [("end", "")]


def test_a_command_gets_the_event_without_a_shell(make_grid: MakeGrid, place: Path) -> None:
    script = "import sys, json; open('told.txt', 'a').write(json.dumps([sys.argv[1:], json.load(sys.stdin)]))"
    command = [sys.executable, "-c", script, "{event}: {text}", "$(touch never)", "{other}"]
    run = Run.create(place / "runs/little", telling(make_grid(), webhook=None, command=command))
    launch(run, InlineExecutor(), workers=1)
    words, record = json.loads((place / "told.txt").read_text())
    assert words == ["end: little has ended: 1 finished", "$(touch never)", "{other}"]
    assert (record["event"], record["run"], record["states"]) == ("end", "little", {"finished": 1})
    assert not (place / "never").exists()


@pytest.mark.parametrize(
    ("notify", "said"),
    [
        ({"webhook": None, "command": ["a-program-that-nobody-has"]}, "a-program-that-nobody-has: No such file"),
        ({"webhook": None, "command": ["false"]}, "false ended with code 1"),
        ({"webhook": None, "command": ["sleep", "60"], "seconds": 0.2}, "sleep took more than 0.2 s, and was ended"),
        ({"webhook": "${KLAB_NOT_SET}"}, "the environment variable KLAB_NOT_SET is not set where this job runs"),
    ],
)
def test_what_cannot_be_told_is_said_and_harms_nothing(
    make_grid: MakeGrid, place: Path, capsys: pytest.CaptureFixture[str], notify: dict[str, Any], said: str
) -> None:
    run = Run.create(place / "runs/little", telling(make_grid(), **notify))
    launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 1}
    assert said in capsys.readouterr().err


def test_the_local_pool_tells_and_the_address_is_nowhere_in_the_run_folder(
    make_grid: MakeGrid, place: Path, web: Server
) -> None:
    run = Run.create(
        place / "runs/little", telling(make_grid(seeds=2, resources={"cells_per_job": 1}), on=["cell", "end"])
    )
    launch(run, LocalExecutor(max_parallel=2, device="cpu"), workers=2)
    wait_for(lambda: len(web.bodies) == 3)
    assert sorted(web.events()) == sorted([("cell", cell) for cell in run.cells] + [("end", "")])
    kept = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(kept) > 10
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


def test_looking_at_a_run_tells_nobody(make_grid: MakeGrid, place: Path, web: Server) -> None:
    run = Run.create(place / "runs/little", make_grid())
    launch(run, InlineExecutor(), workers=1)
    Run.create(run.path, telling(load_grid("little.yaml")))
    for command in ("status", "watch"):
        assert main([command, "little"]) == 0
    assert web.bodies == []


@pytest.mark.parametrize(
    ("notify", "message"),
    [
        ({}, "notify: tells nobody"),
        ({"webhook": "https://hooks.example/secret"}, "notify.webhook: not an environment variable"),
        ({"command": "mail me"}, "notify.command: not a list of words"),
        ({"command": ["x"], "on": ["ends"]}, "notify.on"),
        ({"command": ["x"], "on": []}, "notify.on: names no event"),
        ({"web_hook": "${X}"}, "did you mean 'webhook'"),
        ({"command": ["x"], "seconds": 0}, "notify.seconds"),
    ],
)
def test_mistakes_are_named_without_secrets(notify: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_grid(json.dumps({"name": "study", "task": "addition", "notify": notify}), "study.yaml")
    assert message in str(caught.value)
    assert "hooks.example" not in str(caught.value)
