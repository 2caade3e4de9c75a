"""The `analysis` section: what a study will be asked, written down before it has run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from klab.grid.errors import UserError
from klab.grid.schema.base import Count, NonNegative, Section


class Stop(Section):
    """When seeds are no longer added: the error rate is spent over the looks until then."""

    seeds: Count
    """Most seeds per cell; `klab extend` adds no more."""
    spending: Literal["obrien_fleming", "pocock"] = "obrien_fleming"
    """How the error rate is spent: late, so that the last look has nearly all of it; or evenly."""


class AnalysisPlan(Section):
    """The analysis, stated beforehand. The first launch records it; the report says what was stated, and what not."""

    score: str | tuple[str, ...] | None = None
    """What cells are compared by; of several, the first decides. null: the default score."""
    delta: NonNegative | None = None
    """Differences smaller than this count as none; null: 0.05."""
    contrasts: tuple[dict[str, Any], ...] = ()
    """The comparisons that matter, each a cell as its changes to the baseline; most of the error rate is theirs."""
    stop: Stop | None = None
    """When seeds are no longer added."""

    @field_validator("score", mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        if isinstance(given, list | tuple) and (not given or len(set(map(str, given))) < len(given)):
            raise UserError("not a list of different scores", key="score", value=list(given))
        return given

    @field_validator("contrasts", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        if not isinstance(given, list | tuple) or not all(isinstance(each, dict) for each in given):
            raise UserError(
                "not a list of cells, each written as changes to the baseline", key="contrasts", value=given
            )
        return given

    @property
    def scores(self) -> tuple[str, ...]:
        """The stated scores, the deciding one first; none where the default decides."""
        return (self.score,) if isinstance(self.score, str) else self.score or ()
