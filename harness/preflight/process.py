"""The checks in a process of their own: this one imports neither torch nor the user's code, and neither can hang it.

The process is `klab.harness.preflight.worker`: it gets a request on standard input, one JSON object, and answers with
a line for each finding and each estimate of memory.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from klab.grid import Cell, Grid
from klab.grid.user_code import python_command
from klab.harness.preflight.memory import MemoryEstimate, workload_settings

SECONDS = 600.0
"""Limit of all checks of a grid; a dataset or a tokenizer from the hub may have to be downloaded."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about a grid: a mistake of the user's, or a note about something that is allowed but may surprise."""

    text: str
    is_mistake: bool


@dataclass(frozen=True, slots=True)
class Results:
    """What the checks of a grid found, each line once, and the memory that its cells need at least."""

    findings: tuple[Finding, ...]
    memory: tuple[MemoryEstimate, ...] = ()


class Preflight:
    """The checks of a grid, begun at once; `results` waits for them."""

    def __init__(self, grid: Grid) -> None:
        cells = representatives(grid.cells)
        evaluate = None if grid.evaluations is None else grid.evaluations.model_dump(mode="json")
        request = {"file": grid.file, "cells": [cell.resolved() for cell in cells], "evaluate": evaluate}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            python_command("-m", "klab.harness.preflight.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()
        except BrokenPipeError:  # how it ended is said by `results`
            pass

    def results(self) -> Results:
        assert self._process.stdout is not None
        self._process.stdin = None  # written and closed
        try:
            out, _ = self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            late = Finding(f"the checks did not end within {SECONDS:g} s. --no-check leaves them out.", True)
            return Results((late,))
        except BaseException:
            self._process.kill()
            raise
        lines = [json.loads(line) for line in out.splitlines()]
        found = [Finding(**line["finding"]) for line in lines if "finding" in line]
        memory = [MemoryEstimate.from_record(line["memory"]) for line in lines if "memory" in line]
        if self._process.returncode:
            self._errors.seek(0)
            last = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()][-1:]
            why = last[0].strip() if last else f"exit status {self._process.returncode}"
            found.append(Finding(f"the checks ended early: {why}. --no-check leaves them out.", True))
        return Results(tuple(dict.fromkeys(found)), tuple(memory))


def representatives(cells: Iterable[Cell]) -> list[Cell]:
    """A cell for all that is checked: custom objectives, tasks, policies, critics, and sizes of sets and prompts."""
    found: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        training = cell.training
        key = (
            cell.objective if cell.objective.is_custom else None,
            id(cell.task),
            id(cell.policy),
            training.critic.kind if training.critic is not None else None,
            training.evaluation_prompts,
            (training.engine, training.trl, training.sampler),
            training.reference and (training.reference, training.on_policy, cell.objective.estimator),
            workload_settings(cell),
        )
        found.setdefault(key, cell)
    return list(found.values())
