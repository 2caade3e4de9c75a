"""What one reward term says of a completion."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one term says of a completion; `correct` is None for terms that do not judge that."""

    value: float
    correct: bool | None = None
    parts: dict[str, float] = field(default_factory=dict)
