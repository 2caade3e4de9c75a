"""Claims that a grid file states beforehand, and the configurations of the study that each of them compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from klab.grid.errors import UserError
from klab.grid.schema.sections import AnalysisPlan, Claim
from klab.grid.score import DEFAULT_SCORE, parse_score
from klab.grid.variant import format_value


@dataclass(frozen=True)
class Match:
    """Groups of both sides that are compared, on one task.

    `alike`: they have the same values wherever the claim does not tell the sides apart.
    """

    cells: tuple[str, ...]
    against: tuple[str, ...]
    alike: bool = True

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every configuration of `cells` with every other one of `against`."""
        return [(one, other) for one in self.cells for other in self.against if one != other]


@dataclass(frozen=True)
class StatedClaim:
    """A claim and the configurations that it compares; at least one pair.

    `unmatched` counts those that it names and compares with nothing; known when the grid file is read.
    """

    claim: Claim
    matches: tuple[Match, ...]
    unmatched: int = 0

    @property
    def cells(self) -> tuple[str, ...]:
        """The groups that the claim is about."""
        return tuple(dict.fromkeys(group for match in self.matches for group in match.cells))

    @property
    def against(self) -> tuple[str, ...]:
        """The groups that they are compared with."""
        return tuple(dict.fromkeys(group for match in self.matches for group in match.against))

    def renamed(self, names: Mapping[str, str | None]) -> StatedClaim | None:
        """The claim with other groups for its own; without those that become None, and None when nothing is left."""

        def found(groups: Iterable[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(name for group in groups if (name := names.get(group, group)) is not None))

        matches = compared(Match(found(each.cells), found(each.against), each.alike) for each in self.matches)
        return replace(self, matches=matches) if matches else None

    @property
    def compared(self) -> str:
        """What is compared, in a clause: ``estimator=k1 (2 configurations) against the baseline (2)``."""
        one, other = len(self.cells), len(self.against)
        against = "the baseline's values" if other > 1 else "the baseline"
        if self.claim.against is not None:
            against = _settings_words(self.claim.against)
        where = f" where {_settings_words(self.claim.where)}" if self.claim.where else ""
        found = f", {len(self.matches)} comparisons" if len(self.matches) > 1 else ""
        apart = sum(not each.alike for each in self.matches)
        of_them = "" if apart == len(self.matches) else f"{apart} of them "
        return (
            f"{_settings_words(self.claim.cells)} ({one} configuration{'s' * (one > 1)}) against {against} ({other})"
            f"{where}{found}{f', {of_them}between means of unlike configurations' if apart else ''}"
            f"{f'; {self.unmatched} more without a counterpart are left out' if self.unmatched else ''}"
        )


def has_margin(claim: Claim, plan: AnalysisPlan | None) -> bool:
    """Whether there is a size below which a difference counts as none: the claim's own, or that of the study.

    The study's margin is one of its score, and of scores from 0 to 1.
    """
    main = parse_score(plan.scores[0] if plan and plan.scores else DEFAULT_SCORE)
    score = main if claim.score is None else parse_score(claim.score)
    stated = plan is not None and plan.delta is not None and score.name == main.name
    return claim.delta is not None or score.from_0_to_1 or stated


def merged_claims(claims: Iterable[StatedClaim], runs_as: Mapping[str, str]) -> tuple[StatedClaim, ...]:
    """The claims once cells that are the same algorithm were merged.

    Args:
        runs_as: by group that was merged, the group that is trained for it.

    Raises:
        UserError: both sides of a claim are the same algorithm.
    """
    found = []
    for index, claim in enumerate(claims):
        left = claim.renamed(runs_as)
        if left is None:
            raise same_algorithm(f"claims.{index}", claim.claim)
        found.append(left)
    return tuple(found)


def _settings_words(settings: Mapping[str, Any]) -> str:
    """Settings in one line: ``estimator=k1 or k2, placement=loss``."""
    return ", ".join(
        f"{key}={' or '.join(map(format_value, value if isinstance(value, list) else [value]))}"
        for key, value in settings.items()
    )


def compared(matches: Iterable[Match]) -> tuple[Match, ...]:
    """The different matches that compare anything."""
    return tuple(dict.fromkeys(match for match in matches if match.pairs))


def same_algorithm(key: str, claim: Claim) -> UserError:
    """The error for a claim whose two sides cannot differ."""
    return UserError("its two sides are the same algorithm: nothing is compared", key=key, value=claim.claim)
