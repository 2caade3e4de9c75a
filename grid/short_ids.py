"""Ids as people write them: whole, or any part that only one of them has."""

from __future__ import annotations

from collections.abc import Iterable


def matching_ids(part: str, ids: Iterable[str]) -> list[str]:
    """The ids that a part may mean: the one that it is, else those that begin or end so, else those that contain it."""
    known = list(dict.fromkeys(ids))
    if part in known:
        return [part]
    if not part:
        return []
    at_ends = [each for each in known if each.startswith(part) or each.endswith(part)]
    return at_ends or [each for each in known if part in each]
