"""The record of one job array, written before `sbatch`: a job whose id was never recorded is found by its name."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.harness.dispatch.backends import Pack
from klab.harness.store import Run, files

_NUMBER = re.compile(r"\d{3,}")
_RECORD = "submission.json"


@dataclass(frozen=True, slots=True)
class Submission:
    """One array: task number i trains `cells[i]`. `job` is Slurm's id, None as long as nobody has seen it; `ranks` are
    the processes that a launcher starts on each node, 0 without one.

    The folder holds this record, submitit's files and the logs. A single task is an ordinary job, not an array.
    """

    folder: Path
    name: str
    cells: tuple[tuple[str, ...], ...]
    at: float
    cluster: str = ""
    threads: int = 1
    processes: int = 1
    ranks: int = 0
    job: str | None = None

    @property
    def number(self) -> int:
        """Its place among the run's submissions, from 1."""
        return int(self.folder.name)

    def element(self, index: int) -> str:
        """Slurm's name of a task; the job must be known."""
        return f"{self.job}_{index}" if len(self.cells) > 1 else str(self.job)

    def write(self) -> None:
        """Store the record, replacing the one there is."""
        record: dict[str, Any] = {"name": self.name, "at": self.at, "cluster": self.cluster, "threads": self.threads}
        record |= {
            "processes": self.processes,
            "ranks": self.ranks,
            "job": self.job,
            "cells": [list(cells) for cells in self.cells],
        }
        files.replace(self.folder / _RECORD, files.encode_record(record))

    def forget(self) -> None:
        """Remove the record and its folder: nothing was submitted."""
        (self.folder / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def record_intent(
    run: Run, packs: Sequence[Pack], *, cluster: str, threads: int, processes: int = 1, ranks: int = 0
) -> Submission:
    """Write down that these packs are about to be submitted. The caller holds the run's lock."""
    number = next_number(run.jobs)
    path = folder(run.jobs, number)
    path.mkdir(parents=True)
    cells = tuple(pack.cells for pack in packs)
    submission = Submission(path, job_name(run.name, number), cells, time.time(), cluster, threads, processes, ranks)
    submission.write()
    files.sync_folder(path.parent)
    return submission


def submissions(run: Run) -> list[Submission]:
    """All of a run's submissions, oldest first.

    Raises:
        UserError: when a record is damaged.
    """
    found = (read(folder(run.jobs, number)) for number in _numbers(run.jobs))
    return [submission for submission in found if submission is not None]


def read(path: Path) -> Submission | None:
    """The submission of this folder; None where its launcher died before it wrote the record, hence before `sbatch`."""
    file = path / _RECORD
    record = files.read_record(file)
    if record is None:
        return None
    name, at, cells, job = (record.get(key) for key in ("name", "at", "cells", "job"))
    sound = isinstance(name, str) and isinstance(at, int | float) and isinstance(job, str | None)
    if not sound or not isinstance(cells, list) or not all(_is_pack(pack) for pack in cells) or not cells:
        raise files.damaged_file(file, "does not describe a submission")
    if job is not None and not job.isdigit():
        raise files.damaged_file(file, f"has the job {job[:40]!r}")
    threads, processes, ranks = (record.get(key) for key in ("threads", "processes", "ranks"))
    return Submission(
        path,
        str(name),
        tuple(tuple(pack) for pack in cells),
        float(at),  # type: ignore[arg-type]
        str(record.get("cluster", "")),
        threads if isinstance(threads, int) and threads > 0 else 1,
        processes if isinstance(processes, int) and processes > 0 else 1,
        ranks if isinstance(ranks, int) and ranks > 0 else 0,
        job,
    )


def next_number(jobs: Path) -> int:
    """The number of the next submission."""
    return 1 + max(_numbers(jobs), default=0)


def folder(jobs: Path, number: int) -> Path:
    """Where submission `number` lives below a run's `jobs`."""
    return jobs / "slurm" / f"{number:03d}"


def job_name(run: str, number: int) -> str:
    """A job name that no other submission has or had."""
    return f"klab-{run}-{number:03d}-{secrets.token_hex(4)}"


def _numbers(jobs: Path) -> list[int]:
    try:
        names = os.listdir(jobs / "slurm")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


def _is_pack(pack: object) -> bool:
    return isinstance(pack, list) and bool(pack) and all(isinstance(cell, str) for cell in pack)
