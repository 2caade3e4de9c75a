"""One entry of the section `claims`: a sentence about cells of a study, stated before it has run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from klab.grid.schema.base import Positive, Section


class Claim(Section):
    """A sentence about the cells of the study, stated beforehand; the report says whether it holds here.

    `cells`, `against` and `where` name values of axes (of the keys that cells set, with `design: list`); a list means
    any of its values.
    """

    claim: Annotated[str, Field(min_length=1, max_length=500)]
    """What is claimed, in a sentence."""
    source: Annotated[str, Field(max_length=500)] = ""
    """Who claims it, and where."""
    cells: dict[str, Any]
    """The cells that the sentence is about."""
    against: dict[str, Any] | None = None
    """The cells that they are compared with; null: those with the baseline's values instead."""
    where: dict[str, Any] = Field(default_factory=dict)
    """Restricts both sides."""
    score: str | None = None
    """What they are compared by; null: the study's score."""
    expect: Literal["higher", "lower", "equal"]
    """What the score of `cells` is said to be, beside that of `against`."""
    delta: Positive | None = None
    """Smaller differences count as none; null: the study's margin for scores from 0 to 1, and none for others."""
