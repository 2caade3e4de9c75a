"""What the drifts are called under which a gradient is measured. Imports nothing."""

ON_POLICY = "on-policy"
AS_TRAINED = "as trained"
"""As far from the policy of the rollout as training went, in the direction of the cell's own updates."""


def inner_updates_name(updates: int) -> str:
    """So many updates of the cell itself on one rollout, each of a fixed length."""
    return f"{updates} updates"


def is_own(name: str) -> bool:
    """Whether a drift is of the cell's own updates."""
    return name == AS_TRAINED or name.endswith(" updates")
