"""A claim from the literature, the evidence for or against it, and the verdict that follows from the evidence.

A claim is one short function that receives an `Evidence` and records numbers and checks in it. Verdicts are never
written by hand: `verdict_of` derives them from the checks.

* *stated* checks test the statement in the generality in which its source makes it;
* *restricted* checks test what remains when that fails: the statement under its condition, or in its range.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What the measurements say of a statement."""

    HOLDS = "holds"
    CONDITION = "holds under its condition"
    OVERCLAIMED = "overclaimed"
    FAILS = "fails"
    UNDECIDED = "not decided here"


EXPECTED = {
    "T": Verdict.HOLDS,
    "T*": Verdict.CONDITION,
    "O": Verdict.OVERCLAIMED,
    "F": Verdict.FAILS,
    "E": Verdict.UNDECIDED,
}
"""The verdict that each tag predicts: true, true under its condition, overclaimed, false, empirical."""


@dataclass(frozen=True, slots=True)
class Number:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the measurement.
        book: the number in print, as printed, or None.
        within: relative tolerance of the comparison; None compares to half a unit in the last printed place.
        headline: whether it stands for the claim in a table of all claims (the last such number does).
    """

    name: str
    value: float
    book: str | None = None
    within: float | None = None
    headline: bool = False

    @property
    def agrees(self) -> bool | None:
        """Whether the measurement reproduces the printed number; None when there is none."""
        if self.book is None:
            return None
        printed = float(self.book)
        if math.isinf(printed) or not math.isfinite(self.value):
            return self.value == printed
        if self.within is not None:
            return abs(self.value - printed) <= self.within * abs(printed)
        exponent = Decimal(self.book).as_tuple().exponent
        half_unit = 0.5 * 10.0 ** int(exponent)
        return abs(self.value - printed) <= half_unit * (1 + 1e-6) + 1e-15

    @property
    def comparison(self) -> str:
        """How the measurement compares with print, in words; empty when nothing was printed."""
        if self.agrees is None:
            return ""
        if not self.agrees:
            return "differs"
        return "agrees" if self.within is None else f"within {self.within:.0%}, other draws"


@dataclass(frozen=True, slots=True)
class Check:
    """One proposition that the measurements decide."""

    proposition: str
    holds: bool
    restricted: bool = False


@dataclass(slots=True)
class Evidence:
    """What a claim's function collects."""

    numbers: list[Number] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def number(self, name: str, value: Any, book: str | None = None, within: float | None = None) -> float:
        """Record a measured number beside the printed one (a decimal numeral) and return it as a float."""
        measured = float(value)
        self.numbers.append(Number(name, measured, book, within))
        return measured

    def headline(self, name: str, value: Any, book: str | None = None, within: float | None = None) -> float:
        """`number`, marked as the one that stands for the claim in a table of all claims."""
        measured = float(value)
        self.numbers.append(Number(name, measured, book, within, headline=True))
        return measured

    def stated(self, proposition: str, holds: Any) -> None:
        """Record a check of the statement as its source makes it."""
        self.checks.append(Check(proposition, bool(holds)))

    def restricted(self, proposition: str, holds: Any) -> None:
        """Record a check of the statement under its condition or in its range."""
        self.checks.append(Check(proposition, bool(holds), restricted=True))

    def remark(self, text: str) -> None:
        """Record what the numbers mean."""
        self.remarks.append(text)


def verdict_of(checks: Sequence[Check], conditional: bool = False) -> Verdict:
    """The verdict that follows from the checks.

    Args:
        checks: see the module's docstring; none means that nothing was decided.
        conditional: whether the source itself names the condition; then a statement that survives only in its
            restricted form holds under its condition, otherwise it is overclaimed.
    """
    if not checks:
        return Verdict.UNDECIDED
    stated = [check.holds for check in checks if not check.restricted]
    restricted = [check.holds for check in checks if check.restricted]
    if stated and all(stated):
        return Verdict.HOLDS
    if restricted and all(restricted):
        return Verdict.CONDITION if conditional else Verdict.OVERCLAIMED
    return Verdict.FAILS


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim after its examination."""

    claim: Claim
    numbers: tuple[Number, ...]
    checks: tuple[Check, ...]
    remarks: tuple[str, ...]
    verdict: Verdict
    seconds: float

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the one that the claim's tag predicts."""
        return self.verdict == EXPECTED[self.claim.tag]

    @property
    def disagreements(self) -> tuple[Number, ...]:
        """Numbers that do not reproduce the printed ones."""
        return tuple(number for number in self.numbers if number.agrees is False)

    @property
    def headline(self) -> Number | None:
        """The number that stands for the claim: the last one so marked, else the first."""
        marked = [number for number in self.numbers if number.headline]
        return marked[-1] if marked else next(iter(self.numbers), None)

    def value(self, name: str) -> float:
        """The measured number called `name`.

        Raises:
            KeyError: no such number.
        """
        for number in self.numbers:
            if number.name == name:
                return number.value
        raise KeyError(name)

    def record(self) -> dict[str, Any]:
        """The finding as plain data for JSON (infinities as text)."""

        def plain(value: float) -> float | str:
            return value if math.isfinite(value) else str(value)

        return {
            "id": self.claim.id,
            "source": self.claim.source,
            "statement": self.claim.statement,
            "tag": self.claim.tag,
            "verdict": str(self.verdict),
            "as_expected": self.as_expected,
            "numbers": [
                {
                    "name": n.name,
                    "value": plain(n.value),
                    "book": n.book,
                    "within": n.within,
                    "agrees": n.agrees,
                }
                for n in self.numbers
            ],
            "checks": [
                {"proposition": c.proposition, "holds": c.holds, "restricted": c.restricted} for c in self.checks
            ],
            "remarks": list(self.remarks),
            "seconds": round(self.seconds, 3),
        }


Examination = Callable[[Evidence], None]


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement from the literature and the function that examines it.

    Attributes:
        id: C and two characters; a lower-case suffix separates parts of one claim that deserve their own verdict.
        tag: T, T*, O, F or E (see `EXPECTED`): the verdict on record, which the examination either confirms or not.
        source: who says so.
        statement: what they say.
        examine: fills the evidence.
        conditional: whether the source names the condition under which it holds.
    """

    id: str
    tag: str
    source: str
    statement: str
    examine: Examination
    conditional: bool = False

    def examined(self) -> Finding:
        """Run the examination."""
        started = time.perf_counter()
        evidence = Evidence()
        self.examine(evidence)
        return Finding(
            self,
            tuple(evidence.numbers),
            tuple(evidence.checks),
            tuple(evidence.remarks),
            verdict_of(evidence.checks, self.conditional),
            time.perf_counter() - started,
        )


CLAIMS: dict[str, Claim] = {}
"""Every claim by its id, in the order in which the modules declare them; filled by importing
`klab.harness.claims.book`."""


def claim(identifier: str, tag: str, source: str, statement: str) -> Callable[[Examination], Examination]:
    """Enter a function into the book.

    Raises:
        ValueError: an unknown tag, or an id that is taken.
    """

    def enter(examine: Examination) -> Examination:
        if tag not in EXPECTED or identifier in CLAIMS:
            raise ValueError(f"claim {identifier} with tag {tag}: the tag is unknown or the id is taken")
        CLAIMS[identifier] = Claim(identifier, tag, source, statement, examine, conditional=tag == "T*")
        return examine

    return enter
