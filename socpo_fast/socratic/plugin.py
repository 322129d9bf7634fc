"""Functions of the user's own, named in a setting as "module:function"."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def load_function(where: str, spec: str) -> Callable[..., Any]:
    """The function that `spec`, "module:function", names; `where` opens the error message.

    Raises:
        ValueError: spec has another form, there is no such module or no such function in it.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ValueError(f'{where} must be "module:function", got {spec!r}')
    try:
        function = vars(import_module(module_name)).get(function_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{where} must name a module that can be imported, got {spec!r} ({error})") from error
    if not callable(function):
        raise ValueError(f"{where} must name a function of {module_name}, got {function_name!r}")
    return function
