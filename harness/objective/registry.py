"""The functions behind an axis, by the names that the catalogue gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from klab.grid import UserError
from klab.grid.catalogue import is_import_path
from klab.harness.objective.custom import check_parameters, load_function

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., Any]]):
    """The built-in values of one axis, as functions, and the way to a value of the user's own.

    Args:
        axis: the axis's name in the catalogue.
        positional: what every value is called with, in order; its parameters follow as keywords.
    """

    def __init__(self, axis: str, *positional: str) -> None:
        self.axis = axis
        self.positional = positional
        self._values: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that enters a function as the built-in value `name`."""

        def enter(function: F) -> F:
            self._values[name] = function
            return function

        return enter

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def bound(self, name: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """The value `name`, built in or an import path, with its parameters filled in.

        Raises:
            UserError: for an unknown name, a missing module or function, or parameters that do not fit.
        """
        if name in self._values:
            function = self._values[name]
        elif is_import_path(name):
            function = load_function(name, self.axis)
            check_parameters(function, name, self.axis, self.positional, arguments)
        else:
            raise UserError(f"unknown {self.axis}", key=self.axis, value=name, allowed=self._values)
        return partial(function, **arguments) if arguments else function
