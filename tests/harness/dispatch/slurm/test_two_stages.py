"""A study that tunes on Slurm: the second stage waits in the queue for the first, and is never submitted twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.cancel import cancel
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.slurm.backend import SlurmExecutor
from klab.harness.dispatch.slurm.submission import submissions
from klab.harness.dispatch.status import statuses
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Run
from tests.harness.dispatch.slurm.test_backend import Fake, fake
from tests.support.tuned_run import TEXT, create, fill, settled

__all__ = ["fake"]


def _tuned(tmp_path: Path, **resources: Any) -> Run:
    run = create(tmp_path / "runs" / "tuned", f"{TEXT}resources: {json.dumps(resources)}\n")
    launch(run, SlurmExecutor(), workers=100, cells_per_job=2, others=[SlurmExecutor()])
    return run


def test_the_second_stage_waits_for_all_jobs_of_the_first(tmp_path: Path, fake: Fake) -> None:
    run = _tuned(tmp_path)
    first, second = submissions(run)
    assert sum(map(len, first.cells)) == 12 + 6
    assert {cell for pack in second.cells for cell in pack} == set(pending(run))
    assert "#SBATCH --dependency" not in fake.script(1)
    assert f"#SBATCH --dependency=afterany:{first.job}\n" in fake.script(2)


def test_what_dry_run_shows_is_what_sbatch_gets(tmp_path: Path, fake: Fake) -> None:
    run = create(tmp_path / "runs" / "tuned")
    packs = [Pack(tuple(run.cells)), *(Pack((name,)) for name in pending(run))]
    shown = SlurmExecutor().scripts(run, packs, run.resources)
    assert len(shown) == 2
    assert "afterany:<job of script 1>" in shown[1]


def test_the_second_stage_is_queued_under_the_names_that_it_has_then(tmp_path: Path, fake: Fake) -> None:
    run = _tuned(tmp_path)
    second = submissions(run)[1]
    rows = [(str(second.job), str(i), "PENDING", "Dependency", "1:00", "0", "0", second.name) for i in range(3)]
    fake.queue(*rows)
    later = {row.id: row for row in statuses(run) if row.id in pending(run)}
    assert {row.state for row in later.values()} == {"queued"}
    assert len({row.job for row in later.values()}) == 3
    fill(run, lambda cell: ("finished", cell.training.lr))
    settled(run)
    states = {row.id: row.state for row in statuses(run)}
    assert set(states) == set(run.cells)
    assert {states[each] for each in run.grown} == {"queued"}
    launch(run, SlurmExecutor(), workers=100, cells_per_job=2, others=[SlurmExecutor()])
    assert len(submissions(run)) == 2  # nothing is submitted twice
    cancel(run, list(run.grown), executors=[SlurmExecutor()])
    assert fake.calls("scancel")


def test_launching_again_lets_the_second_stage_wait_for_jobs_that_still_run(tmp_path: Path, fake: Fake) -> None:
    run = _tuned(tmp_path)
    first, second = submissions(run)
    second.forget()  # as if the launcher had died in between
    count = len(first.cells)
    fake.queue(*((str(first.job), str(i), "RUNNING", "None", "1:00", "0", "0", first.name) for i in range(count)))
    launch(run, SlurmExecutor(), workers=100, cells_per_job=2, others=[SlurmExecutor()])
    assert len(submissions(run)) == 2
    assert f"#SBATCH --dependency=afterany:{first.job}\n" in fake.script(3)
