"""A controller that waits for its run: it takes it over, or leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from klab.grid import Grid
from klab.harness.cli.execution import ready_controller
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.ready import ReadyController
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run
from tests.support.run_processes import controllers, kill, wait_for, workers

MakeGrid = Callable[..., Grid]
TINY = {"policy": {"name": "tiny"}, "task": {"name": "addition"}, "training": {}}


def stat(pid: int) -> list[str]:
    """State, parent and so on of a living process; [] of one that has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    words = text[text.rfind(")") + 2 :].split()
    return [] if words[0] == "Z" else words


def children(pid: int) -> list[int]:
    found = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [each for each in found if stat(each)[1:2] == [str(pid)]]


def is_server(pid: int) -> bool:
    return b"klab.harness.dispatch.local.fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()


def server_of(ready: ReadyController) -> int:
    """The fork server that it has started, once that is a program of its own."""
    found: int = wait_for(lambda: next(filter(is_server, children(ready.pid)), None))
    return found


def test_without_a_run_it_ends_with_its_server() -> None:
    ready = ReadyController([TINY], threads=1)
    server = server_of(ready)
    ready.end()
    wait_for(lambda: not stat(ready.pid) and not stat(server))


def test_a_launcher_that_is_killed_takes_it_along(place: Path) -> None:
    program = (
        "import sys; from klab.harness.dispatch.local.ready import ReadyController\n"
        "print(ReadyController([], 1).pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        (server,) = wait_for(lambda: children(pid))
        kill(launcher.pid)
    wait_for(lambda: not stat(pid) and not stat(server))


def test_it_controls_the_run_with_the_server_that_it_has_warmed(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2, task={"name": "slow_tasks:Chore", "seconds": 0.02}))
    ready = ReadyController(map(run.resolved, run.cells), threads=1)
    server = server_of(ready)
    local = LocalExecutor(max_parallel=1, ready=ready)
    launch(run, local, workers=1)
    assert controllers(run) == [ready.pid]
    (worker,) = wait_for(lambda: workers(run))
    assert stat(worker)[1] == str(server)
    assert ready_controller(make_grid(seeds=2, task={"name": "slow_tasks:Chore", "seconds": 0.02}), run.path, 1) is None
    wait_for(lambda: count(statuses(run)) == {"finished": 2})
    wait_for(lambda: not stat(ready.pid) and not stat(server))
    assert (run.jobs / "controller.log").read_text() == ""


def test_where_it_has_died_another_controller_is_started(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid())
    ready = ReadyController([], threads=1)
    server = server_of(ready)
    kill(ready.pid)
    wait_for(lambda: not stat(ready.pid))
    launch(run, LocalExecutor(max_parallel=1, ready=ready), workers=1)
    wait_for(lambda: count(statuses(run)) == {"finished": 1})
    wait_for(lambda: not stat(server))


def test_a_server_that_dies_before_the_run_is_known_is_made_again(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid())
    ready = ReadyController(map(run.resolved, run.cells), threads=1)
    kill(server_of(ready))
    launch(run, LocalExecutor(max_parallel=1, ready=ready), workers=1)
    wait_for(lambda: count(statuses(run)) == {"finished": 1})


def test_a_launch_with_nothing_to_do_ends_it(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid())
    ready = ReadyController([TINY], threads=1)
    local = LocalExecutor(ready=ready)
    local.end_ready()
    wait_for(lambda: not stat(ready.pid))
    local.end_ready()  # nothing any more
    assert controllers(run) == []
