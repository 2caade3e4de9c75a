"""Axis values written by the user: functions named by an import path, `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from klab.grid import UserError
from klab.grid.custom_values import Signature


def load_function(path: str, axis: str) -> Callable[..., Any]:
    """The function that `path` names.

    Args:
        path: `package.module:function`, importable from where the process runs.
        axis: the axis it is a value of, for the message.

    Raises:
        UserError: when there is no such module or function. An error raised by the module's own code propagates.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        hint = "The folder that holds it must be on the import path: install the package, or set PYTHONPATH."
        raise UserError(f"there is no module {error.name!r}", key=axis, value=path, hint=hint) from error
    function = getattr(module, name, None)
    if function is None:
        offered = [f"{module_name}:{key}" for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UserError(f"{module_name!r} has no function {name!r}", key=axis, value=path, allowed=offered)
    if not callable(function):
        raise UserError("not a function", key=axis, value=path)
    return function  # type: ignore[no-any-return]


def optional_inputs(function: Callable[..., Any], signature: Signature) -> frozenset[str]:
    """The optional inputs of an axis that `function` asks for by having parameters of their names."""
    try:
        return frozenset(signature.optional).intersection(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature
        return frozenset()


def check_parameters(
    function: Callable[..., Any], path: str, axis: str, signature: Signature, arguments: Mapping[str, Any]
) -> None:
    """Make sure that `function` can be called with this axis's inputs and the given parameters.

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
    try:
        called.bind(*inputs, **dict.fromkeys(asked), **arguments)
    except TypeError as error:
        expected = f"It is called as {path.partition(':')[2]}({', '.join([*inputs, *asked, *arguments])})."
        raise UserError(f"cannot be called: {error}", key=axis, value=path, hint=expected) from error
