"""Functions of the user's own: found by name, and named when they fail."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def load_function(where: str, spec: str) -> Callable[..., Any]:
    """The function that `spec`, "module:function", names; `where` opens the error message.

    Raises:
        ValueError: spec has another form, there is no such module or no such function in it, or the
            module cannot be imported.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ValueError(f'{where} must be "module:function", got {spec!r}')
    try:
        function = vars(import_module(module_name)).get(function_name)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} must name a module that can be imported, got {spec!r} ({reason})") from error
    if not callable(function):
        raise ValueError(f"{where} must name a function of {module_name}, got {function_name!r}")
    return function


def blame(function: object, error: BaseException) -> str:
    """Who raised what, and where: "mine:rule raised KeyError: 'x' (mine.py line 3)".

    To be called where the function was called and the error caught: the line is the function's own.
    """
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    frame = traceback.extract_tb(error.__traceback__)[:2][-1]
    what = " ".join(f"{type(error).__name__}: {error!s:.300}".split())
    where = f"{Path(frame.filename).name} line {frame.lineno}"
    return f"{named.__module__}:{named.__qualname__} raised {what} ({where})"
