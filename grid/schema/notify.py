"""The `notify` section of a grid file: whom a study tells of its end, of failures and of divergence."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from klab.grid.errors import UserError
from klab.grid.schema.base import Positive, Section

Event = Literal["end", "failure", "divergence", "cell"]
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Notify(Section):
    """Whom a study tells of its end, of cells that failed and of cells that diverged: a command, an address on the web,
    or both. Each event is told once, by the job in which it happens (harness/README.md). What cannot be told is said in
    the job's output, and harms nothing.
    """

    command: tuple[str, ...] = ()
    """Program and arguments, started without a shell; `{text}`, `{event}`, `{run}` and `{cell}` are filled in. The
    event as JSON is its standard input."""
    webhook: str | None = None
    """Environment variable with the address that gets the event as JSON, by POST: `${KLAB_WEBHOOK}`. The address itself
    never enters the run folder."""
    on: tuple[Event, ...] = ("end", "failure", "divergence")
    """Which events: `end` of the study, `failure` or `divergence` of a cell, or the end of every `cell`."""
    seconds: Positive = 10.0
    """Longest that a command, or the web, may take."""

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, given: object) -> object:
        if isinstance(given, str):
            raise UserError(
                "not a list of words: nothing is run by a shell",
                key="command",
                value=given,
                hint='Write the program and its arguments: ["notify-send", "klab", "{text}"].',
            )
        return given

    @field_validator("webhook", mode="after")
    @classmethod
    def _variable(cls, given: str | None) -> str | None:
        if given is not None and not _VARIABLE.fullmatch(given):
            raise UserError(
                "not an environment variable: the grid file is copied into the run folder, and addresses are secrets",
                key="webhook",
                value="…",
                hint="Put the address into a variable and write its name: ${KLAB_WEBHOOK}.",
            )
        return given

    @model_validator(mode="after")
    def _someone(self) -> Notify:
        if not self.command and self.webhook is None:
            raise UserError("tells nobody", allowed=("command", "webhook"))
        if not self.on:
            raise UserError("names no event", key="on", allowed=("end", "failure", "divergence", "cell"))
        return self

    @property
    def variable(self) -> str | None:
        """The environment variable that holds the address."""
        found = _VARIABLE.fullmatch(self.webhook or "")
        return found[1] if found else None
