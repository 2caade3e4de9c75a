"""What one reward term says of a completion."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one term says of a completion.

    Attributes:
        value: None where the term has nothing to say of it.
        correct: None for terms that do not judge that.
        parts: named parts of the value, for the record.
        timeouts: how many limits of time decided it.
    """

    value: float | None
    correct: bool | None = None
    parts: dict[str, float] = field(default_factory=dict)
    timeouts: int = 0
