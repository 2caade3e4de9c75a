"""The functions behind an axis, by the names that the catalogue gives them, and the way to a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from klab.grid import UserError
from klab.grid.catalogue import value_of
from klab.grid.custom_values import SIGNATURES
from klab.grid.user_code import names_user_code
from klab.harness.objective.custom import check_parameters, load_function, optional_inputs

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., Any]]):
    """The built-in values of one axis, as functions, and the way to a value of the user's own.

    All of them are called with the inputs of `klab.grid.custom_values.SIGNATURES`, their parameters following as
    keywords.

    Args:
        axis: the axis's name in the catalogue.
    """

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self.signature = SIGNATURES[axis]
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

    def function(self, name: str) -> Callable[..., Any]:
        """The function of the value `name`, built in or an import path.

        Raises:
            UserError: for an unknown name, or a missing module or function.
        """
        if name in self._values:
            return self._values[name]
        if names_user_code(name):
            return load_function(name, self.axis)
        raise UserError(f"unknown {self.axis}", key=self.axis, value=name, allowed=self._values)

    def needs(self, name: str) -> frozenset[str]:
        """The optional inputs that the value `name` reads: of a built-in value by the catalogue, of the user's own
        function by the names of its parameters."""
        if name in self._values:
            return frozenset(value_of(self.axis, name).needs)
        return optional_inputs(self.function(name), self.signature)

    def bound(self, name: str, arguments: Mapping[str, Any], solved: bool = False) -> Callable[..., Any]:
        """The value `name` with its parameters filled in.

        Args:
            solved: a solver finds further parameters for each update.

        Raises:
            UserError: for an unknown name, a missing module or function, or parameters that do not fit.
        """
        function = self.function(name)
        if name not in self._values:
            check_parameters(function, name, self.axis, self.signature, arguments, solved)
        return partial(function, **arguments) if arguments else function
