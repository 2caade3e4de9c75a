"""Sections of what moves in the KL term while a cell trains: its coefficient β, and the reference policy."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from klab.grid.errors import UserError
from klab.grid.schema.base import Count, NonNegative, Positive, Section


class BetaControl(Section):
    """A β that changes while a cell trains; the objective's β is that of the first update.

    ``adaptive`` (Ziegler et al. 2019, section 2.2): after each update β ← β·(1 + clip(KL/target − 1, ±0.2)/horizon).
    KL is the update's mean k3 to the reference. An update that was skipped, or in which only a critic learned, leaves β
    as it is.

    ``linear`` and ``cosine``: from the objective's β to ``end``, which update number ``updates`` is the first to have
    and all later ones keep; skipped updates count. With s = min(1, (n − 1)/(updates − 1)) update n has
    end + (β − end)·(1 − s), or end + (β − end)·(1 + cos πs)/2.
    """

    schedule: Literal["adaptive", "linear", "cosine"] = "adaptive"
    """Whether β follows a KL (`adaptive`) or the number of the update."""
    target: Positive | None = None
    """`adaptive`, required there: KL to the reference that β steers towards, in nats per own token."""
    horizon: Positive = 10.0
    """`adaptive`: updates over which β adapts: at 10 it moves by 2% at most in one update."""
    end: NonNegative = 0.0
    """`linear`, `cosine`: the last β."""
    updates: Annotated[int, Field(ge=2)] | None = None
    """`linear`, `cosine`: the update that is the first to have `end`; null: the last one of the cell."""

    @model_validator(mode="after")
    def _one_kind(self) -> BetaControl:
        """Refuses the settings of the other kind, and an adaptive β without a target."""
        adaptive = self.schedule == "adaptive"
        if adaptive and self.target is None:
            raise UserError(
                "missing: the KL that an adaptive β steers towards",
                key="beta_control.target",
                hint="Or write schedule: linear, or cosine.",
            )
        for name in _SCHEDULED if adaptive else _ADAPTIVE:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"has no effect on schedule: {self.schedule}",
                    key=f"beta_control.{name}",
                    value=getattr(self, name),
                    allowed=_ADAPTIVE if adaptive else _SCHEDULED,
                )
        return self

    @model_serializer(mode="wrap")
    def _of_its_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what acts: an adaptive β is written as it was before there were others, so that ids stay."""
        written: dict[str, Any] = handler(self)
        left_out = ("schedule", *_SCHEDULED) if self.schedule == "adaptive" else _ADAPTIVE
        return {name: value for name, value in written.items() if name not in left_out}

    def scheduled(self, first: float, update: int, last: int) -> float:
        """β of an update under `linear` or `cosine`.

        Args:
            first: the objective's β.
            update: number of the update, from 1.
            last: updates of the cell.
        """
        share = min(1.0, (update - 1) / max(1, (self.updates or last) - 1))
        left = 1.0 - share if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return self.end + (first - self.end) * left if share < 1.0 else self.end


_ADAPTIVE = ("target", "horizon")
_SCHEDULED = ("end", "updates")


class ReferencePolicy(Section):
    """A reference policy that moves; without this section it is the policy that the cell starts from.

    ``follows: policy``: after every update whose number is a multiple of ``update_every``, each weight becomes
    ema·(the reference's) + (1 − ema)·(the policy's), in float32 or wider. ``{update_every: 100}`` thus resets the
    reference to the policy (as slime does, which counts rollouts), ``{ema: 0.99}`` lets it trail (as TRL's
    `sync_ref_model` and open-instruct do, whose α is 1 − ema).

    ``follows: rollout``, or ``reference: rollout``: the policy that drew the rollout, π_old of the importance ratios:
    the KL to the reference is the KL to the behaviour policy (RPG, Zhang et al. 2025).

    A rollout keeps the reference that it was drawn beside. Evaluations go on measuring KL to the policy that the cell
    started from, the same yardstick for all cells, and beside it KL to the moving reference.
    """

    follows: Literal["policy", "rollout"] = "policy"
    """What the reference follows: the policy in training, or the one that drew each rollout."""
    update_every: Count = 1
    """Updates between two moves of the reference, with `follows: policy`."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the reference that a move keeps; 0 resets it to the policy."""

    @model_validator(mode="before")
    @classmethod
    def _something_written(cls, given: Any) -> Any:
        """Refuses an empty mapping, which says nothing of how the reference moves."""
        if given == {}:
            raise UserError(
                "says nothing of how the reference moves",
                key="reference",
                value=given,
                hint="Write {update_every: 100}, {ema: 0.99}, rollout, or fixed.",
            )
        return given

    @model_validator(mode="after")
    def _one_kind(self) -> ReferencePolicy:
        for name in ("update_every", "ema"):
            if self.follows == "rollout" and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    "has no effect beside follows: rollout, which moves the reference with every rollout",
                    key=f"reference.{name}",
                    value=getattr(self, name),
                )
        return self

    def moves_after(self, update: int) -> bool:
        """Whether the reference moves after this update, counted from 1."""
        return self.follows == "policy" and update % self.update_every == 0


NAMED_REFERENCES: dict[str, dict[str, str] | None] = {"fixed": None, "rollout": {"follows": "rollout"}}
"""What may be written for `training.reference` in one word."""


def named_reference(given: object) -> object:
    """What a word for `training.reference` stands for; anything else as it is.

    Raises:
        UserError: for another word.
    """
    if not isinstance(given, str):
        return given
    if given not in NAMED_REFERENCES:
        raise UserError(
            "unknown reference policy",
            key="reference",
            value=given,
            allowed=tuple(NAMED_REFERENCES),
            hint="Or a section: {update_every: 100}, {ema: 0.99}.",
        )
    return NAMED_REFERENCES[given]
