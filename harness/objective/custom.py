"""Axis values written by the user: functions, checked against the signature of the axis."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from klab.grid import UserError, user_code
from klab.grid.custom_values import Signature


def load_function(name: str, axis: str) -> Callable[..., Any]:
    """The function of this name.

    Args:
        name: `package.module:function` or `./file.py:function`; see `klab.grid.user_code`.
        axis: the axis it is a value of, for the message.

    Raises:
        UserError: when there is no such file, module or function. An error raised by the module's own code propagates.
    """
    function = user_code.load(name, axis)
    if not callable(function):
        raise UserError("not a function", key=axis, value=name)
    return function  # type: ignore[no-any-return]


def optional_inputs(function: Callable[..., Any], signature: Signature) -> frozenset[str]:
    """The optional inputs of an axis that `function` asks for by having parameters of their names, after the positional
    ones."""
    return frozenset(signature.optional).intersection(_parameters(function)[len(signature.inputs) :])


def divide_parameters(
    weight: Callable[..., Any], solver: Callable[..., Any], path: str, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a weight's parameters goes to the weight itself, and what to its solver: each to whichever has it.

    Raises:
        UserError: for a parameter that neither has.
    """
    named = [_parameters(function)[2:] for function in (weight, solver)]
    for name in arguments:
        if not any(name in names for names in named):
            raise UserError(
                f"neither {path!r} nor its solver has such a parameter",
                key="weight",
                value=name,
                allowed=[*named[0], *named[1]],
            )
    parts = ({name: value for name, value in arguments.items() if name in names} for names in named)
    return next(parts), next(parts)


def check_parameters(
    function: Callable[..., Any],
    path: str,
    axis: str,
    signature: Signature,
    arguments: Mapping[str, Any],
    solved: bool = False,
) -> None:
    """Make sure that `function` can be called with this axis's inputs and the given parameters.

    Args:
        solved: a solver finds further parameters, whose names only its result tells.

    Raises:
        UserError: for a parameter that it does not take, or one without a default that is missing.
    """
    try:
        called = inspect.signature(function)
    except ValueError:  # a builtin without a signature
        return
    inputs, asked = list(signature.inputs), sorted(optional_inputs(function, signature))
    taken = list(called.parameters.values())[len(inputs) :]
    names = [p.name for p in taken if p.kind is not p.VAR_KEYWORD and p.name not in asked]
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in called.parameters.values())
    for name in arguments:
        if name in asked or not (anything or name in names):
            raise UserError(f"{path!r} has no such parameter", key=axis, value=name, allowed=names)
    bind = called.bind_partial if solved else called.bind
    try:
        bind(*inputs, **dict.fromkeys(asked), **arguments)
    except TypeError as error:
        expected = f"It is called as {path.rpartition(':')[2]}({', '.join([*inputs, *asked, *arguments])})."
        raise UserError(f"cannot be called: {error}", key=axis, value=path, hint=expected) from error


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature
        return []
