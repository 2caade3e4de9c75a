"""Where the numbers come from: grid file, versions, commit, hardware, seeds and cost of every run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from klab.harness.store import Run
from klab.reports.study import Study


def cost_unit(runs: Sequence[Run]) -> str:
    """What the hours of training are hours of: ``GPU`` where every run had some, else ``core``."""
    return "GPU" if runs and all(run.manifest["hardware"].get("gpus") for run in runs) else "core"


def provenance(study: Study) -> list[dict[str, Any]]:
    """One record per run: name, facts to list, and the grid file as given."""
    found = []
    for run, name in zip(study.runs, study.names, strict=True):
        cells = study.cells[study.cells["run"] == name]
        manifest = run.manifest
        hardware = manifest["hardware"]
        hours = float(np.nansum(cells["seconds"])) / 3600
        gpus = hardware.get("gpus") or []
        created = manifest.get("created")
        facts = [
            (
                "created",
                time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(created))
                if isinstance(created, int | float)
                else "unknown",
            ),
            ("design", str(manifest.get("design", ""))),
            ("seeds", ", ".join(str(seed) for seed in manifest["seeds"][:30])),
            ("commit", str(manifest.get("commit") or "not in a repository")),
            (
                "hardware",
                f"{hardware.get('processor', '')}, {hardware.get('cores', '?')} cores, "
                f"{hardware.get('memory_gb', '?')} GB",
            ),
            ("graphics processors", ", ".join(map(str, gpus)) or "none"),
            (
                "cost",
                f"{hours:.3g} {cost_unit([run])}-hours of training, {np.nansum(cells['tokens']):,.0f} tokens sampled",
            ),
            ("versions", ", ".join(f"{key} {value}" for key, value in manifest["versions"].items() if value)),
        ]
        found.append(
            {
                "name": name,
                "folder": run.path.name,
                "facts": facts,
                "grid": run.grid_text,
                "description": manifest.get("description", ""),
            }
        )
    return found
