"""`klab release`: let held cells start."""

from __future__ import annotations

from klab.harness.cli.arguments import RUNS, CellsArgument, JsonOption, RunArgument, RunsOption, cells_of, run_of
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.hold import release as let_go


def release(
    run: RunArgument,
    cells: CellsArgument = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Let cells start that were held. Those that were in a queue start by themselves, others with the next launch."""
    opened = run_of(run, runs)
    found = let_go(opened, cells_of(opened, cells))
    if as_json:
        show_json({"run": str(opened.path), "starting": list(found.starting), "waiting": list(found.waiting)})
        return
    say(f"{len(found.starting)} cells released, which start by themselves")
    if found.waiting:
        say(f"{len(found.waiting)} more wait for the next `klab launch`: they were in no queue")
