"""The base of every section of a grid file, and the types of its fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from klab.grid.errors import UserError

_DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)")


def _whole_minutes(given: object) -> object:
    """A duration in minutes, from a number of minutes or from text in Slurm's forms with seconds; rounded up."""
    if not isinstance(given, str) or given.strip().isdecimal():
        return given
    found = _DURATION.fullmatch(given.strip())
    if found is None:
        raise UserError(
            "not a duration",
            value=given,
            hint="Write minutes (90), hours:minutes:seconds or days-hours:minutes:seconds.",
        )
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Minutes = Annotated[int, Field(ge=1), BeforeValidator(_whole_minutes)]


class Section(BaseModel):
    """A section of a grid file. Frozen and hashable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_not_numbers(cls, given: object, info: ValidationInfo) -> object:
        """Refuses `true` where a number belongs; pydantic would read it as 1."""
        values = given if isinstance(given, list | tuple) else (given,)
        if any(isinstance(value, bool) for value in values):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if not _admits_booleans(annotation):
                raise UserError("true and false are not numbers or names", key=info.field_name, value=given)
        return given


class GrownSection(Section):
    """A section with settings that came after ids were given."""

    LATER: ClassVar[tuple[str, ...]] = ()
    """They are left out of what is written and hashed where they have their default: ids stay what they were."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        for name in self.LATER:
            if name in written and getattr(self, name) == type(self).model_fields[name].default:
                del written[name]
        return written


def _admits_booleans(annotation: Any) -> bool:
    return annotation is bool or any(_admits_booleans(inner) for inner in get_args(annotation))
