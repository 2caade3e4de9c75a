"""Which configurations of a tuned run a report is about: with the settings that they chose, or as written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from klab.harness.store import Run
from klab.harness.store.tuning import Choice, TunedRun, choices

Stage = Literal["chosen", "untuned"]


@dataclass(frozen=True)
class Arms:
    """The configurations of one run in one stage.

    Attributes:
        groups: by arm (the configuration as written), its group in this stage. Arms that have not chosen are absent.
        tuned, chosen: what is tuned, and what every arm chose; None and empty for a run with one stage.
    """

    groups: Mapping[str, str]
    tuned: TunedRun | None
    chosen: Mapping[str, Choice]

    def group(self, arm: str | None) -> str | None:
        """The group of an arm; of a run with one stage, the arm itself."""
        return arm if self.tuned is None or arm is None else self.groups.get(arm)

    def only(self, cells: pd.DataFrame, run: Run) -> pd.DataFrame:
        """The rows of cells that belong to this stage."""
        if self.tuned is None:
            return cells
        groups, seeds = set(self.groups.values()), set(self.tuned.seeds)
        records = [run.resolved(identity) for identity in cells["cell"]]
        return cells[[record["group"] in groups and record["seed"] not in seeds for record in records]]


def arms(run: Run, stage: Stage = "chosen") -> Arms:
    """The configurations of a run in a stage.

    Raises:
        UserError: the record of the choices is damaged.
    """
    tuned = run.tuned
    if tuned is None:
        return Arms({}, None, {})
    chosen = choices(run.path)
    if stage == "untuned":
        return Arms({arm: arm for arm in tuned.arms} if tuned.untuned else {}, tuned, chosen)
    found = {arm: next(iter(settings)) for arm, settings in tuned.arms.items() if len(settings) == 1}
    found |= {arm: choice.group for arm, choice in chosen.items() if arm in tuned.arms}
    return Arms({arm: found[arm] for arm in tuned.arms if arm in found}, tuned, chosen)
