"""The `budget` section of a grid file: the most that a study may use of the machines."""

from __future__ import annotations

from pydantic import model_validator

from klab.grid.errors import UserError
from klab.grid.schema.base import Positive, Section

UNITS = {"gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours", "hours": "hours"}
"""What can be limited, in words."""


class Budget(Section):
    """The most that a study may use, attempts that failed or were interrupted included. `klab plan` compares it with
    what the cells are expected to take, `klab launch` submits no more than fits and holds the rest, and a job that
    would start when it is used up holds its cells. A cell that runs is not ended.
    """

    gpu_hours: Positive | None = None
    """Hours of GPUs: what a job has of them, times the time that it runs."""
    cpu_hours: Positive | None = None
    """Hours of cores: threads and processes of a job, times the time that it runs."""
    hours: Positive | None = None
    """Hours by the clock in which any cell runs."""

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if not self.limits:
            raise UserError("limits nothing", allowed=UNITS)
        return self

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        found = {name: getattr(self, name) for name in UNITS}
        return {name: limit for name, limit in found.items() if limit is not None}
