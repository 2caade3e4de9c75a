"""`klab hold`: keep waiting cells from starting."""

from __future__ import annotations

from klab.harness.cli.arguments import RUNS, CellsArgument, JsonOption, RunArgument, RunsOption, cells_of, run_of
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.hold import hold as keep
from klab.harness.dispatch.status import statuses


def hold(
    run: RunArgument,
    cells: CellsArgument = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Keep waiting cells from starting, here and on Slurm, until `klab release`. Running cells go on."""
    opened = run_of(run, runs)
    chosen = cells_of(opened, cells)
    held = keep(opened, chosen)
    going = [row.id for row in statuses(opened, cells=chosen) if row.state == "running"]
    if as_json:
        show_json({"run": str(opened.path), "held": held, "running": going})
        return
    on = f"; {len(going)} running ones go on (klab cancel stops them)" if going else ""
    say(f"{len(held)} waiting cells held{on}")
